"""PSNR and SSIM as in benchmarks of restoration: on luma of 8-bit images, without a border, averaged over images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WINDOW = 11
"""Side of SSIM's Gaussian window (sigma 1.5), pixels."""

STRIP = 512
"""Rows for which SSIM is computed at once."""


def luma(image: Tensor) -> Tensor:
    """Return BT.601 luma, 16 to 235, as MATLAB's rgb2ycbcr without rounding: (..., C, H, W) uint8, C 3 or 1 -> (..., 1, H, W) float64.

    An image with one channel is treated as grey, on the same range.
    """
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=image.device)
    if image.shape[-3] == 1:
        return 16 + image.double() / 255 * weights.sum()
    channels = image.unbind(-3)  # one after the other, because copies of a whole photograph in float64 need gigabytes
    red, green, blue = (channel.double().div_(255).mul_(weight) for channel, weight in zip(channels, weights, strict=True))
    return red.add_(green).add_(blue).add_(16).unsqueeze(-3)


def structural_similarity(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean SSIM of two images (1, 1, H, W) over the positions where a window lies inside; in strips, to bound the memory."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    edge, sums, count = WINDOW // 2, [], 0
    for top in range(0, one.shape[-2] - 2 * edge, STRIP):
        rows = slice(top, top + STRIP + 2 * edge)
        _, places = structural_similarity_index_measure(
            one[..., rows, :], other[..., rows, :], data_range=255.0, sigma=1.5, return_full_image=True
        )
        inside = places[..., edge:-edge, edge:-edge]
        sums.append(inside.sum())
        count += inside.numel()
    return torch.stack(sums).sum() / count


class LumaQuality(nn.Module):
    """PSNR (dB) and SSIM on luma, accumulated image by image.

    Args:
        border: pixels left out on each side; by convention the scale.

    SSIM is the original one: Gaussian windows, at positions where a window lies inside (torchmetrics' own mean includes mirrored borders,
    0.01 lower on small images). Images that are smaller than a window count for PSNR only.
    """

    def __init__(self, border: int):
        from torchmetrics import MeanMetric
        from torchmetrics.image import PeakSignalNoiseRatio

        super().__init__()
        self.border = border
        self.psnr = PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3), reduction="elementwise_mean")
        self.ssim = MeanMetric()

    def update(self, restored: Tensor, high: Tensor) -> None:
        """Add one pair of images, (C, H, W) uint8 each."""
        if restored.shape != high.shape:
            raise ValueError(f"the restored image has the shape {tuple(restored.shape)}, the true one {tuple(high.shape)}")
        rows, columns = (slice(b, side - b) for side in high.shape[-2:] for b in [min(self.border, (side - 1) // 2)])
        both = [luma(image)[None, :, rows, columns] for image in (restored, high)]
        self.psnr.update(*both)
        if min(both[0].shape[-2:]) >= WINDOW:
            self.ssim.update(structural_similarity(both[0], both[1]))

    def compute(self) -> dict[str, float]:
        """Return {"psnr": dB, "ssim": at most 1}, means over the images; a metric without images is left out."""
        parts = {"psnr": self.psnr, "ssim": self.ssim}
        return {name: float(part.compute()) for name, part in parts.items() if part.update_called}
