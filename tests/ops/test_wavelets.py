"""The dual-tree wavelet transform of one level."""

from __future__ import annotations

import pytest
import torch

from vitarium.ops.wavelets import ORIENTATIONS, dtcwt, inverse_dtcwt


@pytest.mark.parametrize("size", [(16, 12), (2, 2), (4, 30), (56, 56)])
def test_nothing_is_lost(size: tuple[int, int]):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(inverse_dtcwt(*dtcwt(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse_dtcwt(*dtcwt(x.float())), x.float(), rtol=0, atol=5e-6)


@pytest.mark.parametrize(("down", "right", "angles"), [(2.2, 0.0, {15, 165}), (2.2, 2.2, {45}), (0.0, 2.2, {75, 105}), (2.2, -2.2, {135})])
def test_waves_show_by_their_direction(down: float, right: float, angles: set[int]):
    """A diagonal wave is in one band and not in that of its mirror image; one along an axis in two."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    _, real, imaginary = dtcwt(torch.cos(down * y + right * x)[None, None].double())
    energy = (real**2 + imaginary**2)[0, 0, :, 4:-4, 4:-4].mean((1, 2))
    assert {angle for angle, of in zip(ORIENTATIONS, energy, strict=True) if of > 0.5 * energy.max()} == angles


def test_magnitudes_move_less_than_haars():
    """An image shifted by a pixel: how much its bands' magnitudes change, over their size, against a plain Haar transform."""
    y, x = torch.meshgrid(torch.arange(33.0), torch.arange(33.0), indexing="ij")
    picture = torch.sigmoid(4 * (12 - ((y - 16) ** 2 + (x - 15) ** 2).sqrt())).double()[None, None]
    here, there = picture[..., :32, :32].contiguous(), picture[..., 1:, 1:].contiguous()

    def magnitudes(image: torch.Tensor) -> torch.Tensor:
        _, real, imaginary = dtcwt(image)
        return (real**2 + imaginary**2).sqrt().flatten(2).norm(dim=-1)

    def haar(image: torch.Tensor) -> torch.Tensor:
        a, b, c, d = image[..., ::2, ::2], image[..., ::2, 1::2], image[..., 1::2, ::2], image[..., 1::2, 1::2]
        return torch.stack([a - b + c - d, a + b - c - d, a - b - c + d], 2).flatten(2).abs()

    def change(of) -> float:
        return ((of(here) - of(there)).norm() / of(here).norm()).item()

    assert change(magnitudes) < change(haar)


def test_refuses_odd_sides():
    with pytest.raises(ValueError, match="even height and width, got 5x4"):
        dtcwt(torch.randn(1, 1, 5, 4))
