"""DiT and SiT: a plain transformer on patches of a noisy latent, conditioned on time and class by adaptive layer norm.

DiT (Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023) is trained by Gaussian diffusion, SiT (Ma et al., "SiT: Exploring
Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers", 2024) is the same network trained by a flow.

    c = time(t) + label(y)        [shift1, scale1, gate1, shift2, scale2, gate2] = Linear(SiLU(c))
    x <- x + gate1 * Attention(LN(x) (1 + scale1) + shift1)
    x <- x + gate2 * MLP(LN(x) (1 + scale2) + shift2)

The last linear layer of every condition is initialised to 0, so that each block is initially the identity and the output is 0.
Follows the authors' code (facebookresearch/DiT, willisma/SiT), whose checkpoints load by name, as do diffusers'. Left out: likelihoods of
images by the flow (no number of SiT's tables needs them).
Cost: quadratic in tokens. A third of DiT's parameters are in the layers of the conditions.

Notation: B batch, C channels of x, H W its sides (latent cells, or pixels), N tokens, D embed_dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vitarium.catalog import chain, family, rename
from vitarium.generation.diffusion.denoiser import Denoiser
from vitarium.nn import Attention, Linear, Mlp, PatchEmbed, sincos_2d
from vitarium.ops.maps import as_tokens

TanhGELU = functools.partial(nn.GELU, approximate="tanh")


class TimeEmbed(nn.Module):
    """Embed times: (B,) -> (B, dim), cosines, then sines, of t at 128 rates from 1 down to 1 / 10000, through two linear layers.

    Args:
        dim: D.
        scale: factor of t, applied first.
    """

    rates: Tensor

    def __init__(self, dim: int, scale: float = 1.0, *, width: int = 256):
        super().__init__()
        self.scale = scale
        steps = torch.arange(width // 2, dtype=torch.float32)  # in float32 as in the authors' code; exp rounds as the processor does
        rates = torch.exp(-math.log(10000) * steps / (width // 2))
        self.register_buffer("rates", rates, persistent=False)
        self.fc1 = nn.Linear(width, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        angles = (t.float() * self.scale)[:, None] * self.rates.float()  # float32 in any dtype, because t runs up to 999
        waves = torch.cat([angles.cos(), angles.sin()], 1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(waves)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift: (B, N, D) with (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


class DiTBlock(nn.Module):
    """Transformer block with adaptive layer norm: tokens (B, N, D) and SiLU of the condition (B, D) -> (B, N, D).

    Args:
        dim: D.
        num_heads: heads of the attention.
        mlp_ratio: hidden channels of the MLP over D.
        qk_norm: whether to apply a layer norm to each head's queries and keys.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, *, qk_norm: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, num_heads, qk_norm=nn.LayerNorm if qk_norm else None)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), TanhGELU)  # type: ignore[arg-type]
        self.modulation = Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Output layer with adaptive layer norm: tokens (B, N, D) and SiLU of the condition (B, D) -> (B, N, out_dim)."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = Linear(dim, out_dim)
        self.modulation = Linear(dim, 2 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        return self.linear(modulate(self.norm(x), shift, scale))


OFFICIAL = chain(
    rename(
        (r"^pos_embed$", None),  # computed here
        (r"^x_embedder\.", "patch_embed."),
        (r"^t_embedder\.mlp\.0\.", "time_embed.fc1."),
        (r"^t_embedder\.mlp\.2\.", "time_embed.fc2."),
        (r"^y_embedder\.embedding_table\.", "label_embed."),
        (r"^final_layer\.", "final."),
    ),
    rename((r"\.adaLN_modulation\.1\.", ".modulation.")),
)


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge queries, keys and values into one tensor; of the embedders' copies in each block the first is used."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn1.to_q." in name:
            out[name.replace("attn1.to_q", "attn.qkv")] = torch.cat([state[name.replace("to_q", f"to_{part}")] for part in "qkv"])
        elif ".attn1.to_k." not in name and ".attn1.to_v." not in name:
            out[name] = tensor
    return out


DIFFUSERS = chain(
    _joined,
    rename(
        (r"^pos_embed\.proj\.", "patch_embed.proj."),
        (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_(\d)\.", r"time_embed.fc\1."),
        (r"^transformer_blocks\.0\.norm1\.emb\.class_embedder\.embedding_table\.", "label_embed."),
        (r"\.norm1\.emb\.", None),
        (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.modulation."),
        (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
        (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
        (r"^transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
        (r"^transformer_blocks\.", "blocks."),
        (r"^proj_out_1\.", "final.modulation."),
        (r"^proj_out_2\.", "final.linear."),
    ),
)

SIZES = {  # name -> width, depth, heads
    "s": dict(embed_dim=384, depth=12, num_heads=6),
    "b": dict(embed_dim=768, depth=12, num_heads=12),
    "l": dict(embed_dim=1024, depth=24, num_heads=16),
    "xl": dict(embed_dim=1152, depth=28, num_heads=16),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pico": dict(
        embed_dim=64, depth=3, num_heads=4, patch_size=4, image_size=16, latent_chans=0, latent_stride=1, num_classes=10, time_scale=1000.0
    ),
    **{f"{size}_{p}": dict(numbers, patch_size=p, image_size=256) for size, numbers in SIZES.items() for p in (2, 4, 8)},
    "xl_2_512": dict(SIZES["xl"], patch_size=2, image_size=512),
}
RELEASES = "https://dl.fbaipublicfiles.com/DiT/models"
PREPARATION: dict[str, Any] = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0, learner="diffusion")


@family(
    "dit",
    variants=VARIANTS | {"pico": VARIANTS["pico"] | dict(time_scale=1.0)},
    official=OFFICIAL,
    dialects={"diffusers": DIFFUSERS},
    weights={
        "xl_2": {"in1k": (f"{RELEASES}/DiT-XL-2-256x256.pt",)},
        "xl_2_512": {"in1k": (f"{RELEASES}/DiT-XL-2-512x512.pt",)},
    },
    **PREPARATION,
)
class DiT(Denoiser):
    """DiT: x (B, C, H, W) at times t (B,) with labels (B,) -> (B, 2 C, H, W), noise and log variance (`GaussianDiffusion`).

    Args:
        embed_dim: D.
        depth: number of blocks.
        num_heads: heads of the attention.
        patch_size: side of a patch, cells of x.
        image_size: side of the images, pixels; x has image_size / latent_stride cells.
        in_chans: channels of the images.
        latent_chans: channels of the autoencoder's latents; 0: x is the image itself.
        latent_stride: pixels per cell of the latent; 1 for images.
        num_classes: number of classes, without the null class; 0: only the null class.
        mlp_ratio: hidden channels of the MLPs over D.
        class_drop_rate: probability in training that a label becomes the null class.
        learn_sigma: whether to return 2 C channels.
        qk_norm: whether to apply a layer norm to queries and keys.
        time_scale: factor of t; 1000 for flows trained with it.

    Any H and W that are multiples of patch_size; raises InputError for others, and ValueError if image_size is not a multiple.
    """

    process = "gaussian"
    guided_channels: ClassVar[int | None] = 3

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        image_size: int = 256,
        in_chans: int = 3,
        latent_chans: int = 4,
        latent_stride: int = 8,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        class_drop_rate: float = 0.1,
        learn_sigma: bool = True,
        qk_norm: bool = False,
        time_scale: float = 1.0,
    ):
        super().__init__(image_size, in_chans, latent_chans, latent_stride, num_classes)
        if self.sample_size % patch_size or image_size % latent_stride:
            raise ValueError(f"image_size must divide by {patch_size * latent_stride} (patch_size x latent_stride), got {image_size}")
        self.patch_size, self.class_drop_rate, self.learn_sigma = patch_size, class_drop_rate, learn_sigma
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(patch_size, self.sample_chans, embed_dim)
        self.time_embed = TimeEmbed(embed_dim, time_scale)
        self.label_embed = nn.Embedding(num_classes + (class_drop_rate > 0 or num_classes == 0), embed_dim)
        self.blocks = nn.ModuleList(DiTBlock(embed_dim, num_heads, mlp_ratio, qk_norm=qk_norm) for _ in range(depth))
        self.out_chans = self.sample_chans * (2 if learn_sigma else 1)
        self.final = FinalLayer(embed_dim, patch_size**2 * self.out_chans)
        self.register_buffer("pos_embed", sincos_2d(embed_dim, *[self.sample_size // patch_size] * 2), persistent=False)
        self._init_weights()

    pos_embed: Tensor

    def _init_weights(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        for weight in (self.label_embed.weight, self.time_embed.fc1.weight, self.time_embed.fc2.weight):
            nn.init.normal_(weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.final.modulation, self.final.linear):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict (B, C or 2 C, H, W). Without labels: for the null class."""
        self.check_input(x, t, labels, self.patch_size, self.label_embed.num_embeddings - 1)
        tokens, grid = self.embed(x)
        condition = F.silu(self.condition(t, labels))
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition)
        return self.unpatchify(self.final(tokens, condition), grid)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens (B, N, D) with positions, and the grid's height and width."""
        patches = self.patch_embed(x)
        height, width = patches.shape[-2:]
        table = self.pos_embed
        if (height, width) != (self.sample_size // self.patch_size,) * 2:
            table = sincos_2d(table.shape[1], height, width, device=x.device).to(table)
        return as_tokens(patches) + table, (height, width)

    def condition(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return the condition (B, D). In training labels are dropped at class_drop_rate."""
        if labels is None:
            labels = torch.full(t.shape, self.num_classes, device=t.device)
        if self.training and self.class_drop_rate > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.class_drop_rate
            labels = torch.where(dropped, self.num_classes, labels)
        return self.time_embed(t) + self.label_embed(labels)

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convert tokens (B, N, p p C'), in the order row, column, channel, to a map (B, C', H, W)."""
        p = self.patch_size
        cells = tokens.unflatten(2, (p, p, self.out_chans)).unflatten(1, grid)
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass of training, for less memory and more time."""
        self.grad_checkpointing = enable


@family("dit", name="sit_flow", variants=VARIANTS, official=OFFICIAL, dialects={"diffusers": DIFFUSERS}, **PREPARATION)
class SiT(DiT):
    """SiT: x (B, C, H, W) at times t (B,) in [0, 1] with labels (B,) -> velocities (B, C, H, W). t is 0 at noise and 1 at data (`Flow`).

    The released models compute 2 C channels (learn_sigma) and return the first C. Arguments as of `DiT`.
    """

    process = "flow:data_at=1"

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x, t, labels)[:, : self.sample_chans]
