"""Alignment of a denoiser's hidden tokens with those of a frozen encoder, position by position (REPA's side branch).

The output of a block, given by name, is read by a hook; the encoder gets the clean image. Both return tokens on a grid; if the grids
differ, the encoder's is interpolated.

Notation: B batch, N tokens, D channels of the block, Z channels of the encoder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.errors import UsageError, nearest
from vitarium.nn.modes import evaluating
from vitarium.nn.tokens import masked_mean
from vitarium.ops.maps import as_tokens


@contextlib.contextmanager
def hidden_tokens(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the named blocks in each forward pass: name -> tokens (B, N, D), with gradients.

    A block may return tokens, a map (B, D, h, w), or a tuple that begins with either.

    Raises:
        UsageError: the model has no such block; the message names similar ones.
    """
    parts = dict(model.named_modules())
    for name in names:
        if name not in parts or not name:
            raise UsageError(f"{type(model).__name__} has no block {name!r}{nearest(name, parts)}")
    found: dict[str, Tensor] = {}

    def reader(name: str) -> Any:
        def read(_: nn.Module, __: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple | list) else out
            found[name] = as_tokens(out) if out.ndim == 4 else out

        return read

    hooks = [parts[name].register_forward_hook(reader(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def token_grid(count: int, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of `count` square patches of an image or latent.

    Raises:
        UsageError: the count does not form a grid (because of a class token, for example).
    """
    side = (height * width / count) ** 0.5
    rows, columns = round(height / side), round(width / side)
    if rows * columns != count:
        raise UsageError(f"{count} tokens do not form a grid of {height}x{width} cells; choose a block with one token per patch")
    return rows, columns


@dataclass(frozen=True)
class Encoder:
    """A frozen network that returns a map of features of an image; shared by all copies, it moves to the device of its input.

    Args:
        name: used in reports.
        model: with timm's `forward_intermediates` (all of our backbones, timm's ViTs and CNNs), and a `preprocessing`.
    """

    name: str
    model: Any

    def __post_init__(self) -> None:
        if not hasattr(self.model, "forward_intermediates"):
            raise UsageError(f"{self.name} returns no intermediate maps; use an encoder of ours or of timm's ('vitarium models')")
        self.model.requires_grad_(False).eval()

    def __deepcopy__(self, memo: Any) -> Encoder:
        return self

    @property
    def dim(self) -> int:
        """Number of channels Z."""
        return int(self.model.feature_info[-1]["num_chs"])

    def map(self, image: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return normed features (B, Z, h, w) of images (B, 1 or 3, H, W) in [0, 1], without class tokens or gradients.

        Args:
            grid: h and w. The image is resized so that the encoder returns that grid, if this is not larger than the encoder's native
                size; else the features are interpolated. None: the encoder's own grid.
        """
        pre = self.model.preprocessing
        mean, std = (torch.tensor(v, device=image.device).view(-1, 1, 1) for v in (pre.mean, pre.std))
        if image.shape[1] != len(mean):
            image = image.mean(1, keepdim=True) if len(mean) == 1 else image.expand(-1, len(mean), -1, -1)
        stride = int(self.model.feature_info[-1]["reduction"])
        size = [side * stride for side in grid] if grid else [pre.image_size] * 2
        if max(size) > pre.image_size or not self._takes(size):
            size = [pre.image_size] * 2
            self._takes(size)
        x = F.interpolate(image.float(), size, mode="bicubic") if list(image.shape[-2:]) != size else image.float()
        with torch.no_grad():
            model = self.model.to(image.device)
            (features,) = model.forward_intermediates((x - mean) / std, indices=1, norm=True, intermediates_only=True)
        if grid and tuple(features.shape[-2:]) != grid:
            features = F.interpolate(features.float(), grid, mode="bicubic")
        return features

    def _takes(self, size: Sequence[int]) -> bool:
        """Return whether the encoder accepts images of this size; timm's ViTs are set to it, and resample their positions."""
        if not hasattr(self.model, "set_input_size"):
            return True
        if tuple(self.model.patch_embed.img_size) == tuple(size):
            return True
        try:
            self.model.set_input_size(img_size=tuple(size))
        except (AssertionError, ValueError, TypeError, RuntimeError):
            return False
        return True

    def tokens(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return features (B, h w, Z) of images in [0, 1]."""
        return as_tokens(self.map(image, grid))

    def pooled(self, image: Tensor) -> Tensor:
        """Return the mean over the map, (B, Z), of images in [0, 1]."""
        return self.map(image).flatten(2).mean(2)


def open_encoder(source: str) -> Encoder:
    """Open an encoder by the name of a model with published weights ("timm/vit_base_patch14_dinov2.lvd142m"), or by a saved file.

    Raises:
        UsageError, CheckpointError: unknown encoder, or its weights cannot be downloaded.
    """
    from vitarium.catalog import create_model
    from vitarium.catalog.saving import load
    from vitarium.files import is_model_file

    if is_model_file(source):
        return Encoder(source, load(source))
    return Encoder(source, create_model(source, pretrained=True, num_classes=0))


def projector(dim: int, out_dim: int, hidden_dim: int = 2048) -> nn.Sequential:
    """Return the side branch: (B, N, dim) -> (B, N, out_dim), three linear layers with SiLU between; Xavier weights, zero biases."""
    layers = nn.Sequential(
        nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, out_dim)
    )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return layers


def alignment_loss(found: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the negative mean cosine of paired tokens, in [-1, 1]: (B, N, Z), (B, N, Z) -> (B,).

    Args:
        mask: bool (B, N), True for the tokens that count; None: all.
    """
    return -masked_mean(F.cosine_similarity(found, target, dim=-1), mask)


class Alignment(nn.Module):
    """Projectors from one block of a denoiser to one or several encoders.

    Args:
        denoiser: any module called as (x, t, labels); it is neither changed nor kept.
        block: name of the block, such as "blocks.7".
        encoders: the targets of alignment.
        hidden_dim: hidden channels of the projectors.
        projectors: existing ones of the denoiser, one per encoder; None: new ones.

    Raises:
        UsageError: no such block, or projectors for other encoders.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        block: str,
        encoders: Sequence[Encoder],
        *,
        hidden_dim: int = 2048,
        projectors: nn.ModuleList | None = None,
    ):
        super().__init__()
        self.block, self.encoders = block, tuple(encoders)
        if projectors is not None:
            dims = [p[-1].out_features for p in projectors]  # type: ignore[index]
            if dims != [e.dim for e in encoders]:
                wanted = [e.dim for e in encoders]
                raise UsageError(f"the model's projectors have {dims} channels, the encoders have {wanted}; create it with z_dims={wanted}")
            self.projectors = projectors
        else:
            width = block_width(denoiser, block)
            self.projectors = nn.ModuleList(projector(width, encoder.dim, hidden_dim) for encoder in encoders)

    def forward(self, hidden: Tensor, image: Tensor, sides: Sequence[int], mask: Tensor | None = None) -> Tensor:
        """Return losses (B,) of hidden tokens (B, N, D), the mean over the encoders.

        Args:
            image: the clean images, (B, 1 or 3, H, W) in [0, 1].
            sides: height and width of the denoiser's input.
            mask: bool (B, N), True for tokens of the image in padded batches; None: all.
        """
        grid = token_grid(hidden.shape[1], *sides)
        pairs = zip(self.projectors, self.encoders, strict=True)
        return torch.stack([alignment_loss(project(hidden), encoder.tokens(image, grid), mask) for project, encoder in pairs]).mean(0)


def block_width(denoiser: nn.Module, block: str) -> int:
    """Return the channels of a block's tokens, found by a forward pass of zeros of size `sample_chans` and `sample_size`."""
    like, side = next(denoiser.parameters()), denoiser.sample_size
    with hidden_tokens(denoiser, [block]) as found, evaluating(denoiser):
        x = like.new_zeros(1, denoiser.sample_chans, side, side)  # type: ignore[call-overload]
        denoiser(x, like.new_zeros(1), torch.zeros(1, dtype=torch.int64, device=like.device))
    return found[block].shape[-1]
