"""Evaluations during a training: the metrics of the moving average on the held-out images, statistics of batch norms, drawings."""

from __future__ import annotations

import itertools
import logging

from torch import Tensor, nn

from vitarium.data.loader import generators_kept, seed_generators
from vitarium.files import atomic_path
from vitarium.nn.modes import evaluating
from vitarium.training import statistics
from vitarium.training.base import Learner
from vitarium.training.evaluation import run_evaluation, to_device
from vitarium.training.run import Run
from vitarium.training.stopping import best_of, save_best
from vitarium.training.tasks import Task

log = logging.getLogger("vitarium")


def evaluate(run: Run) -> None:
    """Evaluate the moving average, or the model if there is none, in the phase of the previous step, and record the metrics."""
    state = run.state
    run.enter(max(0, state.step - 1), state.step)
    model = run.model_to_evaluate()
    before = _estimate_statistics(run, model)
    values = run_evaluation(
        run.learner,
        model,
        run.val_loader.epoch(0),
        device=run.fabric.device,
        autocast=run.fabric.autocast,
        between=run.stop_if_asked,
    )
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    means = {f"train_{name}": value for name, value in run.means("evaluation").items()}
    lr = run.lr(run.seats[0], state.step - 1)
    state.history.append({"step": state.step, "epoch": run.epoch, "seconds": state.seconds, "lr": lr, **means, **numbers})
    state.evaluated = state.step
    name, better = run.learner.primary_metric
    if name in numbers:
        state.best = (max if better == "max" else min)(numbers[name], numbers[name] if state.best is None else state.best)
    run.note_bad_files(everywhere=True)
    if run.recipe.stopping is not None and run.logs and best_of(state.history, name, better) == len(state.history) - 1:
        save_best(run.folder, state.step, model)
    if run.logs:
        run.logs.evaluation(state.history)
        _draw(run, model)
    if state.step < state.total_steps:
        statistics.restore(before)  # training goes on with the running averages
    run.report(None)


def _estimate_statistics(run: Run, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Estimate the statistics of batch norms in the model to evaluate, where the recipe's rule says so; called in all processes.

    Returns:
        (buffer, former values) of all that was changed.
    """
    names = statistics.names_to_estimate(run.learner, run.recipe, run.state.total_steps)
    if not names:
        return []
    if run.recipe.batch_norm.estimate == "auto" and run.logs and not run.state.history:
        statistics.report(run.learner, names, run.state.total_steps)
    sample = run.make_sample()
    count = max(1, statistics.IMAGES // (run.recipe.batch_size * run.fabric.world_size))
    batches = itertools.islice(sample.epoch(0), count)
    before = statistics.estimate(run.learner, model, names, batches, run.fabric, autocast=run.fabric.autocast)
    sample.close()
    if run.whole is not None and run.state.step == run.state.total_steps:  # checkpoints hold the sharded model
        statistics.copy_statistics(model, run.learner.eval_model(), names)
    return before


def _draw(run: Run, model: nn.Module) -> None:
    """Write the learner's drawings of the first held-out batch to `pictures/NAME-STEP.png`."""
    if type(run.learner).pictures is Learner.pictures and type(run.learner.task).sheets is Task.sheets:
        return  # neither learner nor task has drawings
    batch = next(run.val_loader.epoch(0))
    if not len(batch["index"]):
        return
    with evaluating(model, inference=True), generators_kept():
        seed_generators(run.recipe.seed)
        drawn = run.learner.pictures(model, to_device(batch, run.fabric.device))
    try:
        (run.folder / "pictures").mkdir(exist_ok=True)
        for name, drawing in drawn.items():
            with atomic_path(run.folder / "pictures" / f"{name}-{run.state.step:06d}.png") as temporary:
                drawing.save(temporary, format="png")
    except OSError as error:
        log.warning("cannot write the drawings of step %d (%s); training continues", run.state.step, error.strerror or error)
