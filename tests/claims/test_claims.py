"""Tests of verdicts, the ledger and resuming of claims; the claims themselves are run by `vitarium claim`, not by tests."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vitarium.claims import Arm, Comparison, Measured, Range, claimed_slugs, find_claim, read_ledger, run_claim, run_claims
from vitarium.claims import run as runner
from vitarium.claims.experiment import Claim
from vitarium.claims.judging import Gain, gain_of, judge, judge_equal, together, uncalibrated
from vitarium.claims.ledger import Entry, write_entry
from vitarium.errors import DataError, UsageError


def test_the_interval_decides():
    assert judge(Gain(2.0, 0.5, 1.1, 2.9), at_least=1.0) == "held"
    assert judge(Gain(1.9, 0.5, 0.9, 2.9), at_least=1.0) == "inconclusive"
    assert judge(Gain(-0.1, 0.5, -1.1, 0.9), at_least=1.0) == "not held"
    assert judge_equal(Gain(0.1, 0.2, -0.5, 0.7), margin=1.0) == "held"
    assert judge_equal(Gain(0.6, 0.2, 0.2, 1.1), margin=1.0) == "inconclusive"
    assert judge_equal(Gain(-2.0, 0.2, -2.5, -1.5), margin=1.0) == "not held"
    assert together(["held", "held"]) == "held"
    assert together(["held", "inconclusive"]) == "inconclusive"
    assert together(["inconclusive", "not held"]) == "not held"


def test_gains_have_the_interval_of_students_t():
    gain = gain_of([91.0, 95.0, 99.0], [89.0, 94.0, 99.0])  # paired: 2, 1, 0
    assert (gain.mean, gain.error) == pytest.approx((1, 3**-0.5))
    assert gain.high - gain.mean == pytest.approx(4.302653 * 3**-0.5, rel=1e-6)  # two degrees of freedom
    welch = gain_of([2.0, 4.0], [1.0, 1.0, 1.0])  # all of the spread is in two values: one degree of freedom
    assert (welch.mean, welch.error) == (2.0, 1.0)
    assert welch.high - welch.mean == pytest.approx(12.7062, rel=1e-4)
    single = gain_of([1.5], None)
    assert (single.mean, single.low, single.high) == (1.5, -float("inf"), float("inf"))
    assert gain_of([1.5], None, exact=True) == Gain(1.5, 0.0, 1.5, 1.5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"within": None}, "no floor and ceiling are named"),
        ({"means": [79.0, 70.0]}, "the better arm reaches 79 %, and the floor is 80"),
        ({"means": [90.0, 97.0]}, "an arm reaches 97 %, and the ceiling is 97"),
        ({"images": [359, 359]}, "the test part has 359 images, and 2000 are needed"),
        ({"images": [None, None]}, ""),
        ({"at_least": 2.0}, "4 seeds, and a gain of 2 points needs 5"),
        ({"at_least": -2.0}, "4 seeds, and a gain of 2 points needs 5"),
        ({"at_least": 2.0, "counts": [5, 5]}, ""),
        ({"at_least": 2.0, "unit": "dB"}, ""),
    ],
)
def test_what_cannot_say_anything_is_not_calibrated(changes, reason):
    asked = dict(within=Range(80), means=[90.0, 85.0], unit="%", at_least=3.0, counts=[4, 4], images=[2000, 2000])
    assert uncalibrated(**(asked | changes)) == reason


def test_ranges_and_margins_are_checked():
    with pytest.raises(ValueError, match="below the ceiling"):
        Range(97)
    arm = Measured("a", [1.0], "x")
    with pytest.raises(ValueError, match="margin is positive"):
        Comparison("equal", arm, arm, margin=0.0)
    with pytest.raises(ValueError, match="needs a baseline"):
        Comparison("equal", arm, margin=1.0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A claim of swin whose arms are given and not trained; the list collects what was asked for."""
    asked: list[str] = []
    better = Arm("better", "swin_pico", data="fashion", steps=1, seeds=3)
    worse = Arm("worse", "convnext_pico", data="fashion", steps=1, seeds=3)
    again = replace(better, label="the same by another label")
    comparisons = [
        Comparison("one", better, worse, at_least=5.0, within=Range(80)),
        Comparison("two", again, Measured("fixed", [50.0, 51.0, 52.0], "%"), at_least=5.0, within=Range(80)),
        Comparison("counted", Measured("MACs ratio", [2.0], "x", exact=True), at_least=1.5),
    ]
    claim = Claim("swin", "says", 1, lambda: comparisons, task="clothes", weights="")

    def train(arm: Arm, seed: int) -> float:
        asked.append(f"{arm.model} {seed}")
        return (0.9 if arm.model == "swin_pico" else 0.8) + seed / 1000

    monkeypatch.setattr(runner, "find_claim", lambda slug: replace(claim, slug=slug))
    monkeypatch.setattr(runner, "train_arm", train)
    return asked


def test_a_run_is_written_to_the_ledger(toy: list[str], tmp_path: Path):
    entry = run_claim("swin", out=tmp_path)
    assert (entry.verdict, entry.word, entry.task) == ("held", "held", "clothes")
    assert [c["gain"] for c in entry.comparisons] == pytest.approx([10, 39.1, 2.0])
    assert entry.comparisons[0]["interval"] == pytest.approx([10, 10])
    assert len(toy) == 6  # an arm that differs by its label alone is trained once
    assert read_ledger(tmp_path) == [entry]
    assert json.loads((tmp_path / "swin.json").read_text())["machine"]["cores"] >= 1


def test_an_outcome_on_data_without_room_is_inconclusive(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "train_arm", lambda arm, seed: 0.98 if arm.model == "swin_pico" else 0.5)
    entry = run_claim("swin", out=tmp_path)
    assert (entry.verdict, entry.word) == ("inconclusive", "inconclusive: not calibrated")
    assert [c["verdict"] for c in entry.comparisons] == ["inconclusive", "inconclusive", "held"]
    assert "the ceiling is 97" in entry.comparisons[0]["uncalibrated"]


def test_a_killed_run_continues(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(line: str) -> None:
        if len(toy) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_claim("swin", out=tmp_path, cache=tmp_path / "cache", progress=stop)
    run_claim("swin", out=tmp_path, cache=tmp_path / "cache")
    assert len(toy) <= 7
    assert not list((tmp_path / "cache").iterdir())


def test_a_killed_batch_continues_with_the_claims_that_are_missing(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []
    one = runner.measure_claim

    def killed_at_the_second(slug: str, *given) -> Entry:
        ran.append(slug)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return one(slug, *given)

    monkeypatch.setattr(runner, "measure_claim", killed_at_the_second)
    monkeypatch.setattr(runner, "read_ledger", lambda folder=None: [])  # how long they took decides the order
    where = {"out": tmp_path / "ledger", "cache": tmp_path / "cache"}
    with pytest.raises(KeyboardInterrupt):
        run_claims(["swin", "convnext"], **where)
    lines: list[str] = []
    entries = run_claims(["swin", "convnext"], **where, progress=lines.append)
    assert ran == ["swin", "convnext", "convnext"]
    assert lines[0] == "swin: done before (1 of 2)"
    assert [e.slug for e in entries] == ["swin", "convnext"]
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_killed_batch_has_done_is_its_own(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One of its claims, asked for alone or in another batch, is run; and the batch still continues where it was."""
    ran: list[str] = []
    one = runner.measure_claim

    def run_one(slug: str, *given) -> Entry:
        ran.append(slug)
        if slug == "vim":
            raise DataError("not yet")
        return one(slug, *given)

    monkeypatch.setattr(runner, "measure_claim", run_one)
    monkeypatch.setattr(runner, "read_ledger", lambda folder=None: [])
    where = {"out": tmp_path / "ledger", "cache": tmp_path / "cache"}
    for slugs in (["swin", "vim"], ["swin"], ["swin", "convnext"], ["vim", "swin"]):
        with contextlib.suppress(DataError):
            run_claims(slugs, **where)
    assert ran == ["swin", "vim", "swin", "swin", "convnext", "vim"]


def test_a_claim_that_fails_stops_no_other(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = runner.measure_claim

    def run_one(slug: str, *given) -> Entry:
        if slug == "swin":
            raise DataError("no images")
        return one(slug, *given)

    monkeypatch.setattr(runner, "measure_claim", run_one)
    with pytest.raises(DataError, match="no images"):
        run_claims(["swin", "convnext"], out=tmp_path)
    assert (tmp_path / "convnext.json").exists()


def test_claims_in_two_processes(tmp_path: Path):
    """Real claims in real processes, of arms whose values an interrupted run has left; one was finished and only the ledger lacks it."""
    slugs = ["van", "hornet", "convnext"]
    where = {"out": tmp_path / "ledger", "cache": tmp_path}

    batch = known_batch(slugs, **where)
    for slug in slugs:
        arms = [a for c in find_claim(slug).compare() for a in (c.method, c.baseline) if isinstance(a, Arm)]
        known = {runner.key_of(arm, seed): {"value": 90.0 + seed, "seconds": 1.0} for arm in arms for seed in range(arm.seeds)}
        (batch / slug).mkdir(parents=True)
        (batch / slug / "arms.json").write_text(json.dumps(known))
    done = runner.measure_claim("convnext", batch / "convnext" / "arms.json")
    (batch / "convnext" / "result.json").write_text(json.dumps(done.to_dict()))
    lines: list[str] = []
    entries = run_claims(slugs, **where, jobs=2, progress=lines.append)
    assert [e.slug for e in entries] == slugs
    assert lines[0] == "convnext: done before (1 of 3)"
    assert read_ledger(tmp_path / "ledger") == sorted(entries, key=lambda e: claimed_slugs().index(e.slug))
    assert all(c["gain"] == 0 for e in entries[:2] for c in e.comparisons)
    assert not batch.exists()


def known_batch(slugs: list[str], *, out: Path, cache: Path) -> Path:
    """The folder of a batch, which does not depend on the order of its claims."""
    seen: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_all", lambda jobs, *_, **__: seen.extend(job.folder.parent for job in jobs) or [])
        with contextlib.suppress(KeyError):
            run_claims(slugs[::-1], out=out, cache=cache)
    return seen[0]


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
        assert claim.minutes <= 15
        assert claim.method, f"{slug}: the docstring says how it is measured"


def test_one_arm_really_trains():
    value = runner.train_arm(Arm("x", "convnext_pico", steps=3, seeds=1), seed=0)
    assert 0 <= value <= 1
