"""Dependency trees over the patches of an image, grown from pairwise dependencies between tokens.

    tree = grow_tree(mask, (14, 14), 16, (224, 224))     # mask[parent, child]
    tree.parts()                                          # (14, 14): the branch of each patch

The tree is the spanning arborescence with the largest sum of weights (Chu and Liu 1965, Edmonds 1967): each token takes the parent it
depends on most; cycles are contracted, and expanded at the edge that costs least. NumPy only; each contraction is quadratic in the tokens.

Notation: N tokens of h x w patches; the image has H x W pixels. `vitarium.explanation.tree_drawing` draws a tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A rooted tree over the patches of one image.

    Args:
        parent: (N,) index of each token's parent; the root is its own parent.
        strength: (N,) weight of the edge to the parent; 0 for the root.
        received: (N,) sum of the mask's row of each token, which is small for leaves.
        grid: (h, w).
        patch_size: side of a patch in pixels.
        size: (H, W) of the model's input; patches may extend beyond it.
    """

    parent: Ints
    strength: Floats
    received: Floats
    grid: tuple[int, int]
    patch_size: int
    size: tuple[int, int]

    @cached_property
    def root(self) -> int:
        return int(np.flatnonzero(self.parent == np.arange(len(self.parent)))[0])

    @cached_property
    def order(self) -> list[int]:
        """All tokens in breadth-first order: the root first, each token after its parent."""
        children: list[list[int]] = [[] for _ in self.parent]
        for child, parent in enumerate(self.parent.tolist()):
            if child != parent:
                children[parent].append(child)
        found = [self.root]
        for token in found:  # the list grows while it is iterated
            found.extend(children[token])
        return found

    def depth(self) -> Ints:
        """Return the number of edges between each patch and the root, (h, w)."""
        depth = np.zeros(len(self.parent), np.int64)
        for token in self.order[1:]:
            depth[token] = depth[self.parent[token]] + 1
        return depth.reshape(self.grid)

    def parts(self) -> Ints:
        """Return the index of each patch's part, (h, w): 0 for the root, then one for each branch below it, the largest first."""
        branch = np.full(len(self.parent), self.root)
        for token in self.order[1:]:
            parent = self.parent[token]
            branch[token] = token if parent == self.root else branch[parent]
        heads, sizes = np.unique(branch[branch != self.root], return_counts=True)
        number = np.zeros(len(self.parent), np.int64)
        number[heads[np.argsort(-sizes, kind="stable")]] = np.arange(1, len(heads) + 1)
        return number[branch].reshape(self.grid)

    def reach(self) -> Floats:
        """Return the weakest edge on the path from each patch to the root, (h, w); for the root, the strongest edge of the tree."""
        reach = np.full(len(self.parent), self.strength.max(initial=0.0))
        for token in self.order[1:]:
            reach[token] = min(reach[self.parent[token]], self.strength[token])
        return reach.reshape(self.grid)

    def saliency(self) -> NDArray[np.bool_]:
        """Return a mask (h, w) of the patches whose path to the root has only edges above the mean; the root is included."""
        edges = self.strength[self.order[1:]]
        salient = self.reach() > edges.mean() if len(edges) else np.ones(self.grid, bool)
        salient.flat[self.root] = True
        return salient

    def to_pixels(self, values: ArrayLike) -> NDArray:
        """Expand values of the patches (h, w) to pixels (H, W), without smoothing."""
        large = np.asarray(values).repeat(self.patch_size, axis=0).repeat(self.patch_size, axis=1)
        return large[: self.size[0], : self.size[1]]


def grow_tree(
    mask: ArrayLike, grid: tuple[int, int], patch_size: int, size: tuple[int, int] | None = None, *, root: int | None = None
) -> TokenTree:
    """Return the maximum spanning tree of a dependency mask.

    Args:
        mask: (N, N), [parent, child]: how strongly the child depends on the parent. The diagonal only counts towards `received`.
        grid: (h, w) with h w = N.
        patch_size: side of a patch in pixels.
        size: (H, W) of the model's input; None: that of the grid.
        root: index of the root token; None: the one with the largest `received`.

    Raises:
        ValueError: the mask has another shape or values that are not finite, or the root is out of range.
    """
    weights = np.asarray(mask, dtype=np.float64)
    count = grid[0] * grid[1]
    if weights.shape != (count, count):
        raise ValueError(f"the mask of {grid[0]}x{grid[1]} patches is ({count}, {count}), [parent, child]; got {weights.shape}")
    if not np.isfinite(weights).all():
        raise ValueError("the dependency mask has values that are not finite; look at the model's weights and input")
    received = weights.sum(1)
    chosen = int(received.argmax()) if root is None else root
    if not 0 <= chosen < count:
        raise ValueError(f"the root must be a token from 0 to {count - 1}, got {root}")
    parent = spanning_arborescence(weights, chosen)
    strength = weights[parent, np.arange(count)]
    strength[chosen] = 0.0
    return TokenTree(parent, strength, received, grid, patch_size, size or (grid[0] * patch_size, grid[1] * patch_size))


def spanning_arborescence(weights: ArrayLike, root: int) -> Ints:
    """Return the spanning tree directed away from `root` with the largest sum of edge weights.

    Args:
        weights: (N, N) finite, [parent, child].
        root: index of the root token.

    Returns:
        (N,) parent of each token; the root is its own parent.
    """
    w = np.array(weights, dtype=np.float64)
    np.fill_diagonal(w, -np.inf)
    w[:, root] = -np.inf
    alive = np.ones(len(w), bool)
    merged: list[tuple[Ints, Ints, Ints, Ints]] = []
    while True:
        parent = w.argmax(0)
        parent[root] = root
        cycle = _find_cycle(parent, alive)
        if cycle is None:
            break
        into = w[:, cycle] - w[parent[cycle], cycle]  # gain or loss of entering the cycle at each of its tokens
        out = w[cycle]
        merged.append((cycle, parent[cycle], cycle[into.argmax(1)], cycle[out.argmax(0)]))
        one = cycle[0]  # represents the contracted cycle from here on
        w[:, one], w[one] = into.max(1), out.max(0)
        w[cycle, one] = w[one, cycle] = -np.inf
        w[cycle[1:]] = w[:, cycle[1:]] = -np.inf
        alive[cycle[1:]] = False
    for cycle, inside, enter, leave in reversed(merged):
        one = cycle[0]
        outer = parent[one]
        below = alive & (parent == one)
        parent[below] = leave[below]
        parent[cycle] = inside
        parent[enter[outer]] = outer
        alive[cycle] = True
    return parent


def _find_cycle(parent: Ints, alive: NDArray[np.bool_]) -> Ints | None:
    """Return the tokens of one cycle of parents, or None if every path leads to the root."""
    walk = np.full(len(parent), -1)
    for start in np.flatnonzero(alive).tolist():
        token = start
        while walk[token] < 0:
            walk[token] = start
            token = int(parent[token])
        if walk[token] == start and parent[token] != token:
            cycle = [token]
            while (following := int(parent[cycle[-1]])) != token:
                cycle.append(following)
            return np.array(cycle)
    return None
