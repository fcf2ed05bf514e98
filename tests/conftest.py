"""Fixtures of all tests: no network access, and recording of golden and identity results (`pytest --record-evidence`, `make evidence`)."""

from __future__ import annotations

import math
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
EVIDENCE = TESTS.parent / "src/vitarium/catalog/recorded"
LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails at once; this machine's own addresses stay open (gloo, a test's server)."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise OSError(f"no network in tests, and this one asked for {address}")
        return connect(self, address)

    def guarded_resolve(host: Any, *args: Any, **options: Any) -> Any:
        if host not in (*LOCAL, socket.gethostname()):
            raise socket.gaierror(f"no network in tests, and this one asked for {host}")
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_resolve)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests write into no folder of the user."""
    monkeypatch.setenv("VITARIUM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


# ---- evidence


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-evidence", action="store_true", help="write the results of goldens and identities to catalog/recorded")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-evidence") and not hasattr(config, "workerinput"):  # under xdist, only where the reports arrive
        if config.option.keyword or config.option.markexpr or any("::" in arg for arg in config.args):
            raise pytest.UsageError("--record-evidence wants whole files: a system's row is replaced by what its tests of this run say")
        config.pluginmanager.register(EvidenceRecorder(), "evidence")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Hand what a test compared to its report, which travels from xdist's workers."""
    if call.when == "call":
        golden = sys.modules.get("tests.golden")
        results: list[tuple[str, float]] = getattr(golden, "RESULTS", [])
        item.user_properties.extend(("golden", (name, float(error))) for name, error in results)
        results.clear()
        if item.get_closest_marker("identity"):
            item.user_properties.append(("identity", True))
    return (yield)


class EvidenceRecorder:
    """Collects the outcomes of a run into one file a system, recorded/<slug>.json, with its goldens and identities."""

    def __init__(self, folder: Path = EVIDENCE, goldens: Path = TESTS / "golden"):
        self.folder = folder
        self.vendored = sorted(file.stem for file in goldens.glob("*.json"))
        self.goldens: dict[str, float | None] = {}
        self.identities: dict[str, dict[str, bool]] = {}
        self.combinations: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        slug = _slug_of_test(report.nodeid)
        tests = self.identities.setdefault(slug, {})  # also for a file without identities, whose old row must go
        if report.when != "call":
            return
        for kind, value in report.user_properties:
            if kind == "golden":
                name, error = value
                before = self.goldens.get(name, 0.0)
                proven = report.passed and math.isfinite(error) and before is not None  # max() would lose a NaN
                self.goldens[name] = max(error, before) if proven else None
            elif kind == "combination" and report.passed:
                self.combinations.append(value)
            elif kind == "identity":
                test = report.nodeid.split("::", 1)[1].partition("[")[0]
                tests[test] = tests.get(test, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        from vitarium.catalog.systems import systems
        from vitarium.files import write_json

        seen = {*self.identities, *map(_slug_of_golden, self.goldens)}
        for slug in (s.slug for s in systems() if s.slug in seen):
            wired = [name for name in self.vendored if _slug_of_golden(name) == slug]
            goldens = {name: self.goldens.get(name) for name in wired}
            identities = dict(sorted(self.identities.get(slug, {}).items()))
            write_json(self.folder / f"{slug}.json", {"goldens": goldens, "identities": identities})
        if self.combinations:
            table = TESTS.parent / "docs/examples/combinations.json"
            write_json(table, sorted(self.combinations, key=lambda row: (row["model"], row["smaller"], row["reducer"])))


def _slug_of_golden(name: str) -> str:
    return name.partition("-")[0]


def _slug_of_test(nodeid: str) -> str:
    found = re.search(r"test_(\w+)\.py", nodeid)
    return found[1] if found else ""
