"""A tree over the patches of a picture, from how much each token depends on each other: the best tree, its parts, its picture.

    tree = grow_tree(mask, (14, 14), 16, (224, 224))     # mask[parent, child]
    tree.parts()                                          # (14, 14): which branch each patch belongs to
    tree.draw(picture).save("tree.png")

The best tree is the spanning arborescence of the largest sum of weights (Chu and Liu 1965, Edmonds 1967): each token takes the parent it
depends on most, cycles are contracted and opened where that costs least. Plain arrays; quadratic in tokens for each contraction.

N tokens of h x w patches, H and W sides of the image, pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

COLOURS = ((255, 170, 40), (60, 190, 255), (90, 215, 120), (255, 105, 150), (190, 140, 255), (245, 230, 80), (60, 220, 200), (255, 130, 90))
"""Of the largest parts; those beyond are grey."""
SMALLEST_PART = 3
"""Patches from which a part has a colour."""
OTHERS = (190, 190, 190)
SHADE = (20, 20, 24)
"""Of what lies around lines and dots, so that they stand out from any picture."""
SIDE, LONGEST = 672, 1600
"""Pixels of a drawn tree's shorter side, and at most of the whole picture's longer side."""
FINER = 2
"""How much larger lines are drawn than shown, so that their edges are smooth."""


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Who depends on whom.

    Args:
        parent: (N,) the token that each depends on most; the root is its own.
        strength: (N,) how much: the weight of the edge to the parent, 0 for the root.
        received: (N,) what each token receives from all; small for leaves.
        grid: h, w.
        patch_size: side of a patch, pixels.
        size: H, W of the image that the model saw; patches may reach beyond it.
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
        """All tokens, the root first, each behind its parent."""
        children: list[list[int]] = [[] for _ in self.parent]
        for child, parent in enumerate(self.parent.tolist()):
            if child != parent:
                children[parent].append(child)
        found = [self.root]
        for token in found:  # grows as it goes
            found.extend(children[token])
        return found

    def depth(self) -> Ints:
        """(h, w) edges from the root."""
        depth = np.zeros(len(self.parent), np.int64)
        for token in self.order[1:]:
            depth[token] = depth[self.parent[token]] + 1
        return depth.reshape(self.grid)

    def parts(self) -> Ints:
        """(h, w) number of each patch's part: 0 the root, 1, 2, ... the branches that begin at its children, the largest first."""
        branch = np.full(len(self.parent), self.root)
        for token in self.order[1:]:
            parent = self.parent[token]
            branch[token] = token if parent == self.root else branch[parent]
        heads, sizes = np.unique(branch[branch != self.root], return_counts=True)
        number = np.zeros(len(self.parent), np.int64)
        number[heads[np.argsort(-sizes, kind="stable")]] = np.arange(1, len(heads) + 1)
        return number[branch].reshape(self.grid)

    def reach(self) -> Floats:
        """(h, w) the weakest edge between each patch and the root; the root's is the strongest edge of all."""
        reach = np.full(len(self.parent), self.strength.max(initial=0.0))
        for token in self.order[1:]:
            reach[token] = min(reach[self.parent[token]], self.strength[token])
        return reach.reshape(self.grid)

    def saliency(self) -> NDArray[np.bool_]:
        """(h, w) whether a patch hangs on the root by edges that are all stronger than the mean edge; the root itself does."""
        edges = self.strength[self.order[1:]]
        salient = self.reach() > edges.mean() if len(edges) else np.ones(self.grid, bool)
        salient.flat[self.root] = True
        return salient

    def to_pixels(self, values: ArrayLike) -> NDArray:
        """Something of each patch (h, w) -> of each pixel (H, W), without smoothing."""
        large = np.asarray(values).repeat(self.patch_size, axis=0).repeat(self.patch_size, axis=1)
        return large[: self.size[0], : self.size[1]]

    def draw(self, picture: Image.Image, box: tuple[float, float, float, float] | None = None) -> Image.Image:
        """The tree over a picture: parts tinted, edges from child to parent, thick where strong, dots large where much arrives, a ring
        around the root.

        Args:
            picture: any size and mode.
            box: left, top, right, lower edge of what the model saw of it, pixels; None: the whole. The rest is dark.

        Returns:
            RGB of the picture's shape, its shorter side 672 pixels where the longer one stays within 1600.
        """
        scale = min(SIDE / min(picture.size), LONGEST / max(picture.size))
        large = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        left, top, right, lower = (round(v * scale) for v in box or (0, 0, *picture.size))
        seen = max(1, right - left), max(1, lower - top)
        base = picture.convert("RGB").resize(large, Image.Resampling.BICUBIC)
        sheet = Image.fromarray((np.asarray(base, dtype=np.float32) * 0.25).astype(np.uint8))
        parts = self.parts()
        shown = _tinted(base.crop((left, top, left + seen[0], top + seen[1])), self.to_pixels(parts), _part_colours(parts))
        self._draw_edges(shown, parts)
        sheet.paste(shown.resize(seen, Image.Resampling.LANCZOS), (left, top))
        return sheet

    def _draw_edges(self, shown: Image.Image, parts: Ints) -> None:
        """On a picture of what the model saw, which is larger than shown by FINER."""
        across, down = shown.width / self.size[1], shown.height / self.size[0]
        cell = self.patch_size * min(across, down)
        rows, columns = np.divmod(np.arange(len(self.parent)), self.grid[1])
        x, y = (columns + 0.5) * self.patch_size * across, (rows + 0.5) * self.patch_size * down
        colours, part = _part_colours(parts), parts.ravel()
        strong = np.sqrt(self.strength / max(float(self.strength.max()), 1e-30))
        pen = ImageDraw.Draw(shown, "RGBA")  # see-through: many edges meet at a hub
        for token in np.argsort(self.strength, kind="stable").tolist():
            if token != self.root:
                ends = [(x[token], y[token]), (x[self.parent[token]], y[self.parent[token]])]
                thick = cell * (0.025 + 0.09 * strong[token])
                colour = colours.get(int(part[token]), OTHERS)
                pen.line(ends, fill=(*SHADE, 150), width=max(1, round(thick + 0.05 * cell)))
                pen.line(ends, fill=(*colour, 120 if colour is OTHERS else 225), width=max(1, round(thick)))
        share = np.sqrt(self.received / max(float(self.received.max()), 1e-30))
        for token in range(len(self.parent)):
            colour = colours.get(int(part[token]), OTHERS)
            _dot(pen, x[token], y[token], cell * (0.05 + 0.15 * share[token]), colour, SHADE, cell * 0.03)
        _dot(pen, x[self.root], y[self.root], cell * 0.36, (255, 255, 255), SHADE, cell * 0.06)
        _dot(pen, x[self.root], y[self.root], cell * 0.18, (215, 30, 50), SHADE, cell * 0.03)


def grow_tree(
    mask: ArrayLike, grid: tuple[int, int], patch_size: int, size: tuple[int, int] | None = None, *, root: int | None = None
) -> TokenTree:
    """The best tree of a dependency mask.

    Args:
        mask: (N, N), [parent, child]: how much a child sends to, or takes from, a parent. The diagonal is not looked at but for `received`.
        grid: h, w with h w = N.
        patch_size: side of a patch, pixels.
        size: H, W; None: the grid's.
        root: its token; None: the one that receives most.

    Raises:
        ValueError: a mask of another shape or with values that are not finite, or a root outside of it.
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
    """The tree away from `root` whose edges weigh most together.

    Args:
        weights: (N, N) finite, [parent, child].
        root: its token.

    Returns:
        (N,) the parent of each; the root's is itself.
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
        into = w[:, cycle] - w[parent[cycle], cycle]  # what it costs to enter the cycle here, which opens it there
        out = w[cycle]
        merged.append((cycle, parent[cycle], cycle[into.argmax(1)], cycle[out.argmax(0)]))
        one = cycle[0]  # stands for all of them from now on
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
    """The tokens of one cycle of parents, or None where all ways lead to the root."""
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


def _part_colours(parts: Ints) -> dict[int, tuple[int, int, int]]:
    """Number of a part -> its colour, for the largest."""
    numbers, sizes = np.unique(parts[parts > 0], return_counts=True)
    return {int(n): COLOURS[i] for i, n in enumerate(numbers[: len(COLOURS)]) if sizes[i] >= SMALLEST_PART}


def _tinted(picture: Image.Image, parts: Ints, colours: dict[int, tuple[int, int, int]]) -> Image.Image:
    """Enlarged by FINER, half grey and a little dark, with parts in their colours and dark lines between them."""
    fine = picture.resize((picture.width * FINER, picture.height * FINER), Image.Resampling.BICUBIC)
    pixels = np.asarray(fine, dtype=np.float64)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    pixels = 0.8 * (0.5 * pixels + 0.5 * grey[..., None])
    rows, columns = (np.arange(n) * side // n for n, side in zip(pixels.shape[:2], parts.shape, strict=True))
    label = parts[rows][:, columns]
    for number, colour in colours.items():
        inside = label == number
        pixels[inside] = 0.6 * pixels[inside] + 0.4 * np.array(colour)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _dot(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple, outline: tuple, width: float) -> None:
    corners = (x - radius, y - radius, x + radius, y + radius)
    pen.ellipse(corners, fill=fill, outline=outline, width=max(1, round(width)))
