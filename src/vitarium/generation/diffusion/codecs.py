"""Codecs between images in [-1, 1] and the denoised variable: the identity, or an autoencoder of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vitarium.catalog.hub import advice, hub_or_cache
from vitarium.catalog.record import training_of
from vitarium.errors import CheckpointError, UsageError, require

DEFAULT_AUTOENCODER = "stabilityai/sd-vae-ft-ema"


class Codec(Protocol):
    """Encoding and decoding. `encode` may draw from torch's global generator."""

    def encode(self, image: Tensor) -> Tensor: ...
    def decode(self, x: Tensor) -> Tensor: ...


class Pixels:
    """Identity: the images themselves are denoised."""

    def encode(self, image: Tensor) -> Tensor:
        """Return the images, (B, C, H, W)."""
        return image

    def decode(self, x: Tensor) -> Tensor:
        """Return the images, (B, C, H, W)."""
        return x


@dataclass(frozen=True)
class Latents:
    """A frozen `AutoencoderKL` of diffusers: images (B, 3, H, W) <-> latents (B, C, H / 8, W / 8) of about unit variance.

    It is shared by all copies of a model, and moves to the device of its input.

    Args:
        autoencoder: the module, with `encode(image).latent_dist` and `decode(latent).sample`.
        scaling: factor on the latents, a number; None: from its configuration (0.18215).
        shift: subtracted before scaling; None: from its configuration, else 0.
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
        """Return latents of images in [-1, 1], drawn from the posterior."""
        with torch.no_grad():
            latent = self._on(image).encode(image.to(self.autoencoder.dtype)).latent_dist.sample()
        return ((latent - self.shift) * self.scaling).to(image.dtype)

    def decode(self, x: Tensor) -> Tensor:
        """Return the images of latents, in about [-1, 1]."""
        with torch.no_grad():
            return self._on(x).decode((x / self.scaling + self.shift).to(self.autoencoder.dtype)).sample.to(x.dtype)

    def _on(self, x: Tensor) -> Any:
        return self.autoencoder.to(x.device)


def open_autoencoder(source: str) -> Latents:
    """Open an autoencoder by its folder, or by its name on Hugging Face ("stabilityai/sd-vae-ft-ema").

    Raises:
        MissingExtra: diffusers is not installed.
        CheckpointError: it does not exist, or cannot be downloaded.
    """
    diffusers = require("diffusers", "diffusion")
    local = Path(source).is_dir()
    try:
        with hub_or_cache("." if local else source) as reason:
            return Latents(diffusers.AutoencoderKL.from_pretrained(source, local_files_only=local))
    except (OSError, ValueError) as error:
        if reason:
            raise CheckpointError(f"cannot open the autoencoder {source!r}: {advice(source, reason)}") from error
        raise CheckpointError(
            f"cannot open the autoencoder {source!r}: {str(error).splitlines()[0]}; give a folder that AutoencoderKL.save_pretrained wrote"
        ) from error


def codec_of(model: Any, source: str | None = None) -> Codec:
    """Return the codec of a denoiser, opened once for each source: the identity for models of pixels; else `source`, the autoencoder of its
    training, or Stable Diffusion's.

    Raises:
        UsageError: an autoencoder for a model of pixels, or one with latents of another size.
    """
    learner = training_of(model).learner
    trained = learner.settings.get("autoencoder") if learner else None
    if not getattr(model, "latent_chans", 0):
        if source:
            raise UsageError("this model generates pixels and uses no autoencoder")
        return Pixels()
    kept: dict[str, Latents] = model.__dict__.setdefault("_codecs", {})
    name = source or trained or DEFAULT_AUTOENCODER
    if name not in kept:
        found = open_autoencoder(name)
        if found.autoencoder.config.latent_channels != model.latent_chans:
            raise UsageError(f"{name} has {found.autoencoder.config.latent_channels} latent channels, the model {model.latent_chans}")
        kept[name] = found
    return kept[name]
