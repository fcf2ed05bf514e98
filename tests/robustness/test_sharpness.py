"""Hessian products, Lanczos, power iteration and trace against the whole matrix of a small model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

import vitarium
from vitarium.errors import InputError, UsageError
from vitarium.robustness.sharpness import Hessian


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,))) for _ in range(2)]
    return net, batches


def whole(net, batches):
    """The matrix, from torch's own double derivative."""
    shapes = [(name, p.shape) for name, p in net.named_parameters()]
    flat = parameters_to_vector(net.parameters()).detach()

    def loss(vector):
        parts = vector.split([shape.numel() for _, shape in shapes])
        state = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        losses = [nn.functional.cross_entropy(torch.func.functional_call(net, state, (x,)), y) for x, y in batches]
        return torch.stack(losses).mean()

    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("columns", [[0, 7, 30]])
def test_products_are_columns_of_the_matrix(columns):
    net, batches = small()
    hessian, matrix = Hessian.of_classifier(net, batches), whole(net, batches)
    for i in columns:
        unit = torch.zeros(len(matrix)).double()
        unit[i] = 1
        torch.testing.assert_close(hessian.product(unit), matrix[:, i], rtol=1e-10, atol=1e-12)


def test_lanczos_equals_eigvalsh():
    """As many steps as parameters give all eigenvalues that differ; a few steps give the largest."""
    net, batches = small()
    hessian = Hessian.of_classifier(net, batches)
    values = torch.linalg.eigvalsh(whole(net, batches))
    found = torch.tensor(hessian.lanczos(len(values)).values, dtype=torch.float64)
    distances = (values[:, None] - found[None]).abs()
    assert distances.min(1).values.max() < 1e-10  # each eigenvalue is found
    assert distances.min(0).values.max() < 1e-10  # and nothing else
    assert hessian.lanczos(12).values[-1] == pytest.approx(float(values[-1]), rel=1e-3)
    assert sum(hessian.lanczos(12).weights) == pytest.approx(1)


def test_power_iteration_and_trace():
    net, batches = small()
    hessian, matrix = Hessian.of_classifier(net, batches), whole(net, batches)
    values = torch.linalg.eigvalsh(matrix)
    largest = values[values.abs().argsort(descending=True)][:2].tolist()
    assert hessian.power_iteration(2, iterations=500, tolerance=1e-8) == pytest.approx(largest, rel=1e-3)
    trace, error = hessian.trace(400)
    assert abs(trace - float(matrix.trace())) < 4 * error


def test_a_block_of_a_vit_alone():
    """Attention has a second derivative here, and a part's largest eigenvalue is at most the whole's."""
    torch.manual_seed(0)
    model = vitarium.create_model("timm/vit_pico", num_classes=4, image_size=16)
    batches = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))]
    largest = Hessian.of_classifier(model, batches).lanczos(15).values[-1]
    part = Hessian.of_classifier(model, batches, model.blocks[0]).lanczos(15).values[-1]
    assert 0 < part <= largest * 1.01


def test_what_cannot_be_measured():
    net, batches = small()
    with pytest.raises(InputError, match="got 0 and 4"):
        Hessian.of_classifier(net, [])
    with pytest.raises(InputError, match="got 2 and 0"):
        Hessian.of_classifier(net.requires_grad_(False), batches)
    net.requires_grad_(True)
    with pytest.raises(UsageError, match="count must lie between"):
        Hessian.of_classifier(net, batches).power_iteration(0)
    with pytest.raises(UsageError, match="samples"):
        Hessian.of_classifier(net, batches).trace(1)
    linear = Hessian(lambda batch: sum(p.sum() for p in net.parameters()), batches, net.parameters())
    assert linear.lanczos(3).values == [0.0]
