"""Restoration: a low-quality image becomes a high-quality one, `model.scale` times as large."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.errors import DataError
from vitarium.generation.restoration.samples import PairTransform, enlarged
from vitarium.generation.restoration.tiling import restore_tensor, to_image
from vitarium.training.tasks import Metric, Task, task
from vitarium.training.tasks.base import Batch

if TYPE_CHECKING:
    from PIL import Image

SHOWN, SHOWN_SIDE = 3, 192
"""Number of images on a sheet, and the side of the crop of each, pixels of the result."""


@task("restore")
class Restore(Task):
    """Restore an image. Metrics are computed on whole images, restored in tiles if they are large.

    Target: the true image, uint8 (C, scale H, scale W). The model is a `Restorer`.

    Args:
        tile, overlap: for large images, pixels of the low-resolution image (see `tiling`); tile 0: no tiling.
    """

    tile: Annotated[int, Field(ge=0)] = 256
    overlap: Annotated[int, Field(ge=0)] = 32

    own_models = True
    data_kind = "pairs"
    default_data = "photos"
    usage = "vitarium restore IMAGE --model {file} --output FOLDER"
    result_kind = "image"
    eager_only = "it restores images of every size, and a graph has one"

    @property
    def primary(self) -> Metric:
        return Metric("psnr", "max", "dB", title="PSNR")

    def transform(self, model: Any) -> Callable[..., Any]:
        return PairTransform(model.scale, int(model.in_chans))

    @staticmethod
    def collate(samples: list[tuple[Tensor, Any]]) -> Batch:
        """Stack training crops. Whole images differ in size and stay lists of uint8 under "low" and "target"; "image" is then (B, 0)."""
        if samples and samples[0][0].is_floating_point():
            low, high = (torch.stack(part) for part in zip(*samples, strict=True))
            return {"image": low, "target": high}
        return {"image": torch.empty(len(samples), 0), "low": [low for low, _ in samples], "target": [high for _, high in samples]}

    def metrics(self, model: Any) -> nn.ModuleDict:
        """Return PSNR and SSIM on luma without `scale` pixels of the border, for the model and for bicubic enlargement."""
        from vitarium.generation.restoration.metrics import LumaQuality

        return nn.ModuleDict({name: LumaQuality(model.scale) for name in ("restored", "bicubic")})

    def update(self, metrics: Any, model: Any, batch: Batch) -> None:
        """Add a batch.

        Raises:
            DataError: the true images have another scale.
        """
        scale = model.scale
        for low, high in zip(batch["low"], batch["target"], strict=True):
            if low.shape[1] * scale != high.shape[1] or low.shape[2] * scale != high.shape[2]:
                raise DataError(
                    f"the model makes {low.shape[2]}x{low.shape[1]} pixels {scale} times larger, the true image has "
                    f"{high.shape[2]}x{high.shape[1]}; take data of that scale"
                )
            metrics["restored"].update(self.restored(model, low).to(high.device), high)
            metrics["bicubic"].update(enlarged(low, scale), high)

    def summary(self, metrics: Any, model: nn.Module) -> dict[str, Any]:
        return metrics["restored"].compute() | {f"bicubic_{name}": value for name, value in metrics["bicubic"].compute().items()}

    def restored(self, model: Any, low: Tensor) -> Tensor:
        """Restore a low-resolution image, uint8 (C, H, W) -> (C, scale H, scale W)."""
        return restore_tensor(model, low, tile=self.tile, overlap=self.overlap)

    def answers(self, model: nn.Module, batch: Batch, *, limit: int = 5) -> list[dict[str, Any]]:
        """Return the size of each restored image; `draw` gives the image."""
        restored = [self.restored(model, low) for low in batch["low"]]
        return [{"width": r.shape[2], "height": r.shape[1], "_restored": to_image(r)} for r in restored]

    def draw(self, image: Image.Image, answer: dict[str, Any]) -> Image.Image | None:
        """Return the restored image."""
        return answer["_restored"]

    def sheets(self, model: Any, batch: Batch) -> dict[str, Image.Image]:
        """Draw "restored": the centre of each image enlarged bicubically, restored by the model, and the true one."""
        rows, scale = [], model.scale
        for low, high in list(zip(batch["low"], batch["target"], strict=True))[:SHOWN]:
            side = SHOWN_SIDE // scale
            top, left = (max(0, n - side) // 2 for n in low.shape[1:])
            low = low[:, top : top + side, left : left + side]
            high = high[:, top * scale :, left * scale :][:, : low.shape[1] * scale, : low.shape[2] * scale]
            row = torch.cat([enlarged(low, scale).cpu(), self.restored(model, low), high.cpu()], 2)
            rows.append(F.pad(row, (0, 3 * SHOWN_SIDE - row.shape[2], 0, 0)))
        return {"restored": to_image(torch.cat(rows, 1))}
