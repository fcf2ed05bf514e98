"""Reconstruction of hidden patches: the task of masked autoencoders, with its errors and drawings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog.create import preprocessing_of
from vitarium.ops.patches import patchify, unpatchify
from vitarium.training.tasks import Metric, Task, task
from vitarium.training.tasks.base import Batch

if TYPE_CHECKING:
    from PIL import Image

SHOWN = 8
"""Number of images on a sheet."""


@task("reconstruct")
class Reconstruct(Task):
    """Reconstruct the hidden patches of an image. The mask of a held-out image depends only on its index, so that evaluations are
    comparable.

    The model maps (image, noise, mask_ratio) to a `Reconstruction` and has `patch_size`.

    Args:
        mask_ratio: share of patches that are hidden.
        norm_targets: whether each patch's pixels are normalised before they are compared.
    """

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    norm_targets: bool = True

    own_models = True
    data_kind = "image"
    usage = "vitarium probe {file} --data DATA"
    result_kind = "image"

    @property
    def primary(self) -> Metric:
        return Metric("loss", "min")

    def targets(self, model: Any, image: Tensor) -> Tensor:
        """Return the target of the prediction, (B, L, p p c), float32 at least."""
        patches = patchify(image, model.patch_size)
        return normalised(patches)[0] if self.norm_targets else patches

    def masked(self, model: Any, batch: Batch) -> Any:
        """Return the reconstruction of a held-out batch."""
        image = batch["image"]
        count = image.shape[-2] // model.patch_size * (image.shape[-1] // model.patch_size)
        return model(image, mask_noise(batch["index"], count).to(image.device), mask_ratio=self.mask_ratio)

    def metrics(self, model: nn.Module) -> Any:
        """Return loss (of hidden patches) and explained, 1 - loss / loss of each image's visible mean colour."""
        from torchmetrics import MeanMetric

        return nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in ("loss", "plain")})

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        made, targets, channels = self.masked(model, batch), self.targets(model, batch["image"]), batch["image"].shape[1]
        seen = (1 - made.hidden)[..., None]
        plain = (targets.unflatten(2, (-1, channels)).mean(2) * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        plain = plain.repeat(1, 1, targets.shape[2] // channels)
        for name, guess in (("loss", made.prediction), ("plain", plain)):
            metrics[name].update((patch_errors(guess, targets) * made.hidden).sum(1) / made.hidden.sum(1))

    def summary(self, metrics: Any, model: nn.Module) -> dict[str, Any]:
        loss, plain = (metrics[name].compute().item() for name in ("loss", "plain"))
        return {"loss": loss, "explained": 1 - loss / plain if plain else float("nan")}

    # ---- drawings

    def triplets(self, model: Any, batch: Batch) -> Tensor:
        """Return the image, its visible part and the reconstruction side by side: uint8 (B, H, 3 W, 3) on the CPU."""
        image, made = batch["image"], self.masked(model, batch)
        patches, p = patchify(image, model.patch_size), model.patch_size
        grid = image.shape[-2] // p, image.shape[-1] // p
        painted = made.prediction.to(patches)
        if self.norm_targets:
            _, mean, deviation = normalised(patches)
            painted = painted * deviation + mean
        hidden = made.hidden[..., None].to(patches)
        restored = unpatchify(painted * hidden + patches * (1 - hidden), p, grid)
        seen = unpatchify((1 - hidden).expand_as(patches), p, grid)
        pre = preprocessing_of(model)
        mean, std = (torch.tensor(values, device=image.device).view(-1, 1, 1) for values in (pre.mean, pre.std))
        shown = [image * std + mean, (image * std + mean) * seen + 0.5 * (1 - seen), restored * std + mean]
        pixels = (torch.cat(shown, 3).float() * 255).round().clamp(0, 255).byte()
        return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu()

    def sheets(self, model: nn.Module, batch: Batch) -> dict[str, Image.Image]:
        """Draw "reconstruction": held-out images as original, visible part, reconstruction; two in a row."""
        few = {name: value[:SHOWN] for name, value in batch.items() if isinstance(value, Tensor)}
        rows = self.triplets(model, few)
        rows = F.pad(rows, (0, 0, 2, 2, 2, 2), value=255)
        if len(rows) % 2 == 0:
            rows = torch.cat([rows[0::2], rows[1::2]], 2)
        return {"reconstruction": _enlarged(rows.flatten(0, 1))}

    def answers(self, model: nn.Module, batch: Batch, *, limit: int = 5) -> list[dict[str, Any]]:
        """Return `reconstruction_error`: mean squared error of the hidden patches, in the units of the loss."""
        made = self.masked(model, batch)
        errors = (patch_errors(made.prediction, self.targets(model, batch["image"])) * made.hidden).sum(1) / made.hidden.sum(1)
        triplets = self.triplets(model, batch).numpy()
        return [{"reconstruction_error": float(e), "_triplet": t} for e, t in zip(errors.tolist(), triplets, strict=True)]

    def draw(self, image: Image.Image, answer: dict[str, Any]) -> Image.Image | None:
        """Draw the image, its visible part and the reconstruction."""
        return _enlarged(torch.from_numpy(answer["_triplet"]))


def mask_noise(indices: Tensor, count: int) -> Tensor:
    """Return the noise that determines the masks of `count` patches, (B, count), as a function of the images' indices (B,)."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(int(index))) for index in indices])


def normalised(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return patches (B, L, n) with mean 0 and variance 1 each, and their means and deviations (B, L, 1)."""
    mean = patches.mean(2, keepdim=True)
    deviation = (patches.var(2, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation


def patch_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each patch, (B, L, n), (B, L, n) -> (B, L); at least in float32."""
    exact = torch.float64 if target.dtype is torch.float64 else torch.float32
    return (prediction.to(exact) - target.to(exact)).square().mean(2)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values at which mask is 1, over the whole batch."""
    return (values * mask).sum() / mask.sum()


def _enlarged(pixels: Tensor) -> Image.Image:
    """Enlarge small images (H, W, 3) by a whole factor to at least 480 pixels of width."""
    from PIL import Image

    times = max(1, 480 // pixels.shape[1])
    return Image.fromarray(pixels.numpy().repeat(times, 0).repeat(times, 1))
