"""One model of a comparison: built, trained, evaluated, measured, saved."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitarium
from vitarium.catalog import preprocessing_of
from vitarium.data import ImageData, ImageSet
from vitarium.efficiency.profiler import Profile, count_macs, profile
from vitarium.reports.results import Mistake, Trial
from vitarium.training import ClassificationLearner, Progress, Recipe, fit, predict_logits
from vitarium.training.building import build_model

MISTAKES = 12
"""How many of the most confident mistakes are kept."""
MEASURING_BATCH = 32
"""Images at once for throughput and peak memory, the same for every model."""
MEASURING_SECONDS = 1.5
"""A small model is measured as often as fits into this."""
SMALL_MACS = 20e6
"""Below this many a picture, a model's operations are too short to share: threads that wait for each other take up to ten times as long."""
MODEL = "model.safetensors"


@dataclass(frozen=True)
class Devices:
    """Where training runs, as Lightning Fabric takes it."""

    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    accelerator: str = "auto"


def is_main_process() -> bool:
    """Whether this is the only process, or the first of several (started by torchrun, SLURM or Fabric): the one that writes."""
    environment = os.environ
    rank = environment.get("RANK", environment.get("SLURM_PROCID"))
    return int(rank) == 0 if rank else environment.get("LOCAL_RANK", "0") == "0" == environment.get("NODE_RANK", "0")


def started_together() -> bool:
    """Whether torchrun or SLURM started this process as one of several."""
    return any(int(os.environ.get(name, "1")) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))


def run_trial(
    name: str,
    data: ImageData,
    recipe: Recipe,
    folder: Path,
    *,
    pretrained: bool,
    devices: Devices,
    progress: Callable[[Progress], None] | None,
    measuring: Callable[[], None],
) -> Trial | None:
    """Train a model (or go on where it was), then evaluate and measure it. The model's file is written last.

    Args:
        folder: of this model alone.
        progress: hears how training goes.
        measuring: called when training is over.

    Returns:
        the result; None in the helping processes of data-parallel training.

    Raises:
        whatever `create_model`, `fit` and the model itself raise.
    """
    model = build_model(name, data, recipe, pretrained=pretrained)
    size = preprocessing_of(model).image_size
    learner = ClassificationLearner.create(model, data, recipe)
    with suitable_threads(count_macs(model, size)):
        fitted = fit(learner, data, recipe, folder, **asdict(devices), progress=progress)
        if not is_main_process():
            return None
        measuring()
        model = learner.eval_model()
        logits, targets, indices = predict_logits(model, data.val, batch_size=recipe.batch_size)
        cost, threads = measure(model, size), torch.get_num_threads()
    vitarium.save(model, folder / MODEL)
    return Trial(
        name=name,
        accuracy=(logits.argmax(1) == targets).double().mean().item(),
        loss=nn.functional.cross_entropy(logits, targets).item(),
        evaluated=len(targets),
        latency_ms=cost.latency_ms,
        throughput=cost.throughput,
        peak_memory_mb=cost.peak_memory_mb,
        params=cost.params,
        macs=cost.macs,
        bytes=cost.bytes,
        image_size=size,
        steps=fitted.steps,
        seconds=fitted.seconds,
        history=fitted.history,
        confusion=confusion_matrix(logits, targets),
        mistakes=confident_mistakes(logits, targets, indices, data.val),
        bad_files=[{"path": str(path), "reason": str(reason)} for path, reason in fitted.bad_files],
        file=f"models/{folder.name}/{MODEL}",
        threads=threads,
    )


@contextlib.contextmanager
def suitable_threads(macs: int) -> Iterator[None]:
    """One thread inside for a small model (see `SMALL_MACS`), torch's own number for others."""
    before = torch.get_num_threads()
    try:
        if macs < SMALL_MACS:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def measure(model: nn.Module, image_size: int) -> Profile:
    """The profile, with the shortest latency and the highest throughput of several: other load only makes them worse."""
    end = time.perf_counter() + MEASURING_SECONDS
    profiles: list[Profile] = []
    while len(profiles) < 3 or time.perf_counter() < end:
        profiles.append(profile(model, image_size, batch=MEASURING_BATCH, runs=3))
    latency, throughput = min(p.latency_ms for p in profiles), max(p.throughput for p in profiles)
    return replace(profiles[0], latency_ms=latency, throughput=throughput)


def confusion_matrix(logits: Tensor, targets: Tensor) -> list[list[int]]:
    """Counts; rows true, columns predicted. Logits (N, C), targets (N,)."""
    classes = logits.shape[1]
    return torch.bincount(targets * classes + logits.argmax(1), minlength=classes**2).view(classes, classes).tolist()


def confident_mistakes(logits: Tensor, targets: Tensor, indices: Tensor, images: ImageSet) -> list[Mistake]:
    """The wrong answers of highest probability, at most `MISTAKES`. Logits (N, C), targets and indices into `images` (N,)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    wrong = (predicted != targets).nonzero().flatten()
    chosen = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    columns: list[list[Any]] = [t[chosen].tolist() for t in (indices, targets, predicted, confidence)]
    return [Mistake(i, images.describe(i), true, said, sure) for i, true, said, sure in zip(*columns, strict=True)]
