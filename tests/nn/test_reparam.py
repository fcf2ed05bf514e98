"""Tests of folding parallel convolutions into one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vitarium.nn.reparam import RepConv, rep_conv


def with_statistics(part: nn.Module) -> nn.Module:
    """Fill norms and biases with random values."""
    with torch.no_grad():
        for name, tensor in part.state_dict().items():
            if name.endswith(("bn.weight", "identity.weight", "running_var")):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith(("bias", "running_mean")):
                tensor.normal_()
    return part.eval()


@pytest.mark.identity
@pytest.mark.parametrize(
    "part",
    [
        lambda: rep_conv(8, 8, 3),
        lambda: rep_conv(8, 8, 3, groups=4),
        lambda: rep_conv(8, 12, 3, stride=2, groups=2),
        lambda: rep_conv(8, 8, 3, groups=8, dilation=2),
        lambda: rep_conv(8, 8, 5),
        lambda: rep_conv(8, 8, 1),
        lambda: RepConv(8, 12, [(1, 1), (1, 2), (1, 4)]),
        lambda: RepConv(8, 8, [(3, 2), (1, 8), (1, 4)]),
    ],
)
def test_one_convolution_does_what_the_branches_do(part):
    part = with_statistics(part()).double()
    x = torch.randn(2, 8, 7, 10, dtype=torch.float64)
    expected = part(x)
    for _ in range(2):
        part.fold()
        assert len(part.branches) == 0
        torch.testing.assert_close(part(x), expected, rtol=0, atol=1e-12)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in part.modules())


@pytest.mark.identity
def test_groups_are_blocks_of_a_dense_kernel():
    part = with_statistics(RepConv(8, 12, [(1, 1), (1, 4)])).double()
    with torch.no_grad():
        part.branches[0].bn.weight.zero_()
    grouped: Tensor = (
        part.branches[1].conv.weight.detach()
        * (part.branches[1].bn.weight / (part.branches[1].bn.running_var + 1e-5).sqrt())[:, None, None, None]
    )
    part.fold()
    assert part.conv is not None
    torch.testing.assert_close(part.conv.weight[:, :, 0, 0], torch.block_diag(*grouped[:, :, 0, 0].view(4, 3, 2)), rtol=0, atol=1e-12)
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(F.conv2d(x, part.conv.weight), F.conv2d(x, grouped, groups=4), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("branches", "words"), [([(2, 1)], "odd"), ([(3, 3)], "3 groups")])
def test_refuses(branches: list, words: str):
    with pytest.raises(ValueError, match=words):
        RepConv(8, 8, branches)


def test_a_strided_point_branch_spares_pytorchs_gradient():
    """PyTorch's weight gradient of a strided 1 x 1 on a channels-last image overwrites memory: no such convolution may reach it."""
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                asked.append((tuple(args[2].shape[2:]), args[4]))
            return func(*args, **(kwargs or {}))

    part = rep_conv(3, 32, 3, stride=2)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = part(x).sum()
    with Watch():
        y.backward()
    assert sorted(asked) == [((1, 1), [1, 1]), ((3, 3), [2, 2])]
