"""Convolutions as they are deployed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn import Conv2d, by_images, conv_norm_gelu, fold_norm_after


def lively_norm(dim: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(dim).eval()
    for statistic in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        statistic.data.uniform_(0.5, 1.5)
    return norm


@pytest.mark.parametrize("form", ["none", "tanh"])
@torch.inference_mode()
def test_a_folded_norm_and_the_activation_are_one_kernel_with_equal_outputs(form):
    x, conv, norm = torch.randn(2, 6, 7, 5).contiguous(memory_format=torch.channels_last), Conv2d(6, 8, 3, padding=1), lively_norm(8)
    expected = F.gelu(norm(F.conv2d(x, conv.weight, conv.bias, padding=1)), approximate=form)
    torch.testing.assert_close(conv_norm_gelu(x, conv, norm, form), expected)
    torch.testing.assert_close(conv_norm_gelu(x, fold_norm_after(conv, norm), nn.Identity(), form), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_whoever_looks_at_a_convolution_sees_it_without_the_activation():
    x, conv, seen = torch.randn(1, 6, 4, 4), Conv2d(6, 8, 1), []
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    conv_norm_gelu(x, conv, nn.Identity())
    torch.testing.assert_close(seen[0], F.conv2d(x, conv.weight, conv.bias))


def test_other_paddings_are_pytorchs():
    x, conv = torch.randn(1, 2, 5, 5), Conv2d(2, 2, 3, padding="same", padding_mode="reflect")
    torch.testing.assert_close(conv(x, "none"), F.gelu(nn.Conv2d.forward(conv, x)))


class Net(nn.Module):
    """Counts the calls of its inner part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 4, 1)
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return by_images(self, self.work, x, 4)

    def work(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.inner(x)


def test_a_batch_goes_through_in_pieces_in_inference_alone(monkeypatch):
    monkeypatch.setattr("vitarium.nn.convolutions.PIECE_BYTES", 2 * 4 * 3 * 3 * 4)  # two images
    net, x = Net().eval(), torch.randn(5, 2, 3, 3)
    expected = net.inner(x)
    net(x)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), expected)
        net.train()(x)
        net.eval().inner.register_forward_hook(lambda *_: None)
        net(x)
    assert net.batches == [5, 2, 2, 1, 5, 5]
