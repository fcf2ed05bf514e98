"""Generation from labels: seeded noise, the model's process and sampler, guidance, the autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitarium.catalog.record import training_of
from vitarium.errors import UsageError
from vitarium.generation.diffusion.codecs import codec_of
from vitarium.generation.diffusion.guidance import guided
from vitarium.generation.diffusion.process import Process, kind_of, parse_process, sample
from vitarium.generation.labels import check_labels
from vitarium.generation.noise import ImageNoise, numbered
from vitarium.nn.modes import evaluating

DEFAULT_STEPS = 50
ADAPTIVE = ("dopri5",)
"""Samplers with adaptive steps, which depend on the error of the whole batch."""


def process_of(model: Any) -> Process:
    """Return the process that a denoiser was trained with, from its record, or else the published one."""
    learner = training_of(model).learner
    trained = learner.settings.get("process") if learner else None
    return parse_process(trained or getattr(model, "process", "flow"))


def generate(
    model: Any,
    labels: Tensor,
    *,
    seed: int = 0,
    indices: Tensor | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    interval: tuple[float, float] | list[float] = (0.0, 1.0),
    guided_channels: int | None = None,
    image_size: int | None = None,
    autoencoder: str | None = None,
    **options: Any,
) -> Tensor:
    """Generate images (B, in_chans, image_size, image_size) float32 in [0, 1], on the model's device.

    Args:
        model: a `Denoiser`; its training record holds its process.
        labels: classes (B,), 0 to num_classes; the last is the null class, an image of no particular class.
        seed: of the noise, including that of a stochastic sampler.
        indices: numbers (B,) of the images in a longer list; an image's noise depends only on the seed and its number. None: 0, 1, ...
        guidance: strength; 1 is none. None: the value of the training settings, else the model's own.
        steps: number of sampling steps; None: the value of the training settings, else 50.
        sampler: see `process.sample`; None: that of the training settings.
        interval: times at which guidance acts, in the model's own time (as a share of the steps for Gaussian diffusion).
        guided_channels: number of guided channels; 0: all. None: as in the authors' code.
        image_size: side of the images, pixels; None: the model's native size.
        autoencoder: folder or Hugging Face name of the autoencoder, for a model of latents.
        options: of the sampler.

    Raises:
        UsageError: a label, number or option out of range.
    """
    labels = check_labels(labels, model.num_classes, null=True)
    low, high = check_interval(interval)
    size = image_size or model.image_size
    if size % model.latent_stride:
        raise UsageError(f"image_size must be a multiple of {model.latent_stride}, got {size}")
    learner = training_of(model).learner
    process, settings = process_of(model), dict(learner.settings if learner else {})
    weight = next(model.parameters())
    numbers = numbered(labels, indices)
    if (sampler or settings.get("sampler")) in ADAPTIVE and len(labels) > 1:  # image by image, because its steps depend on the whole batch
        given: dict[str, Any] = dict(seed=seed, guidance=guidance, steps=steps, sampler=sampler, interval=interval)
        given |= dict(guided_channels=guided_channels, image_size=image_size, autoencoder=autoencoder, **options)
        return torch.cat([generate(model, one, indices=at, **given) for one, at in zip(labels.split(1), numbers.split(1), strict=True)])
    noise = ImageNoise(seed, numbers)
    x = _first_noise(noise, (model.sample_chans, *2 * (size // model.latent_stride,)), weight.device)
    channels = model.guided_channels if guided_channels is None else guided_channels or None
    with evaluating(model, inference=True):
        predict = guided(
            model,
            labels.to(weight.device),
            model.num_classes,
            scale=_first(guidance, settings.get("guidance"), model.guidance),
            interval=(low, high),
            channels=channels if model.latent_chans else None,
            length=1.0 if kind_of(process) == "flow" else process.steps - 1,
        )
        x = sample(
            process,
            predict,
            x,
            steps=_first(steps, settings.get("steps"), DEFAULT_STEPS),
            sampler=sampler or settings.get("sampler"),
            clip=not model.latent_chans,
            generator=noise,
            **options,
        )
        image = codec_of(model, autoencoder).decode(x.float())
    return image.mul(0.5).add(0.5).clamp(0, 1).clone()


def check_interval(interval: Any) -> tuple[float, float]:
    """Check an interval of two times, low and high.

    Raises:
        UsageError: it has another form.
    """
    values = list(interval) if isinstance(interval, list | tuple) else []
    if len(values) != 2 or not all(isinstance(v, int | float) for v in values) or values[0] > values[1]:
        raise UsageError(f"interval must be two times [low, high], such as [0, 0.7]; got {interval!r}")
    return float(values[0]), float(values[1])


def _first_noise(noise: ImageNoise, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the sampler's start (B, *shape), in float64 if the device supports it, because a sampler sums many small steps."""
    return noise.normal(*shape).to(device, torch.float32 if device.type == "mps" else torch.float64)


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)
