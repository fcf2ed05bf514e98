"""MPTQ-ViT: post-training quantization of vision transformers from a few images, with uniform or mixed precision.

"MPTQ-ViT: Mixed-Precision Post-Training Quantization for Vision Transformer" (2024). Weights and inputs of linear layers and convolutions
become integers, code = round(x / D), with D searched as in PTQ4ViT (`hessian`). Three parts address the difficult distributions:

    SQ-b       channels after a layer norm are skewed and uneven: shift each by b = (max + min) / 2, divide by s, and undo both in the
               next layer (`folding`); exact in floating point
    OPT-m      values after GELU: many small ones around zero, few large ones. One bit of the code selects a region,
                   fine    D1 round(x / D1),  codes -2^(b-2) .. 2^(b-2) - 1, all negatives and the smallest positives
                   coarse  D2 round(x / D2),  codes 0 .. 2^(b-1) - 1, the rest;   D2 = 2^m D1
               with m of least squared error on the layer's data
    Greedy MP  bits per layer: repeatedly lower the layer with the least loss per saving, until the mean is reached (`allocation`)

Linear layers between integers run on int8 matrix products, fine and coarse codes as two; attention and convolutions are simulated, which
is slower than float32. There is no public code: the paper's outline is followed; base quantizer, search and softmax split are PTQ4ViT's
(its numbers are reproduced). Our choices: g^2 is the Fisher diagonal; one step per weight row by default (granularity="block": PTQ4ViT's);
an input with few values below zero counts as post-GELU by its range. PTQ4ViT itself is smooth="none", gelu="twin", granularity="block",
attention=true; its baseline also search="cosine", gelu="uniform", softmax="uniform". Left out: integer layer norm, softmax and GELU;
PTQ4ViT's bias correction, steps by column blocks and its other criteria (L1, L2 weighted by the output, Pearson), which its configurations
leave off.
Cost of calibration: up to 600 passes over 512 sampled rows of every layer: a few minutes for a ViT-S on a core; search="mse" takes seconds.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitarium.catalog.methods import AttachReport, method
from vitarium.catalog.options import Patterns, validated
from vitarium.efficiency.quantization.allocation import greedy_allocation
from vitarium.efficiency.quantization.attention import attach_attention, rebuild_attention
from vitarium.efficiency.quantization.calibration import Record, batches, divergence, outputs, watch
from vitarium.efficiency.quantization.folding import find_pairs, fold, sqb
from vitarium.efficiency.quantization.hessian import fit_layer
from vitarium.efficiency.quantization.layers import Activation, Packed, QuantizedLayer, Static, activation, find_layers, quantized
from vitarium.efficiency.quantization.plain import Int4W, Int8, Quantizer, exchange  # noqa: F401 - int8 and int4w are registered with it
from vitarium.efficiency.quantization.ranges import search_step, squared_error, symmetric_step
from vitarium.errors import AttachError, UsageError
from vitarium.ops.number_formats import Integer

GELU_LOWEST = -0.16997124254703522
"""Minimum of GELU."""
LOWEST_ACTIVATION = -0.2785
"""Minimum of SiLU (GELU's is -0.16997). An input range above it whose maximum is several times larger is taken for the output of such a
function."""


# ---- OPT-m


@activation("two_region")
class TwoRegion(Activation):
    """OPT-m's grid for values after GELU: a fine region around zero and a coarse one above, with steps a power of two apart.

    Args:
        bits: number of bits of a code, 3 to 8; one of them selects the region.
    """

    coarse: Tensor
    m: Tensor

    def __init__(self, bits: int = 8):
        if not 3 <= bits <= 8:
            raise UsageError(f"two regions need 3 to 8 bits, got {bits}")
        super().__init__()
        self.bits = bits
        self.register_buffer("coarse", torch.ones(()))
        self.register_buffer("m", torch.zeros((), dtype=torch.int64))

    @classmethod
    def of(cls, x: Tensor, bits: int) -> TwoRegion:
        """Find D2 = max / (2^(b-1) - 1) and the m in 0 .. b + 4 of least squared error on x; of equal ones the smallest."""
        made = cls(bits).to(x.device)
        made.coarse = symmetric_step(x.max().detach(), bits, margin=1)
        errors = torch.stack([squared_error(x, made._set_m(m)(x)) for m in range(bits + 5)])
        return made._set_m(int(errors.argmin()))

    def _set_m(self, m: int) -> TwoRegion:
        self.m = torch.tensor(m, device=self.coarse.device)
        return self

    @property
    def integer(self) -> bool:
        return True

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        coarse = self.coarse.to(x.dtype)
        fine = torch.ldexp(coarse, -self.m)
        half = 2 ** (self.bits - 2)
        codes = (x / fine).round()
        near = codes < half
        small = torch.where(near, codes.clamp(min=-half), 0)
        large = torch.where(near, 0, (x / coarse).round().clamp(0, 2 * half - 1))
        return [(small.to(torch.int8), fine), (large.to(torch.int8), coarse)]

    def forward(self, x: Tensor) -> Tensor:
        (small, fine), (large, coarse) = self.terms(x)
        return small * fine + large * coarse

    def describe(self) -> dict[str, Any]:
        return {"bits": self.bits}


@activation("twin")
class TwinUniform(Activation):
    """PTQ4ViT's grid for values after GELU: positives with a calibrated step, negatives with the fixed step 0.16997 / 2^(bits-1).

    Args:
        bits: number of bits of a code, 3 to 8; one of them is the sign.
    """

    step: Tensor

    def __init__(self, bits: int = 8):
        if not 3 <= bits <= 8:
            raise UsageError(f"a twin grid needs 3 to 8 bits, got {bits}")
        super().__init__()
        self.bits = bits
        self.register_buffer("step", torch.ones(()))

    @property
    def integer(self) -> bool:
        return True

    def terms(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        half, step = 2 ** (self.bits - 1), self.step.to(x.dtype)
        below = torch.full_like(step, -GELU_LOWEST / half)
        above = (x / step).round().clamp(0, half - 1)
        return [(above.to(torch.int8), step), ((x / below).round().clamp(-half, 0).to(torch.int8), below)]

    def forward(self, x: Tensor) -> Tensor:
        (above, step), (under, below) = self.terms(x)
        return above * step + under * below

    def describe(self) -> dict[str, Any]:
        return {"bits": self.bits}


def is_post_gelu(low: Tensor, high: Tensor) -> bool:
    """Return whether a range (numbers) is that of values after GELU or SiLU."""
    return LOWEST_ACTIVATION <= float(low) < 0 and float(high) > -4 * float(low)


# ---- the method

InputBits = Annotated[int, Field(ge=3, le=8)]
WeightBits = Annotated[int, Field(ge=2, le=8)]


@method("mptq_vit", kind="quantize")
@validated
class MPTQ(Quantizer):
    """Quantize linear layers and convolutions of any model, from calibration images.

    Args:
        bits: number of bits of weights and inputs, 3 to 8.
        weight_bits, activation_bits: override `bits` (weights 2 to 8; inputs 3 to 8, or 32: left in floating point).
        mean_bits: for mixed precision: mean over all weights of the bits, which vary by layer within `widths`. None: uniform precision.
        widths: narrowest and widest number of bits in mixed precision.
        allocation: bits of layers by name or shell pattern, {"blocks.0.*": 6, "head": [8, 8]} (weight, input); overrides all of the above.
        cost: saving of a bit in mixed precision: "size" of the weights, or "bops" (MACs * weight bits * input bits).
        smooth: folding after layer norms: "sqb" (scale and shift), "scale" (SmoothQuant), "none".
        alpha: share of the difficulty that moves into the weight, 0 to 1.
        gelu: grid of inputs after GELU: "opt_m", "twin" (PTQ4ViT's), "uniform", or "auto": opt_m below 8 bits; at 8 one step is fine
            enough, and faster.
        attention: whether to round queries, keys, values and attention weights too, in models that anatomy supports. Simulated.
        softmax: grid of attention weights: "split" at a power of two, or "uniform".
        granularity: steps of a weight: per "row", "block" (three for a joint layer of queries, keys and values, else one) or "tensor".
        search: criterion for steps: "hessian" (weighted error of the output), "cosine" (angle of the output, PTQ4ViT's baseline; for
            granularity "block" or "tensor"), "mse" (error of the layer's own values) or "minmax".
        skip: shell patterns of layers to leave out, such as ["head"].
        images: largest number of calibration images.
        calibration: tensor (n, C, H, W) or loader of training images, or batches of inputs by name; not saved.
    """

    bits: InputBits = 8
    weight_bits: WeightBits | None = None
    activation_bits: InputBits | Literal[32] | None = None
    mean_bits: Annotated[float, Field(ge=2, le=8)] | None = None
    widths: Annotated[tuple[WeightBits, WeightBits], Field(strict=False)] = (4, 8)
    allocation: Mapping[str, Any] | None = None
    cost: Literal["size", "bops"] = "size"
    smooth: Literal["sqb", "scale", "none"] = "sqb"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    gelu: Literal["auto", "opt_m", "twin", "uniform"] = "auto"
    attention: bool = False
    softmax: Literal["split", "uniform"] = "split"
    granularity: Literal["row", "block", "tensor"] = "row"
    search: Literal["hessian", "cosine", "mse", "minmax"] = "hessian"
    skip: Patterns = ()
    images: Annotated[int, Field(ge=1)] = 32
    calibration: Any = field(default=None, metadata={"saved": False}, repr=False, compare=False)

    training: ClassVar[Literal["none", "images", "required"]] = "images"
    convolutions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.widths[0] > self.widths[1]:
            raise UsageError(f"widths must be [narrowest, widest], got {list(self.widths)}")
        if self.mean_bits is not None and not self.widths[0] <= self.mean_bits <= self.widths[1]:
            raise UsageError(f"mean_bits must lie between the widths {self.widths[0]} and {self.widths[1]}, got {self.mean_bits}")

        if self.search == "cosine" and self.granularity == "row":
            raise UsageError("search=cosine compares the angles of several outputs, and granularity=row has one each; use block or tensor")

    def attach(self, model: nn.Module) -> AttachReport:
        """Calibrate, fold, search steps, and replace the layers.

        Raises:
            UsageError: no calibration images.
            AttachError: no layer to quantize, or folding changed the outputs; the model is unchanged.
        """
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        images = batches(self.calibration, self.images, like, model=model)
        layers = find_layers(model, skip=self.skip)
        before = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.ndim == 1}
        try:
            reference = outputs(model, images)
            folded = self._fold(model, layers, images, reference)
            found = watch(model, find_layers(model, skip=self.skip), images, weigh=self.search == "hessian")
            fits = {name: _Fit(self, name, model.get_submodule(name), record) for name, record in found.items() if record.x}
            if not fits:
                raise AttachError(f"{type(model).__name__} has no linear layer or convolution that its images pass through")
            bits = self._allocate(model, fits, images, reference)
            ready = {name: fit.layer(*bits[name]) for name, fit in fits.items()}
            if self.attention:
                how = dict(weigh=self.search == "hessian", uniform=self.softmax == "uniform", cosine=self.search == "cosine")
                wrapped, sites, steps = attach_attention(model, images, self._bits("attention")[1], **how)
            report = exchange(self, model, ready)
            if self.attention:
                report.replaced = {**wrapped, **report.replaced}
                report.live, report.state = sites, report.state | {"attention": steps}
        except BaseException:
            for name, layer in layers.items():
                model.set_submodule(name, layer)
            for name, parameter in model.named_parameters():
                if name in before:
                    parameter.data = before[name]
            raise
        report.replaced.update({name: layer for name, layer in layers.items() if name in report.replaced})
        report.tensors = {name: before[name] for name in folded}
        return report

    def rebuild(self, model: nn.Module, state: Mapping[str, Any]) -> AttachReport:
        report = super().rebuild(model, state)
        if "attention" in state:
            wrapped, report.live = rebuild_attention(model, state["attention"])
            report.replaced = {**wrapped, **report.replaced}
            report.state = report.state | {"attention": state["attention"]}
        return report

    def _bits(self, name: str) -> tuple[int, int]:
        """Return the weight and input bits of a layer by the options."""
        for pattern, given in (self.allocation or {}).items():
            if fnmatch.fnmatch(name, pattern):
                return (given, given) if isinstance(given, int) else (int(given[0]), int(given[1]))
        weight = self.bits if self.weight_bits is None else self.weight_bits
        return weight, self.bits if self.activation_bits is None else self.activation_bits

    # ---- SQ-b

    @torch.no_grad()
    def _fold(self, model: nn.Module, layers: Mapping[str, nn.Module], images: list[Tensor], reference: Tensor) -> list[str]:
        """Apply scale and shift in place; return the names of the norms' tensors that were overwritten."""
        if self.smooth == "none":
            return []
        pairs = find_pairs(model, images[0])
        pairs = {norm: names for norm, names in pairs.items() if all(type(layers.get(name)) in _LINEAR for name in names)}
        records = watch(model, {n: layers[n] for names in pairs.values() for n in names}, images, rows=1, weigh=False)
        changed = []
        for norm_name, names in pairs.items():
            norm: Any = model.get_submodule(norm_name)
            linears: list[Any] = [layers[name] for name in names]
            if any(linear.in_features != norm.weight.numel() for linear in linears):
                continue
            ranges = records[names[0]].ranges
            stacked = torch.cat([linear.weight for linear in linears])
            b, s = sqb(ranges.low, ranges.high, stacked, alpha=self.alpha, shift=self.smooth == "sqb")
            values, twins = fold(norm, linears, b, s)
            for key, value in values.items():
                getattr(norm, key).data = value
                changed.append(f"{norm_name}.{key}")
            for name, twin in zip(names, twins, strict=True):
                model.set_submodule(name, twin)
        error = float((outputs(model, images) - reference).abs().max() / reference.std().clamp(min=1e-12))
        if not error < _FOLD_TOLERANCE.get(reference.dtype, 0.3):
            raise AttachError(f"folding changes the model's outputs by {error:.2g} standard deviations; use smooth='none'")
        return changed

    # ---- Greedy MP

    def _allocate(self, model: nn.Module, fits: Mapping[str, _Fit], images: list[Tensor], reference: Tensor) -> dict[str, tuple[int, int]]:
        """Return the bits of every layer (weight, input)."""
        given = {name: self._bits(name) for name in fits}
        if self.mean_bits is None:
            return given
        free = [n for n in fits if not any(fnmatch.fnmatch(n, pattern) for pattern in self.allocation or ())]
        original = {name: model.get_submodule(name) for name in fits}

        def both(name: str, width: int) -> tuple[int, int]:
            return width, width if self.activation_bits is None else self.activation_bits

        def loss(bits: Mapping[str, int]) -> float:
            for name in fits:
                model.set_submodule(name, fits[name].layer(*(both(name, bits[name]) if name in bits else given[name])))
            return divergence(reference, outputs(model, images))

        def saved(name: str, width: int) -> float:
            if self.cost == "size":
                return fits[name].count
            (w, a), (w1, a1) = both(name, width), both(name, width - 1)
            return fits[name].count * fits[name].record.positions * (w * a - w1 * a1)

        sizes = {name: float(fits[name].count) for name in free}
        try:
            found = greedy_allocation(sizes, loss, target=self.mean_bits, widths=self.widths, saved=saved)
        finally:
            for name, layer in original.items():
                model.set_submodule(name, layer)
        return given | {name: both(name, width) for name, width in found.bits.items()}


_LINEAR = tuple(cls for cls in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear))
_FOLD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


class _Fit:
    """A layer with its statistics, which returns its quantized counterpart at any width, searched once."""

    def __init__(self, options: MPTQ, name: str, layer: Any, record: Record):
        self.options, self.layer_, self.record = options, layer, record
        self.count = layer.weight.numel()
        rows = layer.weight.shape[0]
        channels = options.granularity == "block" and not isinstance(layer, nn.Linear) and options.search != "cosine"
        by_rows = options.granularity == "row" or channels
        joint = options.granularity == "block" and "qkv" in name.rpartition(".")[2] and rows % 3 == 0
        self.groups = rows if by_rows else 3 if joint else 1
        self.x, self.y = torch.cat(record.x), torch.cat(record.y)
        self.g = torch.cat(record.g) if record.g else None
        self._made: dict[tuple[int, int], QuantizedLayer] = {}

    def layer(self, weight_bits: int, input_bits: int) -> QuantizedLayer:
        key = weight_bits, input_bits
        if key not in self._made:
            self._made[key] = self._fit(Integer(weight_bits), input_bits)
        return self._made[key]

    @torch.no_grad()
    def _fit(self, format: Integer, bits: int) -> QuantizedLayer:
        weight, search = self.layer_.weight, self.options.search
        inputs, first, rounding = self._inputs(bits)
        rows = weight.reshape(self.groups, -1)
        step = symmetric_step(rows.abs().amax(1, keepdim=True), format.bits)
        if search == "mse":
            step = search_step(step, lambda s: squared_error(rows, format.quantize(rows, s), 0))
            if inputs is not None and first is not None and rounding is not None:
                first = search_step(first, lambda s: squared_error(self.x, rounding(self.x, s)))
        elif search in ("hessian", "cosine"):
            rounded: dict[str, Any] = dict(round_input=rounding, first_input=first, cosine=search == "cosine")
            step, first = fit_layer(self.layer_, self.x, self.y, self.g, format, groups=self.groups, **rounded)
        if isinstance(inputs, TwoRegion) and first is not None:
            inputs.coarse = first
        elif isinstance(inputs, TwinUniform) and first is not None:
            inputs.step = first
        elif isinstance(inputs, Static) and first is not None:
            inputs.step = first.view(1)
        return quantized(self.layer_, Packed.of(weight, format, step), inputs)

    def _inputs(self, bits: int) -> tuple[Activation | None, Tensor | None, Callable[[Tensor, Tensor], Tensor] | None]:
        """Return the input's grid, its first step, and its rounding at another step. Images themselves stay in floating point."""
        ranges = self.record.ranges
        if bits == 32 or (not isinstance(self.layer_, nn.Linear) and self.layer_.in_channels <= 4):
            return None, None, None
        regions_wanted = self.options.gelu == "opt_m" or (self.options.gelu == "auto" and bits < 8)
        if regions_wanted and is_post_gelu(ranges.low.min(), ranges.high.max()):
            regions = TwoRegion.of(self.x, bits)
            regions.coarse = symmetric_step(ranges.high.max(), bits, margin=1)

            def round_regions(x: Tensor, step: Tensor) -> Tensor:
                regions.coarse = step
                return regions(x)

            return regions, regions.coarse, round_regions
        if self.options.gelu == "twin" and is_post_gelu(ranges.low.min(), ranges.high.max()):
            twin = TwinUniform(bits).to(self.x.device)

            def round_twin(x: Tensor, step: Tensor) -> Tensor:
                twin.step = step
                return twin(x)

            return twin, symmetric_step(ranges.high.max(), bits), round_twin
        format = Integer(bits)
        first = symmetric_step(ranges.amax.max(), bits)
        return Static.of(format, first), first, format.quantize


def allocate_bits(model: nn.Module, calibration: Any, mean_bits: float, **options: Any) -> dict[str, tuple[int, int]]:
    """Return the bits of every layer (weight, input) for a mean over the weights, by Greedy MP; the model is unchanged.

    The table can be passed as `allocation=` of this method or to any other quantizer.

    Args:
        options: of `MPTQ`, such as cost="bops", widths=(3, 8), search="mse".
    """
    twin = copy.deepcopy(model)
    MPTQ(mean_bits=mean_bits, calibration=calibration, **options).attach(twin)
    return {row["layer"]: (row["weight_bits"], row["input_bits"]) for row in layer_table(twin)}


def layer_table(model: nn.Module) -> list[dict[str, Any]]:
    """Return a row for each quantized layer: {"layer", "weight_bits", "input_bits", "input", "m", "input_step", "weight_step"}, in order.

    Steps are numbers: the input's (of two regions the coarse one), and the mean of the weight's.
    """
    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        inputs: Any = layer.activation
        bits = 32 if inputs is None else inputs.bits if isinstance(inputs, TwoRegion | TwinUniform) else inputs.format.bits
        step = getattr(inputs, "coarse", getattr(inputs, "step", None))
        rows.append(
            {
                "layer": name,
                "weight_bits": layer.packed.format.bits,
                "input_bits": bits,
                "input": "float" if inputs is None else inputs.kind,
                "m": int(inputs.m) if isinstance(inputs, TwoRegion) else None,
                "input_step": float(step.mean()) if isinstance(step, Tensor) else None,
                "weight_step": float(layer.packed.step.mean()),
            }
        )
    return rows
