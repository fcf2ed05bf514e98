"""Training a denoiser: noise pictures (or their latents) by its process, learn to say how to go back; measured by what it makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from vitarium.generation.diffusion.codecs import codec_of
from vitarium.generation.diffusion.pipeline import process_of
from vitarium.generation.diffusion.process import parse_process
from vitarium.training import Learner, learner
from vitarium.training.base import Batch
from vitarium.training.settings import Section

if TYPE_CHECKING:
    from PIL import Image

SHEET_COLUMNS, SHEET_ROWS = 10, 4
GOLDEN_RATIO = (5**0.5 - 1) / 2


@learner("diffusion")
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

    usage = "vitarium generate {file}"
    primary_metric: tuple[str, Literal["min", "max"]] = ("loss", "min")

    def __init__(self, model: nn.Module, settings: Any = None):
        super().__init__(model, settings)
        model.objective = {"name": self.objective, **self.settings.model_dump(exclude_none=True)}  # type: ignore[assignment]
        self.process = process_of(model)
        self._judge: Any = None

    def encode(self, image: Tensor) -> Tensor:
        """Pictures of the preprocessing, in [-1, 1] -> what is denoised."""
        return codec_of(self.model).encode(image)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Target: class numbers (B,)."""
        losses = self.process.loss(self.model, self.encode(batch["image"]), labels=batch["target"])
        return total(losses)

    def metrics(self) -> Any:
        """loss (denoising, at fixed times and noise), frechet (see `Settings.judge`)."""
        from torchmetrics import MeanMetric

        from vitarium.generation.frechet import FrechetDistance, extractor

        parts: dict[str, Any] = {"loss": MeanMetric(nan_strategy="disable")}
        if self.settings.samples:
            self._judge = self._judge or extractor(self.settings.judge)
            parts["frechet"] = FrechetDistance(*self._judge)
        return nn.ModuleDict(parts)

    def evaluate_batch(self, model: nn.Module, batch: Batch, metrics: Any) -> None:
        """Target: class numbers (B,)."""
        image, labels = batch["image"], batch["target"]
        x = codec_of(model).encode(image)
        noise, shares = fixed_noise(batch["index"], x)
        losses = self.process.loss(model, x, noise=noise, t=self.process.times_at(shares), labels=labels)
        metrics["loss"].update(sum(losses.values()))
        if "frechet" in metrics and metrics["frechet"].made_count < self.settings.samples:
            metrics["frechet"].update(image / 2 + 0.5, real=True)
            metrics["frechet"].update(model.generate(labels, indices=batch["index"]), real=False)  # type: ignore[operator]

    def summary(self, metrics: Any) -> dict[str, Any]:
        return {name: metric.compute().item() for name, metric in metrics.items()}

    def pictures(self, model: nn.Module, batch: Batch) -> dict[str, Image.Image]:
        """samples: a column a class (the first ten), four pictures each, always from the same noise."""
        from vitarium.generation.pictures import grid

        columns = max(1, min(int(model.num_classes), SHEET_COLUMNS))  # type: ignore[arg-type]
        labels = torch.arange(columns).repeat(SHEET_ROWS)
        return {"samples": grid(model.generate(labels, seed=0), columns)}  # type: ignore[operator]


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
