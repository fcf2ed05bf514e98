"""Training of a learner by a recipe in a folder (`fit`), which resumes a run that the folder holds in part."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from vitarium.catalog.create import preprocessing_of
from vitarium.catalog.record import training_of
from vitarium.cores import core_count
from vitarium.data.bad_files import BadFiles
from vitarium.data.headers import check_headers
from vitarium.data.image_set import ImageData, size_of
from vitarium.data.loader import Loader
from vitarium.errors import DataError, NotSaved, TrainingStopped, UsageError
from vitarium.files import lock_folder
from vitarium.texts import printable
from vitarium.training.base import Learner
from vitarium.training.boards import check_boards
from vitarium.training.checkpoint import LAST, RunState, load_run
from vitarium.training.identity import check_same_run, fingerprint_like, identity_of, whole_objective
from vitarium.training.logs import Logs
from vitarium.training.loop import take_step, train
from vitarium.training.phases import Plan
from vitarium.training.processes import create_fabric, lost_processes_named, run_in_processes, spawns
from vitarium.training.progress import Progress
from vitarium.training.recipe import Recipe
from vitarium.training.recording import record_training
from vitarium.training.run import Run
from vitarium.training.schedules import Rates
from vitarium.training.sharding import check_shardable, is_sharded
from vitarium.training.signals import StopSignals
from vitarium.training.statistics import batch_norms_set
from vitarium.training.stopping import best_of, check_stopping, load_best

TINY = 64
"""Images up to this side, in pixels, are read in the main process: workers would take longer to start than they save."""


MOST_WORKERS, WORKERS_PER_CORE = 16, 4
"""Upper limit on the workers of a process, whichever is larger: 256 of them take minutes to start on 2 cores, and give nothing."""


@dataclass(frozen=True)
class FitResult:
    """Result of a training.

    Attributes:
        metrics: numbers of the evaluation of the final weights.
        history: one entry per evaluation: step, epoch, seconds, lr, train_loss and the metrics.
        steps: optimizer steps in total.
        seconds: time of these steps, over all sessions.
        bad_files: (path, reason) of images that could not be read.
        skipped: number of steps skipped because a loss or gradient was not finite, over all players.
        skips: the same by player.
        earlier: number of the steps that were made before this call; equal to `steps` if the run had ended, so that nothing was trained.
        best_step: with early stopping, the step whose weights are kept, and whose evaluation is in `metrics`.
        stopped_early: whether it ended before its budget.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]]
    steps: int
    seconds: float
    bad_files: list[tuple[str, str]] = field(default_factory=list)
    skipped: int = 0
    skips: dict[str, int] = field(default_factory=dict)
    earlier: int = 0
    best_step: int | None = None
    stopped_early: bool = False


def fit(
    learner: Learner,
    data: ImageData,
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    accelerator: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> FitResult:
    """Train a learner; afterwards `learner.eval_model()` has the final weights (or their moving average) and its record.

    The temperature of an earlier calibration is dropped.

    The folder receives last.ckpt (the state of the run), log.csv, evaluations.jsonl, TensorBoard's events if it is installed, and
    bad_files.txt if images could not be read. Called again after a kill, it resumes from last.ckpt and ends with the weights of an
    uninterrupted run, bit for bit (same machine, same number of threads); called again after the end, it returns the result.

    Args:
        learner: on the CPU; images are prepared by its model's `preprocessing`.
        data: training and held-out images.
        recipe: see `load_recipe`.
        folder: of this run only.
        devices: processes on this machine, one per device.
        num_nodes: machines; with several, start the same command on each under torchrun or SLURM. The folder must be shared.
        strategy: "auto", "ddp", "fsdp", or another of Lightning Fabric's.
        accelerator: "auto", "cpu", "cuda", "mps".
        progress: called several times per second in this process.

    Raises:
        UsageError: the folder holds another run (the message names the differences) or is in use.
        DataError: no data, fewer images than a batch, or too many that cannot be read (for sets of up to `CHECKED_FILES`, before the first
            step; otherwise the state is saved first).
        CheckpointError: last.ckpt is damaged.
        TrainingStopped: losses were not finite, memory ran out, or a process was lost.
        NotSaved: the last checkpoint could not be written; `error.result` is what would be returned, if the training is over.
        KeyboardInterrupt: SIGINT or SIGTERM was received; the state is saved.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot use {folder} as the folder of the run: {error}") from error
    record = training_of(learner.eval_model())
    record.temperature = record.calibration = None  # they were fitted to the logits of before
    fabric = create_fabric(devices, num_nodes, strategy, accelerator, recipe.precision)
    if spawns(fabric):
        with lock_folder(folder):
            begun = load_run(folder / LAST)[0] if (folder / LAST).exists() else None
            if begun is None or not begun.finished:
                run_in_processes(fabric, _fit_here, (learner, data, recipe, folder), progress)
            result = replace(_result_of(fabric.world_size, learner, data, recipe, folder), earlier=begun.step if begun else 0)
        record_training(learner, data)
        return result
    fabric.launch()
    with lock_folder(folder) if fabric.is_global_zero else contextlib.nullcontext():
        result = _fit_here(fabric, learner, data, recipe, folder, progress)
    record_training(learner, data)
    return result


def fit_saved_or_not(learner: Learner, data: ImageData, recipe: Recipe, folder: Path, **options: Any) -> tuple[FitResult, NotSaved | None]:
    """Run `fit` with its options; if only the last checkpoint could not be written, return the result with that error.

    Raises:
        whatever `fit` raises; NotSaved only if the training is not over, or its weights are in other processes.
    """
    try:
        return fit(learner, data, recipe, folder, **options), None
    except NotSaved as error:
        if error.result is None:
            raise
        return error.result, error


def _fit_here(
    fabric: Fabric, learner: Learner, data: ImageData, recipe: Recipe, folder: Path, progress: Callable[[Progress], None] | None
) -> FitResult:
    """Run `fit` in one of its processes."""
    run, tensors = prepare_run(fabric, learner, data, recipe, folder, progress)
    earlier = run.state.step
    with (
        lost_processes_named(),
        _explained_out_of_memory(run),
        _undone_on_error(run),
        _ended(run),
        batch_norms_set(recipe, learner),
        run.stop,
    ):
        if run.state.finished:
            run.restore(tensors or {})
        else:
            if fabric.is_global_zero:
                check_headers(data, run.bad_files)
            set_up_run(run, tensors)
            train(run)
    result = replace(_finish(run), earlier=earlier)
    try:
        run.check_saved()
    except NotSaved as error:
        error.result = result
        raise
    return result


@contextlib.contextmanager
def _undone_on_error(run: Run) -> Iterator[None]:
    """Undo the effects of phases and turns on the learner if the training ends with an error, so that `fit` can resume with it."""
    try:
        yield
    except BaseException:
        run.plan.undo(run.averages())
        raise


@contextlib.contextmanager
def _ended(run: Run) -> Iterator[None]:
    """End the data workers with the training; whatever error ends it, save a checkpoint, except for errors whose message is about it."""
    try:
        yield
    except TrainingStopped:
        raise
    except BaseException:
        run.save_after_error()
        raise
    finally:
        run.loader.close()
        run.val_loader.close()


def prepare_run(
    fabric: Fabric,
    learner: Learner,
    data: ImageData,
    recipe: Recipe,
    folder: Path,
    progress: Callable[[Progress], None] | None,
    *,
    processes: int | None = None,
) -> tuple[Run, dict[str, Any] | None]:
    """Create a run, from its checkpoint if there is one; return it with the checkpoint's tensors."""
    identity = identity_of(recipe, data, learner, processes or fabric.world_size)
    state, tensors = RunState(identity, total_steps=0), None
    if (folder / LAST).exists():
        state, tensors = load_run(folder / LAST)
        recorded = state.identity.get("recipe", {})
        if "objective" in recorded:
            recorded["objective"] = whole_objective(recorded["objective"], learner)
        like = fingerprint_like(state.identity.get("data", {}), data)
        check_same_run(folder, state.identity, {**identity, "data": like})
        state.identity = identity
    shared: dict[str, Any] = dict(
        batch_size=recipe.batch_size,
        collate=learner.collate,
        seed=recipe.seed,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        num_workers=_workers(recipe, data, fabric),
    )

    bad_files = BadFiles(total=size_of(data))

    def loaders() -> tuple[Loader, Loader]:
        order: dict[str, Any] = dict(shuffle=True, drop_last=True, repeats=recipe.repeats, balance=recipe.sampling == "balanced")
        return (
            Loader(data.train, learner.transform(recipe.augment), bad_files=bad_files, **order, **shared),
            Loader(data.val, learner.transform(None), bad_files=bad_files, **shared),
        )

    def sample() -> Loader:
        return Loader(data.train, learner.transform(None), shuffle=True, drop_last=True, bad_files=BadFiles(limit=1.0), **shared)

    if is_sharded(fabric):
        check_shardable(learner, recipe)
    check_stopping(learner, recipe)
    check_boards(recipe)
    plan = Plan(learner, recipe)
    if recipe.precision == "64-true":
        learner.double()  # as Fabric would, but before the moving average is copied
    fabric.to_device(learner)
    whole = copy.deepcopy(learner.model) if is_sharded(fabric) else None
    shown = progress if fabric.is_global_zero else None
    stop = StopSignals(f"stopping after this step, saving to {printable(str(folder / LAST))}" if fabric.is_global_zero else "")
    run = Run(fabric, learner, recipe, state, folder, plan, loaders, sample, whole, shown, stop)
    if not run.steps_per_epoch:
        raise DataError(
            f"{len(data.train)} training images are fewer than one step takes ({run.images_per_step} = batch_size x accumulate x "
            f"processes); use a smaller batch_size (--batch-size) or accumulate={run.loader.steps}, in a recipe or by --set"
        )
    return run, tensors


def set_up_run(run: Run, tensors: dict[str, Any] | None) -> None:
    """Create optimizers, wrappers, rates, phases and logs of a run that has steps to take."""
    fabric, state = run.fabric, run.state
    run.set_up()
    if tensors is not None:
        run.restore(tensors)
    else:
        state.total_steps = _total_steps(run)
    _place(run)
    if fabric.is_global_zero:
        for litter in run.folder.glob(".*.tmp"):  # partial files of a run that was killed while writing
            litter.unlink(missing_ok=True)
        run.logs = Logs(run.folder, state.step, run.recipe)


def _place(run: Run) -> None:
    """Place learning rates, phases and values on the run's steps."""
    for seat in run.seats:
        seat.rates = Rates(
            seat.settings.schedule,
            seat.settings.optimizer,
            total_steps=run.state.total_steps,
            steps_per_epoch=run.steps_per_epoch,
            total_batch=run.images_per_step,
        )
    run.plan.place(run.state.total_steps, run.steps_per_epoch)


def _total_steps(run: Run) -> int:
    """Return the budget in optimizer steps."""
    budget = run.recipe.budget
    if budget.steps is not None:
        return budget.steps
    if budget.epochs is not None:
        return max(1, round(budget.epochs * run.steps_per_epoch))
    assert budget.minutes is not None
    if any(phase.image_size for phase in run.plan.phases):
        raise UsageError("phases of several image sizes differ in speed, which a budget in minutes does not support; use steps or epochs")
    return _steps_in(run, 60 * budget.minutes)


def _steps_in(run: Run, seconds: float) -> int:
    """Return the number of steps that fit into a time, from the speed of the first ones, which take at most a tenth of the time and are
    undone."""
    before = {name: tensor.clone() for name, tensor in run.learner.state_dict().items()}
    run.state.total_steps = 1
    _place(run)
    run.enter(0)
    batches = run.batches()
    begin = time.perf_counter()
    times: list[float] = []
    while len(times) < 24 and (len(times) < 4 or time.perf_counter() - begin < 0.1 * seconds):
        began = time.perf_counter()
        take_step(run, batches)
        times.append(time.perf_counter() - began)
    spent = time.perf_counter() - begin
    typical = sorted(times[2:])[len(times[2:]) // 2]  # the first steps allocate and compile
    steps = torch.tensor(max(1, int((seconds - spent) / typical)))
    run.learner.load_state_dict(before)
    for seat in run.seats:
        seat.optimizer.state.clear()
        if seat.average:
            seat.average.reset()
    return int(run.fabric.broadcast(steps.item()))


def _finish(run: Run) -> FitResult:
    """Load the final weights into the learner, and return the result."""
    if run.logs:
        run.logs.close()
    for seat in run.seats:
        if seat.average and seat.player.averaged is not None:
            seat.player.averaged.load_state_dict(seat.average.module.state_dict())
    state = run.state
    run.plan.place(state.total_steps, run.steps_per_epoch)
    run.plan.leave(run.averages())
    if run.whole is not None and run.seats[0].module is not None:
        run.learner.model = run.whole  # its last evaluation gathered the final weights
    entry = _kept_entry(run)
    metrics = {name: value for name, value in entry.items() if name not in ("step", "epoch", "seconds", "lr")}
    bad_files = [(path, reason) for path, reason in state.bad_files]
    result = FitResult(metrics, state.history, state.step, state.seconds, bad_files, state.skipped, dict(state.skips))
    if run.recipe.stopping is None:
        return result
    return replace(result, best_step=entry.get("step"), stopped_early=state.step < state.total_steps)


def _kept_entry(run: Run) -> dict[str, Any]:
    """Return the evaluation of the weights that the learner ends with; with early stopping, load those of the best one."""
    history = run.state.history
    place = best_of(history, *run.learner.primary_metric) if run.recipe.stopping is not None else None
    if place is not None and history[place] is not history[-1]:
        run.fabric.barrier()  # the first process has written them
        if load_best(run.folder, history[place]["step"], run.learner.eval_model()):
            return history[place]
    return history[-1] if history else {}


def _result_of(processes: int, learner: Learner, data: ImageData, recipe: Recipe, folder: Path) -> FitResult:
    """Return the result of a run that other processes have finished."""
    run, tensors = prepare_run(Fabric(accelerator="cpu", devices=1), learner, data, recipe, folder, None, processes=processes)
    run.restore(tensors or {})
    return _finish(run)


def _workers(recipe: Recipe, data: ImageData, fabric: Fabric) -> int:
    if recipe.num_workers is not None:
        return min(recipe.num_workers, max(MOST_WORKERS, WORKERS_PER_CORE * core_count()))
    if data.image_size is not None and data.image_size <= TINY:
        return 0
    return max(1, min(8, core_count() // max(1, fabric.world_size) - 1))


@contextlib.contextmanager
def _explained_out_of_memory(run: Run) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in text and "out of memory" not in text:
            raise
        size, batch = preprocessing_of(run.learner.model).image_size, run.recipe.batch_size
        half = (
            f"batch_size={max(1, batch // 2)} accumulate={run.recipe.accumulate * 2} (the same total batch) in the recipe or by --set"
            if batch > 1
            else "a smaller model"
        )
        raise TrainingStopped(
            f"out of memory at batch_size={batch} with {size} pixels on {run.fabric.device}: try {half}, model.set_grad_checkpointing(), "
            f"or precision=bf16-mixed ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
