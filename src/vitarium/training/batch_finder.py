"""The largest batch that fits: by trial on an accelerator, by an estimate of the memory and the speed on a CPU."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitarium.data import BadFiles, ImageData
from vitarium.data.loader import Loader, generators_kept
from vitarium.errors import DataError, TrainingStopped
from vitarium.files import write_json
from vitarium.training.base import Learner
from vitarium.training.evaluation import to_device
from vitarium.training.optim import create_optimizer
from vitarium.training.recipe import Recipe

FILE = "batch_size.json"
"""The batch that was found, in the folder of the run."""
FIRST, LARGEST = 8, 4096
"""Smallest and largest batch that are tried, unless even the smallest does not fit."""
GAIN = 1.05
"""On a CPU, a batch twice as large must bring this factor of images per second."""
TIMED = 3
"""Number of timed steps of a size, of which the fastest counts."""
SHARE = 0.8
"""Share of the available memory that a batch may need."""


@dataclass(frozen=True)
class Trial:
    """One step at one size: whether it fitted, its time, and the memory that it needed (CPU only, bytes)."""

    batch_size: int
    fits: bool
    seconds: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class BatchChoice:
    """A batch size, the reason for it in words, and what was tried."""

    batch_size: int
    reason: str
    trials: list[Trial] = field(default_factory=list)


Step = Callable[[int], Trial]


def batch_size_for(
    folder: Path, learner: Learner, data: ImageData, recipe: Recipe, device: torch.device, *, processes: int = 1
) -> BatchChoice:
    """Return the batch of a run: the recorded one where it has begun before, else the largest that fits, which is recorded.

    Raises:
        DataError: no training images.
        TrainingStopped: not even one image fits.
    """
    try:
        known = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return BatchChoice(int(known["batch_size"]), str(known["reason"]), [Trial(**trial) for trial in known["trials"]])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / FILE}, which records the batch of the run, cannot be read ({error}); delete it to search again"
        ) from error
    most = len(data.train) // (recipe.accumulate * processes)
    if most < 1:
        raise DataError(f"{len(data.train)} training images are fewer than accumulate={recipe.accumulate} x {processes} processes need")
    with generators_kept():
        step = TrainingSteps(learner, data, recipe, device)
        choice = largest_batch(step, most) if device.type != "cpu" else best_batch_on_cpu(step, most, available_memory())
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, asdict(choice))
    return choice


def largest_batch(step: Step, most: int) -> BatchChoice:
    """Return the largest batch, up to `most`, whose step fits into the memory of an accelerator: doubled until one fails, then halfway.

    Raises:
        TrainingStopped: not even one image fits.
    """
    trials: list[Trial] = []

    def fits(size: int) -> bool:
        trials.append(step(size))
        return trials[-1].fits

    most = min(most, LARGEST)
    size = min(FIRST, most)
    while not fits(size):
        if size == 1:
            raise TrainingStopped("out of memory with a batch of one image: take a smaller model or image_size, or precision=bf16-mixed")
        size //= 2
    failed = next((trial.batch_size for trial in reversed(trials) if not trial.fits), None)
    while failed is None and size < most:
        following = min(2 * size, most)
        size, failed = (following, None) if fits(following) else (size, following)
    if failed is not None and (size + failed) // 2 > size and fits((size + failed) // 2):
        size = (size + failed) // 2
    limit = f"{failed} is too large for the memory" if failed is not None else f"the data or the limit of {LARGEST} allow no more"
    return BatchChoice(size, f"{size} fits, and {limit}", trials)


def best_batch_on_cpu(step: Step, most: int, available: int) -> BatchChoice:
    """Return the batch, doubled while that makes training faster and the memory suffices.

    The memory of a larger batch is estimated from the two sizes before, along a line, so that none is tried that would not fit. Two sizes
    in a row that bring nothing end the search, because the time of one step varies.

    Args:
        step: as for `largest_batch`.
        most: largest batch.
        available: memory in bytes.

    Raises:
        TrainingStopped: not even the first batch fits.
    """
    most = min(most, LARGEST)
    trials = [step(min(FIRST, most))]
    if not trials[0].fits:
        raise TrainingStopped(f"out of memory with a batch of {trials[0].batch_size}: take a smaller model or image_size")
    reason = f"the data or the limit of {LARGEST} allow no more"
    while trials[-1].batch_size < most:
        size = min(2 * trials[-1].batch_size, most)
        if (needed := _memory_of(size, trials)) > SHARE * available:
            reason = f"{size} would need about {needed / 1e9:.1f} of {available / 1e9:.1f} GB"
            break
        trial = step(size)
        if not trial.fits:
            reason = f"{size} does not fit"
            break
        trials.append(trial)
        if len(trials) > 2 and max(map(_speed, trials[-2:])) < GAIN * max(map(_speed, trials[:-2])):
            reason = "larger ones are not faster"
            break
    fastest = max(map(_speed, trials))
    chosen = next(trial for trial in trials if _speed(trial) * GAIN >= fastest)
    return BatchChoice(chosen.batch_size, f"{_speed(chosen):.0f} images/s; {reason}", trials)


def _memory_of(size: int, trials: list[Trial]) -> float:
    """Return the memory that a batch needs, from the line through the last two sizes; 0 after one."""
    if len(trials) < 2:
        return 0.0
    before, last = trials[-2:]
    slope = max(0.0, (last.memory - before.memory) / (last.batch_size - before.batch_size))
    return last.memory + slope * (size - last.batch_size)


def _speed(trial: Trial) -> float:
    return trial.batch_size / max(trial.seconds, 1e-9)


class TrainingSteps:
    """Steps of a copy of a learner at any batch size, with the recipe's optimizer."""

    def __init__(self, learner: Learner, data: ImageData, recipe: Recipe, device: torch.device):
        self.data, self.device = data, device
        self.learner = copy.deepcopy(learner).to(device).train()
        self.transform = learner.transform(recipe.augment)
        self.optimizers = [
            create_optimizer(self.learner, recipe.player(name).optimizer, player.parameters())
            for name, player in self.learner.players().items()
        ]
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16-mixed")

    def __call__(self, size: int) -> Trial:
        try:
            batch = self._batch(size)
            before = reset_peak()
            self._step(batch)  # allocates
            times = []
            for _ in range(TIMED):
                began = time.perf_counter()
                self._step(batch)
                times.append(time.perf_counter() - began)
            return Trial(size, True, min(times), max(0, peak() - before))
        except (RuntimeError, MemoryError) as error:
            text = str(error).lower()
            if (
                not isinstance(error, MemoryError | torch.OutOfMemoryError)
                and "allocate memory" not in text
                and "out of memory" not in text
            ):
                raise
        self.learner.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return Trial(size, False)

    def _batch(self, size: int) -> dict[str, Any]:
        loader = Loader(self.data.train, self.transform, collate=self.learner.collate, batch_size=size, bad_files=BadFiles(limit=1.0))
        return to_device(next(loader.epoch(0)), self.device)

    def _step(self, batch: dict[str, Any]) -> None:
        for (name, _), optimizer in zip(self.learner.players().items(), self.optimizers, strict=True):
            with self.autocast:
                loss = self.learner(batch, name)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if self.device.type != "cpu":
            float(loss)  # waits for the device


def available_memory() -> int:
    """Return the memory that is free for this process, in bytes; half of the machine's where the system does not report it.

    A container's limit counts where it is smaller than the machine's memory.
    """
    if (free := _kilobytes("/proc/meminfo", "MemAvailable:")) is not None:
        return min([1024 * free, *_left_in_container()])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


CONTAINER = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Files of Linux's control groups, version 2 and 1: limit, use, and details with the name of the cached files, which make room; bytes."""


def _left_in_container(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return the bytes below the limit of this process's container; [] without a limit ("max")."""
    for limit, used, details, cached in CONTAINER:
        with contextlib.suppress(OSError, ValueError, KeyError):
            cache = int(dict(line.split() for line in (root / details).read_text().splitlines())[cached])
            return [max(0, int((root / limit).read_text()) - int((root / used).read_text()) + cache)]
    return []


def _kilobytes(file: str, name: str) -> int | None:
    """Return a number of one of Linux's files of sizes; None elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
    return None


def peak() -> int:
    """Return the largest resident memory of this process since `reset_peak`, or since its start where that is not possible, in bytes."""
    if (most := _kilobytes("/proc/self/status", "VmHWM:")) is not None:
        return 1024 * most
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> int:
    """Set the peak to the present memory where the system can do that (Linux), and return it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()
