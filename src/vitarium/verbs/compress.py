"""Apply methods to a trained model, write one file, and compare before and after."""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.errors import CheckpointError, UsageError
from vitarium.files import check_output
from vitarium.training.tasks.base import Metric, TableData
from vitarium.verbs.opening import Notify, apply_methods, find_device, name_of, open_for, open_model, open_unlabelled, quiet
from vitarium.verbs.result import Result

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitarium.data import ImageData

ENDING = ".safetensors"
COMPILE_LIMIT = 240.0
"""Default limit on torch.compile of one model, in seconds."""
ROUNDS, SECONDS = 7, 0.2
"""Number of interleaved timings of the model before and after, and the least duration of each in seconds."""


@dataclass(repr=False)
class Compression(Result):
    """A compressed model beside the original.

    Attributes:
        model: file or name of the original.
        methods: the applied methods, as text.
        file: of the compressed model.
        data: name of the data for the metric; None: none.
        before, after: disk_bytes, memory_bytes, macs, and the primary metric of the task.
        batch: images per call when time was measured.
        times: "eager" and "compiled": before_ms, after_ms, speedup, least, most; of a compilation that did not finish "unfinished", why.
        warnings: what to know first: that the result is slower, and the size from which each method pays.
        quantized: numbers of quantized layers, of simulated ones, and of those that unpack at each call; None without any.
        metric: the primary metric.
    """

    model: str
    methods: list[str]
    file: str
    data: str | None
    before: dict[str, Any]
    after: dict[str, Any]
    batch: int
    times: dict[str, Any]
    quantized: dict[str, int] | None
    metric: Metric = field(repr=False)
    warnings: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        slower = {"warning": self.warnings[0]} if self.warnings else {}
        return {**slower, "file": self.file, "speedup": f"{self.times['eager']['speedup']:.2f}x"}

    def tables(self) -> list[TableData]:
        return [comparison(self)]

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "metric"}


def compress(
    model: str | os.PathLike[str] | nn.Module,
    apply: Sequence[Any],
    output: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    checkpoint: str | None = None,
    val_fraction: float | None = None,
    seed: int | None = None,
    batch_size: int = 64,
    batch: int = 1,
    compiled: bool = False,
    compile_limit: float = COMPILE_LIMIT,
    device: str = "cpu",
    notify: Notify = quiet,
) -> Compression:
    """Apply methods to a copy of a model, save it, and compare both: primary metric, size, MACs, time.

    Time is measured before the file is written. Where the result is slower, the first warning says so, and one for each method from which
    size it pays on this machine (`efficiency.growth`). The metric is measured on the held-out part, of the model as loaded from the file.

    Args:
        model: a file of `vitarium.save`, a model's name, or a model, which is not changed.
        apply: methods, in order, as "mptq_vit:bits=6".
        output: .safetensors file to write.
        data: for calibration and the metric; None: neither.
        checkpoint: weights for a name.
        val_fraction, seed: of the split, if the data has none; None: those of the model's training, else 0.2 and 0.
        batch_size: images per forward pass when the metric is measured.
        batch: images per call when time is measured.
        compiled: time both under torch.compile too.
        compile_limit: seconds after which a compilation is given up (on POSIX, in the main thread).
        device: "auto", "cpu", "cuda", ...
        notify: called with messages about progress.

    Raises:
        UsageError: unknown methods or device, a wrong order, an output of another ending or that would replace a file of others, or a
            method that needs data without any.
        DataError: labels that the model does not have.
        CheckpointError: weights that are not available, or a saved file with different outputs (it is deleted).
    """
    import vitarium
    from vitarium.catalog.heads import has_trained_head
    from vitarium.catalog.saving import change_record
    from vitarium.reports.card import write_card
    from vitarium.training.recording import record_results
    from vitarium.training.tasks import task_of

    path, place = Path(output), find_device(device)
    check_arguments(model, apply, path)
    original = open_model(model, checkpoint)
    if not apply:
        raise UsageError(no_methods(original))
    answers = has_trained_head(original)  # data for a model without a metric is only for calibration
    images = None if data is None else (open_for if answers else open_unlabelled)(original, data, seed=seed, val_fraction=val_fraction)
    changed = copy.deepcopy(original)
    texts = [method if isinstance(method, str) else repr(method) for method in apply]
    notify("Applying " + ", ".join(texts))
    apply_methods(changed, apply, images, notify)
    notify("Timing before and after")
    times = timed(original.to(place), changed.to(place), batch, compiled, compile_limit)
    warnings = slower(times["eager"], changed, batch, place)
    for warning in warnings:
        notify(f"{warning}\n")
    vitarium.save(changed, path)
    loaded = vitarium.load(path).to(place)
    check_equal(changed, loaded, path)
    notify("Measuring before and after")
    before, after = costs(original, None), costs(loaded, path)
    if images is not None and answers:
        for one, side in ((original, before), (loaded, after)):
            side.update(primary_value(one, images, batch_size))
        metric_name = task_of(loaded).primary.name
        change_record(path, results=record_results(loaded, {metric_name: after[metric_name]}, images))
    write_card(path)
    name, metric = name_of(model), task_of(loaded).primary
    source = images.name if images is not None else None
    return Compression(name, texts, str(path), source, before, after, batch, times, quantized(loaded), metric, warnings)


def check_arguments(model: str | os.PathLike[str] | nn.Module, apply: Sequence[Any], path: Path) -> None:
    """Check the output and the texts of methods before anything is opened.

    Raises:
        UsageError: see `compress`.
    """
    from vitarium.catalog.methods import parse_method

    if path.suffix != ENDING:
        raise UsageError(f"--output must end in {ENDING}, got {path}")
    if isinstance(model, str | os.PathLike) and path.exists() and Path(model).exists() and path.samefile(model):
        raise UsageError(f"--output {path} is the model itself; choose another file, so that the original stays")
    check_output(path)
    for method in apply:
        if isinstance(method, str):
            parse_method(method)


def no_methods(model: nn.Module) -> str:
    """Return the message for a call without methods: those that fit the model, with what each does."""
    from vitarium.verbs.methods import methods

    fit = [row for row in methods(model).rows if row.fits]
    lines = [f"  --apply {row.name}   {row.summary}" for row in fit]
    return "\n".join(
        [
            f"no method is given with --apply; those that fit this {type(model).__name__}:",
            *lines,
            "'vitarium methods' describes their options",
        ]
    )


def primary_value(model: nn.Module, images: ImageData, batch_size: int) -> dict[str, float]:
    """Return the primary metric of the model's task on the held-out part, by its name."""
    from vitarium.data.image_set import size_of
    from vitarium.training.tasks import task_of
    from vitarium.verbs.evaluate import measure

    name = task_of(model).primary.name
    return {name: measure(model, images.val, batch_size, total=size_of(images))[0][name]}


def costs(model: nn.Module, path: Path | None) -> dict[str, Any]:
    """Return the bytes on disk (of the file, or of one that is written and deleted), bytes of weights in memory, MACs of one image."""
    import vitarium
    from vitarium.catalog import preprocessing_of
    from vitarium.efficiency.profiler import count_macs, weight_bytes

    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder) / f"original{ENDING}"
            vitarium.save(model, path)
        size = path.stat().st_size
    return {"disk_bytes": size, "memory_bytes": weight_bytes(model), "macs": count_macs(model, preprocessing_of(model).image_size)}


def check_equal(model: nn.Module, loaded: nn.Module, path: Path) -> None:
    """Delete a file if its model's outputs differ from those of the saved model.

    Raises:
        CheckpointError: outputs differ.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    from vitarium.catalog.calling import call, example_inputs

    inputs = example_inputs(model, 2)
    with torch.inference_mode():
        pairs = zip(tree_leaves(call(model.eval(), inputs)), tree_leaves(call(loaded, inputs)), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
    if not same:
        path.unlink()
        raise CheckpointError(f"the model loaded from {path} has different outputs from the one that was saved; the file was deleted")


def slower(times: dict[str, Any], changed: nn.Module, batch: int, device: torch.device) -> list[str]:
    """Return warnings about a result that was slower in every round: the ratio, and from which size each of its methods pays."""
    from vitarium.efficiency.growth import growth, verdict

    if times["most"] >= 1:
        return []
    ratio = faster(times["speedup"], times["least"], times["most"])
    found = [f"Warning: the result is {ratio}: {times['before_ms']:.3g} ms before, {times['after_ms']:.3g} ms after."]
    methods = [report.method for report in getattr(changed, "methods", ()) if report.method.training != "required"]
    return found + [verdict(method, growth(method, batch=batch, device=device)) for method in methods]


def timed(original: nn.Module, changed: nn.Module, batch: int, compiled: bool, limit: float = COMPILE_LIMIT) -> dict[str, Any]:
    """Return for "eager" (and "compiled") the milliseconds per call before and after, and the ratio by round: median, least, most."""
    import torch

    from vitarium.catalog.calling import arguments, example_inputs
    from vitarium.efficiency.limits import time_limit
    from vitarium.efficiency.profiler import device_of
    from vitarium.efficiency.timing import paired

    inputs = example_inputs(original, batch)
    found: dict[str, Any] = {}
    args, named = arguments(original, inputs)
    for kind in ("eager", "compiled") if compiled else ("eager",):
        before, after = (torch.compile(m) if kind == "compiled" else m for m in (original, changed))
        with torch.inference_mode():
            calls: dict[str, Callable[[], Any]] = {"before": partial(before, *args, **named), "after": partial(after, *args, **named)}
            if kind == "compiled":
                try:
                    for run in calls.values():
                        with time_limit(limit):
                            run()
                except TimeoutError as late:
                    torch.compiler.reset()
                    found[kind] = {"unfinished": f"{late}; --compile-limit SECONDS raises the limit"}
                    continue
            times = paired(calls, rounds=ROUNDS, device=device_of(inputs), least_seconds=SECONDS)
        ratios = [b / a for b, a in zip(times["before"], times["after"], strict=True)]
        medians = {f"{k}_ms": 1e3 * statistics.median(v) for k, v in times.items()}
        found[kind] = {**medians, "speedup": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return found


def quantized(model: nn.Module) -> dict[str, int] | None:
    """Return how many quantized layers there are, how many have no integer product, and how many unpack codes at each call."""
    from vitarium.efficiency.quantization.layers import QuantizedLayer

    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    unpacked = sum(layer.packed.format.bits < 8 for layer in layers)
    return {"layers": len(layers), "simulated": sum(x.simulated for x in layers), "unpacked": unpacked} if layers else None


def comparison(found: Compression) -> TableData:
    """Return the table before and after."""
    from vitarium.numbers import short

    table = TableData(f"{found.model}: {', '.join(found.methods)}", ["", ">before", ">after", ">"])
    for name, a in found.before.items():
        b = found.after[name]
        if name == "macs":
            table.rows.append(["MACs", short(a), short(b), times_less(a, b)])
        elif name.endswith("_bytes"):
            where = "size on disk" if name == "disk_bytes" else "weights in memory"
            table.rows.append([where, f"{a / 1e6:.3g} MB", f"{b / 1e6:.3g} MB", times_less(a, b)])
        else:
            table.rows.append([name, found.metric.text(a), found.metric.text(b), found.metric.difference(a, b)])
    for kind, t in found.times.items():
        if "unfinished" in t:
            table.rows.append(["latency, compiled", "-", "-", t["unfinished"]])
            continue
        name = "latency" + (", compiled" if kind == "compiled" else "") + (f" of {found.batch}" if found.batch > 1 else "")
        table.rows.append([name, f"{t['before_ms']:.3g} ms", f"{t['after_ms']:.3g} ms", faster(t["speedup"], t["least"], t["most"])])
    return table


def times_less(before: float, after: float) -> str:
    """Return "3.90x less" or "1.20x more"; "" for no difference."""
    if not before or not after or before == after:
        return ""
    return f"{before / after:.2f}x less" if after < before else f"{after / before:.2f}x more"


def faster(ratio: float, least: float, most: float) -> str:
    """Return "1.20x faster [1.15, 1.31]", or the same with "slower"."""
    if ratio < 1:
        return f"{1 / ratio:.2f}x slower [{1 / most:.2f}, {1 / least:.2f}]"
    return f"{ratio:.2f}x faster [{least:.2f}, {most:.2f}]"
