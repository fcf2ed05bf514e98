"""Tests of `bench` and `claim`: options and printed results."""

import json

import pytest

from vitarium.claims.ledger import Entry, write_entry
from vitarium.efficiency.bench import Row

ROW = dict(batch=8, image_size=224, dtype="float32", device="cpu", threads=1, params=28_000_000, bytes=1, macs=4_490_000_000, error=1e-6)
SAME = dict(aa=1.0, aa_low=0.97, aa_high=1.04, rounds=7, load=0.5)
FASTER = Row("swin_tiny", "timm/swin", "inference", ours_ms=100, peer_ms=130, ratio=1.3, ratio_low=1.2, ratio_high=1.4, **ROW, **SAME)
ALONE = Row("swin_pico", "", "training", ours_ms=2, peer_ms=None, ratio=None, ratio_low=None, ratio_high=None, **ROW, **SAME)


@pytest.fixture
def timed(monkeypatch):
    """Put two known rows in the place of a measurement; gives what it was asked for."""
    got = {}

    def bench(models, **options):
        got.update(options, models=models)
        yield from (FASTER, ALONE)

    monkeypatch.setattr("vitarium.efficiency.bench.bench", bench)
    return got


def test_bench_shows_times_ratios_and_their_noise(run, timed):
    result = run("bench", "swin_tiny", "swin_pico", "--kind", "compiled", "--batch", 2, "--batch", 4, "--no-peers", "--dtype", "bfloat16")
    assert result.code == 0, result.err
    assert "1.30 [1.20, 1.40]" in result.out
    assert "1.30x faster" in result.out
    assert "1.00 [0.97, 1.04]" in result.out
    assert "7 rounds" in result.err
    assert timed["models"] == ["swin_tiny", "swin_pico"]
    assert (timed["kinds"], timed["batches"], timed["peers"], str(timed["dtype"])) == (["compiled"], [2, 4], False, "torch.bfloat16")


def test_bench_as_json(run, timed):
    rows = json.loads(run("bench", "swin_tiny", "--json").out)
    assert [row["verdict"] for row in rows] == ["1.30x faster", ""]
    assert timed["kinds"] == ["inference", "training"]


@pytest.mark.parametrize(
    "arguments", [[], ["swin_tinny"], ["swin_pico", "--rounds", 2], ["swin_pico", "--device", "tpu"], ["swin_pico", "--kind", "both"]]
)
def test_bench_refuses(run, arguments):
    assert run("bench", *arguments).code == 2


@pytest.fixture
def swin_claims(monkeypatch):
    """A world in which one claim is written, and holds."""
    arm = {"label": "windows", "values": [97.0, 98.0], "mean": 97.5, "unit": "%"}
    arms = {"method": arm, "baseline": arm | {"label": "none"}}
    judged = {"gain": 1.5, "error": 0.2, "interval": [0.9, 2.1], "at_least": 0.0, "uncalibrated": "", "verdict": "held"}
    comparison = {"says": "windows beat none", **arms, **judged}

    def measure_claim(slug, file, progress):
        progress("windows, seed 0: 97.0 %")
        return Entry(slug, "windows matter", "two seeds", "held", [comparison], 12.0, "2026-01-01", {}, "abc")

    monkeypatch.setattr("vitarium.claims.run.measure_claim", measure_claim)
    monkeypatch.setattr("vitarium.claims.claimed_slugs", lambda: ["swin", "convnext"])


def test_a_claim_shows_its_numbers_and_stands_in_the_ledger(run, swin_claims, tmp_path):
    result = run("claim", "swin", "--out", tmp_path / "ledger")
    assert result.code == 0, result.err
    assert "swin: held" in result.out
    assert "97 98" in result.out
    assert "+1.5 [0.9, 2.1], needed at least 0  held" in result.out
    assert "seed 0" in result.err
    shown = run("claim", "--out", tmp_path / "ledger").out
    assert "windows matter" in shown
    assert "not run yet: convnext" in shown


def test_all_claims(run, swin_claims, tmp_path):
    rows = json.loads(run("claim", "--all", "--json", "--out", tmp_path / "ledger").out)
    assert [row["slug"] for row in rows] == ["swin", "convnext"]
    shown = run("claim", "convnext", "swin", "--out", tmp_path / "ledger").out
    assert "2 claims" in shown
    assert "not run yet" not in shown


def old(slug, verdict, calibrated=False):
    """An entry; those that were measured before claims named a range lack the key "uncalibrated"."""
    arm = {"label": "a", "values": [1.0], "mean": 1.0, "unit": "%"}
    comparison = {"says": "a", "method": arm, "baseline": arm, "gain": 1.0, "error": 0.0, "at_least": 0.0, "verdict": verdict}
    says = "a mechanism of a paper works as its authors say, on a task that needs it, at the same budget as without it"
    return Entry(slug, says, "", verdict, [comparison | ({"uncalibrated": ""} if calibrated else {})], 1234.0, "2026-01-01", {}, "abc")


def test_the_ledger_explains_old_entries_on_80_columns(run, tmp_path, monkeypatch):
    for entry in (old("dependencyvit", "inconclusive"), old("swin", "held"), old("vim", "held", True), old("evit", "not held")):
        write_entry(entry, tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("claim", "--out", tmp_path).out
    assert "4 claims: 2 held (1 not calibrated), 1 not held (1 not calibrated), 1 inconclusive" in " ".join(shown.split())
    assert "* not calibrated: measured before claims named a range, or outside of it;" in shown
    assert "held: not calibrated" not in shown
    assert "inconclusive *  a mechanism of a paper works" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_ledger_of_calibrated_entries_has_no_legend(run, tmp_path):
    write_entry(old("vim", "held", True), tmp_path)
    assert "calibrated" not in run("claim", "--out", tmp_path).out


def test_claim_refuses(run):
    assert run("claim", "swim").code == 2
    assert "did you mean swin" in run("claim", "swim").err
    assert run("claim", "swin", "--all").code == 2
    assert run("claim", "swin", "--jobs", 0).code == 2
