"""Tests of load_checkpoint: recognised names, resized tensors, errors, and no change of the model after an error."""

import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vitarium
from tests.catalog.toys import assert_unchanged, officially_named, tensors_of
from vitarium.catalog.checkpoints import adapt_channels, load_checkpoint
from vitarium.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("toy")


@pytest.fixture
def saved(tmp_path):
    """Writes a state to a file and gives its path."""

    def write(state, name="w.safetensors"):
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / name)
        return tmp_path / name

    return write


def other(name="toy_small", **arguments):
    """A model with weights of its own, BatchNorm's numbers included."""
    model = vitarium.create_model(name, **arguments)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


# ---- names


@pytest.mark.parametrize(
    ("dialect", "write"),
    [
        ("ours", tensors_of),
        ("official", officially_named),
        ("timm", lambda m: {k.replace("head.", "head.fc.").replace("stem.", "patch."): v for k, v in tensors_of(m).items()}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_loads_every_dialect(saved, dialect, write, prefix):
    source = other()
    model = vitarium.create_model("toy_small")
    report = load_checkpoint(model, saved({prefix + name: tensor for name, tensor in write(source).items()}))
    assert_unchanged(model, source.state_dict())
    assert report.dialect == dialect
    assert report.complete
    assert sorted(report.matched) == sorted(model.state_dict())
    assert report.opened == ([prefix] if prefix else [])


def test_loads_a_training_scripts_file(tmp_path):
    source = other()
    torch.save({"model": {"module." + k: v for k, v in officially_named(source).items()}, "epoch": 7}, tmp_path / "w.pth")
    model = vitarium.create_model("toy_small", checkpoint=tmp_path / "w.pth")
    assert_unchanged(model, source.state_dict())


def test_keeps_the_models_dtype_and_takes_files_without_batch_counters(saved):
    source = other().half()
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    model = vitarium.create_model("toy_small").double()
    assert load_checkpoint(model, saved(state)).complete
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model.stem.weight, source.stem.weight.double())


def test_loads_a_module_of_the_users_own(saved):
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    load_checkpoint(model, saved(tensors_of(source)))
    assert_unchanged(model, source.state_dict())


# ---- the head


def test_head_of_other_classes_stays_fresh_and_the_report_says_so(saved):
    source = other()
    model = vitarium.create_model("toy_small", num_classes=10)
    before = model.head.weight.clone()
    report = load_checkpoint(model, saved(officially_named(source)))
    assert report.complete
    assert report.head == "left as it was, for 10 classes; the file's has 1000 classes"
    assert "head: left as it was" in str(report)
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.stem.weight, source.stem.weight)


def test_head_follows_the_file_where_no_number_is_asked_for(saved):
    source = other(num_classes=21841)
    model = vitarium.create_model("toy_small", checkpoint=saved(officially_named(source)))
    assert model.num_classes == 21841
    assert_unchanged(model, source.state_dict())


def test_file_without_a_head(saved):
    state = {name: tensor for name, tensor in other().state_dict().items() if not name.startswith("head")}
    assert vitarium.create_model("toy_small", checkpoint=saved(state)).num_classes == 0
    model = vitarium.create_model("toy_small", num_classes=10)
    assert load_checkpoint(model, saved(state)).head == "left as it was, for 10 classes; the file has none"


def test_model_without_a_head_drops_the_files(saved):
    model = vitarium.create_model("toy_small", num_classes=0)
    report = load_checkpoint(model, saved(tensors_of(other())))
    assert report.complete
    assert report.head == "the file's, of 1000 classes, was dropped; the model has none"


# ---- sizes


def test_position_table_is_resized_by_the_models_own_rule(saved):
    source, model = other("toy_fine"), vitarium.create_model("toy_wide")
    report = load_checkpoint(model, saved(tensors_of(source)))
    assert report.resized == ["pos_table (1, 12, 8, 8) -> (1, 12, 4, 4)"]
    assert torch.equal(model.pos_table, model.resize_tensor("pos_table", source.pos_table, model.pos_table.shape))


@pytest.mark.parametrize(("given", "wanted"), [(3, 1), (3, 4), (3, 9), (1, 3), (5, 3)])
def test_first_convolution_is_adapted_to_other_channels(saved, given, wanted):
    """The response to an image of equal channels stays (one channel: that of its grey copy)."""
    source, model = other(in_chans=given), vitarium.create_model("toy_small", in_chans=wanted)
    report = load_checkpoint(model, saved(tensors_of(source)))
    assert report.resized == [f"stem.weight (8, {given}, 4, 4) -> (8, {wanted}, 4, 4)"]
    flat = adapt_channels(torch.ones(8, given, 4, 4), wanted)
    assert torch.allclose(flat.sum(1), torch.full((8, 4, 4), float(given)))


# ---- refusals


@pytest.mark.parametrize("present", ["toy_small", "toy_wide", "toy_deep", "toy_fine"])
@pytest.mark.parametrize("wanted", ["toy_small", "toy_wide", "toy_deep", "toy_fine"])
@pytest.mark.parametrize("write", [tensors_of, officially_named])
def test_a_wrong_variant_is_refused_with_the_right_one(saved, present, wanted, write):
    if present == wanted or {present, wanted} == {"toy_wide", "toy_fine"}:
        return  # the two differ in their table's size only, which is resized
    model = vitarium.create_model(wanted)
    before = tensors_of(model)
    with pytest.raises(CheckpointError, match=f"do not fit {wanted}; this looks like {present}: create that model"):
        load_checkpoint(model, saved(write(other(present, in_chans=4, num_classes=7))))
    assert_unchanged(model, before)


def test_left_over_and_missing_tensors_are_named(saved):
    state = tensors_of(other())
    state["rogue.weight"] = state.pop("blocks.0.bias")
    model = vitarium.create_model("toy_small")
    before = tensors_of(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, saved(state))
    assert "missing (1): blocks.0.bias" in str(caught.value)
    assert "unexpected (1): rogue.weight" in str(caught.value)
    assert "likely cause" in str(caught.value)
    assert_unchanged(model, before)
    report = load_checkpoint(model, saved(state), strict=False)
    assert (report.missing, report.unexpected, report.complete) == (["blocks.0.bias"], ["rogue.weight"], False)
    assert torch.equal(model.stem.weight, state["stem.weight"])


def test_a_stranger_is_refused_even_when_not_strict(saved):
    model = vitarium.create_model("toy_small")
    before = tensors_of(model)
    with pytest.raises(CheckpointError, match="another architecture"):
        load_checkpoint(model, saved({f"layer{i}.weight": torch.ones(2) for i in range(300)}), strict=False)
    assert_unchanged(model, before)


def test_a_family_that_cannot_be_built_does_not_hide_the_report(saved, monkeypatch):
    state = tensors_of(other("toy_wide"))
    model = vitarium.create_model("toy_small")
    monkeypatch.setattr(type(model), "__init__", lambda self, **options: (_ for _ in ()).throw(TypeError("half-written")))
    with pytest.raises(CheckpointError, match="do not fit toy_small; choose the model that the file was made for"):
        load_checkpoint(model, saved(state))


def test_the_report_stays_short(saved):
    state = tensors_of(other()) | {f"rogue.{i}": torch.ones(1) for i in range(500)}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(vitarium.create_model("toy_small"), saved(state))
    assert "unexpected (500): rogue.0, rogue.1, rogue.10, rogue.100, rogue.101, and 495 more" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_integers_do_not_pass_for_weights(saved):
    state = tensors_of(other())
    state["stem.weight"] = state["stem.weight"].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"mismatched \(1\): stem.weight .*torch.int8 for torch.float32"):
        load_checkpoint(vitarium.create_model("toy_small"), saved(state))


def test_cut_and_flipped_files_leave_the_model_as_it_was(tmp_path):
    """Faults 1: of a file that `save` wrote, every cut and every flipped byte is noticed."""
    path = tmp_path / "w.safetensors"
    vitarium.save(other(num_classes=3), path)
    whole = path.read_bytes()
    model = vitarium.create_model("toy_small", num_classes=3)
    before = tensors_of(model)
    rng = random.Random(0)
    damaged = [whole[:size] for size in (0, 8, len(whole) // 2, len(whole) - 1)]
    for _ in range(100):
        at = rng.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ rng.randint(1, 255)]) + whole[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"w\.safetensors"):
            load_checkpoint(model, path)
        with pytest.raises(CheckpointError, match=r"w\.safetensors"):
            vitarium.load(path)
    assert_unchanged(model, before)


def test_parts_released_one_by_one_are_joined(saved):
    source, model = other(), vitarium.create_model("toy_small")
    state = tensors_of(source)
    names = list(state)
    a, b, c = (saved({n: state[n] for n in part}, f"{i}.safetensors") for i, part in enumerate((names[:2], names[2:], names[1:])))
    assert load_checkpoint(model, f"{a} + {b}").complete
    assert_unchanged(model, source.state_dict())
    with pytest.raises(CheckpointError, match=f"both hold {names[1]}"):
        load_checkpoint(model, f"{a} + {c}")
