"""DCGAN: a class-conditional convolutional generator trained against a discriminator; the baseline of adversarial generation.

Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks", ICLR 2016. A
generator G makes an image of noise z and a class y, a discriminator D scores how real an image of that class looks:

    loss of D = softplus(-D(x, y)) + softplus(D(G(z, y), y)) + gamma / 2 |dD(x, y)/dx|^2       the last term at every k-th step, times k
    loss of G = softplus(-D(G(z, y), y))

Differences from the paper: classes (G adds an embedding of y to z; D adds <embedding of y, features>, Miyato and Koyama 2018), group norm
instead of batch norm, so that the result does not depend on the number of processes, nearest-neighbour upsampling and convolution instead
of transposed convolution, and R1 (Mescheder, Geiger and Nowozin 2018), computed lazily (Karras et al. 2020). No released weights.

    vitarium train dcgan --data digits
    vitarium generate runs/dcgan-dcgan_pico-digits/model.safetensors --output digits.png

B batch, C channels of an image, H W its sides, Z length of the noise, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import family
from vitarium.data.loader import generators_kept, seed_generators
from vitarium.errors import UsageError
from vitarium.generation.labels import check_labels
from vitarium.generation.noise import ImageNoise, numbered
from vitarium.nn.inputs import check_classes, check_floats
from vitarium.nn.modes import evaluating
from vitarium.training import Learner, Player, learner
from vitarium.training.base import Batch
from vitarium.training.building import build_model
from vitarium.training.settings import Section

if TYPE_CHECKING:
    from vitarium.data import ImageData
    from vitarium.training.recipe import Recipe

LARGEST_MAP = 7
"""Largest side of the generator's first map, cells."""


def halvings(image_size: int) -> int:
    """Return the number of halvings until a side has at most `LARGEST_MAP` cells.

    Raises:
        UsageError: the side becomes odd before that.
    """
    side, count = image_size, 0
    while side > LARGEST_MAP:
        if side % 2:
            raise UsageError(f"image_size must halve to at most {LARGEST_MAP} without a remainder, such as 16, 28 or 64; got {image_size}")
        side, count = side // 2, count + 1
    return count


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm with eight channels per group."""
    return nn.GroupNorm(max(1, channels // 8), channels)


class Generator(nn.Module):
    """Generator: noise (B, Z) and classes (B,) -> images (B, C, H, W) in [-1, 1].

    Args:
        num_classes: K.
        image_size: H = W, pixels; halves to at most 7 without a remainder.
        in_chans: C.
        latent_dim: Z.
        width: channels of the largest map; a map of half its side has twice as many.
    """

    def __init__(self, *, num_classes: int, image_size: int, in_chans: int, latent_dim: int, width: int):
        super().__init__()
        count = halvings(image_size)
        self.side = image_size >> count
        self.embed = nn.Embedding(num_classes, latent_dim)
        self.stem = nn.Linear(latent_dim, (width << count) * self.side**2)
        blocks: list[nn.Module] = []
        for channels in (width << i for i in range(count, 0, -1)):
            blocks += [group_norm(channels), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels // 2, 3, padding=1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(group_norm(width), nn.ReLU(), nn.Conv2d(width, in_chans, 3, padding=1), nn.Tanh())

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        check_floats(self, noise, ("B", self.stem.in_features), "noise")
        check_classes(self, labels, noise.shape[0], self.embed.num_embeddings - 1, noise.device)
        x = self.stem(noise + self.embed(labels))
        return self.head(self.blocks(x.unflatten(1, (-1, self.side, self.side))))


class Discriminator(nn.Module):
    """Discriminator: images (B, C, H, W) in [-1, 1] and classes (B,) -> scores (B,), high for real ones. Arguments as for `Generator`."""

    def __init__(self, *, num_classes: int, image_size: int, in_chans: int, width: int):
        super().__init__()
        count = halvings(image_size)
        blocks: list[nn.Module] = [nn.Conv2d(in_chans, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for channels in (width << i for i in range(count)):
            blocks += [nn.Conv2d(channels, 2 * channels, 4, 2, 1), group_norm(2 * channels), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*blocks)
        features = (width << count) * (image_size >> count) ** 2
        self.score = nn.Linear(features, 1)
        self.embed = nn.Embedding(num_classes, features)
        nn.init.normal_(self.embed.weight, std=features**-0.5)

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        x = self.blocks(image).flatten(1)
        return self.score(x).squeeze(1) + (self.embed(labels) * x).sum(1)


VARIANTS: dict[str, dict[str, Any]] = {
    "pico": dict(width=24, latent_dim=32, image_size=16),
    "small": dict(width=64, latent_dim=128, image_size=64),
}


@family("dcgan", variants=VARIANTS, learner="dcgan", mean=(0.5,) * 3, std=(0.5,) * 3)
class DCGAN(Generator):
    """Generator as a model: noise (B, Z) and classes (B,) -> images (B, C, H, W) in [-1, 1]; `generate` takes classes only.

    Args:
        num_classes, image_size, in_chans, latent_dim, width: see `Generator`.

    Raises:
        UsageError: an image size that does not halve to at most 7.
    """

    def __init__(self, *, num_classes: int = 10, image_size: int = 16, in_chans: int = 3, latent_dim: int = 32, width: int = 24):
        super().__init__(num_classes=num_classes, image_size=image_size, in_chans=in_chans, latent_dim=latent_dim, width=width)
        self.num_classes, self.image_size, self.in_chans, self.latent_dim, self.width = num_classes, image_size, in_chans, latent_dim, width

    def example_inputs(self, n: int = 1, image_size: int | tuple[int, int] | None = None, *, seed: int = 0) -> dict[str, Tensor]:
        """Return noise (n, Z) and labels (n,) below num_classes.

        Raises:
            UsageError: an image size other than the model's own.
        """
        if image_size not in (None, self.image_size, (self.image_size, self.image_size)):
            raise UsageError(f"this {type(self).__name__} makes images of {self.image_size} pixels alone, got image_size={image_size}")
        weight, generator = self.stem.weight, torch.Generator().manual_seed(seed)
        noise = torch.randn(n, self.latent_dim, generator=generator).to(weight)
        return {"noise": noise, "labels": torch.randint(self.num_classes, (n,), generator=generator).to(weight.device)}

    def generate(
        self, labels: Tensor, *, seed: int = 0, indices: Tensor | None = None, guidance: float | None = None, steps: int | None = None
    ) -> Tensor:
        """Return images of classes, (B, C, H, W) float32 in [0, 1]; see `vitarium.generation.Generator`.

        Raises:
            UsageError: a class that the model does not have, or a guidance or number of steps other than 1.
        """
        labels = check_labels(labels, self.num_classes)
        for name, value in (("guidance", guidance), ("steps", steps)):
            if value not in (None, 1):
                raise UsageError(f"a {type(self).__name__} makes an image in one step without guidance; got {name}={value}")
        weight = self.stem.weight
        noise = ImageNoise(seed, numbered(labels, indices)).normal(self.latent_dim)
        with evaluating(self, inference=True):
            image = self(noise.to(weight), labels.to(weight.device)).float()
        return image.mul(0.5).add(0.5).clamp(0, 1).clone()


@learner("dcgan", task="generate")
class DCGANLearner(Learner):
    """Train a generator against a discriminator with the logistic loss and R1.

    Args:
        model: the generator.
        settings: see `Settings`.
    """

    class Settings(Section):
        """Settings of the loss and of the evaluation.

        Args:
            gamma: weight of R1, the discriminator's squared gradient at real images; 0: none.
            r1_every: steps between two computations of it.
            judge: feature extractor of the Fréchet distance: "pixels" (8x8 grey levels), a model's name, or a file.
            samples: images that are generated for it at an evaluation, in each process; 0: no distance.
        """

        gamma: Annotated[float, Field(ge=0)] = 0.1
        r1_every: Annotated[int, Field(ge=1)] = 4
        judge: str = "pixels"
        samples: Annotated[int, Field(ge=0)] = 256

    model: Any

    def __init__(self, model: DCGAN, settings: Any = None):
        super().__init__(model, settings)
        shape = {name: getattr(model, name) for name in ("num_classes", "image_size", "in_chans", "width")}
        self.discriminator = Discriminator(**shape)

    @classmethod
    def create(
        cls, name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> DCGANLearner:
        model = build_model(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint)
        if not isinstance(model, DCGAN):
            raise UsageError(f"the objective dcgan trains dcgan_* models, got a {type(model).__name__}")
        with generators_kept():
            seed_generators(recipe.seed, 1)
            return cls(model, recipe.settings_of(cls))

    def players(self) -> Mapping[str, Player]:
        lazy = {"r1": self.settings.r1_every} if self.settings.gamma else {}
        return {"discriminator": Player(self.discriminator, lazy=lazy), "generator": Player(self.model, ema=True)}

    def loss(self, batch: Batch, player: str) -> dict[str, Tensor]:  # type: ignore[override]
        """Target: class numbers (B,)."""
        labels = batch["target"]
        fake = self.model(self.noise(batch, self.model.latent_dim), labels)
        if player == "generator":
            return {"loss": F.softplus(-self.discriminator(fake, labels)).mean()}
        real, made = self.discriminator(batch["image"], labels), self.discriminator(fake.detach(), labels)
        return {"loss": F.softplus(-real).mean() + F.softplus(made).mean(), "real": real.mean(), "made": made.mean()}

    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return noise, the same for the same indices, and the batch's classes as labels."""
        return {"noise": ImageNoise(0, batch["index"]).normal(self.model.latent_dim).to(batch["image"]), "labels": batch["target"]}

    def regularize(self, batch: Batch, player: str, name: str) -> Tensor:
        """gamma / 2 of the squared gradient of the scores of real images, a mean over the batch."""
        image = batch["image"].detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.discriminator(image, batch["target"]).sum(), image, create_graph=True)
        return self.settings.gamma / 2 * slope.square().sum((1, 2, 3)).mean()
