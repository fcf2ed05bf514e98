"""Image weights for video models: a kernel over (h, w) becomes one over (t, h, w).

    image = create_model("uniformer_small", checkpoint="uniformer_small_in1k.pth")
    video = create_model("uniformer_video_small", num_classes=400)
    inflate(image, video)

"mean" repeats the kernel over time and divides by its length: a clip that stands still gives what the image gives, away from the clip's
ends. "centre" keeps the kernel at the middle frame: each frame gives what it would give as an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitarium.errors import UsageError, nearest

WAYS = ("mean", "centre")


def inflate_kernel(weight: Tensor, frames: int, how: str = "mean") -> Tensor:
    """(out, in, h, w) -> (out, in, frames, h, w).

    Args:
        weight: an image kernel.
        frames: length of the new axis.
        how: "mean" or "centre".

    Raises:
        UsageError: another way.
    """
    if how not in WAYS:
        raise UsageError(f"kernels are inflated by {' or '.join(WAYS)}, got {how!r}{nearest(how, WAYS)}")
    if how == "mean":
        return weight.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
    inflated = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    inflated[:, :, frames // 2] = weight
    return inflated


@torch.no_grad()
def inflate(image: nn.Module, video: nn.Module, how: str = "mean") -> list[str]:
    """Give a video model the weights of the image model of the same parts, in place.

    Args:
        image: where the weights come from.
        video: where they go; tensors of the same name and shape are copied, kernels with one axis more are inflated.
        how: "mean" or "centre".

    Returns:
        names of the video model's tensors that stay as they were (such as a head of other classes).

    Raises:
        UsageError: another way, or the two models have no tensor in common.
    """
    source, kept = image.state_dict(), []
    for name, target in video.state_dict().items():
        tensor = source.get(name)
        if tensor is not None and tensor.ndim == 4 and target.ndim == 5:
            tensor = inflate_kernel(tensor, target.shape[2], how)
        if tensor is None or tensor.shape != target.shape:
            kept.append(name)
        else:
            target.copy_(tensor)
    if len(kept) == len(video.state_dict()):
        raise UsageError(f"{type(image).__name__} and {type(video).__name__} share no tensor: inflate needs two models of the same parts")
    return kept
