"""How claims are judged, kept and resumed; the claims themselves are run by `vitarium claim`, not by tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitarium.claims import Arm, Comparison, Measured, claimed_slugs, find_claim, read_ledger, run_claim
from vitarium.claims import run as runner
from vitarium.claims.experiment import Claim, gain_and_error, judge, together
from vitarium.claims.ledger import write_entry
from vitarium.errors import DataError, UsageError


def test_two_standard_errors_decide():
    assert judge(gain=2.0, error=0.5, at_least=1.0) == "held"
    assert judge(gain=1.9, error=0.5, at_least=1.0) == "inconclusive"
    assert judge(gain=-0.1, error=0.5, at_least=1.0) == "not held"
    assert judge(gain=1.0, error=0.0, at_least=1.0) == "held"
    assert together(["held", "held"]) == "held"
    assert together(["held", "inconclusive"]) == "inconclusive"
    assert together(["inconclusive", "not held"]) == "not held"


def test_equal_seeds_are_paired():
    gain, error = gain_and_error([90.0, 95.0, 99.0], [89.0, 94.0, 98.0])
    assert gain == pytest.approx(1)
    assert error == pytest.approx(0)
    gain, error = gain_and_error([2.0, 4.0], [1.0, 1.0, 1.0])
    assert (gain, error) == (2.0, 1.0)
    assert gain_and_error([1.5], None) == (1.5, 0.0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A claim of swin whose arms are not trained but told; the list collects what was asked for."""
    asked: list[str] = []
    better = Arm("better", "swin_pico", steps=1, seeds=3)
    comparisons = [
        Comparison("one", better, Arm("worse", "convnext_pico", steps=1, seeds=3), at_least=1.0),
        Comparison("two", Arm("the same by another label", "swin_pico", steps=1, seeds=3), Measured("fixed", [50.0], "%")),
    ]
    claim = Claim("swin", "says", 1, lambda: comparisons)

    def train(arm: Arm, seed: int) -> float:
        asked.append(f"{arm.model} {seed}")
        return (0.9 if arm.model == "swin_pico" else 0.8) + seed / 1000

    monkeypatch.setattr(runner, "find_claim", lambda slug: claim)
    monkeypatch.setattr(runner, "train_arm", train)
    return asked


def test_a_run_is_written_to_the_ledger(toy: list[str], tmp_path: Path):
    entry = run_claim("swin", out=tmp_path)
    assert entry.verdict == "held"
    assert [c["gain"] for c in entry.comparisons] == pytest.approx([10, 40.1])
    assert len(toy) == 6  # an arm that differs by its label alone is trained once
    assert read_ledger(tmp_path) == [entry]
    assert json.loads((tmp_path / "swin.json").read_text())["machine"]["cores"] >= 1


def test_a_killed_run_goes_on(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(line: str) -> None:
        if len(toy) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_claim("swin", out=tmp_path, cache=tmp_path / "cache", progress=stop)
    run_claim("swin", out=tmp_path, cache=tmp_path / "cache")
    assert len(toy) <= 7
    assert not list((tmp_path / "cache").iterdir())


def test_a_ledger_that_cannot_be_written(toy: list[str], tmp_path: Path):
    entry = run_claim("swin", out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--out"):
        write_entry(entry, tmp_path / "file")


def test_arms_need_one_budget():
    with pytest.raises(ValueError, match="exactly one budget"):
        Arm("x", "swin_pico")
    with pytest.raises(ValueError, match="exactly one budget"):
        Arm("x", "swin_pico", steps=1, seconds=1)


def test_claims_are_found_by_slug():
    assert {"swin", "convnext"} <= set(claimed_slugs())
    with pytest.raises(UsageError, match="did you mean swin"):
        find_claim("swinn")
    for slug in claimed_slugs():
        claim = find_claim(slug)
        assert claim.slug == slug
        assert claim.minutes <= 4
        assert claim.method, f"{slug}: the docstring says how it is measured"


def test_one_arm_really_trains():
    value = runner.train_arm(Arm("x", "convnext_pico", steps=3, seeds=1), seed=0)
    assert 0 <= value <= 1
