"""Files of others: load() makes no request, opens no other file, checks the whole record, and is bounded by what the file holds."""

from __future__ import annotations

import builtins
import copy
import inspect
import json
import random
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import vitarium
from tests.catalog.forging import forge, forge_text, record_of
from vitarium.catalog.create import ModelSpec
from vitarium.catalog.rebuilding import Contents, Limits, TooLarge, rebuilding
from vitarium.catalog.registry import families
from vitarium.cli.info import print_file
from vitarium.errors import CheckpointError, UsageError, VitariumError
from vitarium.verbs.info import describe_file, info

SMALL = {"var": "var_pico", "kmax_deeplab": "kmax_deeplab_pico", "t_tame": "t_tame_pico", "vpt_proxies": "vpt_proxies_pico"}
"""Families whose models hold another registered model; a test compares this with all families."""


@pytest.fixture
def listener(monkeypatch):
    """A listening socket, its address, and the connections that were made to any address."""
    made: list[object] = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: (made.append(address), connect(self, address)))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_options: made.append(args) or [])
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)

        def requests() -> list[object]:
            try:
                server.accept()
                made.append("accepted")
            except BlockingIOError:
                pass
            return made

        yield f"http://127.0.0.1:{server.getsockname()[1]}/model.safetensors", requests


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Paths below tmp_path that are opened."""
    paths: list[str] = []
    original = builtins.open

    def watching(file, *args, **options):
        if str(file).startswith(str(tmp_path)):
            paths.append(Path(file).name)
        return original(file, *args, **options)

    monkeypatch.setattr(builtins, "open", watching)
    return paths


def saved(name: str, folder: Path, **arguments) -> Path:
    torch.manual_seed(0)
    path = folder / "m.safetensors"
    vitarium.save(vitarium.create_model(name, **arguments), path)
    return path


def nested(model: nn.Module) -> list[nn.Module]:
    return [part for name, part in model.named_modules() if name and isinstance(getattr(part, "spec", None), ModelSpec)]


# ---- no request, no other file


def test_the_list_of_families_with_nested_models_is_whole():
    found = set()
    for family in families():
        variant = "pico" if "pico" in family.variants else next(iter(family.variants))
        with torch.device("meta"), rebuilding():
            if nested(family.cls(**family.arguments(variant))):
                found.add(family.name)
    assert found == set(SMALL)


@pytest.mark.parametrize("name", SMALL.values())
def test_no_argument_of_a_nested_model_makes_load_ask_the_network(name, tmp_path, listener, opened):
    address, requests = listener
    path = saved(name, tmp_path)
    torch.save({}, tmp_path / "other.pth")
    whole, values = path.read_bytes(), record_of(path)["arguments"]
    model = vitarium.load(path)
    tables = [key for key in inspect.signature(type(model)).parameters if key.endswith("_arguments") or key == "classifier"]
    assert tables
    for key in tables:
        given = dict(values.get(key) or {}) if isinstance(values.get(key) or {}, dict) else {"name": values[key]}
        if key == "classifier":
            given.setdefault("name", "timm/vit_pico")
        for forged in (
            {"checkpoint": address},
            {"checkpoint": str(tmp_path / "other.pth")},
            {"pretrained": True},
            {"checkpoint_path": address},
        ):
            path.write_bytes(whole)
            inner = {**given, "arguments": {**given.get("arguments", {}), **forged}} if key == "classifier" else {**given, **forged}
            forge(path, arguments={**values, key: inner})
            opened.clear()
            try:
                again = vitarium.load(path)
            except CheckpointError:
                pass
            else:
                assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
            assert set(opened) <= {"m.safetensors"}
    names = [key for key in inspect.signature(type(model)).parameters if key in ("tokenizer", "backbone", "classifier")]
    assert names
    for key in names:
        for forged in (
            "hf/someone/else",
            "timm/hf-hub:someone/else",
            f"hf/{tmp_path}",
            "var_tokenizer_256.in1k",
            "timm/convnext_atto.d2_in1k",
        ):
            path.write_bytes(whole)
            forge(path, arguments={**values, key: forged})
            with pytest.raises(CheckpointError):
                vitarium.load(path)
    assert not requests()


@pytest.mark.parametrize(
    "source",
    [
        *("ADDRESS", "hf:someone/else", "hf:someone/else/model.bin", "timm:vit_tiny_patch16_224", "pretrained:", "PATH"),
        *("x" * 5000, "hf:a/b/../../x", "hf:a/" + "y" * 200, "http://[::1/x", "https://host/" + "y" * 3000),
    ],
    ids=lambda source: source[:20],
)
def test_a_base_is_neither_fetched_nor_opened_unasked(source, tmp_path, listener, opened, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    address, requests = listener
    base = tmp_path / "base.safetensors"
    vitarium.save(vitarium.create_model("timm/vit_pico", num_classes=3, image_size=16), base)
    model = vitarium.load(base)
    vitarium.apply(model, "lora:rank=2", quiet=True)
    (tmp_path / "there").mkdir()
    path = tmp_path / "there/m.safetensors"
    vitarium.save(model, path, trained_only=True)
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path / "nothing"))  # as on another machine
    record = record_of(path)
    forge(path, base={**record["base"], "weights_from": {"ADDRESS": address, "PATH": str(base)}.get(source, source)})
    opened.clear()
    with pytest.raises(CheckpointError, match=r"base is missing: .*checkpoint=FILE.*fetch=True"):
        vitarium.load(path)
    assert set(opened) <= {"m.safetensors"}
    assert not requests()
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(vitarium.load(path, checkpoint=base)(image), model.eval()(image))
    if source == "PATH":
        assert torch.equal(vitarium.load(path, fetch=True)(image), model.eval()(image))


def test_a_base_in_the_cache_is_taken_without_a_request(tmp_path, listener, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    address, requests = listener
    cached = tmp_path / "cache/hub/checkpoints/model.safetensors"
    vitarium.save(vitarium.create_model("timm/vit_pico", num_classes=3, image_size=16), cached)
    model = vitarium.create_model("timm/vit_pico", num_classes=3, image_size=16, checkpoint=address)
    vitarium.apply(model, "lora:rank=2", quiet=True)
    vitarium.save(model, tmp_path / "m.safetensors", trained_only=True)
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(vitarium.load(tmp_path / "m.safetensors")(image), model.eval()(image))
    assert not requests()


def test_weights_of_nested_models_are_not_recorded(tmp_path):
    torch.manual_seed(0)
    encoder = vitarium.create_model("convnext_pico", depths=(1, 1, 1, 1), dims=(16, 24, 32, 48), patch_size=2)
    vitarium.save(encoder, tmp_path / "encoder.safetensors")
    plain = dict(depths=[1, 1, 1, 1], dims=[16, 24, 32, 48], patch_size=2)
    inner = dict(plain, checkpoint=str(tmp_path / "encoder.safetensors"), strict=False)
    model = vitarium.create_model("kmax_deeplab_pico", backbone_arguments=inner)
    vitarium.save(model, tmp_path / "m.safetensors")
    (tmp_path / "encoder.safetensors").unlink()
    assert record_of(tmp_path / "m.safetensors")["arguments"]["backbone_arguments"] == plain
    again = vitarium.load(tmp_path / "m.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


# ---- the record as a whole

GOOD_DATA = dict(source="digits", name="digits", seed=0, val_fraction=0.2, fingerprint="")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (dict(preprocessing={"image_size": 16, "colour": 1}), r"preprocessing: has no field 'colour'"),
        (dict(preprocessing={"image_size": "16"}), r"preprocessing: image_size must be a whole number, got '16'"),
        (dict(preprocessing={"image_size": 10**6}), r"preprocessing: image_size / crop_pct must be at most 16,384"),
        (dict(preprocessing={"image_size": 224, "crop_pct": 1e-6}), "preprocessing: image_size / crop_pct"),
        (dict(preprocessing={"image_size": 8000, "frames": 64}), "preprocessing: an input may hold"),
        (dict(preprocessing={"mean": ["a"], "std": [1]}), r"preprocessing: mean must be a list of 1 or 3 numbers"),
        (dict(preprocessing=[1]), "preprocessing: "),
        (dict(labels=[1, 2, 3]), r"labels\.0: "),
        (dict(labels=["a"]), "labels: 1 names for 3 classes"),
        (dict(labels="abc"), "labels: "),
        (dict(arguments=[]), "arguments: "),
        (dict(methods={}), "methods: "),
        (dict(methods=[{"slug": 1}]), r"methods\.0\.slug: "),
        (dict(methods=[{"slug": "int8", "state": []}]), r"methods\.0\.state: "),
        (dict(methods=[{"slug": "int8", "state": {"layers": 3}}]), "methods"),
        (dict(methods=[{"slug": "int8", "more": 3}]), r"methods\.0\.more: "),
        (dict(learner={"name": "os.system"}), r"learner\.name: 'os\.system' is no learner"),
        (dict(learner={"name": "classification", "settings": [1]}), r"learner\.settings: "),
        (dict(learner=None, objective={"name": "os.system"}, format=2), r"objective\.name: 'os\.system' is no learner"),
        (dict(objective={"name": "classification"}), "objective is a field of formats 1 and 2"),
        (dict(task={"name": "os.system"}), r"task: 'os\.system' is no task"),
        (dict(task={}), "task: must hold the name"),
        (dict(data={**GOOD_DATA, "val_fraction": 2}), r"data\.val_fraction: "),
        (dict(data={**GOOD_DATA, "seed": "1"}), r"data\.seed: "),
        (dict(data={**GOOD_DATA, "images": {"count": 1, "digests": "%"}}), r"data\.images\.digests: "),
        (dict(temperature=-1.0), "temperature: "),
        (dict(temperature="warm"), "temperature: "),
        (dict(tied={"head.weight": "head.weight"}), r"tied: 'head\.weight' is tied to"),
        (dict(tied={"x": "nowhere"}), r"tied\.x: the file lacks 'nowhere'"),
        (dict(tied={"stem.0.weight": "head.weight"}), r"tied\.|at "),
        (dict(untrained=["nothing"]), "untrained: the model has no parameter 'nothing'"),
        (dict(base={"weights_from": "x", "sha256": "0"}), r"base\.sha256: "),
        (dict(config={"model_type": "vit"}), "config is transformers'"),
        (dict(library=3), "library: "),
        (dict(vitarium=None), "vitarium: "),
        (dict(novelty=1), "novelty: "),
        (dict(name=7), "name: "),
        (dict(format=0), "format: "),
        (dict(arguments={"num_classes": 3, "depths": "many"}), "arguments"),
        (dict(arguments={"num_classes": 3, "depths": [1, "2"]}), r"arguments\.depths must be"),
        (dict(arguments={"num_classes": 3, "drop_path_rate": "0.1"}), r"arguments\.drop_path_rate must be a number"),
        (dict(arguments={"num_classes": "3"}), "num_classes"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_by_its_field(changes, field, tmp_path):
    path = saved("convnext_pico", tmp_path, num_classes=3)
    forge(path, **changes)
    with pytest.raises(CheckpointError, match=field):
        vitarium.load(path)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", "{}", "[" * 100_000, '{"format": NaN}', '{"labels": ["\\ud800"]}', "{" + '"a":' * 9999]
)
def test_a_record_that_is_no_table_is_refused(text, tmp_path):
    path = saved("convnext_pico", tmp_path, num_classes=3)
    forge_text(path, text)
    with pytest.raises(CheckpointError, match="damaged record"):
        vitarium.load(path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"_attn_implementation": "evil/kernel"}, "_attn_implementation must be one of eager"),
        ({"attn_implementation": "evil/kernel"}, "attn_implementation must be one of eager"),
        ({"attn_implementation": {"": "evil/kernel"}}, "attn_implementation must be one of eager"),
        ({"auto_map": {"AutoModel": "evil--model.Model"}}, "auto_map names code"),
        ({"backbone": "someone/else", "use_pretrained_backbone": True}, "backbone names code or weights"),
        ({"model_type": "timm_wrapper", "architecture": "hf-hub:someone/else"}, "architecture must be a model of timm"),
        ({"model_type": "nothing"}, "refuses the saved configuration"),
        ({"hidden_size": "16"}, "config|refuses"),
        ({"hidden_size": 10**9}, r"config\.hidden_size is 1,000,000,000"),
        ({"num_hidden_layers": 10**6}, r"config\.num_hidden_layers is 1,000,000"),
        ({"image_size": 10**6}, r"config\.image_size must be at most 16,384"),
    ],
)
def test_a_forged_configuration_of_transformers_is_refused_by_its_field(changes, field, tmp_path, listener, monkeypatch):
    transformers = pytest.importorskip("transformers")
    _, requests = listener
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8)
    transformers.ViTConfig(**sizes, num_labels=2).save_pretrained(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    path = saved("hf/./vit", tmp_path)
    forge(path, config={**record_of(path)["config"], **changes})
    with pytest.raises(CheckpointError, match=field):
        vitarium.load(path)
    assert not requests()


@pytest.mark.parametrize("forged", [{"attn_implementation": "evil/kernel"}, {"auto_map": {"AutoConfig": "evil--x.Y"}}])
def test_forged_arguments_of_transformers_are_refused_by_their_field(forged, tmp_path, listener, monkeypatch):
    """The weights of a trained part's base are read by transformers with the recorded arguments."""
    transformers = pytest.importorskip("transformers")
    _, requests = listener
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8)
    transformers.ViTConfig(**sizes, num_labels=2).save_pretrained(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    path = saved("hf/./vit", tmp_path)
    forge(path, arguments=forged)
    with pytest.raises(CheckpointError, match=rf"arguments\.{next(iter(forged))}"):
        vitarium.load(path)
    assert not requests()


def test_a_token_is_not_saved_with_a_model_of_transformers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8)
    transformers.ViTConfig(**sizes, num_labels=2).save_pretrained(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    path = saved("hf/./vit", tmp_path, token="hf_secret", trust_remote_code=False)
    assert b"hf_secret" not in path.read_bytes()
    assert vitarium.load(path).num_classes == 2


def test_the_command_info_reads_the_record_in_the_same_way(tmp_path):
    path = saved("convnext_pico", tmp_path, num_classes=3)
    report = describe_file(str(path))
    assert report["model"]["name"] == "convnext_pico"
    print_file(info(path))
    forge(path, labels=3)
    with pytest.raises(CheckpointError, match="labels: "):
        describe_file(str(path))


# ---- sizes

SIZES = [
    ("convnext_pico", dict(depths=[2, 1_000_000])),
    ("convnext_pico", dict(depths=[2] * 100_000)),
    ("convnext_pico", dict(depths=[200, 200])),
    ("convnext_pico", dict(num_classes=10**7)),
    ("convnext_pico", dict(dims=[10**5, 10**5])),
    ("thorax_mae_pico", dict(embed_dim=10**6)),
    ("thorax_mae_pico", dict(depth=10**9)),
    ("thorax_mae_pico", dict(image_size=10**6)),
    ("tinyvit_pico", dict(window_sizes=[10**4, 10**4])),
    ("dit_pico", dict(image_size=16_000)),
    ("var_pico", dict(tokenizer_arguments={"vocab_size": 10**8})),
    ("timm/vit_pico", dict(depth=10**6)),
    ("timm/vit_pico", dict(num_classes=10**7)),
    ("timm/vit_pico", dict(embed_dim=10**5, num_heads=10)),
    ("timm/vit_pico", dict(mlp_ratio=1e6)),
    ("timm/resnet_pico", dict(layers=[10**5, 1, 1, 1])),
]


@pytest.mark.parametrize(("name", "arguments"), SIZES, ids=lambda value: str(value)[:60])
def test_counts_beyond_the_file_are_refused_before_anything_is_built(name, arguments, tmp_path):
    """The limits are 5 s and 200 MB; a loaded machine gets more time, and memory is measured as the number of allocated values."""
    path = saved(name, tmp_path, **({} if "num_classes" in arguments else {"num_classes": 3}))
    forge(path, arguments={**record_of(path)["arguments"], **arguments})
    before, start = _peak(), time.thread_time()
    with pytest.raises(CheckpointError):
        vitarium.load(path)
    assert time.thread_time() - start < 5
    assert _peak() - before < 200


def _peak() -> float:
    """Largest memory of this process so far, MB; 0 where it cannot be read."""
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_empty_tensors_and_tied_names_do_not_raise_the_bounds():
    matrix = torch.zeros(2, 3)
    assert Contents.of([matrix, torch.empty(10**12, 0)]).axis == 3
    assert Contents.of([matrix] * 1000).bytes == matrix.nbytes


@pytest.mark.parametrize(
    ("make", "arguments"), [(torch.full, ((10_000, 10_000), 0.0)), (torch.randint, (0, 9, (10_000, 10_000))), (torch.zeros, (10**8,))]
)
def test_a_constructor_may_not_make_more_values_than_the_file_allows(make, arguments):
    with pytest.raises(TooLarge), Limits(Contents(tensors=1, axis=10, bytes=40)):
        make(*arguments)


def test_the_scales_of_var_take_no_memory_beyond_the_file(tmp_path):
    path = saved("var_pico", tmp_path)
    forge(path, arguments={"image_size": 10_000, "tokenizer_arguments": {"image_size": 10_000, "scales": [1, 2, 3, *range(2490, 2501)]}})
    before = _peak()
    with pytest.raises(CheckpointError):
        vitarium.load(path)
    assert _peak() - before < 200


@pytest.mark.parametrize("size", [10**6, 2**14, "224", 2.5, True, None])
def test_preprocessing_has_a_largest_size(size):
    with pytest.raises(UsageError, match="image_size"):
        vitarium.catalog.Preprocessing(image_size=size)  # type: ignore[arg-type]


# ---- mutations


def test_mutated_records_raise_nothing_but_our_errors(tmp_path):
    """A seeded walk over records, of bounded time: each loads or raises CheckpointError."""
    rng = random.Random(0)
    path = saved("timm/vit_pico", tmp_path, num_classes=3, image_size=16)
    model = vitarium.load(path)
    vitarium.apply(model, "lora:rank=2", quiet=True)
    vitarium.save(model, path)
    whole, record = path.read_bytes(), record_of(path)
    record |= dict(task={"name": "classify"}, learner={"name": "classification", "settings": {}}, data=GOOD_DATA, labels=["a", "b", "c"])
    end, refused, loaded = time.monotonic() + 6, 0, 0
    for _ in range(400):
        if time.monotonic() > end:
            break
        forged = json.loads(json.dumps(record))
        for _ in range(rng.choice((1, 1, 2))):
            mutate(forged, rng)
        path.write_bytes(whole)
        forge_text(path, json.dumps(forged))
        try:
            vitarium.load(path)
            loaded += 1
        except CheckpointError:
            refused += 1
    assert refused > 20, (refused, loaded)


VALUES = [
    None,
    True,
    -1,
    0,
    7,
    10**6,
    10**12,
    1e308,
    0.5,
    "",
    "x",
    "os.system",
    "http://127.0.0.1:9/x",
    "\x1b[31m",
    [],
    ["a"],
    [[]],
    {},
    {"a": 1},
]


def mutate(table: dict, rng: random.Random) -> None:
    """Replace, add or remove one value at any depth."""
    place: dict | list = table
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = rng.choice(keys)
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            break
        place = inner
    kind, value = rng.random(), copy.deepcopy(rng.choice(VALUES))  # a copy, since a later mutation may change it
    if not keys or kind < 0.1:
        place.update(extra=value) if isinstance(place, dict) else place.append(value)
    elif kind < 0.25:
        del place[key]
    else:
        place[key] = value


def test_a_thread_that_builds_models_meanwhile_is_not_limited(tmp_path):
    path = saved("convnext_pico", tmp_path, num_classes=3)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                vitarium.create_model("swin_pico", num_classes=10)
        except VitariumError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(5):
        vitarium.load(path)
    thread.join()
    assert not failures
