"""Merging of tokens: averages against a loop, and the inverse."""

from __future__ import annotations

import torch

from vitarium.ops.merging import Merge, bipartite_matching, rows


def test_average_equals_a_loop():
    x, size = torch.randn(2, 9, 3, dtype=torch.float64), torch.randint(1, 4, (2, 9, 1)).double()
    merge = bipartite_matching(torch.randn(2, 9, 4), 3, prefix=1)
    got, new = merge.average(x, size)
    for i in range(2):
        for j, old in enumerate(merge.keep[i]):
            members = [old, *merge.source[i][merge.target[i] == j]]
            weight = size[i, members].sum()
            torch.testing.assert_close(got[i, j], (x[i, members] * size[i, members]).sum(0) / weight)
            assert new[i, j] == weight


def test_rows_gather_whole_rows():
    x, index = torch.randn(3, 5, 2, 2), torch.randint(0, 5, (3, 4))
    assert torch.equal(rows(x, index), torch.stack([x[i, index[i]] for i in range(3)]))


def test_assignment_names_the_stand_in():
    merge = Merge(torch.tensor([[0, 3, 1]]), torch.tensor([[2, 4]]), torch.tensor([[1, 1]]))
    assert merge.assignment().tolist() == [[0, 2, 1, 1, 1]]
    assert merge.unmerge(torch.tensor([[10, 11, 12]])).tolist() == [[10, 12, 11, 11, 11]]


def test_gradients_flow_through_the_merge_and_not_through_the_decision():
    metric = torch.randn(1, 9, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True)
    merge = bipartite_matching(metric, 3)
    assert torch.autograd.gradcheck(lambda t: merge.average(t)[0], x)
    merge.average(x)[0].sum().backward()
    assert metric.grad is None


def test_nothing_to_remove():
    assert bipartite_matching(torch.randn(1, 9, 4), 0) is None
    assert bipartite_matching(torch.randn(1, 2, 4), 3, prefix=1) is None
