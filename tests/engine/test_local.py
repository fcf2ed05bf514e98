"""The local engine: skipping, retrying, reporting and resuming of runs."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.work import part, run
from vitarium.engine import Engine, Job, RunEvent, as_engine, map_images, run_all
from vitarium.engine.images import finished_parts, raise_lasting
from vitarium.engine.runs import worth_a_retry
from vitarium.engine.worker import portable
from vitarium.errors import DataError, MissingExtra, NotSaved, TrainingStopped, UsageError
from vitarium.files import write_error


def jobs_of(folder: Path, *settings: dict[str, Any]) -> list[Job]:
    """A job of `run` for each."""
    return [Job(f"run {i}", run, folder / str(i), {"value": i, **given}) for i, given in enumerate(settings)]


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_are_retried_once_then_named_and_finished_runs_are_kept(tmp_path, workers):
    jobs = jobs_of(tmp_path, {}, {"fails": 1}, {"fails": 2}, {"fails": 1, "how": "usage"})
    events: list[RunEvent] = []
    outcomes = run_all(jobs, workers=workers, progress=events.append)
    assert [o.value and o.value["value"] for o in outcomes] == [0, 1, None, None]
    assert str(outcomes[2].error) == "attempt 2 failed"
    assert type(outcomes[3].error) is UsageError
    attempts = [int((tmp_path / str(i) / "attempts").read_text()) for i in range(4)]
    assert attempts == [1, 2, 2, 1]  # a usage error is not retried
    kinds = [[e.kind for e in events if e.position == i] for i in range(4)]
    assert kinds[1] == ["started", "progress", "retried", "started", "progress", "finished"]
    assert kinds[2] == ["started", "progress", "retried", "started", "progress", "failed"]
    assert kinds[3] == ["started", "progress", "failed"]
    assert any("attempt 1 failed" in e.traceback and "work.py" in e.traceback for e in events if e.kind == "retried")
    assert json.loads((tmp_path / "1" / "result.json").read_text()) == outcomes[1].value

    events.clear()
    again = run_all(jobs, workers=3 - workers, progress=events.append)  # the other way of running
    assert [o.kept for o in again] == [True, True, False, False]
    assert [e.kind for e in events if e.position < 2] == ["kept", "kept"]
    assert again[2].value == {"value": 2, "pairs": [[2, 3]]}  # its third attempt


def test_a_full_disk_is_not_retried_and_the_result_is_in_the_error(tmp_path, monkeypatch):
    def full(path, value):
        raise write_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    monkeypatch.setattr("vitarium.engine.worker.write_json", full)
    events: list[RunEvent] = []
    (outcome,) = run_all(jobs_of(tmp_path, {}), progress=events.append)
    assert [e.kind for e in events] == ["started", "progress", "failed"]
    assert outcome.error.result == {"value": 0, "pairs": [[0, 1]]}
    assert not worth_a_retry(NotSaved("the last checkpoint is not saved"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_process_is_a_lost_run(tmp_path):
    jobs = jobs_of(tmp_path, {"fails": 1, "how": "kill"}, {"fails": 9, "how": "kill"}, {})
    outcomes = run_all(jobs, workers=2)
    assert [o.value is not None for o in outcomes] == [True, False, True]
    assert isinstance(outcomes[1].error, TrainingStopped)
    assert "exit code -9" in str(outcomes[1].error)


def test_a_fatal_error_and_an_interrupt_stop_all(tmp_path):
    jobs = jobs_of(tmp_path, {"fails": 9}, {})
    with pytest.raises(RuntimeError, match="attempt 1 failed"):
        run_all(jobs, fatal=lambda error: isinstance(error, RuntimeError))
    assert not (tmp_path / "1").exists()

    def interrupt(event: RunEvent) -> None:
        if event.kind == "progress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(jobs, workers=2, progress=interrupt)


def test_results_without_their_files_do_not_count(tmp_path):
    job = Job("run", run, tmp_path / "run", {"value": 1}, files=("attempts",))
    run_all([job])
    assert run_all([job])[0].kept is True
    (tmp_path / "run" / "attempts").unlink()
    assert run_all([job])[0].kept is False


def test_two_runs_need_two_names_and_folders(tmp_path):
    with pytest.raises(UsageError, match="have the name 'a'"):
        run_all([Job("a", run, tmp_path / "1"), Job("a", run, tmp_path / "2")])
    with pytest.raises(UsageError, match="have the folder"):
        run_all([Job("a", run, tmp_path / "1"), Job("b", run, tmp_path / "1")])


# ---- images


def test_parts_are_in_order_and_an_interrupted_call_continues(tmp_path):
    items = list(range(20))
    want = [[i * i for i in items[j : j + 4]] for j in range(0, 20, 4)]
    assert map_images(part, items, part_size=4) == want
    parts, marks = tmp_path / "parts", tmp_path / "marks"
    marks.mkdir()

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    given: dict[str, Any] = dict(shared=(marks,), part_size=4, parts=parts)
    with pytest.raises(KeyboardInterrupt):
        map_images(part, items, identity={"a": (1, 2)}, progress=stop, **given)
    assert finished_parts(parts, {"a": (1, 2)}) == want[:2]
    assert finished_parts(parts, "other") == []
    for mark in marks.glob("began-*"):
        mark.rmdir()
    seen: list[tuple[int, int]] = []
    assert map_images(part, items, identity={"a": (1, 2)}, progress=lambda *n: seen.append(n), **given) == want
    assert seen == [(8, 20), (12, 20), (16, 20), (20, 20)]
    assert {m.name for m in marks.glob("began-*")} == {"began-8", "began-12", "began-16"}
    assert not parts.exists()


def test_parts_of_another_identity_or_list_are_not_used(tmp_path):
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    for items, identity in (([1, 2, 3], "a"), ([1, 2, 3], "b"), ([1, 2, 4], "b")):
        with pytest.raises(KeyboardInterrupt):
            map_images(part, items, part_size=1, parts=tmp_path / "parts", identity=identity, progress=stop)
        assert finished_parts(tmp_path / "parts", identity) == [[1]]


def test_values_of_parts_hold_tensors(tmp_path):
    found = map_images(_tensors, [1, 2], part_size=1, parts=tmp_path / "parts")
    assert [(v["x"].tolist(), v["y"]) for v in found] == [([1.0], ("a", [None])), ([2.0], ("a", [None]))]


def _tensors(items: list[int]) -> dict[str, Any]:
    return {"x": torch.tensor(items).float(), "y": ("a", [None])}


def test_a_part_that_failed_twice_or_for_wrong_input_raises():
    failures = {3: (RuntimeError("later"), ""), 1: (RuntimeError("first"), "")}
    raise_lasting(failures, last=False)
    with pytest.raises(RuntimeError, match="first"):
        raise_lasting(failures, last=True)
    with pytest.raises(UsageError, match="never right"):
        raise_lasting({**failures, 4: (UsageError("never right"), "")}, last=False)


def test_no_items_no_parts():
    assert map_images(part, [], part_size=4) == []
    with pytest.raises(UsageError, match="give engine='ray'"):
        map_images(part, [1], part_size=1, engine=Engine(jobs=2))
    with pytest.raises(UsageError, match="part_size"):
        map_images(part, [1], part_size=0)


# ---- settings and errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(engine="rya"), "local, ray; got 'rya'; did you mean ray"),
        (dict(engine="local", address="auto"), "give engine='ray'"),
        (dict(jobs=0), "jobs must be at least 1"),
        (dict(engine="ray", cpus=0), "cpus must be above 0"),
        (dict(engine="ray", gpus=-1), "gpus must be 0 or more"),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(UsageError, match=message):
        as_engine(**given)


def test_settings_of_an_engine_stay_where_nothing_is_given():
    assert as_engine(Engine("ray", jobs=3, cpus=2), address="auto") == Engine("ray", "auto", jobs=3, cpus=2)
    assert Engine().in_process
    assert not Engine("ray").in_process
    assert not Engine(jobs=2).in_process


def test_without_ray_the_error_names_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'vitarium\[cluster\]'"):
        run_all(jobs_of(tmp_path, {}), "ray")
    with pytest.raises(MissingExtra, match=r"pip install 'vitarium\[cluster\]'"):
        map_images(part, [1], part_size=1, engine="ray")


class Awkward(DataError):
    """An error that pickle cannot make again."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")


def test_errors_survive_the_way_between_processes():
    error, text = portable(Awkward("a.png", "cut off"))
    assert type(error) is DataError
    assert str(error) == "a.png: cut off"
    assert "Awkward" in text
    assert portable(UsageError("x"))[0].args == ("x",)
