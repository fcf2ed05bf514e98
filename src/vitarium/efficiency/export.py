"""Export of a model as a graph that runs without this library: ONNX, or torch.export's program. The graph is checked before it is kept.

    export(model, "swin.onnx").error        # root mean square of the difference over that of the logits

The file carries the model's labels and preprocessing under the key "vitarium", as JSON.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog import preprocessing_of
from vitarium.efficiency.profiler import example_image, weight_bytes
from vitarium.errors import CheckpointError, UsageError, nearest, require
from vitarium.files import atomic_path

ONNX_LIMIT = 2 * 10**9  # bytes; a protobuf file cannot hold more
Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """Result of an export, with the error of the graph's outputs.

    Args:
        path: the file.
        format: "onnx" or "torch-export".
        image_size: side of the square input in pixels.
        batch: number of images that the graph takes; None for any number.
        bytes: size of the file.
        error: root mean square of (graph - model) over that of the model's outputs, the largest over the batches tried.
    """

    path: Path
    format: str
    image_size: int
    batch: int | None
    bytes: int
    error: float


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "onnx",
    image_size: int | None = None,
    batch: int | None = None,
    tolerance: float = 1e-3,
) -> Exported:
    """Write a model's graph, read it back, run it beside the model, and keep it only if the outputs agree.

    Args:
        model: float32, on the CPU; it is not changed.
        path: an older file is replaced only if the new one is right.
        format: "onnx" (input "image", output "logits") or "torch-export".
        image_size: side of the square input in pixels; by default the model's own.
        batch: number of images; None: variable.
        tolerance: largest accepted error (see `Exported`).

    Raises:
        UsageError: an unknown format, a model that cannot be traced, or one that is too large for the format.
        CheckpointError: the graph's outputs differ from the model's; nothing is written.
        MissingExtra: onnx is not installed.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}{nearest(format, FORMATS)} (formats: {', '.join(FORMATS)})")
    if batch is not None and batch < 1:
        raise UsageError(f"batch must be at least 1, or None for a variable batch; got {batch}")
    write, read, packages = FORMATS[format]
    for package in packages:
        require(package, "export")
    twin = copy.deepcopy(model).cpu().eval()  # tracing may leave attributes on a module; the caller's must stay unchanged
    size = image_size or preprocessing_of(model).image_size
    with torch.no_grad(), _silent():
        program = _trace(twin, example_image(twin, size, batch or 2), dynamic=batch is None)
        with atomic_path(path) as temporary:
            write(program, temporary, _record(model, size))
            error = compare(read(temporary), twin, size, [batch] if batch else [1, 3])
            if not error <= tolerance:  # also true for NaN
                raise CheckpointError(
                    f"the {format} graph differs from the model by {error:.2g} of its outputs' root mean square (accepted: {tolerance:g}); "
                    f"{path} was not written; try another format or image size"
                )
    return Exported(Path(path), format, size, batch, Path(path).stat().st_size, error)


def compare(graph: Runner, model: nn.Module, image_size: int, batches: list[int]) -> float:
    """Return the largest relative error (root mean square) of a graph against its model, over random images in batches of these sizes."""
    errors = []
    for batch in batches:
        image = example_image(model, image_size, batch)
        wanted = model(image).double()
        got = graph(image).double()
        errors.append(
            ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item() if got.shape == wanted.shape else float("inf")
        )
    return max(errors, key=lambda e: (math.isnan(e), e))


def _trace(model: nn.Module, image: Tensor, *, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    try:
        return torch.export.export(model, (image,), dynamic_shapes=shapes)
    except UsageError:
        raise
    except Exception as error:  # torch.export has no common class for its errors
        first = str(error).strip().splitlines()[0]
        hint = "; a fixed batch may work: --batch 1" if dynamic else ""
        raise UsageError(f"{type(model).__name__} cannot be traced at {tuple(image.shape)}: {first}{hint}") from error


def _record(model: nn.Module, size: int) -> str:
    spec = getattr(model, "spec", None)
    preprocessing = preprocessing_of(model).to_dict() | {"image_size": size}
    return json.dumps({"name": spec.name if spec else None, "labels": getattr(model, "labels", None), "preprocessing": preprocessing})


def _write_onnx(program: torch.export.ExportedProgram, path: Path, record: str) -> None:
    if weight_bytes(program.module()) > ONNX_LIMIT:
        raise UsageError("the weights exceed the 2 GB that one ONNX file can hold; choose --format torch-export")
    axes = ({0: "batch"},) if program.range_constraints else None  # name of the axis in the file
    graph = torch.onnx.export(program, input_names=["image"], output_names=["logits"], dynamic_shapes=axes, verbose=False)
    assert graph is not None  # it is None only when a path is given
    graph.model.metadata_props["vitarium"] = record
    graph.save(path, external_data=False)


def _read_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def _write_program(program: torch.export.ExportedProgram, path: Path, record: str) -> None:
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={"vitarium": record})


def _read_program(path: Path) -> Runner:
    with open(path, "rb") as file:
        return torch.export.load(file).module()


Writer = Callable[[torch.export.ExportedProgram, Path, str], None]
FORMATS: dict[str, tuple[Writer, Callable[[Path], Runner], tuple[str, ...]]] = {
    "onnx": (_write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": (_write_program, _read_program, ()),
}
"""Writer, reader and required packages of each format."""


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence exporters' output; the graph is checked by running it."""
    logger: Any = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
