"""Tests of the inflation of image kernels to clip kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitarium.errors import UsageError
from vitarium.nn import inflate, inflate_kernel


def test_mean_shares_the_kernel_out_and_centre_keeps_it():
    weight = torch.randn(4, 3, 2, 2)
    mean, centre = inflate_kernel(weight, 3), inflate_kernel(weight, 3, "centre")
    assert mean.shape == centre.shape == (4, 3, 3, 2, 2)
    torch.testing.assert_close(mean.sum(2), weight)
    assert torch.equal(centre[:, :, 1], weight)
    assert centre.count_nonzero() == weight.count_nonzero()
    with pytest.raises(UsageError, match="did you mean centre"):
        inflate_kernel(weight, 3, "center")


def test_inflate_returns_what_it_did_not_fill():
    image = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "head": nn.Linear(4, 10)})
    video = nn.ModuleDict({"conv": nn.Conv3d(3, 4, 3), "head": nn.Linear(4, 5)})
    before = video["head"].weight.clone()
    assert inflate(image, video) == ["head.weight", "head.bias"]
    assert torch.equal(video["head"].weight, before)
    torch.testing.assert_close(video["conv"].weight.sum(2), image["conv"].weight)
    assert torch.equal(video["conv"].bias, image["conv"].bias)
    with pytest.raises(UsageError, match="have no tensor in common"):
        inflate(nn.Linear(2, 2), video)
