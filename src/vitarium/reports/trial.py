"""Build, train, evaluate, measure and save one model of a comparison."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog import preprocessing_of
from vitarium.catalog.saving import save
from vitarium.data import ImageData, ImageSet, open_data
from vitarium.efficiency.profiler import Profile, count_macs, profile
from vitarium.engine.machine import describe_device
from vitarium.errors import DataError
from vitarium.reports.results import Mistake, Trial
from vitarium.training import ClassificationLearner, Progress, Recipe, fit, predict_logits
from vitarium.training.building import build_model
from vitarium.training.checkpoint import fingerprint

MISTAKES = 12
"""Number of the most confident mistakes that are kept."""
MEASURING_BATCH = 32
"""Images at once for throughput and peak memory, the same for every model."""
MEASURING_SECONDS = 1.5
"""A model is measured repeatedly for this long."""
SMALL_MACS = 20e6
"""Below this many an image, a model's operations are too short to share: threads that wait for each other take up to ten times as long."""
MODEL = "model.safetensors"


@dataclass(frozen=True)
class DataSource:
    """Data by the arguments that open it, so that any process or machine can; small enough to travel with each run.

    Args:
        spec, seed, val_fraction, image_size: as `open_data` takes them.
        fingerprint: of the data as they were when the comparison began.
    """

    spec: str
    seed: int
    val_fraction: float
    image_size: int | None
    fingerprint: dict[str, Any] = field(hash=False)

    @classmethod
    def of(cls, images: ImageData, spec: str | Path, *, seed: int, val_fraction: float, image_size: int | None) -> DataSource:
        """Return the source of opened data, which this process then need not open again."""
        source = cls(str(spec), seed, val_fraction, image_size, fingerprint(images))
        _OPENED.clear()
        _OPENED[source] = images
        return source

    def open(self) -> ImageData:
        """Open the data; within a process only the first time.

        Raises:
            DataError: they are not there, or not what they were.
        """
        if self not in _OPENED:
            images = open_data(self.spec, seed=self.seed, val_fraction=self.val_fraction, image_size=self.image_size)
            if (now := fingerprint(images)) != self.fingerprint:
                raise DataError(f"{self.spec} differs here from what the comparison began with ({now}, not {self.fingerprint})")
            _OPENED.clear()
            _OPENED[self] = images
        return _OPENED[self]


_OPENED: dict[DataSource, ImageData] = {}
"""The data that this process has open."""


@dataclass(frozen=True)
class Devices:
    """Devices of one training, as Lightning Fabric takes them."""

    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    accelerator: str = "auto"


def is_main_process() -> bool:
    """Return whether this process writes: the only one, or the first of several that torchrun, SLURM or Fabric started."""
    environment = os.environ
    rank = environment.get("RANK", environment.get("SLURM_PROCID"))
    return int(rank) == 0 if rank else environment.get("LOCAL_RANK", "0") == "0" == environment.get("NODE_RANK", "0")


def started_together() -> bool:
    """Return whether torchrun or SLURM started this process as one of several."""
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
    """Train a model (or resume its training), then evaluate and measure it. The model's file is written last.

    Args:
        folder: of this model alone.
        progress: called as training proceeds.
        measuring: called when training is over.

    Returns:
        the result; None in the helper processes of data-parallel training.

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
    save(model, folder / MODEL)
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
        device=describe_device(accelerator=devices.accelerator),
    )


@contextlib.contextmanager
def suitable_threads(macs: int) -> Iterator[None]:
    """Run a small model (see `SMALL_MACS`) with one thread, and others with torch's own number."""
    before = torch.get_num_threads()
    try:
        if macs < SMALL_MACS:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def measure(model: nn.Module, image_size: int) -> Profile:
    """Profile a model repeatedly; keep the shortest latency and the highest throughput, since other load only makes them worse."""
    end = time.perf_counter() + MEASURING_SECONDS
    profiles: list[Profile] = []
    while len(profiles) < 3 or time.perf_counter() < end:
        profiles.append(profile(model, image_size, batch=MEASURING_BATCH, runs=3))
    latency, throughput = min(p.latency_ms for p in profiles), max(p.throughput for p in profiles)
    return replace(profiles[0], latency_ms=latency, throughput=throughput)


def confusion_matrix(logits: Tensor, targets: Tensor) -> list[list[int]]:
    """Return counts (C, C), rows true, columns predicted. Logits (N, C), targets (N,)."""
    classes = logits.shape[1]
    return torch.bincount(targets * classes + logits.argmax(1), minlength=classes**2).view(classes, classes).tolist()


def confident_mistakes(logits: Tensor, targets: Tensor, indices: Tensor, images: ImageSet) -> list[Mistake]:
    """Return the wrong answers of highest probability, at most `MISTAKES`. Logits (N, C), targets and indices into `images` (N,)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    wrong = (predicted != targets).nonzero().flatten()
    chosen = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    columns: list[list[Any]] = [t[chosen].tolist() for t in (indices, targets, predicted, confidence)]
    return [Mistake(i, images.describe(i), true, answer, share) for i, true, answer, share in zip(*columns, strict=True)]
