"""Context managers for evaluation mode and frozen parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitarium.nn import eval_mode, evaluating, frozen_parameters


def mixed() -> nn.Sequential:
    """A training model with one part in evaluation mode and one frozen parameter."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5)))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    return model


def test_every_module_gets_its_own_mode_back_even_after_an_error():
    model = mixed()
    before = [module.training for module in model.modules()]
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="shape"), eval_mode(model):
        model(torch.ones(2, 4))
    assert [module.training for module in model.modules()] == before
    assert True in before
    assert False in before


def test_eval_mode_keeps_gradients_and_evaluating_does_not():
    model = mixed()
    x = torch.ones(2, 3)
    with eval_mode(model):
        assert model(x).requires_grad
    with evaluating(model):
        assert not model(x).requires_grad
        with torch.enable_grad():
            assert model(x).requires_grad
    with evaluating(model, inference=True):
        assert model(x).is_inference()


def test_only_the_parameters_that_were_trained_are_trained_afterwards():
    model = mixed()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with frozen_parameters(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not before["0.bias"]
