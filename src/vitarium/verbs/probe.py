"""Probe a model's frozen features by nearest neighbours and logistic regression."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitarium.errors import UsageError
from vitarium.training.tasks.base import TableData
from vitarium.verbs.opening import Notify, execute, name_of, open_model, quiet
from vitarium.verbs.result import Result, kept

if TYPE_CHECKING:
    from torch import nn

    from vitarium.data import ImageData

NAMES = {"accuracy": "accuracy", "top5": "top 5", "auroc": "AUROC", "mean_average_precision": "mean average precision"}
PROBES = {"knn": "nearest neighbours", "linear": "logistic regression"}
TASKS = ("class", "multilabel")


@dataclass(repr=False)
class Probed(Result):
    """Metrics of two probes of a model's features.

    Attributes:
        model: file or name.
        data: name of the data.
        train, val: images that the probes were fitted on, and held-out images.
        knn, linear: metrics by nearest neighbours and by logistic regression: "accuracy" and "top5" (from six classes on), or "auroc" and
            "mean_average_precision"; shares of 1.
    """

    model: str
    data: str
    train: int
    val: int
    knn: dict[str, float]
    linear: dict[str, float]

    def facts(self) -> dict[str, Any]:
        return {"features": self.model, "fitted on": f"{self.train} images ({self.data})", "held out": self.val}

    def tables(self) -> list[TableData]:
        rows = [
            [PROBES[name], *(f"{100 * value:.2f} %" for value in numbers.values())]
            for name, numbers in (("knn", self.knn), ("linear", self.linear))
        ]
        return [TableData("", ["probe", *(f">{NAMES[name]}" for name in self.knn)], rows)]


def probe(
    model: str | os.PathLike[str] | nn.Module,
    data: str | os.PathLike[str] = "digits",
    *,
    task: Literal["class", "multilabel"] = "class",
    checkpoint: str | None = None,
    image_size: int | None = None,
    neighbours: int = 20,
    uniform: bool = False,
    val_fraction: float = 0.2,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    runtime: str = "eager",
    output: str | os.PathLike[str] | None = None,
    notify: Notify = quiet,
) -> Probed:
    """Probe a model's frozen features by k nearest neighbours and logistic regression, fitted on the training part of labelled images.

    Args:
        model: a file of `vitarium.save`, a model's name, or a model: pretrained encoders (a masked autoencoder, a backbone with weights,
            "timm/NAME", "hf/OWNER/NAME") and trained classifiers.
        data: as for `vitarium.open_data`.
        task: "class", one class an image; or "multilabel".
        checkpoint: weights for a name; None: its published ones.
        image_size: side of the image, pixels; None: the model's own. A model object keeps the new size.
        neighbours: nearest neighbours that vote.
        uniform: give all neighbours equal weight, instead of exp(similarity / 0.07).
        val_fraction, seed: of the split of data that has no val/ part.
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda", ...
        runtime: what executes the model: "eager", "compile", "onnxruntime" or "openvino" (see `vitarium.efficiency.runtimes`).
        output: JSON file for the numbers.
        notify: called with messages about progress.

    Raises:
        UsageError: unknown model or task, a size that the model does not support, or a model without features.
        DataError: no such data, or data without labels.
        CheckpointError: weights that are not available.
    """
    from vitarium.catalog.features import pooled_features
    from vitarium.files import check_output, write_json

    check_output(output)
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}; a probe takes {' or '.join(TASKS)}")
    if neighbours < 1:
        raise UsageError(f"neighbours must be at least 1, got {neighbours}")
    opened, images = open_for_probe(
        model, data, task=task, checkpoint=checkpoint, image_size=image_size, val_fraction=val_fraction, seed=seed
    )
    source = model if image_size is None else None  # another size is another graph
    opened = execute(opened, runtime, device=device, reads=pooled_features, source=source, notify=notify)
    notify(f"Reading {len(images.train)} and {len(images.val)} images")
    metrics = measure(opened, images, neighbours=neighbours, uniform=uniform, batch_size=batch_size)
    found = Probed(name_of(model), images.name, len(images.train), len(images.val), **metrics)
    if output is not None:
        with kept(found):
            write_json(Path(output), found.to_dict())
    return found


def open_for_probe(
    model: str | os.PathLike[str] | nn.Module,
    data: str | os.PathLike[str],
    *,
    task: str = "class",
    checkpoint: str | None = None,
    image_size: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> tuple[nn.Module, ImageData]:
    """Return a model in eval mode at an image size, and the labelled images for its probe; arguments as for `probe`.

    Raises:
        UsageError, CheckpointError, DataError: see `probe`.
    """
    from vitarium.catalog.create import preprocessing_of, set_image_size
    from vitarium.data import open_data

    opened = open_model(model, checkpoint)
    if image_size is not None:
        set_image_size(opened, image_size)
    size = preprocessing_of(opened).image_size
    return opened, open_data(os.fspath(data), task=task, seed=seed, val_fraction=val_fraction, image_size=size)


def measure(model: nn.Module, images: ImageData, *, neighbours: int, uniform: bool, batch_size: int) -> dict[str, dict[str, float]]:
    """Return the metrics of both probes (see `vitarium.pretraining.probes.probe`)."""
    from vitarium.pretraining.probes import TEMPERATURE
    from vitarium.pretraining.probes import probe as run

    return run(model, images, neighbours=neighbours, temperature=None if uniform else TEMPERATURE, batch_size=batch_size)
