"""From labels to pictures: noise by a seed, the model's process and sampler, guidance, the autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitarium.errors import UsageError
from vitarium.generation.diffusion.codecs import codec_of
from vitarium.generation.diffusion.guidance import guided
from vitarium.generation.diffusion.process import Process, kind_of, parse_process, sample
from vitarium.generation.labels import check_labels
from vitarium.nn.modes import evaluating

DEFAULT_STEPS = 50


def process_of(model: Any) -> Process:
    """What a denoiser was trained for: as its objective says, else as it is published."""
    trained = (getattr(model, "objective", None) or {}).get("process")
    return parse_process(trained or getattr(model, "process", "flow"))


def generate(
    model: Any,
    labels: Tensor,
    *,
    seed: int = 0,
    guidance: float | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    interval: tuple[float, float] | list[float] = (0.0, 1.0),
    guided_channels: int | None = None,
    image_size: int | None = None,
    autoencoder: str | None = None,
    **options: Any,
) -> Tensor:
    """Pictures (B, in_chans, image_size, image_size) float32 in [0, 1], on the model's device.

    Args:
        model: a `Denoiser`; its `objective` says what it was trained for.
        labels: classes (B,), 0 to num_classes; the last is the null class: a picture of no class in particular.
        seed: of the noise, and of what a stochastic sampler adds.
        guidance: strength; 1 is without. None: what training was set to, else the model's own.
        steps: of the sampler; None: what training was set to, else 50.
        sampler: see `process.sample`; None: what training was set to.
        interval: times between which guidance acts, in the model's own time (as a share of the steps for Gaussian diffusion).
        guided_channels: guide only so many channels; 0: all. None: as the model's authors do.
        image_size: side of the pictures, pixels; None: what the model was made for.
        autoencoder: folder or Hugging Face name of the autoencoder, for a model of latents.
        options: of the sampler.

    Raises:
        UsageError: a label, a number or an option out of range.
    """
    labels = check_labels(labels, model.num_classes, null=True)
    low, high = check_interval(interval)
    size = image_size or model.image_size
    if size % model.latent_stride:
        raise UsageError(f"image_size must divide by {model.latent_stride}, got {size}")
    process, settings = process_of(model), dict(getattr(model, "objective", None) or {})
    weight = next(model.parameters())
    x = _noise((len(labels), model.sample_chans, *2 * (size // model.latent_stride,)), seed, weight.device)
    generator = torch.Generator().manual_seed(seed + 2**32)
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
            generator=generator,
            **options,
        )
        image = codec_of(model, autoencoder).decode(x.float())
    return image.mul(0.5).add(0.5).clamp(0, 1).clone()


def check_interval(interval: Any) -> tuple[float, float]:
    """Two times, low and high.

    Raises:
        UsageError: something else.
    """
    values = list(interval) if isinstance(interval, list | tuple) else []
    if len(values) != 2 or not all(isinstance(v, int | float) for v in values) or values[0] > values[1]:
        raise UsageError(f"an interval is two times [low, high], such as [0, 0.7]; got {interval!r}")
    return float(values[0]), float(values[1])


def _noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """The same on every device; float64 where there is such a thing, since a sampler adds up many small steps."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)
