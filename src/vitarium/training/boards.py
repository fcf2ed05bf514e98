"""Loggers of a run's numbers beside log.csv: TensorBoard, Weights & Biases, MLflow.

A logger that fails, for example without a network, never stops a training: its failure is a warning, and it is not used further.
"""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from vitarium.errors import require
from vitarium.training.recipe import Recipe

log = logging.getLogger("vitarium")

EXTRAS = {"wandb": "wandb", "mlflow": "mlflow"}
"""Logger -> the extra that installs its package, which has the logger's name. TensorBoard is used where it is installed."""


class Board(Protocol):
    """A logger of numbers."""

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name ("train/loss", "val/accuracy") at an optimizer step."""

    def close(self) -> None:
        """Write what is left, and end."""


class TensorBoard:
    """TensorBoard's events, in the folder `tensorboard` of the run."""

    def __init__(self, folder: Path, step: int, recipe: Recipe):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)

    def add(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, in the project `vitarium` (or `WANDB_PROJECT`).

    It goes online only with a key (`wandb login`, or `WANDB_API_KEY`), and as `WANDB_MODE` says; else it is written to the folder `wandb`
    of the run, for `wandb sync`. A resumed run continues under its name.
    """

    def __init__(self, folder: Path, step: int, recipe: Recipe):
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        known = folder / "wandb.id"
        name = known.read_text().strip() if step and known.exists() else uuid.uuid4().hex[:8]
        known.write_text(name)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vitarium"),
            dir=str(folder),
            id=name,
            name=folder.name,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            config=recipe.model_dump(mode="json", by_alias=True),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, init_timeout=30),
        )

    def add(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _has_key() -> bool:
    """Return whether this user has a key of Weights & Biases: in the environment, or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class MLflow:
    """A run of MLflow, in the experiment `vitarium`: at `MLFLOW_TRACKING_URI`, else in the run's folder (`mlflow.db` or `mlruns`).

    A resumed run continues the run of MLflow that it began.
    """

    def __init__(self, folder: Path, step: int, recipe: Recipe):
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or _local_store(folder))
        experiment = self.client.get_experiment_by_name("vitarium")
        number = experiment.experiment_id if experiment else self.client.create_experiment("vitarium")
        known = folder / "mlflow.id"
        if step and known.exists():
            self.id = known.read_text().strip()
        else:
            self.id = self.client.create_run(number, run_name=folder.name).info.run_id
            known.write_text(self.id)
            for key, value in recipe.model_dump(mode="json", by_alias=True).items():
                self.client.log_param(self.id, key, str(value)[:500])

    def add(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.id)


def _local_store(folder: Path) -> str:
    """Return the address of a store in the run's folder: a database where its package is installed, else files."""
    if importlib.util.find_spec("sqlalchemy") and importlib.util.find_spec("alembic"):
        return f"sqlite:///{(folder / 'mlflow.db').absolute().as_posix()}"
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return (folder / "mlruns").absolute().as_uri()


KINDS: dict[str, Callable[[Path, int, Recipe], Board]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def check_boards(recipe: Recipe) -> None:
    """Check that the packages of a recipe's loggers are installed.

    Raises:
        MissingExtra: one is not; the message has its install line.
    """
    for name in recipe.log:
        if name in EXTRAS:
            require(name, EXTRAS[name])


class Boards:
    """The loggers of one run, which are opened with the first numbers.

    Args:
        folder: of the run.
        step: at which the run resumes.
        recipe: names them under `log`.
    """

    def __init__(self, folder: Path, step: int, recipe: Recipe):
        wanted = [name for name in dict.fromkeys(recipe.log) if name in EXTRAS or importlib.util.find_spec(name)]
        self._make: dict[str, Callable[[], Board]] = {name: lambda kind=KINDS[name]: kind(folder, step, recipe) for name in wanted}  # type: ignore[misc]
        self._open: dict[str, Board] = {}

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name at an optimizer step."""
        for name in list(self._make):
            self._try(name, lambda name=name: self._board(name).add(values, step))  # type: ignore[misc]

    def close(self) -> None:
        """Close those that are open."""
        for name in list(self._open):
            self._try(name, self._open[name].close)
        self._open = {}

    def _board(self, name: str) -> Board:
        if name not in self._open:
            self._open[name] = self._make[name]()
        return self._open[name]

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # each package has its own errors
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            log.warning("%s cannot be written (%s); training continues without it", name, reason)
            self._make.pop(name, None)
            self._open.pop(name, None)
