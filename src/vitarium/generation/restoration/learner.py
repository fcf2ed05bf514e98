"""Training of restoration: reconstruction loss, and PSNR and SSIM on luma, compared with bicubic enlargement."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import preprocessing_of
from vitarium.data.pairs import scale_of
from vitarium.data.transforms import Augment
from vitarium.errors import DataError, UsageError
from vitarium.generation.restoration.restorer import Restorer
from vitarium.generation.restoration.samples import PairTransform
from vitarium.training import Learner, learner
from vitarium.training.base import Batch
from vitarium.training.settings import Section

if TYPE_CHECKING:
    from vitarium.data import ImageData
    from vitarium.training import Recipe


@learner("restoration", task="restore")
class RestorationLearner(Learner):
    """Learn to restore low-resolution images, `model.scale` times enlarged.

    The recipe's `image_size` is the side of a training crop of the low-resolution image; of `augment` only `flip` is used: the probability
    of each flip and of the transposition. Evaluation is on whole images, in tiles if they are large.

    Raises:
        UsageError: the model is not for restoration.
    """

    class Settings(Section):
        """Settings of restoration.

        Args:
            loss: mean absolute error, mean square error, or Charbonnier's sqrt(x^2 + 1e-6).
            start: "interpolation" initialises a model without weights as an interpolation of its input (see its `start_as_interpolation`);
                the first steps of training then already improve on bicubic enlargement.
            tile, overlap: for large images in evaluation, pixels of the low-resolution image (see `tiling`).
        """

        loss: Literal["l1", "l2", "charbonnier"] = "l1"
        start: Literal["random", "interpolation"] = "random"
        tile: Annotated[int, Field(ge=0)] = 256
        overlap: Annotated[int, Field(ge=0)] = 32

    def __init__(self, model: nn.Module, settings: Settings | None = None):
        if not isinstance(model, Restorer):
            raise UsageError(f"a {type(model).__name__} does not restore images; 'vitarium models drct' lists models that do")
        super().__init__(model, settings)
        self.scale = model.scale

    @classmethod
    def create(
        cls, name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> RestorationLearner:
        made = super().create(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint)
        assert isinstance(made, RestorationLearner)
        if made.settings.start == "interpolation" and checkpoint is None and not pretrained:
            if not hasattr(made.model, "start_as_interpolation"):
                raise UsageError(f"{name} cannot start as an interpolation; take objective.start=random")
            made.model.start_as_interpolation()  # type: ignore[operator]
        scale = scale_of(data.train)
        if scale not in (None, made.scale):
            raise DataError(
                f"{name} enlarges images {made.scale} times, but the high-resolution images of {data.name} are {scale} times larger; "
                f"use another model, or model_arguments.scale={scale}"
            )
        return made

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of a batch. Image: (B, C, H, W) in 0..1; target: (B, C, scale H, scale W)."""
        restored, target = self.model(batch["image"]), batch["target"]
        if self.settings.loss == "l1":
            return {"loss": F.l1_loss(restored, target)}
        error = (restored - target).square()
        return {"loss": (error + 1e-6).sqrt().mean() if self.settings.loss == "charbonnier" else error.mean()}

    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the centres of the low-resolution images, all of one size: at most the model's own."""
        side = min(preprocessing_of(self.model).image_size, *(n for low in batch["low"] for n in low.shape[1:]))
        corners = [[(n - side) // 2 for n in low.shape[1:]] for low in batch["low"]]
        crops = [low[:, y : y + side, x : x + side] for low, (y, x) in zip(batch["low"], corners, strict=True)]
        return {"image": torch.stack(crops).float() / 255}

    def transform(self, augment: Augment | None) -> Callable[..., Any]:
        if augment is None:
            return super().transform(None)
        if augment != Augment(flip=augment.flip):
            given = [key for key, value in augment.model_dump().items() if key != "flip" and value != Augment.model_fields[key].default]
            raise UsageError(f"restoration supports only augment.flip, got augment.{given[0]}: both images of a pair must stay aligned")
        channels = int(self.model.in_chans)  # type: ignore[arg-type]
        return PairTransform(self.scale, channels, crop=preprocessing_of(self.model).image_size, flip=augment.flip)
