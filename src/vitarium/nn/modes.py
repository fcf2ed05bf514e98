"""Context managers that temporarily change the state of a model: evaluation mode, gradients of its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode; on leaving, restore the mode that each one had. Gradients are not affected."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def evaluating(model: nn.Module, *, inference: bool = False) -> Iterator[None]:
    """`eval_mode` without gradients.

    Args:
        inference: run under `torch.inference_mode`, which is faster, but gradients cannot be switched on inside and the tensors that are
            made cannot take part in a later backward pass; by default under `torch.no_grad`.
    """
    with eval_mode(model), torch.inference_mode() if inference else torch.no_grad():
        yield


@contextlib.contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Set `requires_grad` of all parameters to False; on leaving, restore those that had it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
