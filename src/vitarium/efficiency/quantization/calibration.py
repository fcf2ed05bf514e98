"""Calibration statistics of a model's layers: input ranges, sampled inputs and outputs, and the importance of each output.

The importance of an output value y is g^2, where g is the gradient of log p(c) and c is drawn from the model's own prediction: the diagonal
of the Fisher matrix. It is the second derivative of the divergence between float and quantized logits at the float model, where the first
derivative is zero. A model without logits is treated as predicting with unit variance, which gives the squared error of its output.

Notation: R sampled rows (tokens, or whole images for convolutions), N inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitarium.catalog.calling import call, inputs_of, required_arguments
from vitarium.efficiency.quantization.ranges import Observer
from vitarium.errors import InputError, UsageError
from vitarium.nn.modes import eval_mode, frozen_parameters

BATCH = 8  # images at once; the autograd graph of a whole batch is in memory


def batches(calibration: Any, count: int, like: Tensor, batch: int = BATCH, *, model: nn.Module | None = None) -> list[Any]:
    """Return at most `count` calibration samples as small batches, on the device of `like` and floating-point values in its dtype.

    Args:
        calibration: a tensor (n, C, H, W), or an iterable of tensors, of mappings, or of (tensor, ...), such as a loader. Samples of a
            tensor, list or tuple are evenly spaced over it; of any other iterable they are the first ones.
        count: samples.
        like: a weight of the model.
        batch: samples per batch.
        model: the model to call; mappings are then reduced to its inputs (see `vitarium.catalog.calling.inputs_of`), and
            calibration of a model with several inputs is given as such mappings.

    Returns:
        images (B, C, H, W), or mappings of inputs by name for a model with several inputs.

    Raises:
        UsageError: None, empty, another type, or inputs that the model does not take.
    """
    if calibration is None:
        raise UsageError(
            "this method needs calibration images: calibration=TENSOR or LOADER in Python, --data in `vitarium compress` (int8 and int4w "
            "need none)"
        )
    sized = isinstance(calibration, Tensor | list | tuple)
    found: list[dict[str, Tensor]] = []
    for item in [calibration] if isinstance(calibration, Tensor | Mapping) else calibration:
        found += _samples(item, model)
        if len(found) >= count and not sized:
            break
    if not found:
        raise UsageError("calibration holds no images")
    chosen = [found[i * len(found) // count] for i in range(count)] if sized and len(found) > count else found[:count]
    columns: dict[str, Any] = {}
    for name, first in chosen[0].items():
        dtype = like.dtype if first.is_floating_point() else first.dtype
        columns[name] = torch.stack([sample[name] for sample in chosen]).to(like.device, dtype).split(batch)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [row["image"] for row in rows] if list(columns) == ["image"] else rows


def _samples(item: Any, model: nn.Module | None) -> list[dict[str, Tensor]]:
    """Split one entry of calibration data into samples, each a mapping of inputs by name; a single image is named "image"."""
    if isinstance(item, Mapping) and model is not None:
        try:
            inputs = inputs_of(model, item)
        except InputError as error:
            raise UsageError(f"calibration: {error}") from error
        if len(inputs) > 1:
            tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
            rows = zip(*(value.detach().unbind() for value in tensors.values()), strict=True)
            return [dict(zip(tensors, row, strict=True)) for row in rows]
        item = next(iter(inputs.values()))
    image = item["image"] if isinstance(item, Mapping) else item[0] if isinstance(item, list | tuple) else item
    if not isinstance(image, Tensor) or image.ndim < 4:
        kind = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise UsageError(f"calibration must yield batches of images (B, C, H, W), or {{'image': ...}}, or (images, ...); got {kind}")
    if model is not None and len(required_arguments(model)) > 1:
        names = ", ".join(required_arguments(model))
        raise UsageError(f"{type(model).__name__} is called with {names}: calibrate it on mappings with fields of these names")
    return [{"image": row} for row in image.detach().unbind()]


@dataclass
class Record:
    """Statistics of one layer.

    Attributes:
        ranges: extremes of each channel of its input over all calibration images.
        axis: of the channels: -1, or 1 for convolutions.
        positions: number of outputs per channel over all calibration images, that is, uses of each weight.
        x, y, g: samples of inputs (R, N), outputs (R, M) and roots of importance (R, M); of convolutions whole images. Empty g: ones.
    """

    ranges: Observer
    axis: int
    positions: int = 0
    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)


def watch(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Iterable[Any], *, rows: int = 512, weigh: bool = True
) -> dict[str, Record]:
    """Run the images through the model and record statistics of its layers. Layers that are never called are left out.

    Args:
        layers: layers by name.
        images: batches (B, C, H, W), or inputs by name.
        rows: largest number of rows sampled per layer over all images.
        weigh: whether to compute g, which takes a backward pass.
    """
    batches = list(images)
    records: dict[str, Record] = {}
    calls: list[tuple[Record, Tensor, Tensor]] = []

    def hook(name: str, layer: nn.Module) -> Any:
        axis = -1 if isinstance(layer, nn.Linear) else 1

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            record = records.setdefault(name, Record(Observer(axis), axis))
            record.ranges(inputs[0])
            record.positions += output.numel() // output.shape[axis]
            calls.append((record, inputs[0].detach(), output))

        return layer.register_forward_hook(keep)

    generator = torch.Generator().manual_seed(0)
    hooks = [hook(name, layer) for name, layer in layers.items()]
    try:
        with eval_mode(model), frozen_parameters(model), torch.set_grad_enabled(weigh):
            for image in batches:
                calls.clear()
                leaves = [t for t in tree_leaves(image) if isinstance(t, Tensor) and t.is_floating_point() and t.is_leaf]
                for leaf in leaves:
                    leaf.requires_grad_(weigh)
                _sample(calls, call(model, image), -(-rows // len(batches)), weigh, generator)
                for leaf in leaves:
                    leaf.requires_grad_(False)
    finally:
        calls.clear()
        for h in hooks:
            h.remove()
    return records


def _sample(calls: list[tuple[Record, Tensor, Tensor]], output: Any, rows: int, weigh: bool, generator: torch.Generator) -> None:
    """Sample a batch's share of rows from every call of every layer."""
    used = [(record, x, y) for record, x, y in calls if not weigh or y.requires_grad]
    grads: Iterable[Tensor | None] = [None] * len(used)
    if weigh and used:
        grads = torch.autograd.grad(draw(output, generator), [y for _, _, y in used], allow_unused=True)
    for (record, x, y), g in zip(used, grads, strict=True):
        if weigh and g is None:
            continue  # its output is not used
        parts = [x, y.detach()] + ([] if g is None else [g])
        if record.axis == -1:
            parts = [part.flatten(0, -2) for part in parts]
            if len(x := parts[0]) > rows:
                chosen = torch.randperm(len(x), generator=generator)[:rows].to(x.device)
                parts = [part[chosen] for part in parts]
        for store, part in zip((record.x, record.y, record.g), parts, strict=False):
            store.append(part.clone())


def draw(output: Any, generator: torch.Generator) -> Tensor:
    """Return the negative log-likelihood of a sample drawn from the model's own prediction, a scalar."""
    leaf = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()), None)
    if leaf is None:
        raise UsageError(f"a model that returns a {type(output).__name__} without floating-point tensors cannot be calibrated")
    if leaf.ndim == 2 and leaf.shape[1] > 1:
        drawn = torch.multinomial(leaf.detach().float().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(leaf.device)
        return nn.functional.cross_entropy(leaf, drawn, reduction="sum")
    noise = torch.randn(leaf.shape, generator=generator).to(leaf)
    return (leaf * noise).sum()


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Return KL(reference || logits), mean over rows of two (R, classes); for other outputs the mean squared error over the variance."""
    reference, logits = reference.double(), logits.double()
    if reference.ndim == 2 and reference.shape[1] > 1:
        p = reference.log_softmax(-1)
        return float(nn.functional.kl_div(logits.log_softmax(-1), p, reduction="batchmean", log_target=True))
    return float((reference - logits).square().mean() / reference.var().clamp(min=1e-12))


@torch.no_grad()
def outputs(model: nn.Module, images: Iterable[Any]) -> Tensor:
    """Return the first floating-point tensor of a model's output for batches of images, in eval mode: (n, ...)."""
    with eval_mode(model), frozen_parameters(model):
        found = [next(t for t in tree_leaves(call(model, image)) if isinstance(t, Tensor) and t.is_floating_point()) for image in images]
    return torch.cat(found).clone()
