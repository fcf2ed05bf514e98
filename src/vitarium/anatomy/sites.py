"""Transformer blocks with sites: hooks at fixed places of a block, at which methods act.

A wrapped block shares the original's dictionaries of modules and parameters (so names, weights and later replacements are the same in
both), computes the same function, and calls its sites in between:

    x = tokens                              site.before(tokens)
    x = x + branch1(attention(norm1(x)))    site.between(tokens, attended)
    x = x + branch2(mlp(norm2(x)))          site.after(tokens)

`install` checks this: on a probe input the outputs of every block and of the model must equal the original's before any site is set.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from vitarium.anatomy.finding import of
from vitarium.anatomy.parts import Anatomy, BlockView
from vitarium.anatomy.tokens import Tokens, carried, carry
from vitarium.catalog.calling import call, example_inputs
from vitarium.errors import AttachError, InputError, UnsupportedModel, UsageError
from vitarium.nn.modes import evaluating
from vitarium.ops.merging import rows

PROOF = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted difference from the original on the probe input, in standard deviations of its output; kernels may round differently."""


@dataclass
class Attended:
    """Inputs of a block's attention.

    Args:
        q, k, v: (B, H, N, D) as used in the product: with rotary embedding if the model has one, not scaled.
        scale: factor on the logits.
        bias: (B, 1, 1, N) added to the logits, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None

    def of(self, images: Tensor, index: Tensor) -> Attended:
        """Return the attention of some images (b,) among some of their tokens (b, n)."""
        q, k, v = (rows(t[images].transpose(1, 2), index).transpose(1, 2) for t in (self.q, self.k, self.v))
        bias = None if self.bias is None else rows(self.bias.expand(len(self.q), -1, -1, -1)[images, 0, 0], index)[:, None, None]
        return Attended(q, k, v, self.scale, bias)

    def weights(self, queries: slice = slice(None)) -> Tensor:
        """Attention weights of some queries, (B, H, n, N): only these rows are computed."""
        logits = self.q[:, :, queries] * self.scale @ self.k.transpose(-2, -1)
        return (logits if self.bias is None else logits + self.bias).softmax(dim=-1)


class Site:
    """Action of a method in one block. Override the hooks that are needed; each may change the tokens through the carrier."""

    proportional = False
    """Return whether attention weighs a merged token by the number of original tokens that it represents."""

    def before(self, tokens: Tokens) -> None:
        """Called before the block."""

    def attend(self, attended: Attended) -> Tensor | None:
        """Return the heads' output (B, H, N, D), which replaces that of the fused kernel, softmax(q k^T scale + bias) v; None: keep the
        kernel's."""
        return None

    def between(self, tokens: Tokens, attended: Attended) -> None:
        """Called after the attention's residual sum, before the MLP's norm."""

    def after(self, tokens: Tokens) -> None:
        """Called after the block."""


class SitedBlock(nn.Module):
    """A vision transformer's block with sites: tokens (B, N, C) -> (B, N', C).

    Args:
        view: the original block.
        index: its number.
        prefix: tokens before the image tokens.
        sites: called in order.
    """

    def __init__(self, view: BlockView, index: int, prefix: int, sites: Sequence[Site] = ()):
        super().__init__()
        original = view.module
        # the same dictionaries, not copies: later replacements, moves and loads apply to both, so `undo` restores the current state
        self.__dict__.update(_modules=original._modules, _parameters=original._parameters, _buffers=original._buffers)
        self.training = original.training
        self.name, self.layout, self.index, self.prefix = view.name, view.layout, index, prefix
        self.sites: tuple[Site, ...] = tuple(sites)
        self._original = (original,)  # in a tuple: not a submodule
        self.users = 0  # contexts of `_masking` on this block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__:
                raise
            return getattr(self.__dict__["_original"][0], name)

    @property
    def view(self) -> BlockView:
        """The current parts of the block."""
        return BlockView(self.name, self, self.layout)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens = self._receive(x)
        view = self.view
        call = view.read_call(args, kwargs)
        for site in self.sites:
            site.before(tokens)
        attended, y = self._attend(view, tokens, call)
        tokens.x = tokens.x + view.branch(self.layout.branch1, y)
        for site in self.sites:
            site.between(tokens, attended)
        tokens.x = tokens.x + view.branch(self.layout.branch2, view.mlp(view.norm2(tokens.x)))
        for site in self.sites:
            site.after(tokens)
        return carry(tokens)

    def _receive(self, x: Tensor) -> Tokens:
        if self.index == 0:
            mask = _MASKS.get().get(id(self)) if self.users else None  # not traced into a graph
            return Tokens.begin(x, self.prefix, mask)
        state = carried(x)
        if state is None:
            raise InputError(
                f"{self.name} got tokens without the state of the previous block: a hook, or code between the blocks, makes new tensors of "
                "them; switch that off, or undo the method"
            )
        return dataclasses.replace(state, x=x)

    def _attend(self, view: BlockView, tokens: Tokens, call: dict[str, Any]) -> tuple[Attended, Tensor]:
        attention, normed = view.attention, view.norm1(tokens.x)
        q, k, v = attention.qkv(normed)
        if (rope := call.get("rope")) is not None:
            rope = tokens.rope(rope)
            q, k = (attention.rotate(t, rope, tokens.prefix).to(v.dtype) for t in (q, k))
        k, v = attention.repeat_kv(k), attention.repeat_kv(v)
        bias = tokens.bias(proportional=any(site.proportional for site in self.sites))
        mask = call.get("attn_mask", call.get("attention_mask"))
        if mask is not None:
            if tokens.mask is not None:
                raise InputError(f"{self.name}: an attention mask does not go together with a mask of the tokens; give the latter alone")
            if tokens.moved:
                raise InputError(f"{self.name}: an attention mask does not go together with token reduction: its tokens moved")
            bias = mask
        if call.get("is_causal"):
            raise InputError(f"{self.name}: causal attention does not go together with methods on blocks")
        attended = Attended(q, k, v, attention.scale, bias)
        heads = next((out for site in self.sites if (out := site.attend(attended)) is not None), None)
        if heads is None:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=attention.dropout, scale=attention.scale)
        return attended, attention.project(heads, normed)


_MASKS: ContextVar[dict[int, Tensor]] = ContextVar("masks", default={})  # noqa: B039 - it is replaced, never changed
"""id of a first block -> mask of its tokens in forward passes inside this context."""


@contextlib.contextmanager
def masked(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Mark tokens of a plain vision transformer as padding, in all passes inside the context.

    Attention ignores padding, and token reductions neither keep nor merge it; the class token's output equals that of each image alone. A
    mask that is True everywhere changes nothing, bit for bit.

    Args:
        model: any model that `anatomy.of` supports, with or without methods on its blocks.
        mask: bool, True for real tokens: (B, N), or (B, number of image tokens).

    Raises:
        UnsupportedModel: anatomy does not support the model, or its head pools all image tokens, including padding.
        InputError: in the forward pass, if the mask does not fit the tokens.
    """
    view = of(model)
    if view.reads_patches:
        raise UnsupportedModel(
            f"the head of this {view.family} pools all image tokens, including padding; create it with the class token's pooling "
            "(global_pool='token'), or pool the result of anatomy.run with Tokens.mean"
        )
    with _sited(model, view) as blocks, _masking(blocks[0], mask):
        yield


def run(model: nn.Module, x: Tensor, mask: Tensor | None = None, **arguments: Any) -> Tokens:
    """Run embedded tokens through the blocks of a plain vision transformer, with its methods.

    Args:
        model: any model that `anatomy.of` supports.
        x: (B, N, C), prefix and image tokens with positions, as the first block takes them.
        mask: see `masked`; None: all tokens are real.
        arguments: further arguments of each block, such as `rope`.

    Returns:
        the state after the last block, `x` (B, N', C) before the final norm. `Tokens.mean` averages the real image tokens.

    Raises:
        UnsupportedModel: anatomy does not know the model.
        InputError: a mask that does not fit the tokens.
    """
    with _sited(model, of(model)) as blocks, _masking(blocks[0], mask) if mask is not None else contextlib.nullcontext():
        for block in blocks:
            x = block(x, **arguments)
    state = carried(x)
    assert state is not None
    return dataclasses.replace(state, x=x)


@contextlib.contextmanager
def _masking(block: SitedBlock, mask: Tensor) -> Iterator[None]:
    """Register the mask of a first block for the forward passes of this thread."""
    token = _MASKS.set({**_MASKS.get(), id(block): mask})
    block.users += 1
    try:
        yield
    finally:
        block.users -= 1
        _MASKS.reset(token)


@contextlib.contextmanager
def _sited(model: nn.Module, view: Anatomy) -> Iterator[list[SitedBlock]]:
    """Yield the model's blocks, wrapped; blocks without sites are unwrapped again on exit."""
    replaced: dict[str, nn.Module] = {}
    if not all(isinstance(block.module, SitedBlock) for block in view.blocks):
        replaced, _ = install(model, lambda view: [Site()] * view.depth)
    try:
        yield [model.get_submodule(block.name) for block in view.blocks]  # type: ignore[misc]
    finally:
        for name, original in replaced.items():
            original.training = model.get_submodule(name).training
            model.set_submodule(name, original)


def install(model: nn.Module, make: Callable[[Anatomy], Sequence[Site]]) -> tuple[dict[str, nn.Module], list[Site]]:
    """Wrap every block of a model, check that the wrapped model equals the original, then set the sites.

    Args:
        model: any model that `anatomy.of` supports.
        make: returns one site per block; it may raise AttachError.

    Returns:
        name of a block -> the original block (for `AttachReport.replaced`), and the sites.

    Raises:
        UnsupportedModel: anatomy does not know the model.
        AttachError: the outputs of the wrapped model differ from the original's; the model is unchanged.
    """
    view = of(model)
    sites = list(make(view))
    if len(sites) != view.depth:
        raise AttachError(f"{view.depth} blocks need as many sites, got {len(sites)}")
    before = _outputs(model, view)
    replaced = {block.name: block.module for block in view.blocks}
    wrapped = [SitedBlock(block, i, view.prefix, getattr(block.module, "sites", ())) for i, block in enumerate(view.blocks)]
    for block in wrapped:
        model.set_submodule(block.name, block)
    try:
        if before is not None:
            _prove(before, _outputs(model, view))
    except BaseException:
        for name, original in replaced.items():
            model.set_submodule(name, original)
        raise
    for block, site in zip(wrapped, sites, strict=True):
        block.sites = (*block.sites, site)
    return replaced, sites


def _outputs(model: nn.Module, view: Anatomy) -> list[tuple[str, Tensor]] | None:
    """Return the outputs of every block and of the model on the probe input; None on the meta device, where nothing is computed."""
    try:
        inputs = example_inputs(model, 2)
    except UsageError as error:
        raise AttachError(f"nothing can be proven: {error}") from error
    if next(iter(inputs.values())).is_meta:
        return None
    seen: list[tuple[str, Tensor]] = []
    modules = [(block.name, model.get_submodule(block.name)) for block in view.blocks]
    hooks = [m.register_forward_hook(lambda _, __, out, name=name: seen.append((name, out.detach()))) for name, m in modules]
    try:
        with evaluating(model):
            result = call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen + [("the output", leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _prove(before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]] | None) -> None:
    if after is None or [name for name, _ in before] != [name for name, _ in after]:
        raise AttachError("the wrapped model does not run the same blocks as the original; the model is unchanged")
    for (name, want), (_, got) in zip(before, after, strict=True):
        spread = (float(want.std()) if want.numel() > 1 else float(want.abs().max())) or 1.0
        error = float((got - want).abs().max()) / spread if got.shape == want.shape else float("inf")
        if not error <= PROOF.get(want.dtype, 1e-4):
            raise AttachError(
                f"{name} of the wrapped model differs from the original by {error:.2g} standard deviations with the method switched off; "
                "the model is unchanged. Please report the model"
            )
