"""Claim: shifting channels and splitting regions beat plain symmetric quantizers at 4 bits, and mixed widths beat one width."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.claims import Comparison, Measured, claim
from vitarium.claims.small_vit import digits, small_vit
from vitarium.efficiency.quantization.calibration import divergence
from vitarium.efficiency.quantization.folding import find_pairs, fold
from vitarium.efficiency.quantization.mptq_vit import MPTQ
from vitarium.training import predict_logits

SEEDS, IMAGES = 3, 32
ARMS: dict[str, dict[str, Any]] = {
    "min-max": dict(smooth="none", gelu="uniform"),
    "SmoothQuant": dict(smooth="scale", gelu="uniform"),
    "SQ-b": dict(smooth="sqb", gelu="uniform"),
    "SQ-b + OPT-m": dict(smooth="sqb", gelu="opt_m"),
}


@claim("mptq_vit", says="SQ-b and OPT-m beat plain symmetric quantizers at 4 bits, greedy mixed precision beats one width", minutes=3)
def compare() -> list[Comparison]:
    """A small ViT trained on digits, a value a seed. Every layer norm's channels get a random shift and scale that the next layer undoes:
    large models' are so. At 4-bit weights and inputs, min-max steps, 32 calibration images: signal over noise of the held-out
    logits, and accuracy. Then all of MPTQ with a mean of 4 bits from layers of 2 to 8, against 4 bits everywhere: divergence from the float
    model. Refuted where a part adds nothing over the arm before it."""
    noise: dict[str, list[float]] = {label: [] for label in ARMS}
    right: dict[str, list[float]] = {label: [] for label in ARMS}
    lost: dict[str, list[float]] = {"mixed": [], "uniform": []}
    for seed in range(SEEDS):
        model = unbalanced(small_vit(seed, steps=600), seed)
        images = calibration(model)
        reference, targets, _ = predict_logits(model, digits().val)
        for label, options in ARMS.items():
            logits = quantized_logits(model, MPTQ(bits=4, search="minmax", calibration=images, **options))
            noise[label].append(-10 * math.log10(float((logits - reference).square().mean() / reference.var())))
            right[label].append(100 * float((logits.argmax(-1) == targets).float().mean()))
        for label, mean in (("mixed", 4.0), ("uniform", None)):
            method = MPTQ(bits=4, mean_bits=mean, widths=(2, 8), activation_bits=8, search="mse", calibration=images)
            lost[label].append(-divergence(reference, quantized_logits(model, method)))
    decibel = {label: Measured(label, values, "dB") for label, values in noise.items()}
    percent = {label: Measured(label, values, "%") for label, values in right.items()}
    return [
        Comparison("SQ-b over SmoothQuant", decibel["SQ-b"], decibel["SmoothQuant"]),
        Comparison("OPT-m over a uniform grid after GELU", decibel["SQ-b + OPT-m"], decibel["SQ-b"]),
        Comparison("accuracy over min-max", percent["SQ-b + OPT-m"], percent["min-max"]),
        Comparison("a mean of 4 bits over 4 bits", Measured("mixed", lost["mixed"], "-KL"), Measured("uniform", lost["uniform"], "-KL")),
    ]


@torch.no_grad()
def unbalanced(model: nn.Module, seed: int) -> nn.Module:
    """Return the same function with skewed and uneven channels after every layer norm."""
    generator = torch.Generator().manual_seed(seed)
    for name, readers in find_pairs(model, calibration(model)[:2]).items():
        norm: Any = model.get_submodule(name)
        spread = norm.weight.abs().mean()
        b = 2 * spread * torch.randn(norm.weight.shape, generator=generator)
        s = torch.exp(torch.randn(norm.weight.shape, generator=generator))
        values, twins = fold(norm, [model.get_submodule(r) for r in readers], b, s)  # type: ignore[misc]
        norm.weight.data, norm.bias.data = values["weight"], values["bias"]
        for reader, twin in zip(readers, twins, strict=True):
            model.set_submodule(reader, twin)
    return model


def calibration(model: nn.Module) -> Tensor:
    """Return training images, spread over the part and preprocessed for the model."""
    train = digits().train
    transform: Any = model.preprocessing
    return torch.stack([transform(train[i * len(train) // IMAGES][0]) for i in range(IMAGES)])


def quantized_logits(model: nn.Module, method: MPTQ) -> Tensor:
    """Return the accuracy on the held-out images."""
    twin = copy.deepcopy(model)
    method.attach(twin)
    return predict_logits(twin, digits().val)[0]
