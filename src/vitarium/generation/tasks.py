"""Tasks of generators: generate images of classes, and encode images into codes and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from vitarium.training.tasks import Metric, Task, task
from vitarium.training.tasks.base import Batch, match_classes

if TYPE_CHECKING:
    from PIL import Image

    from vitarium.data import ImageData

COLUMNS, ROWS = 10, 4
"""Size of a sheet of samples: classes, and images per class."""


@task("generate")
class Generate(Task):
    """Generate images of given classes. Target: int64 (), the class of a real image. The model is a `vitarium.generation.Generator`.

    Args:
        judge: feature extractor of the Fréchet distance: "pixels" (8x8 grey levels), a model's name, or a file.
        samples: images that are generated for the Fréchet distance at an evaluation, in each process; 0: no distance.
    """

    judge: str = "pixels"
    samples: Annotated[int, Field(ge=0)] = 256

    usage = "vitarium generate {file}"
    no_answer = "'vitarium generate FILE' makes images with it"
    eager_only = "a sampler calls the model in many ways"
    conditions = True
    own_models = True
    mergeable = False  # a part has no count of the images that the other parts generate

    @property
    def primary(self) -> Metric:
        return Metric("frechet", "min", title="Fréchet distance")

    def match(self, model: Any, data: ImageData) -> ImageData:
        """Renumber the data's classes by their names, for a model that takes classes.

        Raises:
            DataError: a class that the model does not have.
        """
        return match_classes(model, data, lambda numbers: numbers.__getitem__) if getattr(model, "num_classes", 0) else data

    def metrics(self, model: nn.Module) -> Any:
        """Return frechet, the Fréchet distance of generated images to held-out ones of the same classes, in features of `judge`."""
        if not self.samples:
            return nn.ModuleDict()
        from vitarium.generation.frechet import FrechetDistance, extractor

        return nn.ModuleDict({"frechet": FrechetDistance(*extractor(self.judge))})

    def update(self, metrics: Any, model: Any, batch: Batch) -> None:
        left = self.samples - int(metrics["frechet"].made_count) if "frechet" in metrics else 0
        if left > 0:
            metrics["frechet"].update(batch["image"][:left] / 2 + 0.5, real=True)
            metrics["frechet"].update(model.generate(batch["target"][:left], indices=batch["index"][:left]), real=False)

    def summary(self, metrics: Any, model: nn.Module) -> dict[str, Any]:
        return {name: metric.compute().item() for name, metric in metrics.items()}

    def sheets(self, model: Any, batch: Batch) -> dict[str, Image.Image]:
        """Draw "samples", one column per class (the first ten) of four images, always from the same noise."""
        from vitarium.generation.grids import grid

        columns = max(1, min(int(model.num_classes), COLUMNS))
        return {"samples": grid(model.generate(torch.arange(columns).repeat(ROWS), seed=0), columns)}


@task("autoencode")
class Autoencode(Task):
    """Encode images into codes and decode them. The model has `encode` and `decode`; images are in [-1, 1]."""

    data_kind = "image"
    own_models = True
    result_kind = "codes"
    eager_only = "codes and images are made by two parts of the model, and a graph has one"

    @property
    def primary(self) -> Metric:
        return Metric("psnr", "max", "dB", title="PSNR")

    def metrics(self, model: Any) -> Any:
        """Return psnr (decibels) and usage, the share of the codes that at least one image uses."""
        from torchmetrics import Metric as Accumulator
        from torchmetrics.image import PeakSignalNoiseRatio

        class Usage(Accumulator):
            seen: Tensor

            def __init__(self, count: int):
                super().__init__()
                self.add_state("seen", torch.zeros(count), dist_reduce_fx="sum")

            def update(self, codes: Tensor) -> None:
                self.seen += codes.flatten().bincount(minlength=len(self.seen))

            def compute(self) -> Tensor:
                return (self.seen > 0).float().mean()

        return nn.ModuleDict({"psnr": PeakSignalNoiseRatio(data_range=(-1.0, 1.0)), "usage": Usage(model.vocab_size)})

    def update(self, metrics: Any, model: Any, batch: Batch) -> None:
        codes = model.encode(batch["image"])
        metrics["psnr"].update(model.decode(codes).float(), batch["image"].float())
        metrics["usage"].update(torch.cat(codes, 1))

    def summary(self, metrics: Any, model: nn.Module) -> dict[str, Any]:
        return {name: metric.compute().tolist() for name, metric in metrics.items()}

    def answers(self, model: Any, batch: Batch, *, limit: int = 5) -> list[dict[str, Any]]:
        """Return the codes of each image, one list per scale, and the psnr (decibels) of the decoded image."""
        codes = model.encode(batch["image"])
        made = model.decode(codes)
        psnr = -10 * ((made - batch["image"]) / 2).square().mean((1, 2, 3)).log10()
        return [
            {"psnr": psnr[i].item(), "codes": [scale[i].tolist() for scale in codes], "_made": (made[i].float() + 1) / 2}
            for i in range(len(made))
        ]

    def draw(self, image: Image.Image, answer: dict[str, Any]) -> Image.Image:
        """Return the decoded image."""
        from vitarium.generation.grids import to_image

        return to_image(answer["_made"])

    def sheets(self, model: Any, batch: Batch) -> dict[str, Image.Image]:
        """Draw "reconstructions": images above their decoded codes."""
        from vitarium.generation.grids import grid

        image = batch["image"][:COLUMNS]
        return {"reconstructions": grid((torch.cat([image, model(image)]) + 1) / 2, len(image))}
