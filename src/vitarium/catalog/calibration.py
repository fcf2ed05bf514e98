"""Probabilities of a classifier: the softmax of its logits, divided by the temperature of its calibration (Guo et al., 2017).

    p = softmax(logits / T)

T is a field of the model's record, which `vitarium.evaluate(FILE, calibrate=True)` fits and writes; 1 where a model was never calibrated.
The model's own outputs do not change, nor does the order of its classes. Whatever shows a probability obtains it from here.
"""

from __future__ import annotations

from torch import Tensor, nn

from vitarium.catalog.record import training_of


def temperature_of(model: nn.Module) -> float:
    """Return the temperature of a model's calibration; 1.0 without one."""
    return training_of(model).temperature or 1.0


def calibrated(model: nn.Module, logits: Tensor) -> Tensor:
    """Return the model's logits (..., num_classes) divided by its temperature; the same tensor without a calibration."""
    temperature = temperature_of(model)
    return logits if temperature == 1.0 else logits / temperature


def probabilities(model: nn.Module, logits: Tensor) -> Tensor:
    """Return the probabilities (..., num_classes) of a classifier's exclusive classes, from its logits of the same shape."""
    return calibrated(model, logits).softmax(dim=-1)
