"""State of one training process, and its operations between steps: phases, checkpoints, progress."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from vitarium.catalog.create import preprocessing_of
from vitarium.data.bad_files import BadFiles
from vitarium.data.loader import Loader
from vitarium.errors import NotSaved
from vitarium.training.base import Batch, Learner
from vitarium.training.checkpoint import LAST, RunState, save_run
from vitarium.training.logs import Logs, Meters
from vitarium.training.optim import Average, create_optimizer
from vitarium.training.phases import Plan, hold_norms, require_gradients
from vitarium.training.players import checked_players
from vitarium.training.progress import PROGRESS_SECONDS, Progress, line_of, progress_of
from vitarium.training.recipe import Recipe
from vitarium.training.sharding import gather_model, restore_whole, whole_states
from vitarium.training.signals import StopSignals
from vitarium.training.stopping import is_over
from vitarium.training.turns import Outcome, Seat, foreign_buffers

log = logging.getLogger("vitarium")


@dataclass
class Run:
    """State of a training in this process; `fit` creates it, and `train` runs the steps."""

    fabric: Fabric
    learner: Learner
    recipe: Recipe
    state: RunState
    folder: Path
    plan: Plan
    make_loaders: Callable[[], tuple[Loader, Loader]]  # for training and evaluation, at the model's current image size
    make_sample: Callable[[], Loader]  # of training images without augmentation, for the statistics of batch norms
    whole: nn.Module | None = None  # if weights are sharded: a model to gather them in
    progress: Callable[[Progress], None] | None = None
    stop: StopSignals = field(default_factory=StopSignals)

    seats: list[Seat] = field(default_factory=list)
    logs: Logs | None = None  # in the first process
    save_error: str | None = None
    last_saved: float = field(default_factory=time.monotonic)
    changed: bool = False  # whether weights were changed by a step that is not complete
    _shown: tuple[float, int] = (0.0, 0)
    _saved: int = -1  # the step of the last checkpoint of this session
    _phase: int = 0
    _batches: Iterator[Batch] | None = None
    _last: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        norms = [m for m in self.learner.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.statistics: list[Tensor] = [b for norm in norms for b in norm.buffers(recurse=False)]
        device = self.fabric.device
        self.meters = {name: Meters(self.state.meters.get(name, {}), device) for name in ("line", "evaluation")}
        players = checked_players(self.learner, self.recipe)
        for name, player in players.items():
            settings = self.recipe.player(name)
            average = Average(player.averaged, settings.ema) if player.averaged is not None and settings.ema else None
            others = [other for key, other in players.items() if key != name]
            guarded = foreign_buffers(self.learner, player, others)
            self.seats.append(Seat(name, player, settings, self.learner.stepper(settings, name), average, guarded=guarded))
        self.loader, self.val_loader = self.make_loaders()

    def set_up(self) -> None:
        """Wrap the learner for the devices, and create the players' optimizers for all parameters that are trained in any phase."""
        require_gradients(self.learner, self.plan.ever)
        if len(self.seats) == 1:  # sharding has to come before the optimizer
            self.seats[0].module = self.fabric.setup_module(self.learner)
        for seat in self.seats:
            optimizer = create_optimizer(self.learner, seat.settings.optimizer, seat.player.parameters())
            seat.optimizer = self.fabric.setup_optimizers(optimizer)
            self.plan.attach(seat.optimizer)
        self._phase = -1

    def wrap(self) -> None:
        """Wrap the learner by Fabric once per player: the wrapper of several processes averages the gradients of the player's trained
        parameters."""
        for seat in self.seats:
            if seat.parameters:
                self.listen_to(seat)
                seat.module = self.fabric.setup_module(self.learner)

    def listen_to(self, seat: Seat) -> None:
        """Enable gradients for the parameters of one player only, if there are several."""
        if len(self.seats) > 1:
            self.learner.requires_grad_(False)
            for parameter in seat.parameters:
                parameter.requires_grad_(True)

    # ---- phases

    def averages(self) -> list[nn.Module]:
        """Return the players' moving averages and the model that is evaluated: the modules that phases change in addition to
        `learner.model`."""
        return [*(seat.average.module for seat in self.seats if seat.average), self.learner.eval_model()]

    def enter(self, step: int, value_step: int | None = None) -> None:
        """Set the phase and the values of a step.

        Args:
            value_step: the step of the values, if it differs.
        """
        number = self.plan.phase_at(step)
        if number != self._phase:
            before = self._phase
            self._phase = number
            self._change_phase(before, number)
        self.plan.set_values(step if value_step is None else value_step, number, self.averages())

    def _change_phase(self, before: int, number: int) -> None:
        plan = self.plan
        learns = plan.learning[number]
        if before < 0 or plan.learning[before] != learns:
            require_gradients(self.learner, learns)
            if plan.phases and not self.recipe.batch_norm.frozen:
                hold_norms(self.learner, plan.managed, learns)
            ids = {id(p) for name, p in self.learner.named_parameters() if name in learns}
            for seat in self.seats:
                seat.parameters = [p for p in seat.player.parameters() if id(p) in ids]
            if self.seats[0].optimizer is not None and (len(self.seats) > 1 or before >= 0 or learns != plan.ever):
                self.wrap()
        size = plan.image_size(number)
        if size != preprocessing_of(self.learner.model).image_size:
            plan.set_image_size(number, self.averages())
            self.loader.close()
            self.val_loader.close()
            self.loader, self.val_loader = self.make_loaders()
            self._batches = None

    # ---- sizes and data

    def positions(self, batch: Batch, number: int) -> Tensor:
        """Return the positions (B,) in the whole batch of the samples of accumulated batch 0, 1, ... of this process."""
        first = (number * self.fabric.world_size + self.fabric.global_rank) * self.recipe.batch_size
        position: Tensor = batch["position"]
        return position + first

    def stream(self) -> Iterator[Batch]:
        """Return the iterator over the batches of the current phase, from the current step on."""
        if self._batches is None:
            self._batches = self.batches()
        return self._batches

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps per epoch."""
        return self.loader.steps // self.recipe.accumulate

    @property
    def images_per_step(self) -> int:
        """Number of images per step, over accumulation and processes."""
        return self.recipe.batch_size * self.recipe.accumulate * self.fabric.world_size

    @property
    def epoch(self) -> float:
        """Number of passes over the training part so far."""
        return round(self.state.step / self.steps_per_epoch, 4)

    def batches(self) -> Iterator[Batch]:
        """Yield the batches from the current step on, epoch after epoch, without end."""
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
        """Return whether the current step is due for evaluation and was not evaluated yet."""
        state = self.state
        every = max(1, self.recipe.eval_every.steps(state.total_steps, self.steps_per_epoch))
        return state.evaluated != state.step and (state.step == state.total_steps or (state.step > 0 and state.step % every == 0))

    @property
    def stalled(self) -> bool:
        """Return whether the recipe stops the training early, after the last evaluation."""
        stopping = self.recipe.stopping
        return stopping is not None and is_over(self.state.history, *self.learner.primary_metric, stopping)

    def model_to_evaluate(self) -> nn.Module:
        """Return the moving average, the gathered weights, or the model itself; called in all processes."""
        if self.whole is not None:
            gather_model(self.learner, self.whole)
        model = self.learner.eval_model()
        averages = [seat.average.module for seat in self.seats if seat.average and seat.player.averaged is model]
        return averages[0] if averages else self.whole or model

    def means(self, meters: str) -> dict[str, float]:
        """Return the means of logged scalars since the last call, over all processes."""
        means = self.meters[meters].means() or {self.named(seat, "loss"): math.nan for seat in self.seats}
        if self.fabric.world_size > 1:
            together: Any = self.fabric.all_reduce(torch.tensor(list(means.values()), device=self.fabric.device), reduce_op="mean")
            means = dict(zip(means, together.tolist(), strict=True))
        return means

    @property
    def bad_files(self) -> BadFiles:
        """The record of unreadable images, which both loaders share."""
        assert self.loader.bad_files is not None
        return self.loader.bad_files

    def note_bad_files(self, *, everywhere: bool = False) -> None:
        """Add the images that could not be read, of this process or of all, to the state; the first process lists them in a file."""
        here = self.bad_files.items()
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
        """Return whether a checkpoint is due; only in the first process."""
        return self.fabric.is_global_zero and time.monotonic() - self.last_saved > 60 * self.recipe.checkpoint_minutes

    def save(self, *, last: bool = False) -> None:
        """Write last.ckpt from the first process. If that fails, the old one is kept, and training continues to the next interval.

        Args:
            last: training does not continue; a failure is left to `check_saved`. Else the first failure in a row is a warning.
        """
        self.last_saved = time.monotonic()
        tensors = self.tensors()
        if not self.fabric.is_global_zero:
            return
        self.state.meters = {name: meters.state() for name, meters in self.meters.items()}
        self.note_bad_files()
        try:
            save_run(self.folder / LAST, self.state, tensors)
            self.save_error, self._saved = None, self.state.step
        except OSError as error:
            before, self.save_error = self.save_error, str(error)
            kept = "with the old checkpoint intact" if (self.folder / LAST).exists() else "without a checkpoint"
            if not last and before is None:
                log.warning("%s; training continues %s", error, kept)

    def save_after_error(self) -> None:
        """Write last.ckpt from the first process after an error, unless that would replace a better one or need the other processes."""
        unready = self.seats[0].optimizer is None or self.whole is not None or not self.fabric.is_global_zero
        if unready or self._saved == self.state.step or (self.changed and (self.folder / LAST).exists()):
            return
        try:
            self.save(last=True)
            self.check_saved()
        except Exception as error:  # the first error is the one to report
            log.warning("the state could not be saved: %s", error)
        else:
            log.warning("the state of step %d is saved; the same command resumes from there", self.state.step)

    def tensors(self) -> dict[str, Any]:
        """Return the state dicts of the learner and, by player, of moving averages and (until the end) optimizers."""
        if self.whole is not None:
            learner, optimizer = whole_states(self.learner, self.seats[0].optimizer)
            tensors = {"learner": learner, "optimizers": {self.seats[0].name: optimizer}}
        else:
            optimizers = {seat.name: seat.optimizer.state_dict() for seat in self.seats}
            tensors = {"learner": self.learner.state_dict(), "optimizers": optimizers}
        tensors["averages"] = {seat.name: seat.average.module.state_dict() for seat in self.seats if seat.average}
        if self.state.finished:
            tensors.pop("optimizers")
        return tensors

    def restore(self, tensors: dict[str, Any]) -> None:
        """Load state dicts from `tensors`."""
        if self.whole is not None and "optimizers" in tensors:
            restore_whole(self.learner, self.seats[0].optimizer, tensors["learner"], tensors["optimizers"][self.seats[0].name])
            return
        self.learner.load_state_dict(tensors["learner"])
        for seat in self.seats:
            if seat.average:
                seat.average.module.load_state_dict(tensors["averages"][seat.name])
            if "optimizers" in tensors:
                seat.optimizer.load_state_dict(tensors["optimizers"][seat.name])

    def stop_if_asked(self) -> None:
        """Save and end after a signal; called between two batches of an evaluation."""
        if self.stop.requested:
            self.leave()

    def leave(self) -> None:
        """Save, and end like an interrupt.

        Raises:
            KeyboardInterrupt: always, unless
            NotSaved: the state could not be saved.
        """
        self.save(last=True)
        self.fabric.barrier()  # the others wait, because the first process to end would end the writing one
        self.check_saved()
        raise KeyboardInterrupt(f"interrupted at step {self.state.step} of {self.state.total_steps}; the same command resumes from there")

    def check_saved(self) -> None:
        """Check the result of the last checkpoint.

        Raises:
            NotSaved: it could not be written.
        """
        if self.save_error:
            kept = (self.folder / LAST).exists()
            after = "training continues from the previous checkpoint" if kept else "it begins again, as there is no earlier checkpoint"
            error = NotSaved(f"the last checkpoint is not saved: {self.save_error}. Then run the same command: {after}")
            error.reason = self.save_error
            raise error

    # ---- logs and progress

    def named(self, seat: Seat, name: str) -> str:
        """Return the name under which a player's number is logged, prefixed by the player's name if there are several."""
        return name if len(self.seats) == 1 else f"{seat.name}.{name}"

    @staticmethod
    def lr(seat: Seat, step: int) -> float:
        """Return a player's learning rate at a step; 0 in a run that was already finished."""
        return seat.rates.at(max(0, step)) if seat.rates else 0.0

    def note(self, outcomes: list[Outcome]) -> None:
        """Add the losses of a step's turns, except for skipped ones, to the means."""
        self._last |= {outcome.seat.name: outcome for outcome in outcomes}
        counted = {self.named(o.seat, name): value for o in outcomes if o.finite for name, value in o.losses.items()}
        norms = {self.named(o.seat, "grad_norm"): o.norm for o in outcomes if o.finite} if len(self.seats) > 1 else {}
        if counted:
            self.meters["evaluation"].add(counted)
            self.meters["line"].add(counted | norms)

    def report(self, outcomes: list[Outcome] | None) -> None:
        """Call the progress callback: after an evaluation (None), and at intervals after a step, with its outcomes."""
        now = time.monotonic()
        before, step = self._shown
        if not self.progress or (outcomes is not None and now - before < PROGRESS_SECONDS):
            return
        self._shown = now, self.state.step
        speed = (self.state.step - step) * self.images_per_step / (now - before) if before else 0.0
        losses = None if outcomes is None else {name: float(outcome.losses["loss"]) for name, outcome in self._last.items()}
        self.progress(progress_of(self, losses, speed))

    def write_line(self) -> None:
        """Write a line of log.csv."""
        means = self.means("line")
        if self.logs:
            self.logs.line(line_of(self, means, {name: float(outcome.norm) for name, outcome in self._last.items()}))
