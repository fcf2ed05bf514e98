"""Sharpness of a minimum: eigenvalues and trace of the Hessian of a mean loss, from Hessian-vector products.

    hessian = Hessian(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), batches, model.parameters())
    hessian.lanczos(30).values[-1]     # the largest eigenvalue

A product costs about two forward and backward passes over the batches. Lanczos finds the largest eigenvalues to a few digits in 10 to 30
products; power iteration needs more, and is included because papers report it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitarium.errors import InputError, UsageError


@dataclass(frozen=True)
class Spectrum:
    """Result of Lanczos iteration.

    Attributes:
        values: Ritz values in ascending order; the outermost are eigenvalues to many digits.
        weights: squared component of each in the start vector, adding to 1; with the values a quadrature of the spectral density.
    """

    values: list[float]
    weights: list[float]


class Hessian:
    """Hessian of the mean loss over batches with respect to some parameters.

    Args:
        loss: a batch -> mean loss, a scalar. It must be deterministic (eval mode, or generators seeded inside) and twice differentiable.
        batches: kept in memory, in the form that `loss` takes; all have equal weight.
        parameters: all of a model's, or those of a block. Frozen parameters are left out.

    Raises:
        InputError: no batches, or no trained parameters.
    """

    def __init__(self, loss: Callable[[Any], Tensor], batches: Iterable[Any], parameters: Iterable[Tensor]):
        self.loss, self.batches = loss, list(batches)
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.batches or not self.parameters:
            raise InputError(f"a Hessian needs batches and trained parameters, got {len(self.batches)} and {len(self.parameters)}")
        self.size = sum(p.numel() for p in self.parameters)

    @classmethod
    def of_classifier(cls, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], part: nn.Module | None = None) -> Hessian:
        """Create for the cross entropy of a classifier, which is put into eval mode.

        Args:
            batches: (images (B, C, H, W), classes (B,)).
            part: a block of the model, to restrict the Hessian to its weights.
        """
        model.eval()
        return cls(lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), batches, (part or model).parameters())

    def product(self, vector: Tensor) -> Tensor:
        """Multiply the Hessian by a vector (size,)."""
        pieces = self._split(vector)
        total = torch.zeros_like(vector)
        for batch in self.batches:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention kernels have no second derivative
                slopes = torch.autograd.grad(self.loss(batch), self.parameters, create_graph=True, allow_unused=True)
                used = [(s, v) for s, v in zip(slopes, pieces, strict=True) if s is not None and s.requires_grad]
                if not used:
                    continue  # the loss is linear in all of the parameters
                outer = torch.autograd.grad([s for s, _ in used], self.parameters, [v for _, v in used], allow_unused=True)
            total += self._join([o if o is not None else torch.zeros_like(p) for o, p in zip(outer, self.parameters, strict=True)])
        return total / len(self.batches)

    def lanczos(self, steps: int = 30, *, seed: int = 0) -> Spectrum:
        """Return Ritz values after a number of products (fewer if the space is exhausted), with full reorthogonalisation.

        Memory: `steps` vectors of the parameters' size.
        """
        basis = [self._random(torch.Generator().manual_seed(seed))]
        diagonal: list[Tensor] = []
        beside: list[Tensor] = []
        while True:
            w = self.product(basis[-1])
            diagonal.append(w @ basis[-1])
            scale = w.norm()
            for _ in range(2):  # one pass of orthogonalisation is not exact enough in floating point
                for q in basis:
                    w = w - (w @ q) * q
            if len(diagonal) == min(steps, self.size) or w.norm() <= 100 * torch.finfo(w.dtype).eps * scale:
                break
            beside.append(w.norm())
            basis.append(w / w.norm())
        matrix = torch.diag(torch.stack(diagonal))
        if beside:
            matrix = matrix + torch.diag(torch.stack(beside), 1) + torch.diag(torch.stack(beside), -1)
        values, vectors = torch.linalg.eigh(matrix.double().cpu())
        return Spectrum(values.tolist(), vectors[0].square().tolist())

    def power_iteration(self, count: int = 1, *, iterations: int = 100, tolerance: float = 1e-3, seed: int = 0) -> list[float]:
        """Return the eigenvalues of largest magnitude, in that order.

        Args:
            count: number of eigenvalues; each is searched orthogonally to those before.
            iterations: limit per eigenvalue.
            tolerance: stop when the value changes by less than this share.
        """
        if not 1 <= count <= self.size:
            raise UsageError(f"count must lie between 1 and the {self.size} parameters, got {count}")
        found: list[tuple[float, Tensor]] = []
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            vector, value = self._random(generator), 0.0
            for _ in range(iterations):
                for _, known in found:
                    vector = vector - (vector @ known) * known
                vector = vector / vector.norm().clamp(min=1e-30)
                product = self.product(vector)
                before, value = value, float(product @ vector)
                if abs(value - before) <= tolerance * abs(value):
                    break
                vector = product
            found.append((value, vector / vector.norm().clamp(min=1e-30)))
        return [value for value, _ in found]

    def trace(self, samples: int = 30, *, seed: int = 0) -> tuple[float, float]:
        """Return Hutchinson's estimate of the trace, and its standard error."""
        if samples < 2:
            raise UsageError(f"samples must be at least 2, got {samples}")
        generator = torch.Generator().manual_seed(seed)
        values = []
        for _ in range(samples):
            signs = torch.randint(0, 2, (self.size,), generator=generator).to(self.parameters[0]) * 2 - 1
            values.append(float(signs @ self.product(signs)))
        found = torch.tensor(values, dtype=torch.float64)
        return float(found.mean()), float(found.std() / samples**0.5)

    def _random(self, generator: torch.Generator) -> Tensor:
        vector = torch.randn(self.size, generator=generator).to(self.parameters[0])
        return vector / vector.norm()

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    @staticmethod
    def _join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1) for t in tensors])
