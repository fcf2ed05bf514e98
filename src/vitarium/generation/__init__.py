"""Models that make images: denoisers and their samplers, next-scale prediction, restoration.

Every model here that makes images of classes, whatever it does inside, keeps one contract, `Generator`: `vitarium generate`, the grids that
are drawn during training, and the Fréchet distance ask nothing else of it.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Generator(Protocol):
    """What makes images of classes. `num_classes` (and, where known, `labels`) say which there are."""

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
        """Images of the given classes, (B, C, H, W) float32 in [0, 1], on the model's device; without gradients, in eval mode.

        The same labels, seed, numbers and options give the same images (to 1e-5), however they are cut into batches and whatever the state
        of the global generators.

        Args:
            labels: class numbers (B,) int64, 0 to num_classes - 1.
            seed: of all randomness, 0 or more.
            indices: numbers (B,) of the images in a longer list; the randomness of an image depends on the seed and its number alone.
                None: 0, 1, ...
            guidance: strength of classifier-free guidance; 1 is without. None: what the model was made for.
            steps: evaluations of the sampler's loop; None: what the model was made for. A model whose number of steps is fixed
                raises UsageError for another.
            options: the model's own, each a plain value (`vitarium generate --set top_k=900`).

        Raises:
            UsageError: an option that the model does not have, or a value that it cannot take; the message says what is accepted.
        """
        ...


@runtime_checkable
class Editor(Protocol):
    """What makes a region of a picture anew (`vitarium generate --image PICTURE --mask MASK`)."""

    def edit(self, image: Tensor, mask: Tensor, labels: Tensor, *, seed: int = 0, **options: Any) -> Tensor:
        """Pictures (B, C, H, W) float32 in [0, 1] of the given classes (B,), equal to `image` where `mask` is zero.

        Args:
            image: (B, C, H, W), or (1, C, H, W) for all, in [0, 1].
            mask: (B, 1, H, W) or (1, 1, H, W), nonzero where new pixels are wanted.
            labels, seed, options: as for `Generator.generate`.
        """
        ...


__all__ = ["Editor", "Generator"]
