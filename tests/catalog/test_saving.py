"""Tests of save and load: rebuilding of the model, detection of changed bytes, and atomic writing."""

import json
import os
import stat
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vitarium
from tests.catalog.forging import forge
from tests.catalog.toys import assert_unchanged
from vitarium.catalog.record import FORMAT, DataRecord, LearnerRecord, training_of
from vitarium.errors import CheckpointError, UsageError
from vitarium.training.tasks import task_of

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def model(toy):
    model = vitarium.create_model("toy_deep", num_classes=3, in_chans=1, drop_rate=0.1)
    model.labels = ["cat", "dog", "größe"]
    return model


def assert_same_model(model: nn.Module, again: nn.Module, image: torch.Tensor) -> None:
    assert_unchanged(again, model.state_dict())
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    assert again.spec == model.spec
    assert again.preprocessing == model.preprocessing
    assert again.labels == model.labels
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(image), model.eval()(image))


# ---- what comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_of_ours(model, tmp_path, dtype):
    model = model.to(dtype)
    vitarium.save(model, tmp_path / "m.safetensors")
    assert_same_model(model, vitarium.load(tmp_path / "m.safetensors"), torch.randn(2, 1, 16, 16, dtype=dtype))


@pytest.mark.parametrize("name", ["swin_pico", "convnext_pico", "timm/vit_pico", "timm/deit_pico", "timm/resnet_pico"])
def test_round_trip_of_real_models(tmp_path, name):
    model = vitarium.create_model(name, num_classes=10, image_size=16)
    vitarium.save(model, tmp_path / "m.safetensors")
    assert_same_model(model, vitarium.load(tmp_path / "m.safetensors"), torch.randn(2, 3, 16, 16))


def test_round_trip_of_transformers_needs_no_folder(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8, num_labels=2
    )
    config.save_pretrained(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    model = vitarium.create_model("hf/./vit", num_classes=4)
    vitarium.save(model, tmp_path / "m.safetensors")
    (tmp_path / "vit/config.json").unlink()
    assert_same_model(model, vitarium.load(tmp_path / "m.safetensors"), torch.randn(2, 3, 16, 16))
    model.reset_classifier(2)
    vitarium.save(model, tmp_path / "m.safetensors")
    assert vitarium.load(tmp_path / "m.safetensors").num_classes == 2


def test_a_dtype_a_tensor(model, tmp_path):
    model.bfloat16()
    model.head.float()
    vitarium.save(model, tmp_path / "m.safetensors")
    again = vitarium.load(tmp_path / "m.safetensors")
    assert (again.head.weight.dtype, again.stem.weight.dtype) == (torch.float32, torch.bfloat16)


def test_remembers_a_head_that_was_reset(model, tmp_path):
    model.reset_classifier(7)
    model.labels = None
    vitarium.save(model, tmp_path / "m.safetensors")
    assert vitarium.load(tmp_path / "m.safetensors").num_classes == 7


def test_tied_and_sliced_tensors_come_back(model, tmp_path):
    model.blocks[1].weight = model.blocks[0].weight
    big = torch.randn(20, 8, 1, 1)
    model.blocks[2].weight = nn.Parameter(big[:8])
    model.stem.weight.data = model.stem.weight.data.to(memory_format=torch.channels_last)
    vitarium.save(model, tmp_path / "m.safetensors")
    assert "blocks.1.weight" not in load_file(tmp_path / "m.safetensors")
    assert_unchanged(vitarium.load(tmp_path / "m.safetensors"), model.state_dict())


def test_equal_models_make_equal_files(model, tmp_path):
    for i in range(4):
        vitarium.save(model, tmp_path / f"{i}.safetensors")
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(4)}) == 1


def test_the_file_is_an_ordinary_safetensors(model, tmp_path):
    vitarium.save(model, tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == model.state_dict().keys()
    again = vitarium.create_model("toy_deep", in_chans=1, checkpoint=tmp_path / "m.safetensors")
    assert again.num_classes == 3


def test_loads_onto_a_device(model, tmp_path):
    vitarium.save(model, tmp_path / "m.safetensors")
    assert vitarium.load(tmp_path / "m.safetensors", device="meta").stem.weight.is_meta


def test_threads_save_and_load_at_once(model, tmp_path):
    failures = []

    def work(i: int) -> None:
        try:
            for _ in range(3):
                vitarium.save(model, tmp_path / f"{i}.safetensors")
                assert_unchanged(vitarium.load(tmp_path / f"{i}.safetensors"), model.state_dict())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- the file itself


def test_every_single_byte_is_sealed(tmp_path):
    """The header byte by byte; of the data, which one hash covers, a sample."""
    path = tmp_path / "m.safetensors"
    vitarium.save(vitarium.create_model("convnext_pico", num_classes=2, depths=(1,), dims=(8,)), path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in [*range(header), *range(header, len(whole), 997)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"m\.safetensors"):
            vitarium.load(path)


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_leaves_the_old_file(model, tmp_path):
    """A limit on file sizes stands for the full disk."""
    import resource
    import signal

    path = tmp_path / "m.safetensors"
    vitarium.save(model, path)
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            vitarium.save(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_follow_the_umask(model, tmp_path):
    old = os.umask(0o027)
    try:
        vitarium.save(model, tmp_path / "m.safetensors")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o640


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_refuses_what_is_no_regular_file(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UsageError, match="not a regular file"):
            vitarium.save(model, path)


def test_odd_paths(model, tmp_path):
    path = tmp_path / "ein Ordner" / "größe 模型.safetensors"
    vitarium.save(model, str(path))
    assert_unchanged(vitarium.load(str(path)), model.state_dict())


# ---- what cannot be saved


def test_refuses_arguments_that_no_file_can_hold(toy, tmp_path):
    model = vitarium.create_model("toy_small", act_layer=nn.ReLU)
    with pytest.raises(UsageError, match=r"toy_small cannot be saved: its argument act_layer=.*ReLU"):
        vitarium.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_refuses_a_model_that_create_model_did_not_make(tmp_path):
    with pytest.raises(UsageError, match=r"a Linear that create_model did not make .*state_dict"):
        vitarium.save(nn.Linear(2, 2), tmp_path / "m.safetensors")


def test_refuses_a_model_whose_parts_were_exchanged(model, tmp_path):
    model.blocks[1] = nn.Conv2d(8, 8, 3, padding=1)
    with pytest.raises(UsageError, match=r"changed since it was made \(at blocks\.1\.weight\)"):
        vitarium.save(model, tmp_path / "m.safetensors")


def test_refuses_labels_of_another_head(model, tmp_path):
    model.reset_classifier(5)
    with pytest.raises(UsageError, match="5 classes and 3 labels"):
        vitarium.save(model, tmp_path / "m.safetensors")


# ---- what cannot be loaded


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(format=FORMAT + 1, vitarium="9.9", novelty=1), r"written by vitarium 9\.9 \(format 6\).*pip install --upgrade"),
        (dict(methods=[{"slug": "pitom", "options": {}}]), "unknown method 'pitom'; did you mean pitome"),
        (dict(methods=[{"slug": "pitome", "options": {"kep": 0.9}}]), "pitome has no option 'kep'; did you mean keep"),
        (dict(methods=[{"slug": "pitome", "options": {}}]), "has no plain vision transformer in it"),
        (dict(name="toy_huge"), "toy_huge, which this installation cannot build: unknown model"),
        (dict(arguments={"num_classes": 3, "width": 8}), "takes no argument 'width'"),
        (dict(arguments={"num_classes": 4, "in_chans": 1}), r"does not fit the toy_deep of this installation \(at head\.weight\)"),
        (dict(arguments={"checkpoint": "https://example.org/x.pth"}), "takes no checkpoint"),
        (dict(arguments={"pretrained": True}), "takes no pretrained"),
        (dict(name=7), "damaged record"),
        (dict(format="one"), "damaged record"),
        (dict(name="timm/hf-hub:someone/else"), "timm has no model"),
        (dict(preprocessing={"image_size": -1}), "image_size must be at least 1"),
    ],
)
def test_records_that_do_not_lead_to_a_model(model, tmp_path, changes, words):
    path = tmp_path / "m.safetensors"
    vitarium.save(model, path)
    forge(path, **changes)
    with pytest.raises(CheckpointError, match=words):
        vitarium.load(path)


def test_foreign_files_are_sent_to_create_model(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(CheckpointError, match=r"not written by vitarium\.save: name its model, create_model\(NAME, checkpoint="):
            vitarium.load(tmp_path / name)
    with pytest.raises(CheckpointError, match="there is no file"):
        vitarium.load(tmp_path / "nothing.safetensors")


# ---- files of earlier versions


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("saved-*.safetensors")), ids=lambda path: path.stem)
def test_files_of_earlier_versions_load_and_give_their_outputs(path):
    """Written by tests/catalog/write_fixture.py at each release; they hold the logits that the model gave then."""
    wanted = json.loads(path.with_suffix(".json").read_text())
    model = vitarium.load(path)
    assert path.stat().st_size < 100_000
    assert model.labels == wanted["labels"]
    preprocessing = json.loads(json.dumps(model.preprocessing.to_dict()))
    assert {key: preprocessing[key] for key in wanted["preprocessing"]} == wanted["preprocessing"], "a later version may add to it"
    image = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(image)[0], torch.tensor(wanted["logits"]), atol=1e-5, rtol=1e-5)


def test_earlier_files_say_how_they_were_trained():
    distilled, head = (training_of(vitarium.load(FIXTURES / f"saved-0.1.0-{name}.safetensors")) for name in ("distilled", "head"))
    assert distilled.learner == LearnerRecord(name="distillation", settings={"store": "answers", "k": 3})
    assert head.learner == LearnerRecord(name="linear_probe")
    assert task_of(vitarium.load(FIXTURES / "saved-0.1.0-distilled.safetensors")).name == "classify"


def test_a_training_record_comes_back(tmp_path):
    model = vitarium.create_model("convnext_pico", num_classes=2)
    record = training_of(model)
    record.task = {"name": "classify"}
    record.learner = LearnerRecord(name="sparse_prune", settings={"weight": 0.1})
    record.data = DataRecord(source="digits", name="digits", seed=3, val_fraction=0.25, fingerprint="0123")
    record.temperature = 1.5
    vitarium.save(model, tmp_path / "m.safetensors")
    assert training_of(vitarium.load(tmp_path / "m.safetensors")) == record


def test_names_that_are_not_utf8_are_saved_escaped(tmp_path):
    model = vitarium.create_model("convnext_pico", num_classes=2)
    model.labels = ["a", os.fsdecode(b"caf\xe9")]
    training_of(model).data = DataRecord(source=os.fsdecode(b"caf\xe9/"), name="caf\udce9")
    vitarium.save(model, tmp_path / "m.safetensors")
    again = vitarium.load(tmp_path / "m.safetensors")
    assert again.labels == ["a", "caf\\udce9"]
    assert training_of(again).data.source == "caf\\udce9/"


def test_there_is_such_a_file():
    assert list(FIXTURES.glob("saved-*.safetensors"))
