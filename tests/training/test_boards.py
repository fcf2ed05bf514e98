"""Loggers beside log.csv: what was logged can be read back, and one that fails does not stop a training."""

from __future__ import annotations

import logging
import sys

import pytest

from tests.training.tiny import tiny_data, tiny_net, tiny_recipe
from vitarium.errors import MissingExtra
from vitarium.training import ClassificationLearner, fit
from vitarium.training import boards as boards_module


def train(folder, *changes):
    learner = ClassificationLearner(tiny_net())
    return fit(learner, tiny_data(), tiny_recipe("budget.steps=4", "log_every=2", "eval_every=2 steps", *changes), folder)


def test_mlflow_has_the_numbers_of_the_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = train(tmp_path / "run", "log=[mlflow]")
    client = mlflow.MlflowClient(tracking_uri=boards_module._local_store(tmp_path / "run"))
    experiment = client.get_experiment_by_name("vitarium")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    accuracies = client.get_metric_history(found.info.run_id, "val/accuracy")
    assert [(m.step, m.value) for m in accuracies] == [(e["step"], e["accuracy"]) for e in result.history]
    assert [m.step for m in client.get_metric_history(found.info.run_id, "train/loss")] == [2, 4]
    assert found.data.params["batch_size"] == "8"


def logged_rows(content):
    """Yield what was logged, from a file of records in LevelDB's format: blocks of 32 KiB with parts of a record each."""
    from wandb.proto import wandb_internal_pb2

    place, data = 7, b""  # after the header
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # too little for another part in this block
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        data += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            data = b""
            if record.WhichOneof("record_type") == "history":
                yield {item.key or item.nested_key[0]: item.value_json for item in record.history.item}


def test_wandb_writes_offline_what_it_can_send_later(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = train(tmp_path / "run", "log=[wandb]")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    rows = list(logged_rows(file.read_bytes()))
    logged = [float(row["val/accuracy"]) for row in rows if "val/accuracy" in row]
    assert logged == [entry["accuracy"] for entry in result.history]


def test_a_logger_that_fails_is_one_warning(tmp_path, monkeypatch, caplog):
    class Broken:
        def __init__(self, *_):
            raise ConnectionError("no network")

    monkeypatch.setitem(boards_module.KINDS, "mlflow", Broken)
    monkeypatch.setattr(boards_module, "require", lambda *_: None)
    with caplog.at_level(logging.WARNING, "vitarium"):
        result = train(tmp_path / "run", "log=[mlflow]")
    assert result.steps == 4
    assert [r.getMessage() for r in caplog.records if "mlflow" in r.getMessage()] == [
        "mlflow cannot be written (no network); training continues without it"
    ]


def test_a_package_that_is_missing_is_named_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"vitarium\[wandb\]"):
        train(tmp_path / "run", "log=[wandb]")
    assert not (tmp_path / "run" / "log.csv").exists()
