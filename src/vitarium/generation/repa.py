"""REPA: representation alignment of a denoiser's early block with a frozen encoder, for faster training (Yu et al., "Representation
Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think", 2025).

SiT is trained by a flow (t is the amount of noise: 0 data, 1 noise) with one more term. After block k, an MLP maps each noisy
token to the features of a frozen self-supervised encoder at the same position of the clean image:

    loss = |v(x_t, t) - (noise - x)|^2 - coefficient * mean over tokens of cos(MLP(h_k), encoder(x))

Sampling has no extra cost: the MLP is a side branch, stored in the checkpoint only.

Follows the authors' code (sihyun-yu/REPA), whose checkpoints load by name. `Alignment` adds the same term to any denoiser with any frozen
encoder; the learner uses it for models without projectors. Left out: the text-to-image variant (MMDiT), and early runs that dropped
labels twice.
Cost: the encoder's forward pass in training.

Notation: N tokens, D embed_dim, Z channels of an encoder.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vitarium.catalog import chain, family
from vitarium.errors import UsageError
from vitarium.generation.diffusion.alignment import Alignment, Encoder, hidden_tokens, open_encoder, projector
from vitarium.generation.diffusion.dit import OFFICIAL, PREPARATION, SIZES, VARIANTS, DiT
from vitarium.generation.diffusion.learner import DiffusionLearner, total
from vitarium.training import learner

if TYPE_CHECKING:
    from vitarium.data import ImageData
    from vitarium.training.base import Batch
    from vitarium.training.recipe import Recipe

log = logging.getLogger("vitarium")


def _numbered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename old files' blocks after the aligned one, `decoder_blocks`, which count from 0."""
    first = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("decoder_blocks."):
            _, number, rest = name.split(".", 2)
            name = f"blocks.{int(number) + first}.{rest}"
        renamed[name] = tensor
    return renamed


@family(
    "repa",
    variants={
        "pico": VARIANTS["pico"] | dict(encoder_depth=2, z_dims=(48,), projector_dim=128),
        **{
            f"{size}_{p}": dict(SIZES[size], patch_size=p, image_size=256, encoder_depth=8 if size in ("l", "xl") else 4)
            for size in ("s", "b", "l", "xl")
            for p in (2, 4, 8)
        },
        "xl_2_512": dict(SIZES["xl"], patch_size=2, image_size=512),
    },
    official=chain(_numbered, OFFICIAL),
    **PREPARATION | {"learner": "repa"},
)
class REPA(DiT):
    """SiT with side branches: x (B, C, H, W) at times t (B,) in [0, 1] with labels (B,) -> velocities (B, C, H, W). t is 0 at data.

    Args:
        encoder_depth: k, the number of blocks before the side branch.
        z_dims: channels Z of each encoder.
        projector_dim: hidden channels of the side branch.
        options: as for `DiT`, without learn_sigma.

    Raises:
        ValueError: k is not a number of blocks.
    """

    process = "flow"
    guided_channels = None
    guidance = 1.8

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        encoder_depth: int = 8,
        z_dims: Sequence[int] = (768,),
        projector_dim: int = 2048,
        image_size: int = 256,
        in_chans: int = 3,
        latent_chans: int = 4,
        latent_stride: int = 8,
        num_classes: int = 1000,
        class_drop_rate: float = 0.1,
        qk_norm: bool = False,
        time_scale: float = 1.0,
    ):
        if not 1 <= encoder_depth <= depth:
            raise ValueError(f"encoder_depth must be a number of blocks from 1 to {depth}, got {encoder_depth}")
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            image_size=image_size,
            in_chans=in_chans,
            latent_chans=latent_chans,
            latent_stride=latent_stride,
            num_classes=num_classes,
            class_drop_rate=class_drop_rate,
            learn_sigma=False,
            qk_norm=qk_norm,
            time_scale=time_scale,
        )
        self.encoder_depth = encoder_depth
        self.projectors = nn.ModuleList(projector(embed_dim, z_dim, projector_dim) for z_dim in z_dims)

    @property
    def aligned_block(self) -> str:
        """Name of the block after which the side branch begins."""
        return f"blocks.{self.encoder_depth - 1}"

    def forward_aligned(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return velocities (B, C, H, W) and the side branches' outputs, (B, N, Z) each."""
        with hidden_tokens(self, [self.aligned_block]) as hidden:
            velocity = self(x, t, labels)
        return velocity, [project(hidden[self.aligned_block]) for project in self.projectors]


@learner("repa", task="generate")
class REPALearner(DiffusionLearner):
    """Denoising with aligned representations, for any denoiser.

    Args:
        model: a `REPA`, or another `Denoiser`, whose projectors belong to the learner and are not saved with the model.
        settings: see `Settings`.
        encoders: the frozen encoders; None: opened by the names in the settings at the first loss.
    """

    class Settings(DiffusionLearner.Settings):
        """Settings of the learner "diffusion", and of alignment.

        Args:
            encoders: targets of alignment: names of models with published weights, files of `vitarium.save`, or "recipe:NAME": a
                classifier that is trained first, on the same images, by that recipe.
            coefficient: weight of the alignment.
            block: name of the aligned block; None: the model's own (`REPA`), else the one at a third of "blocks".
            projector_dim: hidden channels of projectors for models without their own.
        """

        encoders: tuple[str, ...] = ("timm/vit_base_patch14_dinov2.lvd142m",)
        coefficient: float = 0.5
        block: str | None = None
        projector_dim: int = 2048

    settings: Settings

    def __init__(self, model: nn.Module, settings: Any = None, *, encoders: Sequence[Encoder] | None = None):
        super().__init__(model, settings)
        self.alignment: Alignment | None = None
        if encoders is not None:
            self.align(encoders)

    @classmethod
    def create(
        cls, name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> REPALearner:
        from vitarium.training.building import build_model

        settings = recipe.settings_of(cls)
        encoders = [
            train_encoder(source.partition(":")[2], data, recipe.seed) if source.startswith("recipe:") else open_encoder(source)
            for source in settings.encoders
        ]
        dims: dict[str, Any] = {"z_dims": [encoder.dim for encoder in encoders]} if str(name).startswith("repa_") else {}
        return cls(build_model(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint, **dims), settings, encoders=encoders)

    def align(self, encoders: Sequence[Encoder]) -> None:
        """Set up the projectors for these encoders; new ones are initialised from the global generator."""
        own = isinstance(self.model, REPA) and self.settings.block in (None, self.model.aligned_block)
        self.alignment = Alignment(
            self.model,
            self.settings.block or default_block(self.model),
            encoders,
            hidden_dim=self.settings.projector_dim,
            projectors=self.model.projectors if own else None,  # type: ignore[arg-type]
        )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of a batch. Target: class numbers (B,)."""
        if self.alignment is None:
            self.align([open_encoder(source) for source in self.settings.encoders])
        alignment: Alignment = self.alignment  # type: ignore[assignment]
        x = self.encode(batch["image"])
        with hidden_tokens(self.model, [alignment.block]) as hidden:
            losses = self.process.loss(self.model, x, labels=batch["target"])
        losses["alignment"] = alignment(hidden[alignment.block], batch["image"] / 2 + 0.5, x.shape[-2:])
        return total(losses, alignment=self.settings.coefficient)


def default_block(model: nn.Module) -> str:
    """Return the name of the block that is aligned by default.

    Raises:
        UsageError: the model has no list "blocks".
    """
    if isinstance(model, REPA):
        return model.aligned_block
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UsageError(f"{type(model).__name__} has no list 'blocks'; name a block with objective.block=NAME")
    return f"blocks.{(len(blocks) - 1) // 3}"


def train_encoder(recipe_name: str, data: ImageData, seed: int, *, model: str | None = None) -> Encoder:
    """Train a classifier by a recipe on the same images, as an encoder. The result is determined by the seed.

    Raises:
        UsageError: unknown recipe, or one without a model if none is given.
    """
    from vitarium.data.loader import generators_kept
    from vitarium.training import find_learner, fit, load_recipe

    recipe = load_recipe(recipe_name, [f"seed={seed}"])
    recipe = recipe.model_copy(update=dict(image_size=recipe.image_size or data.image_size))
    name = model or recipe.model
    if name is None:
        raise UsageError(f"the recipe {recipe_name} names no model, so it cannot train an encoder")
    log.info("training the encoder first: %s by the recipe %s", name, recipe_name)
    with tempfile.TemporaryDirectory() as folder, generators_kept():
        teacher = find_learner(recipe.objective["name"]).create(name, data, recipe)
        fit(teacher, data, recipe, Path(folder))
    return Encoder(f"{name} trained by {recipe_name}", teacher.eval_model())
