"""Image generation: denoisers and their samplers, next-scale prediction, restoration.

All models that generate images by class implement one interface, `Generator`, which `vitarium generate`, the grids drawn during training,
and the Fréchet distance use.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Generator(Protocol):
    """Generates images by class. `num_classes` (and `labels`, if known) define the classes."""

    num_classes: int

    def generate(
        self,
        labels: Tensor,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Generate images of the given classes, (B, C, H, W) float32 in [0, 1], on the model's device; without gradients, in eval mode.

        The same labels, seed, indices and options give the same images (to 1e-5), whatever the batches and the state of the global
        generators.

        Args:
            labels: class numbers (B,) int64, 0 to num_classes - 1.
            seed: of all random numbers, 0 or more.
            indices: numbers (B,) of the images in a longer list; the random numbers of an image depend only on the seed and its number.
                None: 0, 1, ...
            guidance: strength of classifier-free guidance; 1 is none. None: the model's default.
            steps: number of sampling steps; None: the model's default. A model whose number of steps is fixed
                raises UsageError for another.
            options: of the model, plain values (`vitarium generate --set top_k=900`).

        Raises:
            UsageError: unknown option or invalid value; the message says what is accepted.
        """
        ...


@runtime_checkable
class Editor(Protocol):
    """Generates the content of a region of an image (`vitarium generate --image IMAGE --mask MASK`)."""

    def edit(self, image: Tensor, mask: Tensor, labels: Tensor, *, seed: int = 0, **options: Any) -> Tensor:
        """Generate images (B, C, H, W) float32 in [0, 1] of the given classes (B,), equal to `image` where `mask` is zero.

        Args:
            image: (B, C, H, W), or (1, C, H, W) for all, in [0, 1].
            mask: (B, 1, H, W) or (1, 1, H, W), nonzero where new pixels are generated.
            labels, seed, options: as for `Generator.generate`.
        """
        ...


__all__ = ["Editor", "Generator"]
