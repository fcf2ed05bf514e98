"""Learning to restore: the mean absolute error to the true picture, measured by PSNR and SSIM on luma beside bicubic enlargement."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import preprocessing_of
from vitarium.data.pairs import scale_of
from vitarium.data.transforms import Augment
from vitarium.errors import DataError, UsageError
from vitarium.generation.restoration.metrics import LumaQuality
from vitarium.generation.restoration.restorer import Restorer
from vitarium.generation.restoration.samples import PairTransform, enlarged
from vitarium.generation.restoration.tiling import restore_tensor, to_picture
from vitarium.training import Learner, learner
from vitarium.training.base import Batch
from vitarium.training.settings import Section

if TYPE_CHECKING:
    from vitarium.data import ImageData
    from vitarium.training import Recipe

SHOWN, SHOWN_SIDE = 3, 192
"""Held-out pictures that are drawn after an evaluation, and how much of each, pixels of the result."""


@learner("restoration")
class RestorationLearner(Learner):
    """Low picture -> high picture, `model.scale` times as large.

    The recipe's `image_size` is the side of a training crop of the low picture; of `augment` only `flip` has a meaning here: the chance
    of each flip and of the transposition. Whole pictures are measured, in tiles where they are large.

    Raises:
        UsageError: the model restores nothing.
    """

    class Settings(Section):
        """
        Args:
            loss: mean absolute error, mean square error, or Charbonnier's sqrt(x^2 + 1e-6).
            start: "interpolation" lets a model without weights begin as an interpolation of its input (see its `start_as_interpolation`);
                a short training then gains on bicubic enlargement from its first steps on.
            tile, overlap: of large pictures when they are measured, pixels of the low picture (see `tiling`).
        """

        loss: Literal["l1", "l2", "charbonnier"] = "l1"
        start: Literal["random", "interpolation"] = "random"
        tile: Annotated[int, Field(ge=0)] = 256
        overlap: Annotated[int, Field(ge=0)] = 32

    data_task = "pairs"
    default_data = "photos"
    usage = "vitarium restore IMAGE --model {file} --output FOLDER"
    primary_metric = ("psnr", "max")

    def __init__(self, model: nn.Module, settings: Settings | None = None):
        if not isinstance(model, Restorer):
            raise UsageError(f"a {type(model).__name__} does not restore pictures; 'vitarium models drct' lists models that do")
        super().__init__(model, settings)
        self.scale = model.scale

    @classmethod
    def create(
        cls, name: str, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
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
                f"{name} makes pictures {made.scale} times larger, the high pictures of {data.name} are {scale} times larger; "
                f"take another model, or model_arguments.scale={scale}"
            )
        return made

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Image: (B, C, H, W) in 0..1; target: (B, C, scale H, scale W)."""
        restored, target = self.model(batch["image"]), batch["target"]
        if self.settings.loss == "l1":
            return {"loss": F.l1_loss(restored, target)}
        error = (restored - target).square()
        return {"loss": (error + 1e-6).sqrt().mean() if self.settings.loss == "charbonnier" else error.mean()}

    # ---- samples

    def transform(self, augment: Augment | None) -> Callable[..., Any]:
        channels = int(self.model.in_chans)  # type: ignore[arg-type]
        if augment is None:
            return PairTransform(self.scale, channels)
        if augment != Augment(flip=augment.flip):
            given = [key for key, value in augment.model_dump().items() if key != "flip" and value != Augment.model_fields[key].default]
            raise UsageError(f"restoration knows augment.flip alone, got augment.{given[0]}: pairs must stay pairs")
        return PairTransform(self.scale, channels, crop=preprocessing_of(self.model).image_size, flip=augment.flip)

    @staticmethod
    def collate(samples: list[tuple[Tensor, Any]]) -> Batch:
        """Training crops are stacked. Whole pictures differ in size and stay lists of uint8, under "low" and "target"; then "image" holds
        nothing but the number of samples."""
        if samples and samples[0][0].is_floating_point():
            low, high = (torch.stack(part) for part in zip(*samples, strict=True))
            return {"image": low, "target": high}
        return {"image": torch.empty(len(samples), 0), "low": [low for low, _ in samples], "target": [high for _, high in samples]}

    # ---- measuring

    def metrics(self) -> nn.ModuleDict:
        """PSNR and SSIM on luma, `scale` pixels of the border left aside, of the model and of bicubic enlargement."""
        return nn.ModuleDict({name: LumaQuality(self.scale) for name in ("restored", "bicubic")})

    def evaluate_batch(self, model: nn.Module, batch: Batch, metrics: Any) -> None:
        for low, high in zip(batch["low"], batch["target"], strict=True):
            if low.shape[1] * self.scale != high.shape[1] or low.shape[2] * self.scale != high.shape[2]:
                raise DataError(
                    f"the model makes {low.shape[2]}x{low.shape[1]} pixels {self.scale} times larger, the true picture has "
                    f"{high.shape[2]}x{high.shape[1]}; take data of that scale"
                )
            metrics["restored"].update(self._restored(model, low).to(high.device), high)
            metrics["bicubic"].update(enlarged(low, self.scale), high)

    def summary(self, metrics: Any) -> dict[str, Any]:
        return metrics["restored"].compute() | {f"bicubic_{name}": value for name, value in metrics["bicubic"].compute().items()}

    def _restored(self, model: nn.Module, low: Tensor) -> Tensor:
        return restore_tensor(model, low, tile=self.settings.tile, overlap=self.settings.overlap)  # type: ignore[arg-type]

    # ---- what people see

    def pictures(self, model: nn.Module, batch: Batch) -> dict[str, Image.Image]:
        """Rows of one picture each: bicubic enlargement, the model's, the truth; the middle of each."""
        rows = []
        for low, high in list(zip(batch["low"], batch["target"], strict=True))[:SHOWN]:
            side = SHOWN_SIDE // self.scale
            top, left = (max(0, n - side) // 2 for n in low.shape[1:])
            low = low[:, top : top + side, left : left + side]
            high = high[:, top * self.scale :, left * self.scale :][:, : low.shape[1] * self.scale, : low.shape[2] * self.scale]
            row = torch.cat([enlarged(low, self.scale).cpu(), self._restored(model, low), high.cpu()], 2)
            rows.append(F.pad(row, (0, 3 * SHOWN_SIDE - row.shape[2], 0, 0)))
        return {"restored": to_picture(torch.cat(rows, 1))}

    def answers(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Size of each restored picture, which `vitarium predict --output` writes."""
        restored = [self._restored(model, low) for low in batch["low"]]
        return [{"width": r.shape[2], "height": r.shape[1], "_restored": to_picture(r)} for r in restored]

    def picture_of(self, picture: Image.Image, answer: dict[str, Any]) -> Image.Image | None:
        return answer["_restored"]
