"""Training a denoiser: noise pictures (or their latents) by its process, learn to say how to go back; measured by what it makes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from vitarium.catalog.record import LearnerRecord, training_of
from vitarium.generation.diffusion.codecs import codec_of
from vitarium.generation.diffusion.pipeline import process_of
from vitarium.generation.diffusion.process import parse_process
from vitarium.generation.tasks import Generate
from vitarium.training import Learner, learner
from vitarium.training.base import Batch
from vitarium.training.settings import Section

GOLDEN_RATIO = (5**0.5 - 1) / 2


@learner("diffusion", task="generate")
class DiffusionLearner(Learner):
    """Picture and class -> a denoiser of that class.

    Args:
        model: a `Denoiser`, or any module called as (x, t, labels) that tells the same attributes.
        settings: see there.
    """

    class Settings(Section):
        """What a denoiser is trained for, and how it is sampled by default.

        Args:
            process: "flow:data_at=1" and the like (`parse_process`); None: what the model is published for.
            autoencoder: of a model of latents: folder or Hugging Face name; None: Stable Diffusion's.
            steps, sampler, guidance: of samples, in training and later.
            judge: feature extractor of the Fréchet distance: "pixels" (8x8 grey levels), a model's name, or a file.
            samples: pictures that are made for the Fréchet distance at an evaluation, in each process; 0: it is left out.
        """

        process: str | None = None
        autoencoder: str | None = None
        steps: Annotated[int, Field(ge=1)] | None = None
        sampler: str | None = None
        guidance: float | None = None
        judge: str = "pixels"
        samples: Annotated[int, Field(ge=0)] = 256

        @field_validator("process")
        @classmethod
        def _exists(cls, text: str | None) -> str | None:
            if text is not None:
                parse_process(text)
            return text

    @classmethod
    def task_for(cls, settings: Any) -> Generate:
        return Generate(judge=settings.judge, samples=settings.samples)

    primary_metric: tuple[str, Literal["min", "max"]] = ("loss", "min")

    def __init__(self, model: nn.Module, settings: Any = None):
        super().__init__(model, settings)
        training_of(model).learner = LearnerRecord(name=self.objective, settings=self.settings.model_dump(exclude_none=True))
        self.process = process_of(model)

    def encode(self, image: Tensor) -> Tensor:
        """Pictures of the preprocessing, in [-1, 1] -> what is denoised."""
        return codec_of(self.model).encode(image)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Target: class numbers (B,)."""
        losses = self.process.loss(self.model, self.encode(batch["image"]), labels=batch["target"])
        return total(losses)

    def metrics(self) -> Any:
        """As of the task, and loss (denoising, at fixed times and noise)."""
        from torchmetrics import MeanMetric

        return nn.ModuleDict({"loss": MeanMetric(nan_strategy="disable"), **super().metrics()})

    def evaluate_batch(self, model: nn.Module, batch: Batch, metrics: Any) -> None:
        """Target: class numbers (B,)."""
        x = codec_of(model).encode(batch["image"])
        noise, shares = fixed_noise(batch["index"], x)
        losses = self.process.loss(model, x, noise=noise, t=self.process.times_at(shares), labels=batch["target"])
        metrics["loss"].update(sum(losses.values()))
        super().evaluate_batch(model, batch, metrics)


def fixed_noise(indices: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Noise of `like`'s shape and shares in [0, 1), (B,), that depend on the pictures' numbers alone, and are spread evenly over many."""
    numbers = indices.tolist()
    noise = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(number)) for number in numbers]
    return torch.stack(noise).to(like), torch.tensor([number * GOLDEN_RATIO % 1 for number in numbers]).to(like)


def total(losses: dict[str, Tensor], **weights: float) -> dict[str, Tensor]:
    """Losses a sample (B,) by name -> their means, and under "loss" the weighted sum of these (weight 1 where none is given)."""
    means = {name: value.mean() for name, value in losses.items()}
    weighted = [weights.get(name, 1.0) * mean for name, mean in means.items()]
    return {"loss": torch.stack(weighted).sum(), **means}
