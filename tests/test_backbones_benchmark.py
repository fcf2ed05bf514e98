"""Tests of benchmarks/backbones.py and its page: measurements, stored results and verdicts. No test asserts a time."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest

import vitarium
from benchmarks import backbones
from benchmarks.backbones import Cell, Results, chosen, exponent, nearest_variant, plan
from docs import speed
from vitarium.catalog import find_model
from vitarium.efficiency.bench import Contest

CELL = Cell("swin_pico", "inference", "float32", 8, "cpu")


def row(cell: Cell = CELL, **values) -> dict:
    spreads = {f"{k}{s}": v for k, v in (("share", 0.9), ("ratio", 1.2), ("aa", 1.0)) for s in ("", "_low", "_high")}
    setting = dict(peer="timm/swin", params=1_000_000, macs=2_000_000, image_size=16, rounds=5, load=0.5, threads=1, date="2026-01-01")
    where = dict(machine="a machine", versions={"torch": "2"}, remark="", verdict="1.20x faster", ours_ms=1.0, peer_ms=1.2, peer_share=0.75)
    return vars(cell) | spreads | setting | where | values


def growth(model: str, time: float, memory: float, cost: str) -> dict:
    values = dict(image_sizes=[224, 448], ms=[1.0, 4.0], mb=[1.0, 4.0], time_exponent_low=time, time_exponent_high=time)
    where = dict(machine="a machine", versions={"torch": "2"}, threads=1, date="2026-01-01", cost=cost)
    return vars(Cell(model, "scaling", "float32", 1, "cpu")) | where | dict(time_exponent=time, memory_exponent=memory) | values


def test_each_kind_is_offered_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["backbones.py", "--kinds", "no such kind"])
    with pytest.raises(SystemExit):
        backbones.main()
    offered = capsys.readouterr().err.partition("choose from ")[2]
    assert (offered.count("onnxruntime"), offered.count("openvino"), offered.count("scaling")) == (1, 1, 1)


def test_exponents():
    assert exponent([1, 4, 16], [3, 12, 48]) == pytest.approx(1)
    assert exponent([1, 4, 16], [3, 48, 768]) == pytest.approx(2)
    assert exponent([1, 4], [5, 5]) == pytest.approx(0)


def test_growth_of_a_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backbones, "paired", functools.partial(backbones.paired, least_seconds=0))
    found = backbones.grow("swin_pico", "float32", "cpu", 3, sides=(16, 32))
    assert (found["image_sizes"], len(found["ms"]), found["cost"]) == ([16, 32], 2, "linear in image area at a fixed window size")
    assert 0.7 < found["memory_exponent"] < 1.2


def test_the_variant_nearest_to_the_plain_vit_stands_for_its_family():
    assert nearest_variant(find_model("swin_tiny")[0]) == "swin_tiny"
    assert nearest_variant(find_model("tinyvit_5m")[0]) == "tinyvit_21m"


def test_every_system_without_a_public_peer_has_a_reference():
    from vitarium.efficiency.bench import peer_of

    for slug in ("crossformer", "cvt", "hornet", "uniformer", "van", "vim"):
        assert backbones.reference_of(slug) is not None
        assert not peer_of(*find_model(f"{slug}_pico"))
    assert backbones.reference_of("no_such_system") is None


def test_cells():
    both = chosen(["a", "b"], ["inference", "scaling"], ["float32"], [1, 8], "cpu")
    assert both[:3] == [Cell("a", "inference", "float32", b, "cpu") for b in (1, 8)] + [Cell("a", "scaling", "float32", 1, "cpu")]
    assert len(both) == 6  # growth once a model
    assert len(plan(["a"], "cpu")) == len(set(plan(["a"], "cpu")))


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.json"
    cells = [CELL, Cell("swin_pico", "inference", "float32", 1, "cpu"), Cell("swin_pico", "scaling", "float32", 1, "cpu")]

    def broken(*_: object) -> dict:
        raise RuntimeError("no memory\nand a long story")

    monkeypatch.setattr(backbones, "open_contest", broken)
    monkeypatch.setattr(backbones, "grow", lambda *_: {"cost": "linear"})
    assert len(list(backbones.run(cells, Results(path), 3, until=float("inf")))) == 3
    assert [r.get("failed") for r in json.loads(path.read_text())] == ["RuntimeError: no memory"] * 2 + [None]
    results = Results(path)
    assert results.missing(cells) == cells[:2]  # what failed is tried again
    results.add(CELL, {"ours_ms": 1.0})
    results.add(CELL, {"failed": "later"})  # but a failure does not wipe out a measurement
    assert Results(path).missing(cells) == cells[1:2]
    assert not list(backbones.run(cells, Results(path), 3, until=float("-inf")))  # no time left
    first = json.loads(path.read_text())[0]
    assert {"date", "machine", "versions"} < first.keys()


@pytest.mark.parametrize(
    ("values", "goal", "met", "near"),
    [
        (dict(model="swin_tiny", share=0.86), "85 %", True, False),
        (dict(model="maxvit_tiny", share=0.74, share_low=0.70, share_high=0.78), "75 %", False, True),
        (dict(model="van_b2", share=0.91), "90 %", True, False),
        (dict(model="van_b2", share=0.5, ratio=1.11, ratio_low=1.05), "90 %, or 1.1 x the peer", True, True),
        (dict(model="van_b2", share=0.5, ratio=1.09), "90 %, or 1.1 x the peer", False, False),
        (dict(model="van_b2", share=0.5, ratio=None), "90 %", False, False),
    ],
)
def test_goals(values: dict, goal: str, met: bool, near: bool):
    for name in ("share", "ratio"):
        for end in ("low", "high"):
            values.setdefault(f"{name}_{end}", values.get(name, 1.2))
    assert speed.judge(row(**values))[:2] == (goal, met)
    assert speed.close(row(**values)) == near


def test_documented_costs():
    for cost in ("linear in image area", "linear in tokens, in time and in memory", "linear in image area (7 x 7), or more (GF)"):
        assert speed.claims_linear(cost)
    for cost in ("linear in area but for the transform", "quadratic in tokens", "stages of local blocks are linear in pixels", ""):
        assert not speed.claims_linear(cost)


def test_the_page_says_what_the_rows_say():
    wanted = "inference", "float32", 8, "cpu"
    slow = dict(share=0.6, share_low=0.6, share_high=0.6, ratio=0.9, ratio_low=0.9, ratio_high=0.9, verdict="1.11x slower")
    text = speed.page(
        [
            row(Cell("swin_tiny", *wanted)),
            row(Cell("tinyvit_21m", *wanted), **slow),
            vars(Cell("van_b2", *wanted)) | {"failed": "RuntimeError: why"},
            growth("swin_tiny", 1.02, 1.0, "linear in image area"),
            growth("van_b2", 1.2, 1.0, "linear in image area"),
        ]
    )
    for words in (
        "1 of 2 models reach their goal (`swin_tiny`)",
        "Short of it: `tinyvit_21m` (60%)",
        "faster in 1, slower in 1",
        "Slower: `tinyvit_21m` (inference, float32, batch 8: 1.11x slower)",
        "1 of 2 grow by exponents under 1.1",
        "Above it: `van_b2` (time 1.20, memory 1.00)",
        "training, float32, batch 1, cpu: all",
        "`van_b2`, inference, float32, batch 8, cpu: RuntimeError: why",
        "On a GPU: nothing",
    ):
        assert words in text
    assert "Nothing has been measured yet" in speed.page([])


def test_exported_graphs_are_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "rows.json"
    cell = Cell("convnext_pico", "onnxruntime", "float32", 2, "cpu")
    model = vitarium.create_model("convnext_pico", num_classes=5).eval()
    contest = Contest("convnext_pico", "timm/one", 16, model, model, copy.deepcopy(model), 0.0)
    monkeypatch.setattr(backbones, "open_contest", lambda *_: (contest, ""))
    assert [text for _, found in backbones.run([cell], Results(path), 3, until=float("inf")) if (text := found.get("failed"))] == []
    (found,) = json.loads(path.read_text())
    assert found["peer"] == "timm/one"
    assert found["error"] < 1e-3
    assert found["nodes"]["ours"]["Conv"] == found["nodes"]["peer"]["Conv"] == 6
    assert found["nodes"]["ours"].get("Mul", 0) < found["nodes"]["peer"]["Mul"]  # the factors of the layer scales
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert "onnxruntime" not in speed.page([])
    text = speed.page([found])
    assert "Median over 1 pairs" in text
    assert "| `convnext_pico` | timm: one |" in text
    assert "Slower: `convnext_pico`; the reason" in speed.page([found | {"ratio_high": 0.9, "reason": "the reason"}])
