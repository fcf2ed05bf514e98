"""Evaluation on parts of an image set, in one process or several, with merging of the metrics' states."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.data.bad_files import BadFiles
from vitarium.data.image_set import Subset
from vitarium.data.loader import Loader
from vitarium.engine import Engine, map_images
from vitarium.engine.images import PART_BATCHES
from vitarium.errors import UsageError
from vitarium.nn.modes import evaluating
from vitarium.training.base import Learner
from vitarium.training.evaluation import update_metrics

States = list[dict[str, Any]]
"""Metrics' states, in the order of `metrics_of`: states by name, and the number of updates under "updates"."""


def evaluate_in_parts(
    learner: Learner,
    images: Any,
    *,
    batch_size: int = 64,
    bad_files: BadFiles | None = None,
    engine: str | Engine = "local",
    parts: str | os.PathLike[str] | None = None,
    identity: Any = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate like `training.evaluate`, part by part on an engine.

    Args:
        learner: with a model in eval mode; it and the images must be picklable for Ray.
        images: an ImageSet.
        batch_size: images per forward pass.
        bad_files: record of images that cannot be read.
        engine, parts, identity, progress: see `vitarium.engine.map_images`.

    Raises:
        UsageError: metrics that cannot be merged.
        DataError: more images are broken than `bad_files` allows.
    """
    metrics = learner.metrics()
    if metrics is None:
        return {}
    if not learner.task.mergeable:
        raise UsageError(f"the task {learner.task.name} measures all images together; evaluate it with the local engine")
    found = map_images(
        _evaluate_part,
        range(len(images)),
        shared=(learner, images, batch_size),
        part_size=batch_size * PART_BATCHES,
        engine=engine,
        parts=parts,
        identity=identity,
        progress=progress,
    )
    if bad_files is not None:
        for part in found:
            for path, reason in part["broken"]:
                bad_files.record(path, reason)
        bad_files.check(len(images))
    for part in found:
        merge_states(metrics, part["states"])
    with evaluating(learner.eval_model(), inference=True):
        return learner.summary(metrics)


def _evaluate_part(items: Sequence[int], learner: Learner, images: Any, batch_size: int) -> dict[str, Any]:
    """Return the states of the metrics after the images of a part."""
    bad_files, metrics = BadFiles(1.0), learner.metrics()
    loader = Loader(Subset(images, items), learner.transform(None), collate=learner.collate, batch_size=batch_size, bad_files=bad_files)
    model = learner.eval_model()
    place = next(model.parameters(), torch.empty(0))
    batches = ({**batch, "index": batch["index"] + items[0]} for batch in loader.epoch(0))  # indices as in the whole set
    update_metrics(learner, model, batches, metrics, device=place.device)
    return {"states": states_of(metrics), "broken": bad_files.items()}


def metrics_of(metrics: Any) -> Iterator[Any]:
    """Yield every torchmetrics metric of a metric, a collection or a module of them, in a fixed order; shared states are copied."""
    from torchmetrics import Metric, MetricCollection

    collections = [m for m in metrics.modules() if isinstance(m, MetricCollection)] if isinstance(metrics, nn.Module) else []
    for collection in collections:
        list(collection.items(keep_base=True, copy_state=True))  # members of a compute group get their group's states
    yield from (m for m in metrics.modules() if isinstance(m, Metric))


def states_of(metrics: Any) -> States:
    """Return the states of metrics as tensors on the CPU and lists of them."""
    return [
        {"updates": metric.update_count, **{name: _plain(getattr(metric, name)) for name in metric._defaults}}
        for metric in metrics_of(metrics)
    ]


def merge_states(metrics: Any, states: States) -> None:
    """Add the states of another part to metrics, each with its declared reduction.

    Raises:
        UsageError: a state whose parts cannot be merged.
    """
    for metric, found in zip(metrics_of(metrics), states, strict=True):
        before, after = metric.update_count, found["updates"]
        for name, reduction in metric._reductions.items():
            merged = _merged(getattr(metric, name), found[name], reduction, before, after)
            if merged is None:
                raise UsageError(f"the state {name!r} of {type(metric).__name__} cannot be merged; evaluate with the local engine")
            setattr(metric, name, merged)
        metric._update_count = before + after
        metric._computed = None


def _merged(mine: Any, other: Any, reduction: Any, before: int, after: int) -> Any:
    from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

    if isinstance(mine, list):
        device = next((value.device for value in mine if isinstance(value, Tensor)), None)
        return [*mine, *(value.to(device) if isinstance(value, Tensor) else value for value in other)]
    if not isinstance(mine, Tensor):
        return None
    other = other.to(mine)
    if before == 0 or after == 0:  # one of them is the default state, which need not be neutral
        return other if before == 0 else mine
    if reduction is dim_zero_sum:
        return mine + other
    if reduction is dim_zero_mean:
        return (mine * before + other * after) / (before + after)
    if reduction in (dim_zero_max, dim_zero_min):
        return torch.maximum(mine, other) if reduction is dim_zero_max else torch.minimum(mine, other)
    return torch.cat([mine, other]) if reduction is dim_zero_cat else None


def _plain(value: Any) -> Any:
    """Return a state on the CPU: tensors, and lists and tuples of them or of plain values."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.detach().cpu() if isinstance(value, Tensor) else value
