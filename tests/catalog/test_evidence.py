"""Status of the systems, computed from recorded test results."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import EVIDENCE, TESTS, EvidenceRecorder, pytest_configure
from vitarium.catalog import evidence
from vitarium.catalog.evidence import system_status, system_statuses
from vitarium.catalog.systems import find_system, systems
from vitarium.errors import UsageError

PROVEN = {"swin": {"goldens": {"swin-tiny_w7_224": 1e-14}, "identities": {"test_x": True}}}


@pytest.fixture
def found(monkeypatch):
    """Sets what was recorded and what the claim said."""

    def put(rows, verdict=None):
        monkeypatch.setattr(evidence, "recorded", lambda: rows)
        monkeypatch.setattr(evidence, "_verdict", lambda slug: verdict)
        return system_status("swin")

    return put


def test_every_golden_is_wired():
    """A golden of a system passes on record; one of a base, which no row of evidence counts, is asked for by name in a test."""
    passed = {name for row in evidence.recorded().values() for name, error in row["goldens"].items() if error is not None}
    asked = "".join(file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py"))
    vendored = sorted(file.stem for file in (TESTS / "golden").glob("*.json"))
    assert vendored
    assert [name for name in vendored if name not in passed and f'"{name}"' not in asked] == []


def test_there_are_103_systems():
    statuses = system_statuses()
    assert [s.slug for s in statuses] == [s.slug for s in systems()]
    assert len(statuses) == 103
    assert {s.status for s in statuses} <= {"working", "partial", "missing"}
    json.dumps([s.to_dict() for s in statuses])


def test_missing_without_a_module(monkeypatch):
    monkeypatch.setattr(evidence, "entry_of", lambda slug: None)
    status = system_status("swin")
    assert (status.status, status.evidence.models, status.room) == ("missing", [], "backbones")


def test_working_needs_all_of_it(found):
    status = found(PROVEN, "not held")
    assert status.status == "working", "a claim that does not hold is shown as such, and counts as run"
    assert "swin_tiny" in status.evidence.models
    assert (status.evidence.goldens_passed, status.evidence.goldens_wired, status.evidence.identities) == (1, 1, 1)


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ({}, "held"),
        (PROVEN, None),
        ({"swin": {**PROVEN["swin"], "goldens": {"swin-tiny_w7_224": 1e-14, "swin-mlp_c16_w7_224": None}}}, "held"),
        ({"swin": {**PROVEN["swin"], "identities": {}}}, "held"),
        ({"swin": {**PROVEN["swin"], "identities": {"test_x": False}}}, "held"),
    ],
)
def test_partial_where_something_is_owed(found, rows, verdict):
    assert found(rows, verdict).status == "partial"


def test_a_verdict_is_read_from_the_ledger(tmp_path, monkeypatch):
    (tmp_path / "claims/ledger").mkdir(parents=True)
    (tmp_path / "claims/ledger/swin.json").write_text('{"verdict": "inconclusive"}')
    monkeypatch.setattr(evidence.resources, "files", lambda package: tmp_path)
    assert evidence._verdict("swin") == "inconclusive"
    assert evidence._verdict("convnext") is None


def test_unknown_slug():
    with pytest.raises(UsageError, match="did you mean swin"):
        system_status("swinn")


# ---- what is recorded


def test_every_recorded_golden_is_in_the_repository_and_the_other_way_round():
    assert len(evidence.recorded()) == len(list(EVIDENCE.glob("*.json"))) > 0
    for slug, row in evidence.recorded().items():
        find_system(slug)
        assert set(row["goldens"]) == {p.stem for p in (TESTS / "golden").glob(f"{slug}-*.json")}, f"run `make evidence` ({slug})"


def report(nodeid, *, passed=True, when="call", **properties):
    pairs = [(kind, value) for kind, values in properties.items() for value in values]
    return SimpleNamespace(nodeid=nodeid, when=when, passed=passed, failed=not passed, user_properties=pairs)


@pytest.fixture
def recorder(tmp_path):
    (tmp_path / "golden").mkdir()
    for name in ("swin-a", "swin-b", "convnext-a"):
        (tmp_path / "golden" / f"{name}.json").touch()
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded/convnext.json").write_text('{"goldens": {"convnext-a": 0.5}, "identities": {"test_old": true}}')
    return EvidenceRecorder(tmp_path / "recorded", tmp_path / "golden")


def rows_of(recorder):
    recorder.pytest_sessionfinish()
    return {file.stem: json.loads(file.read_text()) for file in recorder.folder.glob("*.json")}


def test_records_what_passed_and_keeps_other_systems(recorder):
    recorder.pytest_runtest_logreport(report("tests/backbones/test_swin.py::test_golden[a]", golden=[("swin-a", 1e-12), ("swin-a", 1e-9)]))
    recorder.pytest_runtest_logreport(report("tests/backbones/test_swin.py::test_shift[0]", identity=[True]))
    recorder.pytest_runtest_logreport(report("tests/backbones/test_swin.py::test_shift[1]", identity=[True]))
    recorder.pytest_runtest_logreport(report("tests/catalog/test_saving.py::test_x", identity=[True]))
    rows = rows_of(recorder)
    assert rows == {
        "convnext": {"goldens": {"convnext-a": 0.5}, "identities": {"test_old": True}},
        "swin": {"goldens": {"swin-a": 1e-9, "swin-b": None}, "identities": {"test_shift": True}},
    }


def test_a_failure_anywhere_is_a_failure(recorder):
    for passed in (True, False, True):
        test = "tests/backbones/test_swin.py::test_shift[0]"
        recorder.pytest_runtest_logreport(report(test, passed=passed, identity=[True], golden=[("swin-a", 1e-9)]))
    assert rows_of(recorder)["swin"] == {"goldens": {"swin-a": None, "swin-b": None}, "identities": {"test_shift": False}}


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_an_error_that_is_no_number_proves_nothing(recorder, error, first):
    for value in (error, 1e-9) if first else (1e-9, error):
        recorder.pytest_runtest_logreport(report("tests/backbones/test_swin.py::test_golden", golden=[("swin-a", value)]))
    assert rows_of(recorder)["swin"]["goldens"]["swin-a"] is None


def test_a_system_that_is_run_again_loses_what_is_gone(recorder):
    recorder.pytest_runtest_logreport(report("tests/backbones/test_convnext.py::test_something"))
    assert rows_of(recorder)["convnext"] == {"goldens": {"convnext-a": None}, "identities": {}}


def test_the_plugin_collects_across_workers(tmp_path):
    """A project of two files with this conftest: goldens that the lead's helper appends, and a marked identity."""
    golden = tmp_path / "tests/golden"
    golden.mkdir(parents=True)
    (golden / "__init__.py").write_text("RESULTS = []\n")
    (golden / "swin-a.json").touch()
    (tmp_path / "tests/conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\nmarkers = ["identity: x"]\n')
    (tmp_path / "tests/test_swin.py").write_text(
        "import pytest\nfrom tests.golden import RESULTS\n"
        "def test_golden(): RESULTS.append(('swin-a', 1e-11))\n"
        "@pytest.mark.identity\n@pytest.mark.parametrize('i', range(4))\ndef test_same(i): pass\n"
    )
    (tmp_path / "src/vitarium/catalog").mkdir(parents=True)
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-n2", "-p", "no:cacheprovider", "--record-evidence"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "src/vitarium/catalog/recorded/swin.json").read_text())
    assert row == {"goldens": {"swin-a": 1e-11}, "identities": {"test_same": True}}


@pytest.mark.parametrize(("keyword", "args"), [("golden", []), ("", ["tests/backbones/test_swin.py::test_golden"])])
def test_recording_wants_whole_files(keyword, args):
    option = SimpleNamespace(keyword=keyword, markexpr="")
    config = SimpleNamespace(getoption=lambda name: True, option=option, args=args)
    with pytest.raises(pytest.UsageError, match="wants whole files"):
        pytest_configure(config)


def test_the_recorded_file_is_package_data():
    assert EVIDENCE.parent == Path(evidence.__file__).parent
