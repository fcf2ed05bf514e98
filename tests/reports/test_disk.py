"""A disk that is full ends a comparison; what was measured is in the error and printed."""

from __future__ import annotations

import errno
import os

import pytest
from typer.testing import CliRunner

import vitarium
from tests.reports.test_compare import MODELS, images, recipe  # noqa: F401 (fixtures)
from vitarium.cli.app import app
from vitarium.errors import NotSaved, WriteError
from vitarium.files import write_error
from vitarium.reports import compare as module
from vitarium.reports import trial
from vitarium.reports.disk import measured, of_disk
from vitarium.verbs.compare import Compared

NAMES = [*MODELS, "swin_pico"]


def full_from(second: str, monkeypatch) -> None:
    """No model file fits on the disk from this model on."""
    save = trial.save

    def full(model, path):
        if second in str(path):
            raise write_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        save(model, path)

    monkeypatch.setattr(trial, "save", full)


def test_models_that_were_measured_are_the_result(tmp_path, recipe, images, monkeypatch, caplog):  # noqa: F811
    full_from("convnext", monkeypatch)
    events = []
    with pytest.raises(WriteError, match=r"cannot write .*convnext_iso_pico/model\.safetensors: No space left on device; ") as caught:
        vitarium.compare("images", NAMES, recipe=recipe, out=tmp_path / "out", progress=events.append)
    assert [(e.model, e.kind) for e in events if e.kind not in ("step", "measuring")] == [
        (MODELS[0], "started"), (MODELS[0], "finished"), (MODELS[1], "started")
    ], "neither retried nor continued"  # fmt: skip
    result = caught.value.result
    assert isinstance(result, Compared)
    assert [t.name for t in result.trials] == MODELS
    assert result.failures[0].name == "swin_pico"
    assert "report" not in result.facts()
    assert "MB are free" not in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(module, "open_data", lambda *_, **__: images)
    again = vitarium.compare("images", NAMES, recipe=recipe, out=tmp_path / "out")  # there is room again
    assert [t.name for t in again.trials] == NAMES
    assert "report" in again.facts()


def test_a_page_that_does_not_fit_leaves_the_result(tmp_path, recipe, images, monkeypatch):  # noqa: F811
    def full(*_):
        raise write_error("report.html", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    monkeypatch.setattr(module, "write_report", full)
    with pytest.raises(WriteError) as caught:
        module.compare("images", MODELS, recipe=recipe, out=tmp_path / "out")
    assert [t.name for t in caught.value.result.trials] == MODELS


def test_nothing_measured_is_the_error_alone():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    with pytest.raises(WriteError, match="cannot write x: No space left on device") as caught:
        measured([], error)
    assert caught.value.result is None
    with pytest.raises(WriteError, match=r"^the last checkpoint"):
        measured([], NotSaved("the last checkpoint is not saved"))
    assert not of_disk(OSError(errno.EACCES, "x"))


def test_the_table_is_printed_once(tmp_path, recipe, images, monkeypatch):  # noqa: F811
    full_from("convnext", monkeypatch)
    monkeypatch.setenv("COLUMNS", "300")
    command = ["compare", "--data", "images", "--models", ",".join(NAMES), "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command, prog_name="vitarium")
    assert result.exit_code == 2
    assert result.stdout.count("\ntimm/vit_pico ") == result.stdout.count("\nconvnext_iso_pico ") == 1
    assert (result.stdout + result.stderr).count("MB are free") == 1
    assert "training continues" not in result.stderr
