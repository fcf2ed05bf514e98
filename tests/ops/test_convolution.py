"""The fast convolution and linear layer equal PyTorch's, and are not used while a tracer or hook observes the operators."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitarium.ops.convolution import conv2d
from vitarium.ops.linear import linear


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups", "bias"),
    [(1, 1, 0, 1, True), (1, 2, 0, 1, False), (3, 1, 1, 8, True), (3, 2, 0, 8, False), (3, 2, 1, 2, True), (7, 1, 3, 8, True)],
)
def test_convolution_equals_the_ordinary_one(kernel, stride, padding, groups, bias, dtype, layout, gelu):
    x = torch.randn(2, 8, 11, 9, dtype=dtype).contiguous(memory_format=layout)
    weight, shift = torch.randn(16, 8 // groups, kernel, kernel, dtype=dtype), torch.randn(16, dtype=dtype) if bias else None
    expected = F.conv2d(x, weight, shift, stride, padding, groups=groups)
    expected = F.gelu(expected, approximate=gelu) if gelu else expected
    with torch.inference_mode():
        found = conv2d(x, weight, shift, stride=(stride, stride), padding=(padding, padding), groups=groups, gelu=gelu)
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_equals_the_ordinary_one(dtype, gelu):
    x, weight, bias = torch.randn(2, 5, 8, dtype=dtype), torch.randn(16, 8, dtype=dtype), torch.randn(16, dtype=dtype)
    expected = F.linear(x, weight, bias)
    expected = F.gelu(expected, approximate=gelu) if gelu else expected
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight, bias, gelu=gelu), expected, rtol=1e-5, atol=2e-5)


def test_gradients_and_counters_see_the_ordinary_operator():
    x = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 4, 1, 1, requires_grad=True)
    conv2d(x, weight, None, gelu="tanh").sum().backward()
    assert weight.grad is not None
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        conv2d(x, weight, None)
    assert counter.get_total_flops() == 2 * 36 * 16
