"""Filters in the Fourier domain."""

import pytest
import torch

from vitarium.ops.spectral import global_filter


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 6), (1, 1)])
def test_a_filter_of_ones_is_the_identity(size):
    x = torch.randn(2, 3, *size).double()
    ones = torch.zeros(3, 8, 5, 2).double()
    ones[..., 0] = 1
    torch.testing.assert_close(global_filter(x, ones), x, rtol=0, atol=1e-12)


def test_equals_a_circular_convolution():
    x, kernel = torch.randn(1, 2, 6, 7).double(), torch.randn(2, 6, 7).double()
    weight = torch.view_as_real(torch.fft.rfft2(kernel))
    expected = torch.zeros_like(x)
    for i in range(6):
        for j in range(7):
            expected += kernel[:, i, j, None, None] * x.roll((i, j), (2, 3))
    torch.testing.assert_close(global_filter(x, weight), expected, rtol=0, atol=1e-12)


def test_half_precision_is_computed_in_float32():
    x, weight = 100 * torch.randn(1, 2, 64, 64), torch.randn(2, 64, 33, 2)
    half = global_filter(x.half(), weight)
    assert half.dtype is torch.float16
    torch.testing.assert_close(half.float(), global_filter(x, weight), rtol=5e-3, atol=1)
