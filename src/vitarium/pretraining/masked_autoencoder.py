"""Masked autoencoders: hide most of an image, encode the rest, and reconstruct the hidden patches (He et al., 2021).

    z = Encoder(visible patches + positions, class token)          a plain ViT, on a quarter or a tenth of the tokens
    y = Decoder(z in its places, a mask token in all others)       small, dropped after pretraining
    loss = mean over *hidden* patches of the mean of (y - pixels)^2

Follows the authors' code (github facebookresearch/mae), whose pretrained files load by name. With `norm_targets` a patch's pixels are
normalised first, (x - mean) / sqrt(variance + 1e-6), with the unbiased variance. Position tables are fixed sines.

Speed: only visible patches are embedded, from the patches that are computed for the loss.

Notation: B images, L patches, K of them visible, C = embed_dim, p = patch_size, c = in_chans.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import rename
from vitarium.catalog.calling import random_normal, random_uniform
from vitarium.errors import InputError
from vitarium.nn import Linear, TransformerBlock, VisionTransformer
from vitarium.nn.inputs import check_numbers
from vitarium.nn.vit import EPS, init_as_mae, sincos_table
from vitarium.ops.masking import mask_by_noise, restore_tokens, take_tokens, visible_count
from vitarium.ops.patches import patchify
from vitarium.pretraining.reconstruction import mask_noise, masked_mean, patch_errors
from vitarium.training.base import Batch, Learner
from vitarium.training.learners import learner
from vitarium.training.settings import Section

OFFICIAL = rename(
    (r"^decoder_(embed|blocks|norm|pred|pos_embed)", r"decoder.\1"),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^", "encoder."),
)
"""Rename parameters of Meta's files and those derived from them."""


class Reconstruction(NamedTuple):
    """Output of an autoencoder.

    Attributes:
        prediction: pixels of every patch, (B, L, p p c), in the order of `patchify`.
        hidden: 1 for hidden patches, 0 for visible ones, (B, L).
        latent: the encoder's tokens, class token first, then the visible ones in the order of the mask, (B, 1 + K, C).
    """

    prediction: Tensor
    hidden: Tensor
    latent: Tensor


class MaskedDecoder(nn.Module):
    """Decoder: encoded visible tokens (B, 1 + K, C) and `restore` (B, L) -> pixels of all patches (B, L, patch_dim).

    Args:
        encoder_dim: C.
        dim, depth, num_heads: of the decoder's blocks.
        mlp_ratio: hidden channels of the MLPs over dim.
        patch_dim: numbers per patch, p p c.
        grid: rows and columns of the position table.
    """

    def __init__(self, encoder_dim: int, dim: int, depth: int, num_heads: int, mlp_ratio: float, patch_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.embed = Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_table(dim, grid), requires_grad=False)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pred = Linear(dim, patch_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        init_as_mae(self)

    def forward(self, latent: Tensor, restore: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(latent)
        patches = restore_tokens(x[:, 1:], self.mask_token, restore)
        x = torch.cat([x[:, :1], patches], 1) + positions
        return self.pred(self.norm(self.blocks(x)))[:, 1:]


class MaskedAutoencoder(nn.Module):
    """Masked autoencoder: image (B, in_chans, H, W), H and W multiples of patch_size -> Reconstruction. Pretraining yields `encoder`.

    `forward_features` and `forward_head` are the encoder's, so that the model's features can be probed like a backbone's.

    Args:
        embed_dim, depth, num_heads: of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
        patch_size: side of a patch, pixels.
        image_size: side of the square image for which the position tables are built, pixels; other sizes get their own tables.
        mlp_ratio: hidden channels of all MLPs over their channels.
    """

    preprocessing: Any = None
    labels: list[str] | None = None

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        patch_size: int = 16,
        image_size: int = 224,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
    ):
        if image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}")
        super().__init__()
        self.in_chans, self.patch_size = in_chans, patch_size
        shape: dict[str, Any] = dict(patch_size=patch_size, image_size=image_size, mlp_ratio=mlp_ratio, in_chans=in_chans)
        self.encoder = VisionTransformer(embed_dim=embed_dim, depth=depth, num_heads=num_heads, global_pool="token", num_classes=0, **shape)
        self.encoder.reset_classifier(0, "avg")  # probes use the mean of its patches, not its class token
        self.encoder.pos_embed.requires_grad_(False)
        self.grid = self.encoder.table_grid
        width = (decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.decoder = MaskedDecoder(embed_dim, *width, mlp_ratio, patch_size**2 * in_chans, self.grid)

    def forward(self, image: Tensor, noise: Tensor | None = None, *, mask_ratio: float = 0.75) -> Reconstruction:
        """Hide patches, encode the rest, reconstruct.

        Args:
            image: normalised.
            noise: (B, L); the patches with the smallest noise stay visible. None: drawn from torch's generator of the image's device.
            mask_ratio: share of hidden patches, from 0 to below 1.

        Raises:
            InputError: an image of the wrong kind or size, noise of the wrong shape, or a mask_ratio that leaves no patch visible.
        """
        grid = self.check_image(image)
        count = grid[0] * grid[1]
        keep = visible_count(count, mask_ratio)
        if not 0 < keep <= count:
            raise InputError(f"mask_ratio must be from 0 to below 1 and leave at least one of {count} patches, got {mask_ratio}")
        if noise is None:
            noise = torch.rand(image.shape[0], count, device=image.device)
        else:
            shape = image.shape[0], count
            check_numbers(noise, shape, image.device, f"{type(self).__name__}: noise must hold one number per patch, {tuple(shape)}")
        mask = mask_by_noise(noise, keep)
        latent = self.encode(patchify(image, self.patch_size), mask.kept, grid)
        positions = self._table(self.decoder.pos_embed, grid)
        return Reconstruction(self.decoder(latent, mask.restore, positions), mask.hidden, latent)

    def example_inputs(self, n: int = 1, image_size: int | tuple[int, int] | None = None, *, seed: int = 0) -> dict[str, Tensor]:
        """Return image (n, in_chans, H, W) and noise (n, L), which determines the mask, so that two calls have the same output."""
        own = self.grid[0] * self.patch_size, self.grid[1] * self.patch_size
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size or own
        image = random_normal(self, (n, self.in_chans, height, width), seed=seed)
        rows, columns = self.check_image(image)
        return {"image": image, "noise": random_uniform(self, (n, rows * columns), seed=seed)}

    def encode(self, patches: Tensor, kept: Tensor, grid: tuple[int, int]) -> Tensor:
        """Encode pixels of all patches (B, L, p p c), of which those at `kept` (B, K) are visible: (B, 1 + K, C)."""
        encoder, positions = self.encoder, self._table(self.encoder.pos_embed, grid)
        projection = encoder.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # in the order of patchify: rows, columns, channels
        x = F.linear(take_tokens(patches, kept), weight, projection.bias) + positions[0, 1:][kept]
        return encoder.norm(encoder.run_blocks(encoder.blocks, encoder.with_class_token(x, positions)))

    def _table(self, own: Tensor, grid: tuple[int, int]) -> Tensor:
        return own if grid == self.grid else sincos_table(own.shape[2], grid).to(own)

    def forward_features(self, image: Tensor) -> Tensor:
        """Return all tokens of an image without hidden patches, (B, 1 + L, C)."""
        return self.encoder.forward_features(image)

    def forward_head(self, features: Tensor, pre_logits: bool = True) -> Tensor:
        """Return the mean of the tokens without the class token, (B, C)."""
        return self.encoder.forward_head(features, pre_logits=pre_logits)

    def check_image(self, image: Tensor) -> tuple[int, int]:
        """Return rows and columns of an image's patches.

        Raises:
            InputError: wrong rank, channels or dtype, or a side that is not a multiple of patch_size.
        """
        self.encoder.check_image(image)
        height, width, p = *image.shape[-2:], self.patch_size
        if height % p or width % p:
            near = "x".join(str(max(p, round(side / p) * p)) for side in (height, width))
            raise InputError(f"{type(self).__name__} takes images whose sides are multiples of {p}, got {height}x{width}; try {near}")
        return height // p, width // p

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's activations in the backward pass of training, for less memory and more time."""
        self.encoder.set_grad_checkpointing(enable)

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Replace a checkpoint's fixed position table by that of this model's grid; None for any other tensor that does not fit."""
        return sincos_table(shape[2], self.grid) if name.endswith("pos_embed") and tensor.shape[2:] == shape[2:] else None


@learner("mae", task="reconstruct")
class MaskedAutoencoderLearner(Learner):
    """Pretrain an encoder by reconstructing hidden patches. Training draws new masks at each step; see `Reconstruct` for evaluation."""

    class Settings(Section):
        """Settings of pretraining.

        Args:
            mask_ratio: share of patches that are hidden.
            norm_targets: whether each patch's pixels are normalised before comparison (Meta's models: yes, thorax_mae: no).
        """

        mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
        norm_targets: bool = True

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the images and the noise of their masks, which is the same for the same indices."""
        image = batch["image"]
        rows, columns = self.model.check_image(image)  # type: ignore[operator]
        return {"image": image, "noise": mask_noise(batch["index"], rows * columns).to(image)}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        image, task = batch["image"], self.task
        made = self.model(image, mask_ratio=self.settings.mask_ratio)
        return {"loss": masked_mean(patch_errors(made.prediction, task.targets(self.model, image)), made.hidden)}
