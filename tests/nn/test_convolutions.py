"""Convolutions with fused activations and foldable norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn import Conv2d, ConvMlp, ConvNorm, by_images, conv_norm_gelu, fold_norm_after


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
def test_hooks_of_a_convolution_see_its_output_before_the_activation():
    x, conv, seen = torch.randn(1, 6, 4, 4), Conv2d(6, 8, 1), []
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    conv_norm_gelu(x, conv, nn.Identity())
    torch.testing.assert_close(seen[0], F.conv2d(x, conv.weight, conv.bias))


def test_other_paddings_are_pytorchs():
    x, conv = torch.randn(1, 2, 5, 5), Conv2d(2, 2, 3, padding="same", padding_mode="reflect")
    torch.testing.assert_close(conv(x, "none"), F.gelu(nn.Conv2d.forward(conv, x)))


class Net(nn.Module):
    """Module that records the batch sizes of its inner calls."""

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


class Named(ConvNorm):
    names = ("proj", "norm")


@pytest.mark.identity
@pytest.mark.parametrize("act", [None, nn.ReLU])
@pytest.mark.parametrize("kind", [ConvNorm, Named])
def test_convolution_and_norm_fold_into_one_under_the_names_of_their_class(kind, act):
    part = kind(4, 6, 3, 2, groups=2, act=act).eval().double()
    for name, tensor in part.state_dict().items():
        if name.endswith(("running_var", "running_mean")):
            tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    expected = part(x)
    assert tuple(expected.shape) == (2, 6, 4, 5)
    assert {name.partition(".")[0] for name in part.state_dict()} == set(kind.names)
    for _ in range(2):
        part.fold()
        torch.testing.assert_close(part(x), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in part.modules())


def test_a_dilated_convolution_keeps_the_map_and_a_sequence_is_not_folded():
    assert ConvNorm(2, 2, 3, dilation=2)(torch.randn(2, 2, 8, 8)).shape == (2, 2, 8, 8)
    part = ConvNorm(2, 3, axes=1, norm=nn.BatchNorm1d(3))
    part.fold()
    assert isinstance(part.bn, nn.BatchNorm1d)
    assert part(torch.randn(2, 2, 5)).shape == (2, 3, 5)


@pytest.mark.identity
def test_a_strided_point_convolution_reads_the_pixels_that_pytorch_reads():
    conv, x = Conv2d(3, 5, 1, 2).double(), torch.randn(2, 3, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(x), nn.Conv2d.forward(conv, x))


@pytest.mark.identity
def test_the_convolutional_mlp_is_its_three_layers():
    part, x = ConvMlp(3, 6).eval().double(), torch.randn(1, 3, 5, 4, dtype=torch.float64)
    dwconv = part.get_submodule(part.depthwise)
    torch.testing.assert_close(part(x), part.fc2(F.gelu(dwconv(part.fc1(x)))))
