"""The number of cores is that of this process, on systems that restrict it and on others."""

import os

from vitarium.cores import core_count


def test_cores_of_the_process_and_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert core_count() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert core_count() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert core_count() == 1
