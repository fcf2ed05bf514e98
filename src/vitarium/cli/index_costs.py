"""Description and costs of a model for the index, counted on the meta device at a few image sizes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vitarium.catalog import create_model, preprocessing_of
from vitarium.catalog.calling import call, example_inputs
from vitarium.catalog.index import REFUSED, Law, interpolate
from vitarium.efficiency.profiler import count_params, peak_memory, weight_bytes
from vitarium.errors import VitariumError
from vitarium.verbs.measuring import stages_of

SIZES = (32, 64, 128, 256, 384)
"""Image sizes in pixels at which every model is measured, in addition to its own."""
SMALL_SIZES = (16, 32, 48, 64, 96, 128, 224)
"""The same for models made for images of up to `SMALL` pixels."""
SMALL = 64
LAW_ERROR = 0.005
"""Largest relative error of a law at the sizes that do not determine it."""
REAL_MACS = 5e8
"""Models with fewer MACs run on real tensors for the measurement of memory, because kernels may depend on the device."""
FAILURES = (VitariumError, ValueError, TypeError, RuntimeError, AssertionError)
"""Errors that models raise for an unsupported input size or type."""


def variant_sizes(image_size: int) -> tuple[int, ...]:
    """Return the sizes at which a model made for `image_size` is measured."""
    return tuple(size for size in (SMALL_SIZES if image_size <= SMALL else SIZES) if size != image_size)


COUNTED = ("macs", "peak_memory", "sizes", "law")
"""Values of a row that need a forward pass."""


def described(name: str, sizes: Iterable[int], *, rebuild: bool, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the description and the costs of a model.

    Args:
        name: of the model.
        sizes: further image sizes, pixels.
        rebuild: whether the model is built for its image size, so that another size needs another model.
        known: an earlier row, whose counted costs are kept if the numbers of parameters and bytes are unchanged; None: count.
    """
    model = on_meta(name)
    preprocessing = preprocessing_of(model)
    row: dict[str, Any] = {"image_size": preprocessing.image_size, "params": count_params(model), "bytes": weight_bytes(model)}
    if known and all(known.get(key) == value for key, value in row.items()):
        row |= {key: known[key] for key in COUNTED if key in known}
    else:
        row |= counted(name, model, row, sizes, rebuild)
    row |= inputs_of(model)
    row["num_classes"] = getattr(model, "num_classes", None)
    if stages := stages_of(model):
        row["stages"] = [[stage["module"], stage["channels"], stage["stride"]] for stage in stages]
    return row | {"preprocessing": plain(preprocessing.to_dict())}


def counted(name: str, model: Any, own: dict[str, Any], sizes: Iterable[int], rebuild: bool) -> dict[str, Any]:
    """Return the values of `COUNTED`. `own` has image_size, params and bytes; see `described` for the rest."""
    row: dict[str, Any] = {}
    row["macs"], row["peak_memory"] = measured(name, model, own["image_size"])
    found = {size: at_size(name, model, size, rebuild, own) for size in sizes} if rebuild or row["macs"] is not None else {}
    if found:
        row["sizes"] = {str(size): value for size, value in found.items()}
        values = (row["macs"], own["params"], own["bytes"])
        rows = {size: (value, *values[1:]) if value is None or isinstance(value, int) else value for size, value in found.items()}
        if law := fitted({own["image_size"]: values, **rows}):
            row["law"] = {"step": law.step, "anchors": list(law.anchors)} | ({} if law.weights else {"weights": False})
    return row


def inputs_of(model: Any) -> dict[str, list[str]]:
    """Return the names of a model's inputs as {"inputs": [...]}; empty for one image (or clip)."""
    try:
        names = list(example_inputs(model, 1))
    except FAILURES:
        return {}
    return {"inputs": names} if len(names) > 1 else {}


def at_size(name: str, model: Any, size: int, rebuild: bool, own: dict[str, Any]) -> Any:
    """Return a value of `sizes` (see `catalog.index.Variant`)."""
    try:
        model = on_meta(name, image_size=size) if rebuild else model
    except FAILURES:
        return REFUSED
    macs = macs_at(model, size)
    params, weights = count_params(model), weight_bytes(model)
    return macs if (params, weights) == (own["params"], own["bytes"]) else [macs, params, weights]


def fitted(measured: dict[int, Any]) -> Law | None:
    """Return the law that measured MACs obey, or None.

    Three sizes determine it; the others must agree to `LAW_ERROR`. It holds for multiples of 16 if sizes that are no multiples of 32 agree
    too, and of 64 if a multiple of 32 is not supported. The smallest sizes are left out if windows or kernels are limited by them.

    Args:
        measured: image size -> (MACs or None, parameters, bytes), or `REFUSED`.
    """
    known = {size: row for size, row in sorted(measured.items()) if row != REFUSED and row[0] is not None}
    for step in (16, 32, 64):
        sizes = [size for size in known if size % step == 0]
        if any(size % step == 0 for size in measured if size not in known):
            continue
        while len(sizes) > 3 and (step > 16 or sum(size % 32 > 0 for size in sizes) > 1):
            anchors = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
            if all(_error(known, anchors, size, 0) <= LAW_ERROR for size in sizes):
                exact = all(_error(known, anchors, size, column) == 0 for size in sizes for column in (1, 2))
                return Law(step, anchors, exact)
            sizes = sizes[1:]
    return None


def _error(known: dict[int, Any], anchors: tuple[int, int, int], size: int, column: int) -> float:
    """Return the relative error of a law for MACs (column 0, in S^2), parameters or bytes (columns 1 and 2, in S) at a measured size."""
    power = 1 if column else 2
    found = interpolate(size**power, [(anchor**power, known[anchor][column]) for anchor in anchors])
    return abs(found - known[size][column]) / max(1, known[size][column])


def on_meta(name: str, **options: Any) -> Any:
    """Return a model without weights, in eval mode."""
    import torch

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = create_model(name, **options).eval().to("meta")  # some tables are computed on the CPU
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def measured(name: str, model: Any, size: int) -> tuple[int | None, int | None]:
    """Return MACs and peak memory at a model's own size; (None, None) if it does not run on such an input."""
    macs = macs_at(model, size)
    if macs is None:
        return None, None
    runs = create_model(name) if macs < REAL_MACS else model
    return macs, peak_memory(runs, example_inputs(runs, 1, size))


def macs_at(model: Any, size: int) -> int | None:
    """Return the MACs of one image; None for a model that takes no such image.

    Equal to `efficiency.profiler.count_macs`, and several times faster.
    """
    try:
        with torch.no_grad(), _Counter() as counter:
            call(model, example_inputs(model, 1, size))
    except FAILURES:
        return None
    return counter.flops // 2


class _Counter(TorchDispatchMode):
    """Count FLOPs on the meta device. The result of an operation is cached by the layouts of its arguments: computing it takes most of the
    time, and the blocks of a network repeat."""

    _known: dict[Any, tuple[Any, int]] = {}  # noqa: RUF012 - shared by all counters of the process

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = (function, _layout(args), _layout(kwargs)) if _is_fresh(function) else None
        if key in self._known:
            made, flops = self._known[key]
            self.flops += flops
            return _remade(made)
        result = function(*args, **kwargs)
        count = flop_registry.get(function._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        self.flops += flops
        if key is not None and _all_meta(result):
            self._known[key] = _layout(result), flops
        return result


@functools.cache
def _is_fresh(function: Any) -> bool:
    """Return whether an operation returns only new tensors, without views of its arguments or changes in place."""
    schema = function._schema
    return not schema.is_mutable and bool(schema.returns) and all(returned.alias_info is None for returned in schema.returns)


def _layout(value: Any) -> Any:
    """Return a hashable form of a value: a tensor by shape, strides, dtype and device."""
    if isinstance(value, Tensor):
        return Tensor, value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((k, _layout(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(_layout(v) for v in value)
    return type(value), value


def _all_meta(value: Any) -> bool:
    return value.is_meta if isinstance(value, Tensor) else isinstance(value, tuple) and all(_all_meta(v) for v in value)


def _remade(made: Any) -> Any:
    """Return new meta tensors of cached layouts."""
    if made[0] is Tensor:
        return torch.empty_strided(made[1], made[2], dtype=made[3], device=made[4])
    return tuple(_remade(m) for m in made[1])


def plain(value: Any) -> Any:
    """Return a value as JSON; a class by its name."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
