"""Decoder with queries as cluster centres: the k-means layer, its predictor, and the auxiliary semantic head."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn import DropPath
from vitarium.ops.precision import without_autocast
from vitarium.perception.kmax_deeplab.parts import ConvNorm, batch_norm, resize, truncated_normal

Prediction = dict[str, Any]
"""Layout of a prediction: logits (B, L, K + 1), the last of them void; masks (B, L, h, w), logits over the queries; pixels (B, D, h, w) of
length 1."""

VOID_PRIOR = 0.9
"""Initial share of queries with class void."""


class ClassHead(nn.Module):
    """Class logits with void as the last: (B, dim, *) -> (B, num_classes + 1, *).

    Void has a separate layer, which is kept when a checkpoint is fine-tuned on other classes.
    """

    def __init__(self, dim: int, num_classes: int, axes: int):
        super().__init__()
        conv: type[nn.Conv1d | nn.Conv2d] = nn.Conv2d if axes == 2 else nn.Conv1d
        self.classes, self.void = conv(dim, num_classes, 1), conv(dim, 1, 1)
        self._start(self.classes)
        self._start(self.void)

    @staticmethod
    def _start(conv: Any) -> None:
        truncated_normal(conv.weight, 0.01)
        nn.init.zeros_(conv.bias)

    def reset(self, num_classes: int) -> None:
        """Replace the layer for other classes; that of void is kept."""
        old = self.classes
        self.classes = type(old)(old.in_channels, num_classes, 1).to(old.weight)
        self._start(self.classes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.classes(x), self.void(x)], 1)


class Predictor(nn.Module):
    """Prediction of masks and classes from queries and a map.

    Args:
        pixel_dim: channels of the map.
        dim: channels of the queries.
        mask_dim: channels D of the space in which pixels and queries are compared.
    """

    def __init__(self, pixel_dim: int, dim: int, mask_dim: int, num_classes: int, momentum: float):
        super().__init__()
        self.pixels = nn.Sequential(
            ConvNorm(pixel_dim, pixel_dim, 5, depthwise=True, act=True, momentum=momentum),
            ConvNorm(pixel_dim, dim, act=True, momentum=momentum),
            ConvNorm(dim, mask_dim, bias=True, std=0.01, momentum=momentum),
        )
        self.kernel = ConvNorm(dim, mask_dim, axes=1, momentum=momentum)
        self.head = ClassHead(dim, num_classes, axes=1)
        self.mask_norm = batch_norm(1, 2, momentum, gain=0.1)

    def forward(self, mask_queries: Tensor, class_queries: Tensor, x: Tensor) -> Prediction:
        """Predict from two forms of the queries, (B, dim, L) each, and a map (B, pixel_dim, h, w)."""
        pixels = F.normalize(self.pixels(x), dim=1)
        masks = self.kernel(mask_queries).transpose(1, 2) @ pixels.flatten(2)  # (B, L, h w)
        masks = self.mask_norm(masks[:, None])[:, 0].unflatten(-1, x.shape[-2:])
        logits = self.head(class_queries).transpose(1, 2)
        classes = logits.shape[-1] - 1
        prior = math.log(classes * VOID_PRIOR / (1 - VOID_PRIOR))
        return {"logits": torch.cat([logits[..., :-1], logits[..., -1:] + prior], -1), "masks": masks, "pixels": pixels}


class Attention(nn.Module):
    """Attention with batch norm instead of a scale: q (B, key_dim, L), k (B, key_dim, N), v (B, value_dim, N) -> (B, value_dim, L)."""

    def __init__(self, value_dim: int, num_heads: int, momentum: float):
        super().__init__()
        self.num_heads = num_heads
        self.similarity_norm = batch_norm(num_heads, 2, momentum)
        self.value_norm = batch_norm(value_dim, 1, momentum)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (self.num_heads, -1)) for x in (q, k, v))
        weights = self.similarity_norm(q.transpose(-1, -2) @ k).softmax(-1)
        return F.gelu(self.value_norm((v @ weights.transpose(-1, -2)).flatten(1, 2)))


def assign(masks: Tensor) -> Tensor:
    """Assign each pixel to a query: mask logits (B, L, h, w) -> indices (B, h, w). Of equal ones the first wins. No gradient."""
    return masks.detach().argmax(1)


def cluster_sums(assignment: Tensor, values: Tensor, queries: int) -> Tensor:
    """Sum the pixels' values in each cluster: (B, h, w) query indices, (B, C, h, w) -> (B, C, queries).

    The sums are products with a one-hot matrix in float32 or better, also under autocast: half precision loses sums of thousands of pixels.
    """
    with without_autocast(values):
        values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        places = assignment.flatten(1)[..., None]
        one_hot = values.new_zeros(*places.shape[:2], queries).scatter_(2, places, 1)  # (B, h w, L)
        return values.flatten(2) @ one_hot


class KMeansUpdate(nn.Module):
    """k-means step: each query receives the sum of its cluster, (B, dim, L).

    Args:
        dim: channels of queries and of the projected map.
    """

    def __init__(self, dim: int, momentum: float):
        super().__init__()
        self.norm = batch_norm(dim, 1, momentum)

    def forward(self, queries: Tensor, pixels: Tensor, values: Tensor, prediction: Prediction) -> Tensor:
        sums, norm = cluster_sums(assign(prediction["masks"]), values, queries.shape[-1]), self.norm
        if self.training or sums.dtype == norm.weight.dtype:
            return norm(sums.to(norm.weight.dtype))
        # half-precision weights: the sums of many pixels exceed the range of float16, the normalised ones do not
        tensors: Any = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        mean, variance, weight, bias = (t.to(sums.dtype) for t in tensors)
        return F.batch_norm(sums, mean, variance, weight, bias, eps=norm.eps).to(norm.weight.dtype)


class CrossAttentionUpdate(nn.Module):
    """Softmax cross attention, the baseline of k-means: each query attends to all pixels, with 1 x 1 queries and keys."""

    def __init__(self, dim: int, num_heads: int, momentum: float):
        super().__init__()
        self.query = ConvNorm(dim, dim // 2, axes=1, momentum=momentum, std=dim**-0.5)
        self.key = ConvNorm(dim, dim // 2, momentum=momentum, std=dim**-0.5)
        self.attention = Attention(dim, num_heads, momentum)

    def forward(self, queries: Tensor, pixels: Tensor, values: Tensor, prediction: Prediction) -> Tensor:
        return self.attention(self.query(queries), self.key(pixels).flatten(2), values.flatten(2))


class KMaXLayer(nn.Module):
    """One round of clustering: queries (B, dim, L) and a map (B, pixel_dim, h, w) -> new queries, and the old ones' prediction.

    c, p = f(q), g(GELU(x))
    q <- q + k-means(c, p);  q <- GELU(q + attention(c));  q <- GELU(q + FFN(q))
    """

    def __init__(
        self,
        pixel_dim: int,
        dim: int,
        *,
        mask_dim: int,
        ffn_dim: int,
        num_heads: int,
        num_classes: int,
        cross_attention: str,
        drop_path: float,
        momentum: float,
    ):
        super().__init__()
        query = functools.partial(ConvNorm, axes=1, momentum=momentum)
        pixel = functools.partial(ConvNorm, momentum=momentum)
        self.query = query(dim, dim, act=True)
        self.pixel = pixel(pixel_dim, dim, act=True)
        self.value = pixel(dim, dim, std=dim**-0.5)
        self.predictor = Predictor(dim, dim, mask_dim, num_classes, momentum)
        self.update = KMeansUpdate(dim, momentum) if cross_attention == "kmeans" else CrossAttentionUpdate(dim, num_heads, momentum)
        self.update_proj = query(dim, dim, gain=0.0)
        self.split = (dim // 2, dim // 2, dim)
        self.qkv = query(dim, sum(self.split), std=dim**-0.5)
        self.attention = Attention(dim, num_heads, momentum)
        self.attention_proj = query(dim, dim, gain=0.0)
        self.ffn = nn.Sequential(query(dim, ffn_dim, act=True), query(ffn_dim, dim, gain=0.0))
        self.drop_path = DropPath(drop_path)

    def forward(self, queries: Tensor, x: Tensor) -> tuple[Tensor, Prediction]:
        pixels, centres = self.pixel(F.gelu(x)), self.query(queries)
        prediction = self.predictor(centres, centres, pixels)
        queries = queries + self.drop_path(self.update_proj(self.update(centres, pixels, self.value(pixels), prediction)))
        attended = self.attention(*self.qkv(centres).split(self.split, 1))
        queries = F.gelu(queries + self.drop_path(self.attention_proj(attended)))
        return F.gelu(queries + self.drop_path(self.ffn(queries))), prediction


class SemanticHead(nn.Module):
    """DeepLab's head on the backbone's maps, used in training: strides 4, 8 and 32 -> class logits (B, K + 1, H / 4, W / 4).

    Args:
        in_dims: channels of the three maps.
        dim: width.
    """

    RATES = (6, 12, 18)

    def __init__(self, in_dims: Sequence[int], dim: int, num_classes: int, momentum: float):
        super().__init__()
        fine, middle, coarse = in_dims
        conv = functools.partial(ConvNorm, act=True, momentum=momentum)
        self.context = nn.ModuleList([conv(coarse, dim), *(conv(coarse, dim, 3, dilation=rate) for rate in self.RATES)])
        self.context_pool = conv(coarse, dim)
        self.context_proj = conv(5 * dim, dim)
        self.drop = nn.Dropout(0.1)
        self.low = nn.ModuleList([conv(middle, dim // 4), conv(fine, dim // 8)])
        widths = (dim + dim // 4, dim + dim // 8)
        self.fusion = nn.ModuleList(nn.Sequential(conv(width, width, 5, depthwise=True), conv(width, dim)) for width in widths)
        self.blocks = nn.Sequential(conv(dim, dim, 5, depthwise=True), conv(dim, dim))
        self.head = ClassHead(dim, num_classes, axes=2)

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        pooled = self.context_pool(coarse.mean((2, 3), keepdim=True)).expand(-1, -1, *coarse.shape[-2:])
        x = self.drop(self.context_proj(torch.cat([*(conv(coarse) for conv in self.context), pooled], 1)))
        for low, fusion, finer in zip(self.low, self.fusion, (middle, fine), strict=True):
            x = fusion(torch.cat([resize(x, finer.shape[-2:]), low(finer)], 1))
        return self.head(self.blocks(x))
