"""Inflation of image weights for video models: kernels over (h, w) become kernels over (t, h, w).

    image = create_model("uniformer_small", checkpoint="uniformer_small_in1k.pth")
    video = create_model("uniformer_video_small", num_classes=400)
    inflate(image, video)

"mean" repeats the kernel over time and divides it by the length: on a static clip the output equals that of the image, except at the ends
of the clip. "centre" places the kernel at the middle frame: every frame is processed like an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitarium.errors import UsageError, nearest

WAYS = ("mean", "centre")


def inflate_kernel(weight: Tensor, frames: int, how: str = "mean") -> Tensor:
    """Inflate an image kernel: (out, in, h, w) -> (out, in, frames, h, w).

    Args:
        weight: the image kernel.
        frames: length of the new axis.
        how: "mean" or "centre".

    Raises:
        UsageError: `how` has another value.
    """
    if how not in WAYS:
        raise UsageError(f"how must be {' or '.join(WAYS)}, got {how!r}{nearest(how, WAYS)}")
    if how == "mean":
        return weight.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
    inflated = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    inflated[:, :, frames // 2] = weight
    return inflated


@torch.no_grad()
def inflate(image: nn.Module, video: nn.Module, how: str = "mean") -> list[str]:
    """Copy the weights of an image model into the video model of the same architecture, in place.

    Args:
        image: source.
        video: target; tensors of the same name and shape are copied, kernels with an additional axis are inflated.
        how: "mean" or "centre".

    Returns:
        names of the target's tensors that were not filled (such as a head for other classes).

    Raises:
        UsageError: `how` has another value, or the two models have no tensor in common.
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
        raise UsageError(
            f"{type(image).__name__} and {type(video).__name__} have no tensor in common; inflate needs matching architectures"
        )
    return kept
