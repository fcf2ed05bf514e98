"""Proxies: a unit vector per class that attracts the embeddings of its images and repels those of others.

ProxyAnchor (Kim et al. 2020), with s = cos(x_i, p_c), alpha = 32, delta = 0.1:

    mean_c log(1 + sum_{i in c} exp(-alpha (s - delta))) + mean_c log(1 + sum_{i not in c} exp(alpha (s + delta)))

Semantic proxies (Ren et al. 2024) are in part made from the images themselves: a GRU-like cell is updated with each image's p over the
whole training, so that a class's proxy summarises its images.

Notation: B batch, K classes, E length of an embedding, C channels of the backbone, P prompts of a class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.errors import DataError

Range = Literal["in_batch", "both_all"]
Mode = Literal["anchor", "nca"]


def proxy_loss(
    embeddings: Tensor, proxies: Tensor, same: Tensor, *, alpha: float = 32.0, delta: float = 0.1, mode: Mode = "anchor"
) -> Tensor:
    """Return the ProxyAnchor loss, a scalar.

    Args:
        embeddings: unit vectors (B, E).
        proxies: unit vectors (K, E).
        same: (B, K) bool, whether an image belongs to a proxy's class. A proxy without images adds 0, and counts in the mean.
        alpha: sharpness.
        delta: margin: cosines above it are near enough, below -delta far enough.
        mode: "anchor" sums over the images of a proxy and averages over proxies; "nca" the reverse.
    """
    s, axis = embeddings @ proxies.mT, 0 if mode == "anchor" else 1
    none = torch.finfo(s.dtype).min
    near = (-alpha * (s - delta)).masked_fill(~same, none)
    far = (alpha * (s + delta)).masked_fill(same, none)
    return sum((F.softplus(terms.logsumexp(dim=axis)).mean() for terms in (near, far)), s.new_zeros(()))


class SemanticCell(nn.Module):
    """A GRU cell whose candidate goes through ReLU ("gru_relu") or tanh ("gru"); state (K, E) and input (K, E) -> state (K, E).

    z = sig(x W_iz + h W_hz + b_iz), r likewise, n = act(x W_in + r (h W_hn) + b_in), h' = (1 - z) n + z h.
    """

    def __init__(self, dim: int, kind: Literal["gru_relu", "gru"] = "gru_relu"):
        super().__init__()
        self.W_ir, self.W_hr, self.W_iz, self.W_hz, self.W_in, self.W_hn = (nn.Parameter(torch.empty(dim, dim)) for _ in range(6))
        self.b_ir, self.b_iz, self.b_in = (nn.Parameter(torch.zeros(dim)) for _ in range(3))
        for weight in (self.W_ir, self.W_hr, self.W_iz, self.W_hz, self.W_in, self.W_hn):
            nn.init.uniform_(weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))
        self.activation = F.relu if kind == "gru_relu" else torch.tanh

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z = (x @ self.W_iz + h @ self.W_hz + self.b_iz).sigmoid()
        r = (x @ self.W_ir + h @ self.W_hr + self.b_ir).sigmoid()
        n = self.activation(x @ self.W_in + r * (h @ self.W_hn) + self.b_in)
        return (1 - z) * n + z * h


def accumulate(container: Tensor, p: Tensor, labels: Tensor, cell: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Update each class of a batch with the vectors p (B, E) of its images, one after another in the batch's order.

    Images of a class may be anywhere in the batch, in any number.

    Returns:
        the batch's classes (K',), their new states (K', E), and the new container (K, E), whose rows are unit vectors.
    """
    classes, place = labels.unique(return_inverse=True)
    order = place.argsort(stable=True)
    counts = place.bincount()
    turn = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[place[order]]
    h = container[classes]
    for j in range(int(counts.max())):
        images = order[turn == j]  # the j-th image of each class with more than j images
        rows = place[images]
        h = h.index_copy(0, rows, cell(p[images], h[rows]).to(h.dtype))
    return classes, h, F.normalize(container.index_copy(0, classes, h), dim=1)


class PlainProxies(nn.Module):
    """Learned proxies (K, E): the published ProxyAnchor.

    Args:
        num_classes, embed_dim: K and E.
    """

    def __init__(self, num_classes: int, embed_dim: int):
        super().__init__()
        self.num_classes = num_classes
        self.bias = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_classes, embed_dim)) / 8)

    def loss(self, embeddings: Tensor, labels: Tensor, *, over: Range = "in_batch", mode: Mode = "anchor", **numbers: float) -> Tensor:
        """Return the loss of embeddings (B, E) of classes (B,), a scalar.

        Args:
            over: "in_batch": over the proxies of the batch's classes; "both_all": over all proxies.
            mode, numbers: see `proxy_loss`.
        """
        check_labels(labels, self.num_classes)
        classes = labels.unique() if over == "in_batch" else torch.arange(self.num_classes, device=labels.device)
        proxies = F.normalize(self.bias[classes], dim=1).to(embeddings.dtype)
        return proxy_loss(embeddings, proxies, labels[:, None] == classes, mode=mode, **numbers)


class SemanticProxies(PlainProxies):
    """Proxies that are in part made from the images of each class, by prompts of the class in the same frozen backbone.

    Args:
        num_classes, embed_dim: K and E.
        dim: channels C of the backbone's tokens; `features`: of its pooled features.
        prompts: number of prompts of a class, in each of the first `depth` blocks.
        ratio: share of the learned proxies; 1 is plain ProxyAnchor.
        cell: update of the container: "gru_relu" (published), "gru", or "mix": 0.8 of the old and 0.2 of the new.
    """

    container: Tensor

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        dim: int,
        *,
        features: int | None = None,
        prompts: int = 5,
        depth: int = 3,
        ratio: float = 0.5,
        cell: Literal["gru_relu", "gru", "mix"] = "gru_relu",
    ):
        super().__init__(num_classes, embed_dim)
        self.ratio = ratio
        self.prompts = nn.ParameterList(nn.Parameter(torch.empty(num_classes, prompts, dim)) for _ in range(depth if prompts else 0))
        for layer in self.prompts:
            nn.init.uniform_(layer, -math.sqrt(6 / (768 + dim)), math.sqrt(6 / (768 + dim)))
        self.norm = nn.LayerNorm(features or dim)
        self.proj = nn.Linear(features or dim, embed_dim)
        self.cell = Mix() if cell == "mix" else SemanticCell(embed_dim, cell)
        self.register_buffer("container", F.normalize(torch.randn(num_classes, embed_dim), dim=1))

    def of(self, labels: Tensor) -> Sequence[Tensor]:
        """Return the prompts of each image's class, (B, P, C) per block."""
        return [layer[labels] for layer in self.prompts]

    def project(self, features: Tensor) -> Tensor:
        """Convert pooled features of the proxy pass (B, C) to p, unit vectors (B, E)."""
        return F.normalize(self.proj(self.norm(features)), dim=-1)

    def proxies(self, p: Tensor, labels: Tensor, over: Range = "in_batch") -> tuple[Tensor, Tensor]:
        """Update with a batch; return the classes (K',) that the loss is over, and their proxies (K', E) with gradients.

        As published, the proxies of a batch's own classes use the cell's unnormalised states, those of all classes unit vectors. The
        container is stored without gradients, and is not updated with non-finite values.
        """
        check_labels(labels, self.num_classes)
        classes, states, updated = accumulate(self.container.clone(), p, labels, self.cell)
        remembered = updated.detach()
        self.container.copy_(torch.where(remembered.isfinite().all(), remembered, self.container))
        if over == "both_all":
            classes, states = torch.arange(self.num_classes, device=labels.device), updated
        return classes, F.normalize(self.ratio * self.bias[classes] + (1 - self.ratio) * states, dim=1)

    def semantic_loss(
        self, embeddings: Tensor, p: Tensor, labels: Tensor, *, over: Range = "in_batch", mode: Mode = "anchor", **numbers: float
    ) -> Tensor:
        """Return the loss, given the proxy pass's vectors of the same images, p (B, E)."""
        classes, proxies = self.proxies(p, labels, over)
        return proxy_loss(embeddings, proxies.to(embeddings.dtype), labels[:, None] == classes, mode=mode, **numbers)


class Mix(nn.Module):
    """Mix 0.8 of the state and 0.2 of the input, without weights."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return 0.8 * h + 0.2 * x


def check_labels(labels: Tensor, num_classes: int) -> None:
    """
    Raises:
        DataError: a class number without a proxy.
    """
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise DataError(f"there are proxies for the classes 0 to {num_classes - 1}; the batch has class {int(labels.max())}")
