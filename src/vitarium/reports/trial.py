"""Build, train, evaluate, measure and save one model of a comparison."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitarium.catalog import preprocessing_of
from vitarium.catalog.calling import call, example_inputs
from vitarium.catalog.saving import save
from vitarium.data import BadFiles, ImageData, open_data
from vitarium.data.image_set import size_of
from vitarium.efficiency.profiler import Profile, count_macs, profile
from vitarium.efficiency.runtimes import run_with
from vitarium.engine.machine import OtherPrograms, describe_device
from vitarium.errors import DataError, TrainingStopped, UsageError, VitariumError, WriteError
from vitarium.nn.modes import evaluating
from vitarium.reports.results import Trial
from vitarium.training import Learner, Progress, Recipe, evaluate, find_learner
from vitarium.training.fitting import fit_saved_or_not
from vitarium.training.identity import fingerprint, in_words
from vitarium.training.learners import check_suits
from vitarium.training.recording import record_training
from vitarium.training.tasks import Metric, Task

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
        spec, labels, seed, val_fraction, image_size: as `open_data` takes them; labels is its `task`.
        fingerprint: of the data as they were when the comparison began.
    """

    spec: str
    labels: str
    seed: int
    val_fraction: float
    image_size: int | None
    fingerprint: dict[str, Any] = field(hash=False)

    @classmethod
    def of(cls, images: ImageData, spec: str | Path, *, labels: str, seed: int, val_fraction: float, image_size: int | None) -> DataSource:
        """Return the source of opened data, which this process then need not open again."""
        source = cls(str(spec), labels, seed, val_fraction, image_size, fingerprint(images))
        _OPENED.clear()
        _OPENED[source] = images
        return source

    def open(self) -> ImageData:
        """Open the data; within a process only the first time.

        Raises:
            DataError: they are not there, or not what they were.
        """
        if self not in _OPENED:
            given: dict[str, Any] = dict(seed=self.seed, val_fraction=self.val_fraction, image_size=self.image_size)
            images = open_data(self.spec, task=self.labels, **given)
            if (now := fingerprint(images)) != self.fingerprint:
                differences = in_words({"data": self.fingerprint}, {"data": now})
                raise DataError(f"{self.spec} differs here from what the comparison began with: {differences}")
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
    progress: Callable[[Progress, Metric], None] | None,
    measuring: Callable[[], None],
    source: DataSource | None = None,
    runtime: str = "eager",
) -> Trial | None:
    """Train a model (or resume its training), then evaluate and measure it. The model's file is written last.

    Args:
        folder: of this model alone.
        progress: called as training proceeds, with the primary metric.
        measuring: called when training is over.
        source: where the data come from, for the model's record.
        runtime: that executes the saved model for its further timings (see `vitarium.efficiency.runtimes`).

    Returns:
        the result; None in the helper processes of data-parallel training.

    Raises:
        UsageError: the learner measures nothing on held-out images.
        TrainingStopped: the primary metric of the trained model is missing or not finite.
        WriteError: its file cannot be written; `error.result` is the result as plain values.
        whatever `create_model`, `fit` and the model itself raise.
    """
    kind = find_learner(recipe.objective["name"])
    check_suits(kind, name)
    learner = kind.create(name, data, recipe, pretrained=pretrained)
    metric = metric_of(learner)
    report = None if progress is None else lambda at: progress(at, metric)
    with suitable_threads(count_macs(learner.eval_model())):
        fitted, _ = fit_saved_or_not(learner, data, recipe, folder, **asdict(devices), progress=report)
        if not is_main_process():
            return None
        measuring()
        model = learner.eval_model()
        numbers, extras, evaluated = held_out(learner, data, recipe.batch_size)
        if metric.name not in numbers:
            raise TrainingStopped(f"its {metric.label} on the {evaluated} held-out images is missing or not finite")
        others = OtherPrograms()
        cost, threads, load = measure(model), torch.get_num_threads(), others.share()
    if source is not None:
        record_training(learner, data, source=source.spec, seed=source.seed, val_fraction=source.val_fraction)
    trial = Trial(
        name=name,
        score=numbers[metric.name],
        metrics=numbers,
        evaluated=evaluated,
        latency_ms=cost.latency_ms,
        throughput=cost.throughput,
        peak_memory_mb=cost.peak_memory_mb,
        params=cost.params,
        macs=cost.macs,
        bytes=cost.bytes,
        image_size=preprocessing_of(model).image_size,
        steps=fitted.steps,
        seconds=fitted.seconds,
        history=fitted.history,
        bad_files=[{"path": str(path), "reason": str(reason)} for path, reason in fitted.bad_files],
        file=f"models/{folder.name}/{MODEL}",
        threads=threads,
        device=describe_device(accelerator=devices.accelerator),
        load=load,
        metric=metric,
        inputs=list(example_inputs(model)),
        extras=extras,
        runtime=runtime,
    )
    try:
        save(model, folder / MODEL)
    except WriteError as error:
        error.result = trial.to_dict()
        raise
    return trial if runtime == "eager" else replace(trial, **runtime_times(model, runtime, folder / MODEL, learner.task))


def metric_of(learner: Learner) -> Metric:
    """Return the primary metric: the task's, or the learner's where it names another one.

    Raises:
        UsageError: the learner measures nothing on held-out images.
    """
    if learner.metrics() is None:
        raise UsageError(
            f"the learner {learner.objective} measures nothing on held-out images, so its models cannot be compared; "
            f"{learner.task.no_answer or 'vitarium train trains one'}"
        )
    (name, best), primary = learner.primary_metric, learner.task.primary
    return primary if (primary.name, primary.best) == (name, best) else Metric(name, "min" if best == "min" else "max")


def held_out(learner: Learner, data: ImageData, batch_size: int) -> tuple[dict[str, float], dict[str, Any], int]:
    """Return the finite metrics on the held-out part, what the task keeps beside them, and the number of images that could be read."""
    bad_files, task = BadFiles(total=size_of(data)), learner.task
    values = evaluate(learner, data.val, batch_size=batch_size, bad_files=bad_files)
    extras = task.extras(learner.eval_model(), data, values, batch_size=batch_size)
    numbers = {name: float(v) for name, v in {**values, **extras}.items() if isinstance(v, int | float) and math.isfinite(v)}
    rest = {name: value for name, value in extras.items() if not isinstance(value, int | float)}
    return numbers, rest, len(data.val) - len(bad_files.items())


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


def runtime_times(model: nn.Module, runtime: str, file: Path, task: Task) -> dict[str, Any]:
    """Return latency and throughput of a saved model that a runtime executes, as fields of a `Trial`, or the reason why it does not.

    The graph is kept beside the file, where `predict --runtime` finds it.
    """
    try:
        with suitable_threads(count_macs(model)):
            running = run_with(model, runtime, source=file, reads=task.reads)
            one, many = (best_seconds(running, count) for count in (1, MEASURING_BATCH))
    except (VitariumError, RuntimeError) as error:
        return {"runtime_refusal": str(error).strip().splitlines()[0][:300] or type(error).__name__}
    return {"runtime_latency_ms": 1e3 * one, "runtime_throughput": MEASURING_BATCH / many}


def best_seconds(model: nn.Module, count: int) -> float:
    """Return the seconds of a call with `count` samples: the shortest of several medians, since other load only makes them longer."""
    inputs = example_inputs(model, count)
    medians: list[float] = []
    with evaluating(model, inference=True):
        call(model, inputs)
        end = time.perf_counter() + MEASURING_SECONDS / 2
        while len(medians) < 3 or time.perf_counter() < end:
            times = []
            for _ in range(3):
                begin = time.perf_counter()
                call(model, inputs)
                times.append(time.perf_counter() - begin)
            medians.append(sorted(times)[1])
    return min(medians)


def measure(model: nn.Module) -> Profile:
    """Profile a model repeatedly; keep the shortest latency and the highest throughput, since other load only makes them worse."""
    end = time.perf_counter() + MEASURING_SECONDS
    profiles: list[Profile] = []
    while len(profiles) < 3 or time.perf_counter() < end:
        profiles.append(profile(model, batch=MEASURING_BATCH, runs=3))
    latency, throughput = min(p.latency_ms for p in profiles), max(p.throughput for p in profiles)
    return replace(profiles[0], latency_ms=latency, throughput=throughput)
