"""Test that sort orders are equal on every machine."""

from __future__ import annotations

import torch

from vitarium.ops.sorting import descending_order


def test_largest_first_and_ties_as_they_stand():
    values = torch.tensor([[1.0, 3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 5.0]])
    assert descending_order(values).tolist() == [[1, 3, 0, 2], [3, 0, 1, 2]]
    many = torch.zeros(2, 1000)
    assert torch.equal(descending_order(many), torch.arange(1000).expand(2, -1))
