"""Between pictures in [-1, 1] and what is denoised: the pictures themselves, or the latents of an autoencoder of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vitarium.catalog.record import training_of
from vitarium.errors import CheckpointError, UsageError, require

DEFAULT_AUTOENCODER = "stabilityai/sd-vae-ft-ema"


class Codec(Protocol):
    """Both ways. `encode` may draw from torch's global generator."""

    def encode(self, image: Tensor) -> Tensor: ...
    def decode(self, x: Tensor) -> Tensor: ...


class Pixels:
    """Pictures as they are."""

    def encode(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return image

    def decode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return x


@dataclass(frozen=True)
class Latents:
    """An `AutoencoderKL` of diffusers, frozen: pictures (B, 3, H, W) <-> latents (B, C, H / 8, W / 8) of about unit variance.

    It is shared by all copies of a model, and moves to the device of what it gets.

    Args:
        autoencoder: the module, with `encode(image).latent_dist` and `decode(latent).sample`.
        scaling: factor on the latents, a number; None: what its configuration says (0.18215).
        shift: subtracted before it; None: what its configuration says, else 0.
    """

    autoencoder: Any
    scaling: Any = None
    shift: Any = None

    def __post_init__(self) -> None:
        config = self.autoencoder.config
        for name, key, default in (("scaling", "scaling_factor", 0.18215), ("shift", "shift_factor", 0.0)):
            if getattr(self, name) is None:
                found = getattr(config, key, None)
                object.__setattr__(self, name, default if found is None else found)
        self.autoencoder.requires_grad_(False).eval()

    def __deepcopy__(self, memo: Any) -> Latents:
        return self

    def encode(self, image: Tensor) -> Tensor:
        """Pictures in [-1, 1] -> latents drawn from the posterior."""
        with torch.no_grad():
            latent = self._on(image).encode(image.to(self.autoencoder.dtype)).latent_dist.sample()
        return ((latent - self.shift) * self.scaling).to(image.dtype)

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> pictures in about [-1, 1]."""
        with torch.no_grad():
            return self._on(x).decode((x / self.scaling + self.shift).to(self.autoencoder.dtype)).sample.to(x.dtype)

    def _on(self, x: Tensor) -> Any:
        return self.autoencoder.to(x.device)


def open_autoencoder(source: str) -> Latents:
    """An autoencoder by its folder, or by its name on Hugging Face ("stabilityai/sd-vae-ft-ema").

    Raises:
        MissingExtra: diffusers is not installed.
        CheckpointError: it is not there, or cannot be fetched.
    """
    diffusers = require("diffusers", "diffusion")
    try:
        return Latents(diffusers.AutoencoderKL.from_pretrained(source, local_files_only=Path(source).is_dir()))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot open the autoencoder {source!r}: {str(error).splitlines()[0]}; give a folder that AutoencoderKL.save_pretrained wrote"
        ) from error


def codec_of(model: Any, source: str | None = None) -> Codec:
    """The codec of a denoiser, opened once for each source: its pixels where it has no latents; else `source`, what it was trained with, or
    Stable Diffusion's.

    Raises:
        UsageError: an autoencoder for a model of pixels, or one whose latents are not the model's.
    """
    learner = training_of(model).learner
    trained = learner.settings.get("autoencoder") if learner else None
    if not getattr(model, "latent_chans", 0):
        if source:
            raise UsageError("this model makes pixels, and needs no autoencoder")
        return Pixels()
    kept: dict[str, Latents] = model.__dict__.setdefault("_codecs", {})
    name = source or trained or DEFAULT_AUTOENCODER
    if name not in kept:
        found = open_autoencoder(name)
        if found.autoencoder.config.latent_channels != model.latent_chans:
            raise UsageError(f"{name} has {found.autoencoder.config.latent_channels} latent channels, the model {model.latent_chans}")
        kept[name] = found
    return kept[name]
