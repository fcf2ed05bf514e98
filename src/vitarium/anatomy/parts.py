"""The parts of a plain vision transformer from any library, under common names.

A layout lists the attribute names of a family's parts; the views below read them from the live modules at every use, so that a replacement
by a later method (a quantized linear layer) takes effect.

B batch, N tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.errors import InputError, UnsupportedModel


@dataclass(frozen=True)
class AttentionLayout:
    """Attribute names inside an attention module; "" where a family has no such part.

    Args:
        qkv: linear layer(s) of queries, keys and values: a name for a joint layer (or its weight) with output [q | k | v], then three.
        biases: three vectors that are added to the joint layer's output.
        q_norm, k_norm: norms of each head's queries and keys.
        norm, gate: norm of the heads' joined output, and a layer whose sigmoid multiplies it.
        proj, proj_drop: output layer and its dropout, a module or a rate.
        heads, head_dim, scale: numbers (scale "": head_dim ** -0.5); dropout: rate on the attention weights, a number or a module with `p`.
        kv_groups: number of query heads that share one key head.
        rotate_half: whether rotary halves are contiguous.
        other: names that the family may have and that the computation here does not use.
    """

    qkv: tuple[str, ...]
    proj: str
    scale: str
    heads: str
    dropout: str
    biases: tuple[str, ...] = ()
    q_norm: str = ""
    k_norm: str = ""
    norm: str = ""
    gate: str = ""
    proj_drop: str = ""
    head_dim: str = "head_dim"
    kv_groups: str = ""
    rotate_half: str = ""
    other: tuple[str, ...] = ()

    def names(self) -> set[str]:
        """Return the names of every child module, parameter and buffer that the family may have."""
        single = (self.proj, self.dropout, self.q_norm, self.k_norm, self.norm, self.gate, self.proj_drop)
        return {*self.qkv, *self.biases, *single, *self.other} - {""}


@dataclass(frozen=True)
class BlockLayout:
    """Attribute names inside a block  x + branch1(attention(norm1(x))), then  x + branch2(mlp(norm2(x))).

    Args:
        branch1, branch2: what a branch's output goes through, in order: layer scales (modules, or parameters that multiply), drop path.
        arguments: names of the arguments of the block's call after the tokens, in order.
        attention_layouts: class name of an attention module -> its layout.
    """

    norm1: str
    attention: str
    norm2: str
    mlp: str
    attention_layouts: Mapping[str, AttentionLayout]
    branch1: tuple[str, ...] = ()
    branch2: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    def names(self) -> set[str]:
        """Return the names of every child module, parameter and buffer that the family may have."""
        return {self.norm1, self.attention, self.norm2, self.mlp, *self.branch1, *self.branch2}


class AttentionView:
    """An attention module's parts."""

    def __init__(self, module: nn.Module, layout: AttentionLayout):
        self.module, self.layout = module, layout

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return getattr(self.module, self.layout.heads)

    @property
    def head_dim(self) -> int:
        """Number of channels of a head."""
        return getattr(self.module, self.layout.head_dim)

    @property
    def scale(self) -> float:
        """Factor that multiplies the logits."""
        return float(getattr(self.module, self.layout.scale)) if self.layout.scale else self.head_dim**-0.5

    @property
    def dropout(self) -> float:
        """Current dropout rate on the attention weights: 0 in eval mode."""
        rate = getattr(self.module, self.layout.dropout)
        return (rate.p if isinstance(rate, nn.Dropout) else float(rate)) if self.module.training else 0.0

    @property
    def proj(self) -> nn.Module:
        """The output layer."""
        return getattr(self.module, self.layout.proj)

    def part(self, name: str) -> Any:
        """Return a part by the layout's attribute name, None if absent."""
        return getattr(self.module, name, None) if name else None

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project normed tokens (B, N, C) to queries, keys and values (B, H, N, D), as used by the attention but not rotated or scaled."""
        layers = [self.part(name) for name in self.layout.qkv]
        if layers[0] is not None:
            q, k, v = self._joint(layers[0], x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        else:
            layers = layers[1:]
            q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in layers)
        if (norm := self.part(self.layout.q_norm)) is not None:
            q = norm(q)
        if (norm := self.part(self.layout.k_norm)) is not None:
            k = norm(k)
        return q, k, v

    def _joint(self, layer: nn.Module, x: Tensor) -> Tensor:
        biases = [self.part(name) for name in self.layout.biases]
        if not biases or biases[0] is None:
            return layer(x)
        bias = torch.cat(biases)
        if isinstance(layer, nn.Parameter):
            return F.linear(x, layer, bias)
        return F.linear(x, layer.weight, bias) if type(layer) is nn.Linear else layer(x) + bias

    def rotate(self, x: Tensor, rope: Tensor, prefix: int) -> Tensor:
        """Rotate the image tokens of queries or keys (B, H, N, D): rope (N - prefix, 2 D) or (B, 1, N - prefix, 2 D)."""
        from timm.layers import apply_rot_embed_cat

        half = bool(self.layout.rotate_half and getattr(self.module, self.layout.rotate_half, False))
        turned = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
        return torch.cat((x[:, :, :prefix], turned), dim=2).to(x.dtype)

    def repeat_kv(self, x: Tensor) -> Tensor:
        """Repeat keys or values (B, H / groups, N, D) to (B, H, N, D) where heads share them."""
        groups = getattr(self.module, self.layout.kv_groups, 1) if self.layout.kv_groups else 1
        return x if groups == 1 else x.repeat_interleave(groups, dim=1)

    def project(self, heads: Tensor, x: Tensor) -> Tensor:
        """Project the heads' output (B, H, N, D) to (B, N, C), through norm, gate, output layer and dropout; x is the input of `qkv`."""
        y = heads.transpose(1, 2).flatten(2)
        if (norm := self.part(self.layout.norm)) is not None:
            y = norm(y)
        if (gate := self.part(self.layout.gate)) is not None:
            y = y * gate(x).sigmoid()
        y = self.proj(y)
        drop = self.part(self.layout.proj_drop)
        if isinstance(drop, float):
            return F.dropout(y, drop, self.module.training)
        return y if drop is None else drop(y)


class BlockView:
    """A block's parts. `name` is its path in the model, such as "blocks.3"."""

    def __init__(self, name: str, module: nn.Module, layout: BlockLayout):
        self.name, self.module, self.layout = name, module, layout

    @property
    def norm1(self) -> nn.Module:
        """Norm before the attention."""
        return getattr(self.module, self.layout.norm1)

    @property
    def attention(self) -> AttentionView:
        """The attention."""
        module = getattr(self.module, self.layout.attention)
        return AttentionView(module, self.layout.attention_layouts[type(module).__name__])

    @property
    def norm2(self) -> nn.Module:
        """Norm before the MLP."""
        return getattr(self.module, self.layout.norm2)

    @property
    def mlp(self) -> nn.Module:
        """The MLP."""
        return getattr(self.module, self.layout.mlp)

    def branch(self, names: tuple[str, ...], y: Tensor) -> Tensor:
        """Apply a branch's layer scale and drop path to its output."""
        for name in names:
            part = getattr(self.module, name, None)
            if isinstance(part, nn.Module):
                y = part(y)
            elif part is not None:
                y = y * part
        return y

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a block's call besides the tokens, by the family's names; None and False are left out."""
        given = {**dict(zip(self.layout.arguments, args, strict=False)), **kwargs}
        return {name: value for name, value in given.items() if value is not None and value is not False}


@dataclass(frozen=True)
class Anatomy:
    """One view of a plain vision transformer.

    Args:
        family: "timm ViT", "transformers DINOv2", ...
        tower: the module that holds the blocks (the model itself, or its vision part).
        embedding: the patch embedding; in the families here its parts belong to the tower.
        blocks: in order.
        prefix: number of tokens before the image tokens: class, distillation, registers.
        class_token: whether token 0 is a class token.
        patch_size: pixels, (height, width).
        norm: after the blocks (identity where the family norms after pooling).
        head: the classifier, None for a bare tower.
        reads_patches: whether the layers after the blocks read image tokens, and so need all of them.
        rotary: whether blocks apply rotary position embedding to queries and keys.
    """

    family: str
    tower: nn.Module
    embedding: nn.Module
    blocks: tuple[BlockView, ...]
    prefix: int
    class_token: bool
    patch_size: tuple[int, int]
    norm: nn.Module
    head: nn.Module | None
    reads_patches: bool
    rotary: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of image tokens for an image of this size in pixels.

        Raises:
            InputError: the image is smaller than a patch.
        """
        rows, columns = height // self.patch_size[0], width // self.patch_size[1]
        if not rows or not columns:
            raise InputError(f"an image of {height}x{width} pixels holds no patch of {self.patch_size[0]}x{self.patch_size[1]}")
        return rows, columns


def read_block(name: str, module: nn.Module, layouts: Mapping[str, BlockLayout]) -> BlockView:
    """Return the view of a block, provided that every part of it is known.

    Raises:
        UnsupportedModel: the class of the block or its attention has no layout, or a part is not in the layout.
    """
    own_layout = getattr(module, "layout", None)  # the block is already wrapped (sites.py)
    layout = own_layout if isinstance(own_layout, BlockLayout) else layouts.get(type(module).__name__)
    if layout is None:
        known = ", ".join(layouts)
        raise UnsupportedModel(f"{name} is a {type(module).__name__}; anatomy supports {known} (norm before each branch)")
    attention = getattr(module, layout.attention)
    inner = layout.attention_layouts.get(type(attention).__name__)
    if inner is None:
        known = ", ".join(layout.attention_layouts)
        raise UnsupportedModel(f"{name}.{layout.attention} is a {type(attention).__name__}; anatomy supports {known}")
    for part, names in ((module, layout.names()), (attention, inner.names())):
        own = [key for table in (part._modules, part._parameters, part._buffers) for key, value in table.items() if value is not None]
        if strange := [key for key in own if key not in names]:
            raise UnsupportedModel(f"{name} has a part {strange[0]!r} ({type(part).__name__}) that anatomy does not know how to use")
    return BlockView(name, module, layout)
