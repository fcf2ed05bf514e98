"""What every backbone of the house is, of images or of clips: an iterator of maps, and timm's contract on top of it.

A backbone says how its maps come about (`forward_stages`) and how wide and coarse they are (`stages`); pooling, head, intermediate
features, gradient checkpointing, layer groups and the checks at the door are here, once.

Names that a backbone keeps, so that the rest works by itself: `stem` (or `patch_embed`), `stages.K.downsample`, `stages.K.blocks.I` (or
`blocks.I` at one resolution), `norm` (on the map, before pooling), `head_norm` (on the pooled features), `head`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vitarium.errors import InputError
from vitarium.nn.inflation import inflate_kernel

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean(tuple(range(2, x.ndim))),
    "max": lambda x: x.amax(tuple(range(2, x.ndim))),
}
"""Map (B, C, H, W), or of a clip (B, C, T, H, W) -> (B, C)."""


@dataclass(frozen=True)
class Stage:
    """One map that a backbone gives out: its channels, the stride of its cells in pixels of the image, and of a clip also in frames."""

    dim: int
    stride: int
    frame_stride: int = 1


class Backbone(nn.Module):
    """Image (B, in_chans, H, W), floating point -> logits (B, num_classes).

    A subclass calls `super().__init__` and builds its parts: a pyramid `stages`, before them perhaps a `stem`; any other model defines
    `forward_stages`. It may set `norm` or `head_norm`.

    Args:
        stages: channels and stride of each map that `forward_stages` yields, in order.
        num_classes: classes of the head; 0 for none (`forward` then gives pooled features).
        in_chans: channels of the image.
        drop_rate: dropout before the head.
        min_size: smallest height and width of the image, pixels.
    """

    pools: tuple[str, ...] = tuple(POOLS)
    """Names of the poolings that `reset_classifier` takes, besides "" for none."""
    axes = "HW"
    """The axes of the input behind batch and channels; a map has the same."""
    preprocessing: Any = None
    """How an image becomes this model's input (vitarium.catalog.Preprocessing); set by `create_model` and `load`."""
    stem: nn.Module
    stages: nn.ModuleList
    """Parts of a pyramid, the first of them optional; see `forward_stages`."""
    labels: list[str] | None = None
    """Names of the classes, in the order of the logits; set by training and `load`."""

    def __init__(self, *, stages: Sequence[Stage], num_classes: int, in_chans: int = 3, drop_rate: float = 0.0, min_size: int = 1):
        super().__init__()
        self.in_chans = in_chans
        self.min_size = min_size
        self.drop_rate = drop_rate
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = stages[-1].dim
        self.global_pool = "avg"
        self.grad_checkpointing = False
        single = len(stages) == 1
        self.feature_info = [
            dict(num_chs=s.dim, reduction=s.stride, module="blocks" if single else f"stages.{i}") for i, s in enumerate(stages)
        ]
        self.norm: nn.Module = nn.Identity()
        self.head_norm: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    # ---- what a subclass defines

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yields the map of each stage before any final norm, (B, dim_i, H / stride_i, W / stride_i); rounded as the authors' code does.

        Here a pyramid's: `stem`, if there is one, then each of `stages` on the map before it, channels-last in memory. A stage is called
        as stage(map, run) with `run_blocks`.
        """
        x = image.contiguous(memory_format=torch.channels_last)
        x = self.stem(x) if hasattr(self, "stem") else x
        for stage in self.stages:
            x = stage(x, self.run_blocks)
            yield x

    # ---- the forward passes

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))

    def forward_features(self, image: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> the last map, normed, (B, num_features, h, w)."""
        self.check_image(image)
        for x in self.forward_stages(image):  # noqa: B007 - earlier maps are freed as the loop goes on
            pass
        return self.norm(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, num_features, h, w) -> logits (B, num_classes), or with `pre_logits` the pooled and normed features (B, num_features).

        With global_pool "" the map itself.
        """
        if self.global_pool == "":
            return features
        x = self.head_norm(self.pool(features))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def pool(self, features: Tensor) -> Tensor:
        """What `forward_features` gives, (B, C, h, w) -> (B, C), by `global_pool`."""
        return POOLS[self.global_pool](features)

    def as_map(self, features: Tensor, image_size: Sequence[int]) -> Tensor:
        """A stage's features as the map (B, C, h, w) of an image of this height and width. Here they are one already."""
        return features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of chosen stages, as timm's method of this name.

        Args:
            x: image, (B, in_chans, H, W).
            indices: which stages: an int for the last n, a list (negative counts from the end), None for all.
            norm: whether the last stage's map goes through the final norm.
            stop_early: whether to stop after the last chosen stage (only together with `intermediates_only`).
            output_fmt: "NCHW" ("NCTHW" for clips), the only form here.
            intermediates_only: whether to leave out the final features.

        Returns:
            the maps, (B, dim_i, h_i, w_i) each; without `intermediates_only`, a pair (final features, maps).

        Raises:
            InputError: an index out of range or another output_fmt.
        """
        if output_fmt not in ("NCHW", f"NC{self.axes}"):  # the first is what timm's wrapper asks for, whatever the model
            raise InputError(f"output_fmt must be 'NC{self.axes}', got {output_fmt!r}")
        self.check_image(x)
        chosen = self.take_indices(indices)
        last = len(self.feature_info) - 1
        size = x.shape[2:]
        maps: list[Tensor] = []
        for i, x in enumerate(self.forward_stages(x)):  # noqa: B020
            if i in chosen:
                maps.append(self.as_map(self.norm(x) if norm and i == last else x, size))
            if stop_early and intermediates_only and i == max(chosen):
                break
        return maps if intermediates_only else (self.norm(x), maps)

    def take_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Stage numbers from timm's way of naming them (see `forward_intermediates`).

        Raises:
            InputError: a number that no stage has.
        """
        count = len(self.feature_info)
        if indices is None:
            return list(range(count))
        wanted = range(count - indices, count) if isinstance(indices, int) else [i + count if i < 0 else i for i in indices]
        if wrong := [i for i in wanted if not 0 <= i < count]:
            raise InputError(f"{type(self).__name__} has {count} stages (0 to {count - 1}); {wrong} is not among them")
        return list(wanted)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen stages do not need (later stages, norm, head), as timm's method. Returns the stage numbers."""
        chosen = self.take_indices(indices)
        stages = getattr(self, "stages", None)
        if isinstance(stages, nn.ModuleList) and len(stages) == len(self.feature_info):
            self.stages = stages[: max(chosen) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.head_norm = nn.Identity()
            self.reset_classifier(0)
        return chosen

    def run_blocks(self, blocks: Iterable[Callable[..., Tensor]], x: Tensor, *args: Any) -> Tensor:
        """Blocks one after the other, each called as block(x, *args); in training under gradient checkpointing when that is on."""
        checkpointing = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        for block in blocks:
            x = checkpoint(block, x, *args, use_reentrant=False) if checkpointing else block(x, *args)
        return x

    def fuse(self) -> Backbone:
        """For deployment: fold what is constant in eval (batch norms, parallel branches) into the layers beside it; in place, for good.

        Outputs stay equal to 1e-5. A fused model is in eval mode, does not train on, and is saved by its state_dict() alone.
        """
        for part in list(self.modules()):
            if fold := getattr(part, "fold", None):
                fold()
        return self.eval()

    # ---- checks at the door

    def check_image(self, image: Tensor) -> None:
        """Refuse what the model cannot take, before any work.

        Raises:
            InputError: wrong rank, channels, layout, dtype or size; the message says what came and what is accepted.
        """
        if torch.compiler.is_compiling():
            return
        name, shape, rank = type(self).__name__, tuple(image.shape), 2 + len(self.axes)
        accepted = f"{name} takes a floating-point image (B, {self.in_chans}, {', '.join(self.axes)})"
        if image.ndim != rank:
            hint = "; add a batch axis with image[None]" if image.ndim == rank - 1 else ""
            raise InputError(f"{accepted}, got {image.ndim} axes {shape}{hint}")
        if shape[1] != self.in_chans:
            order = ", ".join(map(str, (0, rank - 1, *range(1, rank - 1))))
            hint = f"; the channels seem to come last: image.permute({order})" if shape[-1] == self.in_chans else ""
            hint = hint or f"; create the model with in_chans={shape[1]}"
            raise InputError(f"{accepted}, got {shape[1]} channels in {shape}{hint}")
        if not image.is_floating_point():
            raise InputError(f"{accepted}, got {image.dtype}; divide by 255 and normalise (model.preprocessing does it)")
        if min(shape[-2:]) < self.min_size:
            raise InputError(f"{name} takes images of at least {self.min_size}x{self.min_size} pixels, got {shape[-2]}x{shape[-1]}")
        weight = next(self.parameters(), image)
        if image.dtype != weight.dtype and not torch.is_autocast_enabled(image.device.type):
            raise InputError(f"{name} holds {weight.dtype} weights, got a {image.dtype} image; convert one of them with .to(dtype)")
        if image.device != weight.device:
            raise InputError(f"{name} is on {weight.device}, the image on {image.device}; move one of them with .to(device)")

    # ---- timm's contract

    def get_classifier(self) -> nn.Module:
        """The head: a linear layer, or identity where num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` (0: none), and another pooling: "avg", "max" or "" (no pooling; only without classes).

        Raises:
            InputError: another pooling, or none with classes.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in (*self.pools, "") or (pool == "" and num_classes > 0):
            raise InputError(
                f"global_pool must be one of {', '.join(map(repr, self.pools))}, or '' with num_classes=0; "
                f"got {global_pool!r} with num_classes={num_classes}"
            )
        self.num_classes, self.global_pool = num_classes, pool
        old = next(self.parameters())
        self.head = nn.Linear(self.num_features, num_classes).to(old.device, old.dtype) if num_classes > 0 else nn.Identity()
        if isinstance(self.head, nn.Linear):
            init_head(self.head)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes that take no weight decay (one-axis ones never do)."""
        return set()

    def group_matcher(self, coarse: bool = False) -> Any:
        """Layer groups for layer-wise decay, in timm's form: stem, one a block (one a stage if `coarse`), end."""
        return dict(
            stem=r"^(?:stem|patch_embed|pos_embed|cls_token)",
            blocks=r"^(?:stages|blocks)\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)", (99998,)),
                (r"^blocks\.(\d+)", None),
                (r"^(?:norm|head_norm)", (99999,)),
            ],
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: activations inside blocks are computed again in the backward pass."""
        self.grad_checkpointing = enable

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's description of the input and the head; timm's own factory sets it."""
        if "_timm_cfg" in self.__dict__:
            return self.__dict__["_timm_cfg"]
        kinds = (nn.Conv2d, nn.Conv3d, nn.Unfold)  # where patches are unfolded, that is what reads the image's channels
        first_conv = next((name for name, part in self.named_modules() if isinstance(part, kinds)), None)
        pre = self.preprocessing
        values = {} if pre is None else dict(mean=pre.mean, std=pre.std, interpolation=pre.interpolation, crop_pct=pre.crop_pct)
        size = 224 if pre is None else pre.image_size
        return dict(
            num_classes=self.num_classes,
            input_size=(self.in_chans, size, size),
            pool_size=None,
            first_conv=first_conv,
            classifier="head",
            **values,
        )

    @default_cfg.setter
    def default_cfg(self, cfg: dict[str, Any]) -> None:
        self.__dict__["_timm_cfg"] = cfg

    pretrained_cfg = default_cfg
    """The same, under timm's newer name."""


class VideoBackbone(Backbone):
    """Clip (B, in_chans, T, H, W), floating point -> logits (B, num_classes). Maps are (B, dim_i, T / frame_stride_i, h_i, w_i).

    Args:
        min_frames: fewest frames of a clip.
        The others as in `Backbone`.
    """

    axes = "THW"

    def __init__(self, *, stages: Sequence[Stage], min_frames: int = 1, **options: Any):
        super().__init__(stages=stages, **options)
        self.min_frames = min_frames
        for info, stage in zip(self.feature_info, stages, strict=True):
            info["frame_reduction"] = stage.frame_stride

    def check_image(self, image: Tensor) -> None:
        super().check_image(image)
        if not torch.compiler.is_compiling() and image.shape[2] < self.min_frames:
            raise InputError(f"{type(self).__name__} takes clips of at least {self.min_frames} frames, got {image.shape[2]}")

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """An image checkpoint's kernel, repeated over the frames (see `vitarium.nn.inflation`); None for any other tensor."""
        if tensor.ndim == 4 and len(shape) == 5 and tensor.shape == (*shape[:2], *shape[3:]):
            return inflate_kernel(tensor, shape[2])
        return None


def init_head(head: nn.Linear, std: float = 0.02) -> None:
    """Small random weights and a zero bias, in place: a fresh head starts near the uniform prediction."""
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
