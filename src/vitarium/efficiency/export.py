"""Export of a model as a graph that runs without this library: ONNX, or torch.export's program. The graph is verified before it is written.

    export(model, "swin.onnx").error        # root mean square of the difference over that of the logits

The graph's inputs have the names of the model's (`vitarium.catalog.calling.example_inputs`): "image" of a classifier, "x", "t" and "labels"
of a DiT. The file carries the model's labels, preprocessing and inputs under the key "vitarium", as JSON; for a calibrated classifier also
its "temperature", by which the logits are divided before the softmax (`vitarium.catalog.calibration`).
"""

from __future__ import annotations

import contextlib
import copy
import io
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
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_unflatten

from vitarium.catalog import preprocessing_of
from vitarium.catalog.calling import Inputs, arguments, call, example_inputs
from vitarium.catalog.record import training_of
from vitarium.efficiency.graphs import lighten
from vitarium.efficiency.profiler import weight_bytes
from vitarium.efficiency.quantization.onnx import exportable, translations
from vitarium.errors import CheckpointError, UsageError, nearest, require
from vitarium.files import atomic_path

ONNX_LIMIT = 2 * 10**9  # bytes; the largest protobuf file
SAMPLES, WORST = 8, 0.2
"""Samples that are compared for a graph with rounded activations, and the error from which a single one fails it."""
Runner = Callable[..., Any]
"""A graph read from a file: function from the inputs, in order, to the outputs."""


@dataclass(frozen=True)
class Exported:
    """Result of an export, with the error of the graph's outputs.

    Args:
        path: the file.
        format: "onnx" or "torch-export".
        image_size: side of the square input in pixels.
        batch: number of images that the graph takes; None for any number.
        bytes: size of the file.
        error: root mean square of (graph - model) over that of the model's outputs, the largest over the tested batches.
        integer: number of integer weights in the graph.
    """

    path: Path
    format: str
    image_size: int
    batch: int | None
    bytes: int
    error: float
    integer: int = 0


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "onnx",
    image_size: int | None = None,
    batch: int | None = None,
    tolerance: float = 1e-3,
) -> Exported:
    """Write a model's graph, read it back, compare its outputs with the model's, and keep it only if they agree.

    Args:
        model: float32, on the CPU; left as it is.
        path: file to write; an existing file is replaced only by a verified one.
        format: "onnx" (named inputs; the output is "logits" if it is a matrix, "output" if another tensor, else several with their names)
            or "torch-export".
        image_size: side of the square input, pixels; the model's own by default.
        batch: samples at once; None lets it vary.
        tolerance: largest error that is accepted (see `Exported`).

    Raises:
        UsageError: an unknown format, a model that cannot be traced or has unknown inputs, or one too large for the format.
        CheckpointError: the outputs of the graph differ; nothing is written.
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
    traced = copy.deepcopy(twin)
    integer = exportable(traced) if format == "onnx" else 0
    size = image_size or preprocessing_of(model).image_size
    with torch.no_grad(), _silent():
        inputs = example_inputs(twin, batch or 2, size)
        program = _trace(traced, inputs, dynamic=batch is None)
        if format == "onnx":
            program = _trace(lighten(program.module()), inputs, dynamic=batch is None, like=traced)
        with atomic_path(path) as temporary:
            write(program, temporary, _record(model, inputs, size))
            error = compare(read(temporary), twin, size, [batch] if batch else [1, 3], rounded=integer > 0)
            if not error <= tolerance:  # also true for NaN
                raise CheckpointError(
                    f"the {format} graph differs from the model by {error:.2g} of its outputs' root mean square (accepted: {tolerance:g}); "
                    f"{path} was not written; try another format or image size"
                )
    return Exported(Path(path), format, size, batch, Path(path).stat().st_size, error, integer)


def compare(graph: Runner, model: nn.Module, image_size: int | None, batches: list[int], *, rounded: bool = False) -> float:
    """Return the relative error (root mean square) of a graph's outputs against its model's, over random inputs in these batches.

    Args:
        graph, model, image_size: what is compared, and the side of its images.
        batches: numbers of samples at once.
        rounded: whether activations are rounded. A value midway between two codes then goes either way, by the last bit of an earlier sum,
            which changes the outputs of that sample by about a step. The error is the median over samples, `SAMPLES` or more, instead of
            the worst over the batches; one sample beyond `WORST` still counts.
    """
    if not rounded:
        return max((error for batch in batches for error in _errors(graph, model, image_size, batch)), key=_rank)
    errors = [_errors(graph, model, image_size, b, seed, by_sample=True) for b in batches for seed in range(-(-SAMPLES // b))]
    samples = sorted((error for some in errors for error in some), key=_rank)
    return samples[-1] if not samples[-1] <= WORST else samples[len(samples) // 2]


def _rank(error: float) -> tuple[bool, float]:
    """Return a key that orders errors, not-a-number last."""
    return math.isnan(error), error


def _errors(graph: Runner, model: nn.Module, image_size: int | None, batch: int, seed: int = 0, *, by_sample: bool = False) -> list[float]:
    """Return the error of each output, over the batch, or of each sample of each output."""
    inputs = example_inputs(model, batch, image_size, seed=seed)
    wanted, got = outputs_of(call(model, inputs)), outputs_of(graph(*inputs.values()))
    if [t.shape for t in wanted] != [t.shape for t in got]:
        return [float("inf")]
    found: list[float] = []
    for a, b in zip(wanted, got, strict=True):
        rows = (len(a), -1) if by_sample and a.ndim and len(a) == batch else (1, -1)
        a, b = a.double().reshape(rows), b.double().reshape(rows)
        found += ((b - a).square().mean(1) / a.square().mean().clamp(min=1e-30)).sqrt().tolist()
    return found


def outputs_of(result: Any) -> list[Tensor]:
    """Return the tensors of a model's output, in order."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _trace(model: nn.Module, inputs: Inputs, *, dynamic: bool, like: nn.Module | None = None) -> torch.export.ExportedProgram:
    """Trace a model, called as `like` (itself by default).

    Raises:
        UsageError: it cannot be traced.
    """
    args, named = arguments(like or model, inputs)
    batch = torch.export.Dim("batch")
    shapes: Any = {name: {0: batch} for name in inputs} if named else tuple({0: batch} for _ in args)
    try:
        return torch.export.export(model, args, named, dynamic_shapes=shapes if dynamic else None)
    except UsageError:
        raise
    except Exception as error:  # torch.export has no common class for its errors
        first = str(error).strip().splitlines()[0].split("For more information")[0].strip()
        hint = "; a fixed batch works: --batch 1" if dynamic and _traces(model, inputs) else ""
        given = (
            tuple(next(iter(inputs.values())).shape) if len(inputs) == 1 else ", ".join(f"{k} {tuple(v.shape)}" for k, v in inputs.items())
        )
        raise UsageError(f"{type(model).__name__} cannot be traced at {given}: {first}{hint}") from error


def _traces(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether the model can be traced with the first sample alone."""
    args, named = arguments(model, {name: value[:1] for name, value in inputs.items()})
    try:
        torch.export.export(model, args, named)
    except Exception:  # torch.export has no common class for its errors
        return False
    return True


def _record(model: nn.Module, inputs: Inputs, size: int) -> str:
    spec, temperature = getattr(model, "spec", None), training_of(model).temperature
    preprocessing = preprocessing_of(model).to_dict() | {"image_size": size}
    found: dict[str, Any] = {"name": spec.name if spec else None, "labels": getattr(model, "labels", None), "preprocessing": preprocessing}
    if temperature is not None:
        found["temperature"] = temperature
    if len(inputs) > 1:
        found["inputs"] = {name: {"shape": list(value.shape[1:]), "dtype": str(value.dtype)[6:]} for name, value in inputs.items()}
    return json.dumps(found)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, record: str) -> None:
    if weight_bytes(program.module()) > ONNX_LIMIT:
        raise UsageError("the weights exceed the 2 GB that one ONNX file can hold; choose --format torch-export")
    names = _input_names(program)
    axes = tuple({0: "batch"} for _ in names) if program.range_constraints else None  # the name in the file
    options: dict[str, Any] = dict(dynamic_shapes=axes, custom_translation_table=translations() or None, verbose=False)
    try:
        graph = torch.onnx.export(program, input_names=names, output_names=_output_names(program), **options)
    except torch.onnx.errors.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise UsageError(f"this model has an operator that ONNX lacks ({cause}); --format torch-export writes it") from error
    assert graph is not None  # it is None only when a path is given
    graph.model.metadata_props["vitarium"] = record
    graph.save(path, external_data=False)


def _input_names(program: torch.export.ExportedProgram) -> list[str]:
    """Return the inputs' names; a single input is named "image"."""
    names = list(program.graph_signature.user_inputs)
    return ["image"] if len(names) == 1 else [str(name) for name in names]


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    """Return the outputs' names: "logits" for a single matrix, "output" for another single tensor, else the path of each in the model's
    output."""
    values = next(node.args[0] for node in program.graph.nodes if node.op == "output")
    count = len(values)  # type: ignore[arg-type]
    if count == 1:
        one: Any = values[0]  # type: ignore[index]
        return ["logits" if one.meta["val"].ndim == 2 or len(program.graph_signature.user_inputs) == 1 else "output"]
    spec = program.call_spec.out_spec
    assert spec is not None
    paths, _ = tree_flatten_with_path(tree_unflatten(list(range(count)), spec))
    return [".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path) for path, _ in paths]


def _read_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*values: Tensor) -> Any:
        found = session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})
        tensors = [torch.from_numpy(array) for array in found]
        return tensors[0] if len(tensors) == 1 else tensors

    return run


def _write_program(program: torch.export.ExportedProgram, path: Path, record: str) -> None:
    content = io.BytesIO()  # on a full disk, torch's own writer would end the process
    try:
        torch.export.save(program, content, extra_files={"vitarium": record})
    except NotImplementedError as error:  # outputs of a type that torch cannot write
        raise UsageError(f"torch-export cannot write this model's outputs ({error}); choose --format onnx") from error
    path.write_bytes(content.getbuffer())


def _read_program(path: Path) -> Runner:
    with open(path, "rb") as file:
        program = torch.export.load(file)
    module, names = program.module(), list(program.graph_signature.user_inputs)

    def run(*values: Tensor) -> Any:
        given = dict(zip(names, values, strict=True))
        args = len(program.example_inputs[0]) if program.example_inputs else len(values)
        return module(*values[:args], **{str(name): given[name] for name in names[args:]})

    return run


Writer = Callable[[torch.export.ExportedProgram, Path, str], None]
FORMATS: dict[str, tuple[Writer, Callable[[Path], Runner], tuple[str, ...]]] = {
    "onnx": (_write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": (_write_program, _read_program, ()),
}
"""Writer, reader and required packages of each format."""


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence exporters' output; the graph is checked by running it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
