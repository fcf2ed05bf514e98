"""A runtime gives the model's answers or refuses for a stated reason; graphs are kept, found again, and made again where they must be."""

import copy
import errno
import json
import os
import pickle
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import vitarium
from vitarium.catalog.calling import call, example_inputs
from vitarium.catalog.features import pooled_features
from vitarium.catalog.states import fingerprint
from vitarium.efficiency.runtimes import cache, making, run_with
from vitarium.efficiency.runtimes import sessions as opening
from vitarium.errors import CheckpointError, InputError, MissingExtra, UsageError, WriteError
from vitarium.perception.retrieval.embedding import embeddings_of

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
GRAPHS = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.skipif(find_spec("openvino") is None, reason="no openvino"))]


def scattered(name, **options):
    """Return a model whose layers that begin at zero have values, too."""
    torch.manual_seed(0)
    model = vitarium.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def assert_same(model, other, seed=3):
    for batch in (1, 4):
        inputs = example_inputs(model, batch, seed=seed)
        with torch.no_grad():
            pairs = zip(tree_leaves(call(model, inputs)), tree_leaves(call(other, inputs)), strict=True)
            for wanted, found in pairs:
                if isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
                    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model = scattered("timm/vit_pico", num_classes=3, image_size=16, depth=1)
    model.labels = ["cat", "dog", "emu"]
    path = tmp_path_factory.mktemp("runtimes") / "model.safetensors"
    vitarium.save(model, path)
    return path


@pytest.fixture(scope="module")
def model(file):
    return vitarium.load(file)


@pytest.fixture
def exports(monkeypatch):
    """The number of exports so far."""
    made = []
    plain = making.export
    monkeypatch.setattr(making, "export", lambda *args, **options: made.append(args) or plain(*args, **options))
    return made


@pytest.mark.parametrize("runtime", GRAPHS)
def test_a_graph_gives_the_outputs_for_any_batch_and_has_the_attributes(file, model, runtime):
    fast = run_with(model, runtime, source=file)
    assert_same(model, fast)
    assert fast.labels == ["cat", "dog", "emu"]
    assert fast.num_classes == 3
    assert fast.spec == model.spec
    assert fingerprint(fast.state_dict()) == fingerprint(model.state_dict())
    assert next(fast.parameters()) is next(model.parameters())
    assert_same(model, pickle.loads(pickle.dumps(fast)))
    assert_same(model, copy.deepcopy(fast))


def test_a_graph_is_made_once_and_again_for_a_changed_or_damaged_one(file, model, exports):
    place = file.with_name("model.safetensors.vitarium")
    run_with(model, "onnxruntime", source=file)
    exports.clear()
    run_with(model, "onnxruntime", source=file)
    assert not exports
    [graph] = place.glob("*.onnx")
    found_again = lambda: cache.slots_of(file, "forward")[0].read(cache.digest_of(file), cache.exporters())
    whole = graph.read_bytes()
    for damaged in (b"", whole[:-100], b"x" * len(whole)):
        graph.write_bytes(damaged)
        assert found_again() is None
    graph.write_bytes(whole)
    assert found_again()[1] == whole  # another time and the same content
    record = graph.with_suffix(".json")
    text = record.read_text()
    for damaged in ("[]", "{}", "no json", text.replace('"format": 2', '"format": 3'), text.replace('"torch": "', '"torch": "9')):
        record.write_text(damaged)
        assert found_again() is None
    graph.write_bytes(whole[:-100])
    assert_same(model, run_with(model, "onnxruntime", source=file))
    assert len(exports) == 1
    exports.clear()
    (place / "embeddings_of.json").write_text(json.dumps({"model": "another"}))
    (place / "embeddings_of.onnx").write_bytes(b"old")
    changed = scattered("timm/vit_pico", num_classes=3, image_size=16, depth=1)
    with torch.no_grad():
        changed.head.bias.add_(1)
    other = file.with_name("other.safetensors")
    vitarium.save(changed, other)
    os.replace(other, file)
    try:
        assert_same(changed, run_with(changed, "onnxruntime", source=file))
        assert len(exports) == 1
        assert sorted(path.name for path in place.iterdir()) == ["forward.json", "forward.onnx"]
    finally:
        vitarium.save(model, file)


def test_a_graph_that_was_not_made_here_is_not_used(file, model, exports, tmp_path, monkeypatch):
    """A folder that came with a download, whose entry has the right hashes."""
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path / "theirs"))
    path = tmp_path / "model.safetensors"
    path.write_bytes(file.read_bytes())
    run_with(model, "onnxruntime", source=path)
    assert len(exports) == 1
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path / "ours"))
    assert cache.slots_of(path, "forward")[0].read(cache.digest_of(path), cache.exporters()) is None
    run_with(model, "onnxruntime", source=path)
    assert len(exports) == 2
    assert cache.slots_of(path, "forward")[0].read(cache.digest_of(path), cache.exporters()) is not None
    record = path.with_name("model.safetensors.vitarium") / "forward.json"
    values = json.loads(record.read_text())
    values["checked"] = dict.fromkeys(["onnxruntime of tomorrow", *values["checked"]], 0.0)
    record.write_text(json.dumps(values))
    assert cache.slots_of(path, "forward")[0].read(cache.digest_of(path), cache.exporters()) is None


def test_a_graph_that_is_replaced_after_its_check_is_not_opened(file, model):
    fast = run_with(model, "onnxruntime", source=file)
    [graph] = file.with_name("model.safetensors.vitarium").glob("forward.onnx")
    content = graph.read_bytes()
    graph.write_bytes(content + b"\0")
    try:
        with pytest.raises(CheckpointError, match="was replaced since"):
            fast(torch.zeros(1, 3, 16, 16))
    finally:
        graph.write_bytes(content)


def test_a_model_without_a_file_is_kept_under_its_weights(exports, tmp_path, monkeypatch):
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path))
    model = Halves().eval()  # quick to export
    run_with(model, "onnxruntime")
    run_with(model, "onnxruntime")
    assert len(exports) == 1
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer.bias.add_(1)
    assert_same(other, run_with(other, "onnxruntime"))
    assert len(exports) == 2


def test_a_folder_that_cannot_be_written_leaves_the_graph_in_the_cache(file, model, tmp_path, monkeypatch):
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    fast = run_with(model, "onnxruntime", source=file)
    assert fast.graph.path.parent == tmp_path / "cache/graphs"
    assert_same(model, fast)


@pytest.mark.parametrize("failing", [".onnx", ".json"])
def test_a_full_disk_leaves_the_graph_in_the_cache(exports, tmp_path, monkeypatch, failing):
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "full/model.safetensors"
    vitarium.save(vitarium.create_model("swin_pico", num_classes=3), file)
    model, replace, notes = vitarium.load(file), os.replace, []

    def full(source, target):
        if "full/" in str(target) and str(target).endswith(failing):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    fast = run_with(model, "onnxruntime", source=file, notify=notes.append)
    assert fast.graph.path.parent == tmp_path / "cache/graphs"
    assert any("cannot write" in note and "the graph is kept in" in note for note in notes)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["model.safetensors"]
    count = len(exports)
    run_with(model, "onnxruntime", source=file)
    assert len(exports) == count, "the graph in the cache is found again"
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path / "full/cache"))
    with pytest.raises(WriteError) as caught:
        run_with(model, "onnxruntime", source=file)
    assert "onnxruntime" not in str(caught.value)


@pytest.mark.parametrize("reads", [pooled_features, embeddings_of])
def test_features_come_from_a_graph(file, model, reads):
    fast = run_with(model, "onnxruntime", source=file, reads=reads)
    image = example_inputs(model, 3, seed=2)["x"] if "x" in example_inputs(model) else next(iter(example_inputs(model, 3, seed=2).values()))
    with torch.no_grad():
        torch.testing.assert_close(reads(fast, image), reads(model, image), rtol=1e-3, atol=1e-4)


def test_what_is_not_in_the_graph_is_refused_instead_of_run_in_pytorch(file, model):
    fast = run_with(model, "onnxruntime", source=file)
    image = torch.zeros(1, 3, 16, 16)
    with pytest.raises(UsageError, match=r"onnxruntime executes the forward of .*forward_features is needed here.*--runtime eager"):
        pooled_features(fast, image)
    with pytest.raises(InputError, match=r"the graph takes x 3 x 16 x 16 for each sample, got x 3 x 24 x 24"):
        fast(torch.zeros(1, 3, 24, 24))
    assert fast.get_classifier() is model.get_classifier()  # a method that executes nothing


class Halves(nn.Module):
    """A model of several inputs and nested outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def example_inputs(self, n=1, image_size=None, *, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(n, 4, generator=generator), "t": torch.rand(n, generator=generator)}

    def forward(self, x, t, scale=2.0):
        made = self.layer(x) * t[:, None] * scale
        return {"low": made[:, :2], "parts": (made[:, 2:3], made[:, 3:])}


def test_several_inputs_and_outputs_keep_their_structure():
    torch.manual_seed(0)
    model = Halves().eval()
    fast = run_with(model, "onnxruntime")
    assert_same(model, fast)
    found = fast(x=torch.zeros(2, 4), t=torch.ones(2))
    assert list(found) == ["low", "parts"]
    assert [part.shape for part in found["parts"]] == [(2, 1), (2, 1)]
    with pytest.raises(InputError, match=r"with scale, which is a constant in its graph \(scale=2.0\)"):
        fast(torch.zeros(2, 4), torch.ones(2), scale=3.0)


class Batchless(nn.Module):
    """A model that cannot be traced with a variable batch."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 2)

    def example_inputs(self, n=1, image_size=None, *, seed=0):
        return {"image": torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed))}

    def forward(self, image):
        return torch.stack([self.layer(image[i].flatten()) for i in range(len(image))])


def test_a_model_without_a_variable_batch_is_run_sample_by_sample():
    torch.manual_seed(0)
    model = Batchless().eval()
    fast = run_with(model, "onnxruntime")
    assert fast.graph.batch == 1
    assert_same(model, fast)


class Undecided(Batchless):
    def forward(self, image):
        return self.layer(image.flatten(1)) if image.sum() > 0 else self.layer(-image.flatten(1))


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason():
    with pytest.raises(UsageError, match=r"onnxruntime does not take this model: Undecided cannot be traced.*--runtime eager works"):
        run_with(Undecided(), "onnxruntime")
    with pytest.raises(UsageError, match="takes float32 models, and this one has float16 weights"):
        run_with(Batchless().half(), "onnxruntime")


def test_unknown_and_missing_runtimes_name_what_works(model, monkeypatch):
    with pytest.raises(UsageError, match=r"unknown runtime 'onnx'; did you mean onnxruntime.*runtimes: eager, compile"):
        run_with(model, "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'vitarium\[export\]'"):
        run_with(model, "onnxruntime")
    assert run_with(model, "eager") is model


def test_a_runtime_with_other_outputs_is_refused(file, model, monkeypatch):
    run_with(model, "onnxruntime", source=file)
    plain = opening.SESSIONS["onnxruntime"]

    def wrong(content, threads):
        session = plain(content, threads)
        return lambda *values: [output * 1.01 for output in session(*values)]

    monkeypatch.setitem(opening.SESSIONS, "onnxruntime", wrong)
    monkeypatch.setattr(making, "version_of", lambda runtime: f"{runtime} of tomorrow")  # another version is checked again
    with pytest.raises(CheckpointError, match=r"onnxruntime does not take this model: the outputs of the graph differ by 0.01"):
        run_with(model, "onnxruntime", source=file)


def test_a_method_may_write_its_own_graph(model, monkeypatch, tmp_path):
    """The hook for quantizers that leave the integer kernels to the runtime."""
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path))
    changed = vitarium.apply(copy.deepcopy(model), "int8", quiet=True)
    seen = []

    def write(self, given, runtime, path, image_size):
        seen.append((runtime, image_size))
        making.export(given, path)
        return True

    monkeypatch.setattr(type(changed.methods[-1].method), "write_graph", write, raising=False)
    fast = run_with(changed, "onnxruntime")
    assert seen == [("onnxruntime", 16)]
    assert_same(changed, fast)
    run_with(changed, "onnxruntime", reads=embeddings_of)
    assert seen == [("onnxruntime", 16)], "features are another function"
    digest = making._identity(changed)
    assert cache.slot_in_cache(f"{digest[:16]}-forward-onnxruntime").read(digest, cache.exporters()) is not None, "of this runtime alone"


@pytest.mark.parametrize(("named", "accepted"), [(None, False), (0.05, True), (0.005, False)])
def test_a_method_names_the_tolerance_of_its_own_graph(model, named, accepted, monkeypatch, tmp_path):
    """A graph that differs by 1 %, as integer kernels that round elsewhere do; its entry keeps whose it is for later versions."""
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path))
    changed = vitarium.apply(copy.deepcopy(model), "int8", quiet=True)
    kind = type(changed.methods[-1].method)

    def write(self, given, runtime, path, image_size):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.head.parameters():
                parameter.mul_(1.01)
        making.export(other, path)
        return True

    monkeypatch.setattr(kind, "write_graph", write, raising=False)
    if named is not None:
        monkeypatch.setattr(kind, "graph_tolerance", named, raising=False)
    if not accepted:
        with pytest.raises(CheckpointError, match=rf"differ by 0.0\d+ of .*accepted: {named or making.TOLERANCE:g}"):
            run_with(changed, "onnxruntime")
        return
    run_with(changed, "onnxruntime")
    [entry] = tmp_path.rglob("*-forward-onnxruntime.json")
    assert json.loads(entry.read_text())["own"]
    monkeypatch.setattr(making, "version_of", lambda runtime: f"{runtime} of tomorrow")
    run_with(changed, "onnxruntime")
    monkeypatch.setattr(kind, "graph_tolerance", 1.0)
    with pytest.raises(ValueError, match=r"graph_tolerance must be above 0 and at most 0.2, got 1"):
        run_with(changed, "onnxruntime")


@pytest.mark.parametrize("runtime", GRAPHS)
@pytest.mark.parametrize("method", ["int8", "int4w"])
def test_a_quantized_model_gives_its_outputs(model, method, runtime):
    changed = vitarium.apply(copy.deepcopy(model), method, quiet=True)
    assert_same(changed, run_with(changed, runtime))


@pytest.mark.skipif(find_spec("openvino") is None, reason="no openvino")
def test_a_graph_that_openvino_does_not_take_and_onnxruntime_does_is_refused_with_both_facts(model, monkeypatch, tmp_path):
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path))
    plain = opening.SESSIONS["openvino"]

    def empty(content, threads):
        session = plain(content, threads)
        return lambda *values: [output[:0] for output in session(*values)]

    monkeypatch.setitem(opening.SESSIONS, "openvino", empty)
    with pytest.raises(CheckpointError, match=r"openvino returns outputs of other shapes.*; --runtime eager and onnxruntime work, and"):
        run_with(model, "openvino")


def test_compile_gives_the_outputs_and_refuses_the_rest(monkeypatch):
    """With the backend that executes the traced graph; inductor takes tens of seconds."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: plain(module, backend="eager"))
    model = scattered("timm/vit_pico", num_classes=3, image_size=16, depth=1)
    fast = run_with(model, "compile")
    assert_same(model, fast)
    with pytest.raises(UsageError, match=r"torch.compile executes the forward of"):
        pooled_features(fast, torch.zeros(1, 3, 16, 16))
    assert_same(model, pickle.loads(pickle.dumps(fast)))
    features = run_with(model, "compile", reads=embeddings_of)
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(embeddings_of(features, image), embeddings_of(model, image))


def test_a_compiler_that_fails_or_takes_too_long_is_an_error_with_advice(model, monkeypatch):
    def compiler(error):
        def fail(module):
            def run(*args, **named):
                raise error

            return run

        return fail

    image = torch.zeros(2, 3, 16, 16)
    monkeypatch.setattr(torch, "compile", compiler(RuntimeError("no C++ compiler\nfurther lines")))
    with pytest.raises(UsageError, match=r"does not take .*: no C.. compiler; choose --runtime eager or onnxruntime"):
        run_with(model, "compile")(image)
    monkeypatch.setattr(torch, "compile", compiler(TimeoutError("not finished within 240 s")))
    with pytest.raises(UsageError, match="not finished within 240 s; choose"):
        run_with(model, "compile")(image)
    monkeypatch.setattr(torch, "compile", lambda module: lambda x: module(x) * 1.1)
    with pytest.raises(CheckpointError, match=r"differs by 0\.1"):
        run_with(model, "compile")(image)
