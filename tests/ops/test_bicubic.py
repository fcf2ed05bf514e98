"""Bicubic resizing as in the super-resolution benchmarks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitarium.ops.bicubic import bicubic_taps, resize_bicubic


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4])
def test_inside_it_is_the_antialiased_bicubic_of_torch(scale: float):
    image = torch.rand(2, 3, 48, 60, dtype=torch.float64)
    ours = resize_bicubic(image, scale)
    theirs = F.interpolate(image, ours.shape[-2:], mode="bicubic", antialias=True)
    assert ours.shape[-2:] == (48 * scale, 60 * scale)
    border = 2 if scale < 1 else int(2 * scale)
    inside = (..., slice(border, -border), slice(border, -border))
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=1e-6)  # torch's weights are float32
    assert not torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("scale", [1 / 2, 1 / 4, 2])
def test_at_the_border_the_picture_is_mirrored(scale: float):
    image = torch.rand(1, 1, 24, 24, dtype=torch.float64)
    mirrored = torch.cat([image.flip(-1), image, image.flip(-1)], -1)
    mirrored = torch.cat([mirrored.flip(-2), mirrored, mirrored.flip(-2)], -2)
    out = int(24 * scale)
    middle = resize_bicubic(mirrored, scale)[..., out : 2 * out, out : 2 * out]
    torch.testing.assert_close(resize_bicubic(image, scale), middle, rtol=0, atol=1e-12)


def test_the_weights_of_halving():
    """MATLAB's own numbers: eight taps of the widened kernel at eighths of a pixel."""
    places, weights = bicubic_taps(20, 0.5)
    row = weights[5][weights[5] != 0]
    expected = torch.tensor([-3, -9, 29, 111, 111, 29, -9, -3], dtype=torch.float64) / 256
    torch.testing.assert_close(row, expected)
    assert places[5][weights[5] != 0].tolist() == list(range(7, 15))


def test_a_constant_stays_and_odd_sides_round_up():
    out = resize_bicubic(torch.full((1, 7, 5), 0.3, dtype=torch.float64), 0.5)
    torch.testing.assert_close(out, torch.full((1, 4, 3), 0.3, dtype=torch.float64))
    assert resize_bicubic(torch.rand(1, 1, 1), 4).shape == (1, 4, 4)


def test_refuses_a_scale_of_nothing():
    with pytest.raises(ValueError, match="above 0"):
        resize_bicubic(torch.rand(4, 4), 0)
