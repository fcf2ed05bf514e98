"""Dependency trees over patches: the maximum spanning tree and its parts."""

from __future__ import annotations

import networkx
import numpy as np
import pytest

from vitarium.ops.token_tree import TokenTree, grow_tree, spanning_arborescence


def weight_of(weights: np.ndarray, parent: np.ndarray) -> float:
    return float(sum(weights[p, c] for c, p in enumerate(parent) if p != c))


@pytest.mark.parametrize("count", [1, 2, 3, 6, 14])
@pytest.mark.parametrize("seed", range(6))
def test_no_tree_weighs_more(count: int, seed: int):
    rng = np.random.default_rng(seed)
    weights = rng.random((count, count))
    if seed % 2:  # pairs that prefer each other: many cycles to open
        weights += np.kron(np.eye(-(-count // 2)), np.ones((2, 2)))[:count, :count]
    root = int(rng.integers(count))
    parent = spanning_arborescence(weights, root)
    assert parent[root] == root
    for token in range(count):  # every way leads to the root
        for _ in range(count):
            token = parent[token]
        assert token == root
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_weighted_edges_from((p, c, weights[p, c]) for p in range(count) for c in range(count) if p != c and c != root)
    best = networkx.maximum_spanning_arborescence(graph, default=0)
    assert weight_of(weights, parent) == pytest.approx(best.size("weight"), abs=1e-12)


def test_without_cycles_each_takes_its_favourite():
    weights = np.array([[0, 3, 1, 1], [1, 0, 2, 1], [0, 0, 0, 5], [0.5, 0, 0, 0]])
    assert spanning_arborescence(weights, 0).tolist() == [0, 0, 1, 2]


def chain() -> TokenTree:
    """On 2 x 3 patches: 0 <- 1 <- 2 and 0 <- 3, 0 <- 4 <- 5; the edge of 4 is weak."""
    weights = np.zeros((6, 6))
    for parent, child, weight in [(0, 1, 0.9), (1, 2, 0.8), (0, 3, 0.7), (0, 4, 0.1), (4, 5, 0.95)]:
        weights[parent, child] = weight
    return grow_tree(weights, (2, 3), 8, (15, 22))


def test_parts_and_saliency():
    tree = chain()
    assert tree.root == 0
    assert tree.parent.tolist() == [0, 0, 1, 0, 0, 4]
    assert tree.depth().tolist() == [[0, 1, 2], [1, 1, 2]]
    parts = tree.parts()
    assert parts[0, 0] == 0
    assert parts[0, 1] == parts[0, 2] == 1
    assert parts[1, 1] == parts[1, 2] == 2
    assert parts[1, 0] == 3
    np.testing.assert_allclose(tree.reach(), [[0.95, 0.9, 0.8], [0.7, 0.1, 0.1]])
    assert tree.saliency().tolist() == [[True, True, True], [True, False, False]]
    assert tree.to_pixels(parts).shape == (15, 22)
    assert tree.to_pixels(parts)[14, 21] == parts[1, 2]


def test_a_single_patch_is_a_tree():
    tree = grow_tree([[0.3]], (1, 1), 16)
    assert tree.root == 0
    assert tree.parts().tolist() == [[0]]
    assert tree.saliency().tolist() == [[True]]


def test_refusals():
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        grow_tree(np.zeros((3, 3)), (2, 2), 8)
    with pytest.raises(ValueError, match="finite"):
        grow_tree(np.full((4, 4), np.nan), (2, 2), 8)
    with pytest.raises(ValueError, match="0 to 3"):
        grow_tree(np.zeros((4, 4)), (2, 2), 8, root=4)
