"""Loss surfaces: values at known points, and restored weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.tiny import assert_same_weights, tiny_net, weights
from vitarium.errors import UsageError
from vitarium.robustness.surface import Surface, draw_surfaces, filter_normalised, loss_surface


def problem(norm=True):
    net = tiny_net(norm=norm)
    batches = [(torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))) for _ in range(2)]
    return net, (lambda batch: nn.functional.cross_entropy(net(batch[0]), batch[1])), batches


@pytest.mark.parametrize("directions", [1, 2])
def test_the_middle_is_the_loss_itself_and_the_weights_come_back(directions):
    net, loss, batches = problem()
    before = weights(net)
    found = loss_surface(net, loss, batches, side=5, directions=directions)
    assert_same_weights(weights(net), before)
    assert net.training
    net.eval()
    assert found.losses.shape == (5,) * directions
    assert found.centre == pytest.approx(float(torch.stack([loss(b) for b in batches]).mean().detach()), rel=1e-6)
    assert np.array_equal(found.losses, loss_surface(net, loss, batches, side=5, directions=directions).losses)


def test_a_bowl_is_a_bowl():
    """0.5 c |w - w0|^2 at a distance a is 0.5 c (a |w0|)^2: directions are as long as the weight."""
    holder = nn.Linear(6, 1, bias=False)
    start = holder.weight.detach().clone()
    found = loss_surface(holder, lambda _: 1.5 * (holder.weight - start).square().sum(), [None], directions=1, side=5, reach=2.0)
    np.testing.assert_allclose(found.losses, 1.5 * (found.axis * float(start.norm())) ** 2, rtol=1e-5, atol=1e-9)


def test_directions_have_the_rows_lengths_of_the_weight():
    weight = torch.randn(5, 3, 2, 2)
    drawn = filter_normalised(weight, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
    assert not filter_normalised(torch.randn(4), torch.Generator()).any()


def test_pictures():
    axis = np.linspace(-1, 1, 5)
    plane = Surface(axis, np.add.outer(axis**2, 3 * axis**2) + 0.1)
    torn = Surface(axis, np.full((5, 5), np.nan))
    one, two = draw_surfaces({"a": plane}), draw_surfaces({"a": plane, "torn": torn})
    assert two.width > one.width
    pixels = np.asarray(one, dtype=int)
    middle, corner = pixels[34 + 140, 46 + 140], pixels[34 + 5, 46 + 5]
    assert corner.sum() > middle.sum()  # yellow outside, blue inside
    line = Surface(axis, axis**2 + 0.1)
    assert draw_surfaces({"a": line, "b": Surface(axis, 2 * axis**2 + 0.1)}).width > 600
    with pytest.raises(UsageError, match="only lines or only planes"):
        draw_surfaces({"a": plane, "b": line})
    with pytest.raises(UsageError, match="at least one"):
        draw_surfaces({})


def test_numbers_out_of_range():
    net, loss, batches = problem(norm=False)
    for wrong in ({"side": 4}, {"directions": 3}, {"reach": 0.0}):
        with pytest.raises(UsageError, match="a surface needs"):
            loss_surface(net, loss, batches, **wrong)
    with pytest.raises(UsageError, match="0 batches"):
        loss_surface(net, loss, [])
