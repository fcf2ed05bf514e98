"""Metrics of a model on held-out images, and raw logits for reports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog.create import preprocessing_of
from vitarium.data.bad_files import BadFiles
from vitarium.data.loader import Loader
from vitarium.nn.modes import evaluating
from vitarium.training.base import Batch, Learner
from vitarium.training.learners import learner_of


def run_evaluation(
    learner: Learner,
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the learner's metrics of a model over batches; with several processes, over the batches of all of them.

    Args:
        model: `learner.eval_model()` or its moving average, on `device`.
        between: called after each batch (to notice a request to stop).
    """
    metrics = learner.metrics()
    if metrics is None:
        return {}
    update_metrics(learner, model, batches, metrics, device=device, autocast=autocast, between=between)
    with evaluating(model, inference=True):
        return learner.summary(metrics)


def update_metrics(
    learner: Learner,
    model: nn.Module,
    batches: Iterable[Batch],
    metrics: Any,
    *,
    device: torch.device,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Update metrics, which are moved to `device`, by batches; in eval mode and without gradients. See `run_evaluation`."""
    metrics.to(device)
    dtype = _place_of(model).dtype
    with evaluating(model, inference=True):
        for batch in batches:
            if len(batch["index"]):
                batch = to_device(batch, device)
                with autocast():
                    learner.evaluate_batch(model, {**batch, "image": batch["image"].to(dtype)}, metrics)
            between()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on a device; copies are asynchronous."""
    if device.type == "cpu":
        return batch
    return _moved(batch, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    return [_moved(part, device) for part in value] if isinstance(value, list) else value


def evaluate(
    learner_or_model: nn.Module,
    images: Any,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    bad_files: BadFiles | None = None,
) -> dict[str, Any]:
    """Return the metrics on an image set, on the device of the model.

    Args:
        learner_or_model: a learner, or a model (see `learner_of`).
        images: an `ImageSet`.
        batch_size: images per forward pass.
        num_workers: processes that read ahead.
        bad_files: record of images that cannot be read, which are left out.

    Returns:
        numbers by name, such as accuracy (0 to 1), and under "confusion_matrix" a list of rows (truth) of counts (prediction).
    """
    learner = learner_or_model if isinstance(learner_or_model, Learner) else learner_of(learner_or_model)
    model = learner.eval_model()
    reading: dict[str, Any] = dict(batch_size=batch_size, num_workers=num_workers, bad_files=bad_files)
    loader = Loader(images, learner.transform(None), collate=learner.collate, **reading)
    return run_evaluation(learner, model, loader.epoch(0), device=_place_of(model).device)


def predict_logits(
    model: nn.Module,
    images: Any,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    bad_files: BadFiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of a classifier on every image of a set that can be read.

    Returns:
        logits (N, num_classes) float32, targets (N,) and indices into the set (N,), on the CPU, in the order of the set.
    """
    place = _place_of(model)
    loader = Loader(images, preprocessing_of(model), batch_size=batch_size, num_workers=num_workers, bad_files=bad_files)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluating(model, inference=True):
        for batch in loader.epoch(0):
            if len(batch["index"]):
                rows.append((model(batch["image"].to(place)).float().cpu(), batch["target"], batch["index"]))
    if not rows:
        return torch.empty(0, int(getattr(model, "num_classes", 0))), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    logits, targets, indices = (torch.cat(column) for column in zip(*rows, strict=True))
    return logits.clone(), targets.clone(), indices.clone()  # cloned outside inference mode, so that autograd accepts them


def _place_of(model: nn.Module) -> Tensor:
    """Return a tensor of the device and dtype of the model."""
    return next(model.parameters(), torch.empty(0))
