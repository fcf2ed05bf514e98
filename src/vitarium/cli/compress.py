"""`vitarium compress`: a model made cheaper by methods, written to one file, and told beside what it was."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import err, out, print_json, short, table
from vitarium.cli.evaluate import measure, measure_other
from vitarium.cli.opening import apply_methods, find_device, open_model
from vitarium.cli.options import DATA_HELP, BatchSize, Checkpoint, Device
from vitarium.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitarium.data import ImageData

ENDING = ".safetensors"
ROUNDS, SECONDS = 7, 0.2  # turns of the model before and after, interleaved, and how long one takes


@configurable
def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE", help="A file that `vitarium.save` wrote, or a model's name.")],
    methods: Annotated[
        list[str],
        typer.Option("--apply", metavar="METHOD:KEY=VALUE,...", help="What to do, as mptq_vit:bits=6 or tome:r=8. Repeatable, in order."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help=f"File to write, {ENDING}; `vitarium.load` opens it.")],
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP} For calibration and accuracy.", show_default="none")] = None,
    checkpoint: Checkpoint = None,
    val_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share held out of data that has no val/ part.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Of the split.")] = 0,
    batch_size: BatchSize = 64,
    batch: Annotated[int, typer.Option(min=1, help="Images a call when time is measured.")] = 1,
    compiled: Annotated[bool, typer.Option("--compile", help="Time both under torch.compile too (takes a minute or two).")] = False,
    device: Device = "cpu",
    report: Annotated[Path | None, typer.Option(help="JSON file for the table.", show_default="none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Apply methods to a trained model, write one loadable file, and compare before and after: accuracy, size, time, MACs.

    Methods that calibrate see training pictures; accuracy is taken on the held-out part, of the model as loaded from the file.
    """
    import copy

    import vitarium
    from vitarium.catalog.heads import has_trained_head
    from vitarium.catalog.methods import parse_method
    from vitarium.files import write_json

    if output.suffix != ENDING:
        raise UsageError(f"--output must end in {ENDING}, got {output}")
    for text in methods:
        parse_method(text)  # a misspelt one is told before anything is opened
    opened = open_model(model, checkpoint)
    images = open_images(opened, data, val_fraction, seed)
    original = copy.deepcopy(opened)
    with err().status("Applying " + ", ".join(methods)):
        apply_methods(opened, methods, images)
    vitarium.save(opened, output)
    place = find_device(device)
    loaded = vitarium.load(output).to(place)
    check_equal(opened.to(place), loaded, output)
    with err().status("Measuring before and after"):
        before, after = costs(original.to(place), None), costs(loaded, output)
        if images is not None:
            for one, side in ((original, before), (loaded, after)) if has_trained_head(opened) else ():
                side.update(worth(one, images, batch_size))
        times = timed(original, loaded, batch, compiled)
    found: dict[str, Any] = {
        "model": model,
        "methods": methods,
        "file": str(output),
        "data": images and images.name,
        "before": before,
        "after": after,
    }
    found |= {"batch": batch, "times": times, "quantized": quantized(loaded)}
    if report is not None:
        write_json(report, found)
    (print_json if as_json else show)(found)


def open_images(model: nn.Module, data: str | None, val_fraction: float, seed: int) -> ImageData | None:
    """The data that suits the model's objective; None where none are given."""
    from vitarium.catalog import preprocessing_of
    from vitarium.data import open_data
    from vitarium.training.learners import learner_of

    if data is None:
        return None
    task = learner_of(model).data_task
    size = preprocessing_of(model).image_size if task != "class" else None
    return open_data(data, task=task, seed=seed, val_fraction=val_fraction, image_size=size)


def worth(model: nn.Module, images: ImageData, batch_size: int) -> dict[str, float]:
    """{"accuracy": 0 to 1}, or the main metric of another objective."""
    from vitarium.training.learners import learner_of

    learner = learner_of(model)
    if learner.objective == "classification":
        return {"accuracy": measure(model, images.val, images.classes, batch_size)["accuracy"]}
    name = learner.primary_metric[0]
    return {name: measure_other(learner, images.val, batch_size)[name]}


def costs(model: nn.Module, path: Path | None) -> dict[str, Any]:
    """Bytes on disk (of the file, or of one that is written and deleted), bytes of weights in memory, MACs of one image."""
    import vitarium
    from vitarium.catalog import preprocessing_of
    from vitarium.efficiency.profiler import count_macs, weight_bytes

    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder) / f"original{ENDING}"
            vitarium.save(model, path)
        size = path.stat().st_size
    return {"disk_bytes": size, "memory_bytes": weight_bytes(model), "macs": count_macs(model, preprocessing_of(model).image_size)}


def example(model: nn.Module, batch: int) -> Tensor:
    """Images of the size that the model takes."""
    from vitarium.catalog import preprocessing_of
    from vitarium.efficiency.profiler import example_image

    return example_image(model, preprocessing_of(model).image_size, batch)


def check_equal(model: nn.Module, loaded: nn.Module, path: Path) -> None:
    """Refuse to leave a file behind that says anything else than the model.

    Raises:
        CheckpointError: outputs differ; the file is deleted.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    image = example(model, 2)
    with torch.inference_mode():
        pairs = zip(tree_leaves(model.eval()(image)), tree_leaves(loaded(image)), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
    if not same:
        path.unlink()
        raise CheckpointError(f"the model that {path} gives back differs from the one that was written; the file was deleted")


def timed(original: nn.Module, loaded: nn.Module, batch: int, compiled: bool) -> dict[str, Any]:
    """For "eager" (and "compiled"): milliseconds a call before and after, and the ratio round by round: median, least, most."""
    import torch

    from vitarium.efficiency.bench import paired

    image, found = example(original, batch), {}
    for kind in ("eager", "compiled") if compiled else ("eager",):
        before, after = (torch.compile(m) if kind == "compiled" else m for m in (original, loaded))
        with torch.inference_mode():
            calls: dict[str, Callable[[], Any]] = {"before": partial(before, image), "after": partial(after, image)}
            times = paired(calls, rounds=ROUNDS, device=image.device, least_seconds=SECONDS)
        ratios = [b / a for b, a in zip(times["before"], times["after"], strict=True)]
        medians = {f"{k}_ms": 1e3 * statistics.median(v) for k, v in times.items()}
        found[kind] = {**medians, "speedup": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return found


def quantized(model: nn.Module) -> dict[str, int] | None:
    """How many quantized layers there are, how many have no integer product, and how many unpack codes at each call; None without any."""
    from vitarium.efficiency.quantization.layers import QuantizedLayer

    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    unpacked = sum(layer.packed.format.bits < 8 for layer in layers)
    return {"layers": len(layers), "simulated": sum(x.simulated for x in layers), "unpacked": unpacked} if layers else None


def show(found: dict[str, Any]) -> None:
    """The table before and after, and what has to be said of it."""
    result = table("", ">before", ">after", ">", title=f"{found['model']}: {', '.join(found['methods'])}")
    before, after = found["before"], found["after"]
    for name in before:
        a, b = before[name], after[name]
        if name == "macs":
            result.add_row("MACs", short(a), short(b), times_less(a, b))
        elif name.endswith("_bytes"):
            where = "size on disk" if name == "disk_bytes" else "weights in memory"
            result.add_row(where, f"{a / 1e6:.3g} MB", f"{b / 1e6:.3g} MB", times_less(a, b))
        else:
            percent = name == "accuracy"
            values = [f"{100 * v:.2f} %" if percent else f"{v:.4g}" for v in (a, b)]
            result.add_row(name, *values, f"{100 * (b - a):+.2f} points" if percent else f"{b - a:+.4g}")
    for kind, t in found["times"].items():
        ratio = faster(t["speedup"], t["least"], t["most"])
        name = "latency" + (", compiled" if kind == "compiled" else "") + (f" of {found['batch']}" if found["batch"] > 1 else "")
        result.add_row(name, f"{t['before_ms']:.3g} ms", f"{t['after_ms']:.3g} ms", ratio)
    out().print(result)
    if (slow := found["quantized"]) is not None and (slow["simulated"] or slow["unpacked"]):
        told = f"Of {slow['layers']} quantized layers {slow['simulated']} are simulated in floating point and {slow['unpacked']} unpack"
        err().print(f"{told} weights under 8 bits at each call: that saves memory and disk, not time.", style="yellow", markup=False)
    if found["data"] is None:
        err().print("Give --data to see what it costs in accuracy.", style="dim", markup=False)
    err().print(f"written: {found['file']}", style="dim", markup=False)


def times_less(before: float, after: float) -> str:
    """ "3.9x less"."""
    if not before or not after or before == after:
        return ""
    return f"{before / after:.2f}x less" if after < before else f"{after / before:.2f}x more"


def faster(ratio: float, least: float, most: float) -> str:
    """ "1.20x faster [1.15, 1.31]", or slower by so much."""
    if ratio < 1:
        return rf"{1 / ratio:.2f}x slower \[{1 / most:.2f}, {1 / least:.2f}]"
    return rf"{ratio:.2f}x faster \[{least:.2f}, {most:.2f}]"
