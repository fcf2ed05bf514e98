"""Training of denoisers that predict the noise, velocity or data of noised images or latents; evaluated on generated images."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from vitarium.catalog.record import LearnerRecord, training_of
from vitarium.generation.diffusion.codecs import codec_of
from vitarium.generation.diffusion.pipeline import process_of
from vitarium.generation.diffusion.process import parse_process
from vitarium.training import Learner, learner
from vitarium.training.base import Batch
from vitarium.training.settings import Section

GOLDEN_RATIO = (5**0.5 - 1) / 2


@learner("diffusion", task="generate")
class DiffusionLearner(Learner):
    """Class-conditional denoising of images.

    Args:
        model: a `Denoiser`, or any module called as (x, t, labels) with the same attributes.
        settings: see `Settings`.
    """

    class Settings(Section):
        """Settings: the process of training, and defaults of sampling.

        Args:
            process: "flow:data_at=1" and the like (`parse_process`); None: the one that the model was published with.
            autoencoder: for a model of latents: folder or Hugging Face name; None: Stable Diffusion's.
            steps, sampler, guidance: defaults of sampling, in training and later.
            judge: feature extractor of the Fréchet distance: "pixels" (8x8 grey levels), a model's name, or a file.
            samples: images generated for the Fréchet distance at an evaluation, in each process; 0: none, and no distance.
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

    primary_metric: tuple[str, Literal["min", "max"]] = ("loss", "min")

    def __init__(self, model: nn.Module, settings: Any = None):
        super().__init__(model, settings)
        training_of(model).learner = LearnerRecord(name=self.objective, settings=self.settings.model_dump(exclude_none=True))
        self.process = process_of(model)

    def encode(self, image: Tensor) -> Tensor:
        """Encode images, normalised to [-1, 1], into what is denoised."""
        return codec_of(self.model).encode(image)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of a batch. Target: class numbers (B,)."""
        losses = self.process.loss(self.model, self.encode(batch["image"]), labels=batch["target"])
        return total(losses)

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return x, t and labels: the batch noised at the times and with the noise of the evaluation."""
        x = codec_of(self.model).encode(batch["image"])
        noise, shares = fixed_noise(batch["index"], x)
        t = self.process.times_at(shares)
        return {"x": self.process.noised(x, noise, t), "t": t, "labels": batch["target"]}

    def metrics(self) -> Any:
        """Return the task's metrics and loss (denoising, at fixed times and noise)."""
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
    """Return noise of `like`'s shape and shares in [0, 1), (B,), as functions of the images' indices, the shares spread evenly."""
    numbers = indices.tolist()
    noise = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(number)) for number in numbers]
    return torch.stack(noise).to(like), torch.tensor([number * GOLDEN_RATIO % 1 for number in numbers]).to(like)


def total(losses: dict[str, Tensor], **weights: float) -> dict[str, Tensor]:
    """Return the means of losses per sample (B,) by name, and as "loss" their weighted sum (default weight 1)."""
    means = {name: value.mean() for name, value in losses.items()}
    weighted = [weights.get(name, 1.0) * mean for name, mean in means.items()]
    return {"loss": torch.stack(weighted).sum(), **means}
