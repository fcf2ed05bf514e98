"""The clock of other programs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitarium.engine.machine import OtherPrograms


@pytest.fixture
def clock(monkeypatch):
    """Two cores of a system whose counters the test sets."""
    counters = dict(stat="", own=0.0, wall=0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: 100, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: counters["stat"])
    monkeypatch.setattr(time, "process_time", lambda: counters["own"])
    monkeypatch.setattr(time, "perf_counter", lambda: counters["wall"])
    return counters


def test_the_share_of_other_programs_is_what_this_process_did_not_use(clock):
    clock["stat"] = "cpu 1 1 1 1\ncpu0 100 0 0 500 9 0 0 0 0 0\ncpu1 7 7 7 7 7 7 7 7 0 0\ncpu3 100 0 100 500 9 0 0 0 0 0\n"
    others = OtherPrograms()
    clock.update(
        own=2.0, wall=2.0, stat=clock["stat"].replace("cpu0 100", "cpu0 300").replace("cpu3 100", "cpu3 200").replace("cpu1 7", "cpu1 900")
    )
    assert others.share() == 0.25  # of 4 seconds of two cores, 3 were used, 2 of them here
    clock.update(own=9.0)
    assert others.share() == 0


def test_a_system_without_counters_has_no_load(clock):
    assert OtherPrograms().share() == 0


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="counters of Linux")
def test_the_counters_of_this_system_are_read():
    before = OtherPrograms._read()[0]
    subprocess.run([sys.executable, "-c", "sum(i * i for i in range(10**6))"], check=True)
    after = OtherPrograms._read()[0]
    assert before is not None
    assert after is not None
    assert after > before
