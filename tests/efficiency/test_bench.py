"""Benchmarks: pairing of runs, checks of equality before timing, and cases without a verdict. No test asserts a time."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import vitarium
from vitarium.catalog import create_model, find_model
from vitarium.efficiency import bench as module
from vitarium.efficiency import contest as contests
from vitarium.efficiency.bench import OutputsDiffer, Row, bench, measure, paired, peer_of, prepare
from vitarium.efficiency.export import export
from vitarium.errors import CheckpointError, UsageError
from vitarium.verbs.bench import kinds_of


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "paired", functools.partial(paired, least_seconds=0))


def row(ratio: float | None, aa: tuple[float, float, float]) -> Row:
    spread = (None, None, None) if ratio is None else (ratio, ratio, ratio)
    same = dict(zip(("aa", "aa_low", "aa_high"), aa, strict=True))
    measured = dict(zip(("ratio", "ratio_low", "ratio_high"), spread, strict=True))
    setting = dict(kind="inference", batch=1, image_size=16, dtype="float32", device="cpu", threads=1, rounds=7, load=0.0)
    return Row("ours", "peer", params=1, bytes=4, macs=1, error=0.0, ours_ms=1.0, peer_ms=1.0, **setting, **measured, **same)


def test_no_verdict_inside_the_spread_of_ours_against_ours():
    assert row(1.20, (1.0, 0.95, 1.05)).verdict == "1.20x faster"
    assert row(0.80, (1.0, 0.95, 1.05)).verdict == "1.25x slower"
    assert row(1.04, (1.0, 0.95, 1.05)).verdict == "no difference beyond the noise"
    assert row(None, (1.0, 0.95, 1.05)).verdict == ""


def test_arms_take_turns_in_changing_order():
    order: list[str] = []
    times = paired({arm: lambda arm=arm: order.append(arm) for arm in "abc"}, rounds=3, least_seconds=0)
    assert {arm: len(values) for arm, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert order[-9:] == [*"abc", *"bca", *"cab"]


def test_a_model_beside_itself(monkeypatch: pytest.MonkeyPatch):
    """The whole path on a tiny model, with a copy of the family as its peer."""
    family, _ = find_model("convnext_pico")
    monkeypatch.setattr(contests, "peer_of", lambda *_: "convnext_pico")
    monkeypatch.setitem(family.dialects, "timm", lambda state: state)
    rows = list(bench(["convnext_pico"], kinds=("inference", "training"), batches=(1, 2), rounds=3))
    assert [(r.kind, r.batch) for r in rows] == [("inference", 1), ("inference", 2), ("training", 2)]
    assert all(r.error == 0 and r.ratio > 0 and r.aa > 0 and r.macs > 0 for r in rows)
    assert rows[0].to_dict()["verdict"] == rows[0].verdict


def test_different_outputs_are_not_timed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    other = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    with pytest.raises(OutputsDiffer, match="nothing is timed"):
        contests._difference(model, other, 2)


def test_a_reference_stands_in_for_a_public_peer_and_a_yardstick_runs_along():
    def reference(model: nn.Module) -> nn.Module | contests.Forward:
        return lambda image: model.head(model.forward_head(model.forward_features(image), pre_logits=True))

    contest = prepare("van_pico", reference=reference)
    yardstick = create_model("swin_pico", image_size=32)
    row = measure(contest, "inference", 1, rounds=3, yardstick=yardstick, yardstick_name="swin_pico")
    assert (row.peer, row.yardstick, row.error < 1e-4) == (contests.WRITTEN_OUT, "swin_pico", True)
    assert 0 < row.share_low <= row.share <= row.share_high
    assert row.peer_share > 0
    assert not any(isinstance(part, nn.BatchNorm2d) for part in contest.ours.stages[0].downsample.modules())  # it is fused
    assert any(isinstance(part, nn.BatchNorm2d) for part in contest.trained.stages[0].downsample.modules())
    trained = measure(contest, "training", 2, rounds=3)
    assert (trained.peer, trained.ratio, trained.share) == ("", None, None)  # a function does not train


def test_a_reference_may_bring_its_own_weights():
    def reference(model: nn.Module) -> nn.Module:
        other = create_model("swin_pico")
        model.load_state_dict(other.state_dict())
        return other

    contest = prepare("swin_pico", reference=reference, dtype=torch.bfloat16)
    assert contest.error == 0
    assert measure(contest, "training", 1, rounds=3).ratio > 0


def test_peers_are_those_whose_weights_load():
    assert peer_of(*find_model("swin_tiny")) == "timm/swin_tiny_patch4_window7_224"
    assert peer_of(*find_model("convnext_tiny")) == "timm/convnext_tiny"
    assert peer_of(*find_model("crossvit_9")) == "timm/crossvit_9_240"
    assert peer_of(*find_model("swin_pico")) == ""


def test_bad_options():
    with pytest.raises(UsageError, match="at least 3"):
        next(bench(["swin_pico"], rounds=1))
    with pytest.raises(UsageError, match="unknown kind"):
        next(bench(["swin_pico"], kinds=("inferenc",)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown model"):
        next(bench(["swin_tinny"]))
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize("name", ["dit_pico", "var_pico", "uniformer_video_pico", "timm/vit_pico"])
def test_models_of_many_inputs_and_of_others_are_timed(name: str):
    rows = list(bench([name], kinds=("inference", "training"), batches=(2,), rounds=3))
    assert [(r.kind, r.peer) for r in rows] == [("inference", ""), ("training", "")]
    assert all(r.macs > 0 and r.ours_ms > 0 and r.dtype == "float32" for r in rows)


def test_a_reference_is_called_with_the_inputs_in_order():
    def reference(model: nn.Module) -> contests.Forward:
        return lambda noisy, times, classes: model(noisy, times, classes)

    assert prepare("sit_flow_pico", reference=reference).error == 0
    with pytest.raises(OutputsDiffer, match="differ in shape"):
        prepare("sit_flow_pico", reference=lambda model: lambda *inputs: model(*inputs)[:, :1])


def test_saved_files_are_timed_with_their_methods(tmp_path):
    model = vitarium.create_model("timm/vit_pico", num_classes=2, image_size=16)
    vitarium.save(model, tmp_path / "plain.safetensors")
    vitarium.apply(model, "int8", quiet=True)
    vitarium.save(model, tmp_path / "int8.safetensors")
    names = [str(tmp_path / f"{name}.safetensors") for name in ("plain", "int8")]
    rows = list(bench(names, kinds=["inference"], batches=[2], rounds=3))
    assert [row.model for row in rows] == names
    assert rows[0].peer == ""
    assert rows[1].bytes < rows[0].bytes
    with pytest.raises(UsageError, match="quantized layers, which do not train; time it with --kind inference"):
        list(bench(names[1:], rounds=3))
    with pytest.raises(UsageError, match="at its own image size"):
        list(bench(names[:1], image_size=32, rounds=3))
    with pytest.raises(CheckpointError):
        list(bench([str(tmp_path / "gone.safetensors")], rounds=3))


def test_exported_graphs_beside_the_peers(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxscript")
    family, _ = find_model("convnext_pico")
    monkeypatch.setattr(contests, "peer_of", lambda *_: "convnext_pico")
    monkeypatch.setitem(family.dialects, "timm", lambda state: state)
    exports = []
    monkeypatch.setattr(contests, "export", lambda *given, **options: exports.append(given[0]) or export(*given, **options))
    rows = list(bench(["convnext_pico"], kinds=["onnxruntime"], batches=(1, 3), rounds=3))
    assert [(r.kind, r.batch, r.peer) for r in rows] == [("onnxruntime", 1, "convnext_pico"), ("onnxruntime", 3, "convnext_pico")]
    assert all(r.ratio > 0 and r.aa > 0 for r in rows)
    assert len(exports) == 2  # ours and the peer, for both batches
    with pytest.raises(UsageError, match="timed in float32 on the CPU, and convnext_pico is float16"):
        list(bench(["convnext_pico"], kinds=["onnxruntime"], batches=(1,), rounds=3, dtype=torch.float16, peers=False))


def test_runtimes_are_short_for_kinds():
    assert kinds_of(None, None) == ["inference", "training"]
    assert kinds_of(None, ["eager", "openvino", "compile"]) == ["inference", "openvino", "compiled"]
    assert kinds_of(["training", "onnxruntime"], "onnxruntime") == ["training", "onnxruntime"]
    with pytest.raises(UsageError, match="unknown runtime 'onnx'"):
        kinds_of(None, "onnx")
