"""What one process holds while it trains, and what it does between two steps: evaluate, save, tell how far it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from vitarium.data.bad_files import BadFiles
from vitarium.data.loader import Loader, generators_kept, seed_generators
from vitarium.errors import TrainingStopped
from vitarium.files import atomic_path
from vitarium.nn.modes import evaluating
from vitarium.training.base import Batch, Learner
from vitarium.training.checkpoint import LAST, RunState, save_run
from vitarium.training.evaluation import run_evaluation, to_device
from vitarium.training.logs import Logs, Meters
from vitarium.training.optim import Average, Rates, create_optimizer
from vitarium.training.recipe import Recipe
from vitarium.training.sharding import gather_model, restore_whole, whole_states
from vitarium.training.signals import StopSignals

log = logging.getLogger("vitarium")

PROGRESS_SECONDS = 0.25
"""Between two calls of the progress callback."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step, total_steps: optimizer steps done and in all.
        epoch: passes over the training part, with fraction.
        loss: of the last step.
        lr: the last step's learning rate.
        images_per_second: over all processes, since the last call.
        seconds: spent in training steps, over all sessions of the run.
        metrics: numbers of the last evaluation.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    lr: float
    images_per_second: float
    seconds: float
    metrics: dict[str, float]


@dataclass
class Run:
    """Everything of one training in this process; `fit` sets it up, `train` drives it."""

    fabric: Fabric
    learner: Learner
    recipe: Recipe
    state: RunState
    folder: Path
    loader: Loader
    val_loader: Loader
    ema: Average | None = None
    whole: nn.Module | None = None  # where weights are spread over processes: a model to gather them in
    progress: Callable[[Progress], None] | None = None
    stop: StopSignals = field(default_factory=StopSignals)

    module: Any = None  # the learner as Fabric wrapped it: calling it gives the losses
    optimizer: Any = None
    rates: Rates | None = None
    logs: Logs | None = None  # in the first process
    save_error: str | None = None
    last_saved: float = field(default_factory=time.monotonic)
    _shown: tuple[float, int] = (0.0, 0)

    def __post_init__(self) -> None:
        norms = [m for m in self.learner.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.statistics: list[Tensor] = [b for norm in norms for b in norm.buffers(recurse=False)]
        device = self.fabric.device
        self.meters = {name: Meters(self.state.meters.get(name, {}), device) for name in ("line", "evaluation")}

    def set_up(self) -> None:
        """Wrap the learner for the devices, and make its optimizer."""
        self.module = self.fabric.setup_module(self.learner)
        self.optimizer = self.fabric.setup_optimizers(create_optimizer(self.learner, self.recipe.optimizer))
        self.parameters = [p for p in self.learner.parameters() if p.requires_grad]

    # ---- sizes and data

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return self.loader.steps // self.recipe.accumulate

    @property
    def images_per_step(self) -> int:
        """Pictures a step, over accumulation and processes."""
        return self.recipe.batch_size * self.recipe.accumulate * self.fabric.world_size

    @property
    def epoch(self) -> float:
        """Passes over the training part so far."""
        return round(self.state.step / self.steps_per_epoch, 4)

    def batches(self) -> Iterator[Batch]:
        """The batches from the present step on, epoch after epoch, without end."""
        count, per_epoch = self.recipe.accumulate, self.steps_per_epoch
        epoch, done = divmod(self.state.step, per_epoch)
        while True:
            epoch_batches = self.loader.epoch(epoch, start_step=done * count)
            for _ in range((per_epoch - done) * count):
                yield next(epoch_batches)
            epoch, done = epoch + 1, 0

    # ---- evaluation

    @property
    def evaluation_due(self) -> bool:
        """Whether the present step is to be evaluated and was not yet."""
        state = self.state
        every = max(1, self.recipe.eval_every.steps(state.total_steps, self.steps_per_epoch))
        return state.evaluated != state.step and (state.step == state.total_steps or (state.step > 0 and state.step % every == 0))

    def evaluate(self) -> None:
        """Evaluate the moving average, or the model where there is none, and note the numbers."""
        state = self.state
        values = run_evaluation(
            self.learner,
            self.model_to_evaluate(),
            self.val_loader.epoch(0),
            device=self.fabric.device,
            autocast=self.fabric.autocast,
            between=self.stop_if_asked,
        )
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        means = {f"train_{name}": value for name, value in self.means("evaluation").items()}
        lr = self.rates.at(max(0, state.step - 1)) if self.rates else 0.0
        state.history.append({"step": state.step, "epoch": self.epoch, "seconds": state.seconds, "lr": lr, **means, **numbers})
        state.evaluated = state.step
        name, better = self.learner.primary_metric
        if name in numbers:
            state.best = (max if better == "max" else min)(numbers[name], numbers[name] if state.best is None else state.best)
        self.note_bad_files(everywhere=True)
        if self.logs:
            self.logs.evaluation(state.history)
            self.draw()
        self.tell(None)

    def draw(self) -> None:
        """Write what the learner draws of the first held-out batch to pictures/NAME-STEP.png."""
        if type(self.learner).pictures is Learner.pictures:
            return
        batch = next(self.val_loader.epoch(0))
        if not len(batch["index"]):
            return
        model = self.model_to_evaluate()
        with evaluating(model, inference=True), generators_kept():
            seed_generators(self.recipe.seed)
            drawn = self.learner.pictures(model, to_device(batch, self.fabric.device))
        try:
            (self.folder / "pictures").mkdir(exist_ok=True)
            for name, picture in drawn.items():
                with atomic_path(self.folder / "pictures" / f"{name}-{self.state.step:06d}.png") as temporary:
                    picture.save(temporary, format="png")
        except OSError as error:
            log.warning("cannot write the pictures of step %d (%s); training goes on", self.state.step, error)

    def model_to_evaluate(self) -> nn.Module:
        """The moving average, the gathered weights, or the model itself; called in all processes."""
        if self.whole is not None:
            gather_model(self.learner, self.whole)
        return self.ema.module if self.ema else self.whole or self.learner.eval_model()

    def means(self, meters: str) -> dict[str, float]:
        """The means of logged scalars over all processes, beginning anew."""
        means = self.meters[meters].means()
        if self.fabric.world_size > 1:
            together: Any = self.fabric.all_reduce(torch.tensor(list(means.values()), device=self.fabric.device), reduce_op="mean")
            means = dict(zip(means, together.tolist(), strict=True))
        return means

    def note_bad_files(self, *, everywhere: bool = False) -> None:
        """Add the images that could not be read, of this process or of all, to the state; the first process lists them in a file."""
        here = [pair for loader in (self.loader, self.val_loader) if loader.bad_files for pair in loader.bad_files.items()]
        if everywhere and self.fabric.world_size > 1:
            parts: list[Any] = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(parts, here)
            here = [pair for part in parts for pair in part]
        known = BadFiles(limit=1.0)
        for path, reason in [*self.state.bad_files, *here]:
            known.record(path, reason)
        if self.logs and len(known) > len(self.state.bad_files):
            self.logs.bad_files(known)
        self.state.bad_files = known.items()

    # ---- saving and stopping

    @property
    def save_due(self) -> bool:
        """Whether the first process's clock asks for a checkpoint."""
        return self.fabric.is_global_zero and time.monotonic() - self.last_saved > 60 * self.recipe.checkpoint_minutes

    def save(self) -> None:
        """Write last.ckpt from the first process. Where that fails the old one stays, and training goes on to the next interval."""
        self.last_saved = time.monotonic()
        tensors = self.tensors()
        if not self.fabric.is_global_zero:
            return
        self.state.meters = {name: meters.state() for name, meters in self.meters.items()}
        self.note_bad_files()
        try:
            save_run(self.folder / LAST, self.state, tensors)
            self.save_error = None
        except OSError as error:
            self.save_error = str(error)
            log.warning("cannot write %s (%s); training goes on with the old checkpoint intact", self.folder / LAST, error)

    def tensors(self) -> dict[str, Any]:
        """State dicts of the learner, the moving average and (until the end) the optimizer."""
        if self.whole is not None:
            tensors = whole_states(self.learner, self.optimizer)
        else:
            tensors = {"learner": self.learner.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.ema:
            tensors["ema"] = self.ema.module.state_dict()
        if self.state.finished:
            tensors.pop("optimizer")
        return tensors

    def restore(self, tensors: dict[str, Any]) -> None:
        """Put back what `tensors` gave."""
        if self.whole is not None and "optimizer" in tensors:
            restore_whole(self.learner, self.optimizer, tensors)
            return
        self.learner.load_state_dict(tensors["learner"])
        if self.ema:
            self.ema.module.load_state_dict(tensors["ema"])
        if "optimizer" in tensors:
            self.optimizer.load_state_dict(tensors["optimizer"])

    def stop_if_asked(self) -> None:
        """Between two batches of an evaluation: save and leave when a signal came."""
        if self.stop.requested:
            self.leave()

    def leave(self) -> None:
        """Save, and end as an interrupt does.

        Raises:
            KeyboardInterrupt: always, unless
            TrainingStopped: the state could not be saved.
        """
        self.save()
        self.fabric.barrier()  # the others wait, so that none that ends first takes the writer with it
        self.check_saved()
        raise KeyboardInterrupt(f"interrupted at step {self.state.step} of {self.state.total_steps}; the same command goes on from there")

    def check_saved(self) -> None:
        """
        Raises:
            TrainingStopped: the last checkpoint could not be written.
        """
        if self.save_error:
            raise TrainingStopped(
                f"the last checkpoint could not be written: {self.folder / LAST}: {self.save_error}; make room, then run again: "
                "training goes on from the checkpoint before"
            )

    # ---- telling

    def tell(self, losses: dict[str, Tensor] | None) -> None:
        """Call the progress callback: after an evaluation (None), and now and then after a step, with its losses."""
        now = time.monotonic()
        before, step = self._shown
        if not self.progress or (losses is not None and now - before < PROGRESS_SECONDS):
            return
        self._shown = now, self.state.step
        speed = (self.state.step - step) * self.images_per_step / (now - before) if before else 0.0
        last = self.state.history[-1] if self.state.history else {}
        metrics = {name: value for name, value in last.items() if name not in ("step", "epoch", "seconds", "lr")}
        loss = float(losses["loss"]) if losses is not None else metrics.get("train_loss", float("nan"))
        lr = self.rates.at(max(0, self.state.step - 1)) if self.rates else 0.0
        self.progress(Progress(self.state.step, self.state.total_steps, self.epoch, loss, lr, speed, self.state.seconds, metrics))

    def write_line(self, norm: Tensor) -> None:
        """A line of log.csv: means since the line before, the last step's rate and gradient norm."""
        state = self.state
        means = self.means("line")
        if not self.logs:
            return
        lr = self.rates.at(state.step - 1) if self.rates else 0.0
        speed = state.step * self.images_per_step / state.seconds if state.seconds else 0.0
        numbers = {"lr": lr, "grad_norm": float(norm), "skipped": state.skipped, "seconds": state.seconds, "images_per_second": speed}
        self.logs.line({"step": state.step, "epoch": self.epoch, **means, **numbers})


def same_on_all(fabric: Fabric, *flags: bool) -> tuple[bool, ...]:
    """Each flag, true where it is true in any process; one small message, none in a single process."""
    if fabric.world_size == 1:
        return flags
    votes = fabric.all_reduce(torch.tensor(flags, dtype=torch.float32, device=fabric.device), reduce_op="max")
    return tuple(bool(vote) for vote in votes.tolist())  # type: ignore[union-attr]
