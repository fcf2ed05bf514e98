"""Classifiers with known evidence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZE = 16
ROWS, COLUMNS = slice(2, 7), slice(9, 14)
"""Location of the evidence for class 1."""


class Patch(nn.Module):
    """Three classes; the logit of class 1 is the sum over one patch, all the rest of the image plays no part."""

    num_classes = 3
    labels = ("nothing", "patch", "other")

    def __init__(self):
        super().__init__()
        weight = torch.zeros(3, 3, SIZE, SIZE)
        weight[1, :, ROWS, COLUMNS] = 0.1
        self.weight = nn.Parameter(weight)

    def forward(self, image: Tensor) -> Tensor:
        return torch.einsum("kchw,bchw->bk", self.weight, image)


class Pooled(nn.Module):
    """A convolution, the mean over its map, a linear layer: what CAM was made for."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 4, 4)
        self.head = nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.conv(image).mean((2, 3)))


def evidence(batch: int = 2) -> Tensor:
    """(B, H, W) bool: the patch."""
    there = torch.zeros(batch, SIZE, SIZE, dtype=torch.bool)
    there[:, ROWS, COLUMNS] = True
    return there


def images(batch: int = 2) -> Tensor:
    """Images that are brighter than the mean in the patch, so that class 1 is seen."""
    image = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    image[:, :, ROWS, COLUMNS] = image[:, :, ROWS, COLUMNS].abs() + 0.2
    return image
