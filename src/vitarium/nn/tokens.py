"""Base class of plain (isotropic) backbones, whose features are tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.nn.backbone import POOLS, Backbone, Stage
from vitarium.nn.patch_embed import PatchEmbed
from vitarium.ops.maps import as_map


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Return the bias of `vitarium.nn.Attention` that hides padding from every query: bool (B, N), True for real tokens -> (B, 1, 1, N).

    None stays None, and a mask that is True everywhere gives None, so that the result is that of no mask, bit for bit.
    """
    return None if mask is None or bool(mask.all()) else mask[:, None, None]


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the real tokens of each image: values (B, N, ...) and bool (B, N), True for real tokens -> (B, ...).

    The average of a loss over tokens is the mean of this over the batch. Padding may hold anything, NaN included; an image without a real
    token gives 0.
    """
    if mask is None or bool(mask.all()):
        return values.mean(1)
    real = mask.view(*mask.shape, *[1] * (values.ndim - 2))
    return values.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)


def masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """Return the maximum over the real tokens of each image: values (B, N, ...) and bool (B, N) -> (B, ...)."""
    return values.masked_fill(~mask.view(*mask.shape, *[1] * (values.ndim - 2)), -torch.inf).amax(1)


MASKED_POOLS = {"avg": masked_mean, "max": masked_max}


class TokenBackbone(Backbone):
    """Base class of plain backbones with features (B, N, dim), as timm's VisionTransformer; `forward_intermediates` returns maps.

    `forward_stages` yields the tokens after each block. A subclass sets `patch_embed` (`vitarium.nn.PatchEmbed`) and `blocks`, and defines
    the positions of its class tokens (`class_places`).

    Args:
        dim: channels.
        depth: number of blocks.
        stride: pixels between patches.
        options: as for `Backbone`.
    """

    pools = ("token", *POOLS)
    patch_embed: PatchEmbed
    blocks: nn.ModuleList

    def __init__(self, *, dim: int, depth: int, stride: int, **options: Any):
        super().__init__(stages=[Stage(dim, stride)] * depth, **options)
        for i, info in enumerate(self.feature_info):
            info["module"] = f"blocks.{i}"
        self.global_pool = "token"

    def class_places(self, patches: int) -> list[int]:
        """Return the positions of the class tokens in the sequence of an image with this number of patches, ascending."""
        return [0]

    def split_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Split tokens (B, N, C) into class tokens (B, P, C) and patch tokens (B, h w, C), row by row."""
        count = len(self.class_places(0))
        places = self.class_places(tokens.shape[1] - count)
        if places == list(range(count)):
            return tokens[:, :count], tokens[:, count:]
        edges = [-1, *places, tokens.shape[1]]
        patches = [tokens[:, i + 1 : j] for i, j in itertools.pairwise(edges)]
        return torch.cat([tokens[:, p : p + 1] for p in places], 1), torch.cat(patches, 1)

    def pool(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool tokens (B, N, C) to (B, C): mean of the class tokens ("token"), mean or maximum of the patches ("avg", "max").

        Args:
            features: class tokens and patch tokens.
            mask: bool (B, number of patches), True for the patches that are not padding; None: all. The class tokens need none.
        """
        if self.global_pool == "token":
            count = len(self.class_places(0))
            places = self.class_places(features.shape[1] - count)
            return features[:, places[0]] if count == 1 else features[:, places].mean(1)
        patches = self.split_tokens(features)[1]
        if mask is not None:
            return MASKED_POOLS[self.global_pool](patches, mask)
        return POOLS[self.global_pool](patches.transpose(1, 2))

    def as_map(self, features: Tensor, image_size: Sequence[int]) -> Tensor:
        """Return the patch tokens as a map (B, C, h, w)."""
        rows, columns = self.patch_embed.grid(*image_size)
        return as_map(self.split_tokens(features)[1], (rows, columns))

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        chosen = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.blocks = self.blocks[: max(chosen) + 1]
        return chosen
