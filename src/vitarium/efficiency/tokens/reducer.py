"""Base class of token reductions: attaching to the blocks, and restoring the full sequence for models that need every patch.

A reducer defines `reduce`, which is called between a block's attention and its MLP, and `acts_on`. The base class and `vitarium.anatomy` do
the rest: prefix tokens (class, distillation, registers) are unchanged, rotary embedding uses each token's own position, neutral options
change nothing, and padding does not affect the reduction of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitarium.anatomy import Anatomy, Attended, Site, SitedBlock, Tokens, carried, install
from vitarium.catalog.methods import AttachReport, Method
from vitarium.errors import AttachError, UsageError
from vitarium.nn.modes import evaluating


@dataclass(frozen=True)
class Reducer(Method):
    """Base class of token reductions."""

    def acts_on(self, block: int, depth: int) -> bool:
        """Return whether a block (numbered from 0) may reduce, whatever the live options are."""
        return True

    def reduce(self, tokens: Tokens, attended: Attended, block: int, depth: int) -> None:
        """Reduce the tokens of one block in place, or leave them unchanged. The tokens contain no padding."""
        raise NotImplementedError(f"{type(self).__name__} does not define reduce")

    def check(self, view: Anatomy) -> None:
        """Raise AttachError for a model that this reduction does not support."""

    @property
    def counts_sizes(self) -> bool:
        """Proportional attention: a merged token is weighted by the number of originals that it represents."""
        return False

    @property
    def can_restore(self) -> bool:
        """True if every original token has a representative, so that the full sequence can be restored for models that need it."""
        return True

    def attach(self, model: nn.Module) -> AttachReport:
        """Wrap the blocks of a plain vision transformer and set a site in each.

        Raises:
            UnsupportedModel: anatomy does not support the model.
            AttachError: the model lacks what this reduction needs, or has none of its blocks.
        """

        def sites(view: Anatomy) -> list[Site]:
            self.check(view)
            if not any(self.acts_on(i, view.depth) for i in range(view.depth)):
                raise AttachError(f"{self} names no block of this model; it has {view.depth}, numbered from 0")
            return [ReducerSite(self, i, view.depth, view.reads_patches and i == view.depth - 1) for i in range(view.depth)]

        replaced, placed = install(model, sites)
        names = tuple(name for i, name in enumerate(replaced) if self.acts_on(i, len(replaced)))
        return AttachReport(self, replaced=replaced, sites=names, live=placed)


class ReducerSite(Site):
    """Site of a reducer in one block.

    Args:
        method: the reducer with its current options.
        block, depth: number of the block, and of blocks.
        restore: whether to restore the full sequence after this block.
    """

    def __init__(self, method: Reducer, block: int, depth: int, restore: bool):
        self.method, self.block, self.depth, self.restore = method, block, depth, restore

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        return self.method.counts_sizes

    def between(self, tokens: Tokens, attended: Attended) -> None:
        if not self.method.acts_on(self.block, self.depth):
            return
        if tokens.mask is None:
            self.method.reduce(tokens, attended, self.block, self.depth)
            return
        tokens.reduce_packed(lambda part, images, index: self.method.reduce(part, attended.of(images, index), self.block, self.depth))

    def after(self, tokens: Tokens) -> None:
        if self.restore and tokens.moved and self.method.can_restore:
            tokens.x = tokens.restore()
            if tokens.mask is not None and tokens.source is not None:
                tokens.mask = tokens.source >= 0


def trace(model: nn.Module, image: Tensor) -> list[Tokens]:
    """Return the state of the tokens after each block of a reduced model: counts, sizes, positions, and the token of each patch.

    Args:
        model: with a token reduction.
        image: (B, C, H, W).

    Returns:
        one state per block, in order (its `x` is empty).

    Raises:
        UsageError: no token reduction is attached.
    """
    states: list[Tokens] = []

    def read(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        states.append(carried(output))  # type: ignore[arg-type]

    hooks = [module.register_forward_hook(read) for module in model.modules() if isinstance(module, SitedBlock)]
    if not hooks:
        raise UsageError("no token reduction is on this model; apply one first: vitarium.apply(model, 'evit')")
    try:
        with evaluating(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return states
