"""Tests of `systems`: one row per system, filters, totals."""

import json

import pytest

from vitarium.catalog import evidence


@pytest.fixture
def swin_works(monkeypatch):
    """A world in which swin has all its evidence, and no other system has any."""
    real = evidence.system_statuses()
    nothing = evidence.Evidence(models=[], methods=[], goldens_passed=0, goldens_wired=0, identities=0, claim=None)
    proof = evidence.Evidence(models=["a", "b"], methods=[], goldens_passed=2, goldens_wired=2, identities=1, claim="held")
    words = {"swin": ("working", proof)}
    statuses = [evidence.Status(s.slug, s.title, s.room, *words.get(s.slug, ("missing", nothing))) for s in real]
    monkeypatch.setattr(evidence, "system_statuses", lambda: statuses)


def test_all_103_as_json(run):
    rows = json.loads(run("systems", "--json").out)
    assert len(rows) == len({row["slug"] for row in rows}) == 103
    assert all(set(row) == {"slug", "title", "room", "status", "evidence"} for row in rows)
    assert {row["status"] for row in rows} <= {"working", "partial", "missing"}


def test_the_table_has_totals(run, swin_works):
    shown = run("systems").out
    assert "swin " in shown
    assert "2 models, 2/2 goldens, 1 identity, claim held" in shown
    assert "103 systems: 1 working," in shown.splitlines()[-1]


def test_filters(run, swin_works):
    rows = json.loads(run("systems", "--status", "working", "--json").out)
    assert [row["slug"] for row in rows] == ["swin"]
    assert rows[0]["evidence"]["claim"] == "held"
    rooms = {row["room"] for row in json.loads(run("systems", "--room", "efficiency", "--json").out)}
    assert len(rooms) > 1
    assert all(room.startswith("efficiency") for room in rooms)


@pytest.mark.parametrize(
    ("arguments", "text"), [(["--room", "backbone"], "did you mean backbones"), (["--status", "done"], "'working', 'partial', 'missing'")]
)
def test_wrong_filters(run, arguments, text):
    result = run("systems", *arguments)
    assert result.code == 2
    assert text in result.err
