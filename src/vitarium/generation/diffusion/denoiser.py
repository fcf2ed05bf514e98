"""Base class of denoisers: a network (x, t, labels) -> prediction with its image size and classes, which generates images."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitarium.catalog.calling import random_integers, random_normal, random_uniform
from vitarium.errors import InputError, UsageError
from vitarium.nn.inputs import check_classes, check_floats, check_times, nearest_multiples

GAUSSIAN_STEPS = 1000
"""Default number of steps of a discrete process."""


class Denoiser(nn.Module):
    """Denoiser: x (B, C, H, W) at times t (B,) with labels (B,) -> prediction (B, C, H, W), or 2 C channels with a variance.

    Subclasses define `forward(x, t, labels=None)`, in which the null class has the number `num_classes`, and the process that they were
    published with. Training overrides it by the settings of its learner, which the model's training record and saved files hold.

    Args:
        image_size: side of the images, pixels.
        in_chans: channels of the images.
        latent_chans: channels of the autoencoder's latents; 0: x is the image itself.
        latent_stride: pixels per cell of the latent.
        num_classes: number of classes, without the null class.
    """

    process: ClassVar[str] = "flow"
    """Process that the model was published with, in the form of `parse_process`."""
    guided_channels: ClassVar[int | None] = None
    """Number of channels that the published sampler guides; None: all."""
    guidance: ClassVar[float] = 1.5
    """Default strength of guidance."""

    preprocessing: Any = None
    labels: list[str] | None = None

    def __init__(self, image_size: int, in_chans: int, latent_chans: int, latent_stride: int, num_classes: int):
        super().__init__()
        self.image_size, self.in_chans = image_size, in_chans
        self.latent_chans, self.latent_stride = latent_chans, latent_stride
        self.num_classes = num_classes

    @property
    def sample_chans(self) -> int:
        """Number of channels C of x."""
        return self.latent_chans or self.in_chans

    @property
    def sample_size(self) -> int:
        """Height and width of x for images of image_size."""
        return self.image_size // self.latent_stride

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
        """Generate images (B, in_chans, H, W) in [0, 1] of the given classes; see `Generator` and `pipeline.generate`."""
        from vitarium.generation.diffusion.pipeline import generate

        return generate(self, labels, seed=seed, indices=indices, guidance=guidance, steps=steps, **options)

    def example_inputs(self, n: int = 1, image_size: int | tuple[int, int] | None = None, *, seed: int = 0) -> dict[str, Tensor]:
        """Return x (n, C, H, W) of Gaussian noise, t (n,) in the range of the published process, and labels (n,) below num_classes."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size or (self.image_size, self.image_size)
        if height % self.latent_stride or width % self.latent_stride:
            raise UsageError(f"{type(self).__name__} takes image sizes that {self.latent_stride} divides, got {height}x{width}")
        shape = (n, self.sample_chans, height // self.latent_stride, width // self.latent_stride)
        if self.process.startswith("gaussian"):
            times = random_integers(self, (n,), GAUSSIAN_STEPS, seed=seed).float()  # exact in any dtype of the weights
        else:
            times = random_uniform(self, (n,), seed=seed)
        labels = random_integers(self, (n,), max(1, self.num_classes), seed=seed)
        return {"x": random_normal(self, shape, seed=seed), "t": times, "labels": labels}

    def check_input(self, x: Tensor, t: Tensor, labels: Tensor | None, multiple: int, last_class: int) -> None:
        """Check the inputs of `forward`; labels of None stand for the null class.

        Args:
            multiple: both sides of x must be divisible by it.
            last_class: largest class number, that of the null class if the model has one.

        Raises:
            InputError: no tensors, or wrong rank, channels, size, dtype or device of x, or not one time and class number per sample.
        """
        if torch.compiler.is_compiling():
            return
        kind = "latent" if self.latent_chans else "image"
        check_floats(self, x, ("B", self.sample_chans, "H", "W"), kind)
        height, width = x.shape[-2:]
        if height % multiple or width % multiple or not height or not width:
            near = nearest_multiples((height, width), multiple)
            raise InputError(f"{type(self).__name__} takes sides divisible by {multiple}, got {height}x{width}; the nearest is {near}")
        check_times(self, t, len(x), x.device)
        if labels is not None:
            check_classes(self, labels, len(x), last_class, x.device)
        elif last_class < self.num_classes:
            raise InputError(f"this {type(self).__name__} has no null class (class_drop_rate=0); give it labels (B,)")
