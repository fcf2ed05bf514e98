"""Base classes of image and video backbones: an iterator over feature maps, and timm's model interface on top of it.

A subclass defines how its maps are computed (`forward_stages`) and their channels and strides (`stages`). Pooling, head, intermediate
features, gradient checkpointing, layer groups and input checks are implemented here.

Submodule names that the shared code relies on: `stem` (or `patch_embed`), `stages.K.downsample`, `stages.K.blocks.I` (or `blocks.I` at one
resolution), `norm` (on the map, before pooling), `head_norm` (on the pooled features), `head`.
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
from vitarium.nn.inputs import check_image

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean(tuple(range(2, x.ndim))),
    "max": lambda x: x.amax(tuple(range(2, x.ndim))),
}
"""Poolings by name: map (B, C, H, W), or video map (B, C, T, H, W), -> (B, C)."""


@dataclass(frozen=True)
class Stage:
    """A feature map of a backbone: channels, stride in pixels of the image, and stride in frames of a clip."""

    dim: int
    stride: int
    frame_stride: int = 1


class Backbone(nn.Module):
    """Base class of image backbones: floating-point images (B, in_chans, H, W) -> logits (B, num_classes).

    A subclass calls `super().__init__` and builds its submodules: a pyramid sets `stages` and optionally `stem`; other models override
    `forward_stages`. It may set `norm` or `head_norm`.

    Args:
        stages: channels and stride of each map that `forward_stages` yields, in order.
        num_classes: number of classes; 0 for no head (`forward` then returns pooled features).
        in_chans: channels of the image.
        drop_rate: dropout before the head.
        min_size: smallest height and width of the image, pixels.
    """

    pools: tuple[str, ...] = tuple(POOLS)
    """Names of the poolings that `reset_classifier` accepts, besides "" for none."""
    axes = "HW"
    """Axes of the input and of the maps after batch and channels."""
    first_conv: str | tuple[str, ...] | None = None
    """Name of the convolution that reads the image, for timm; None: the first one; () if it is no convolution."""
    preprocessing: Any = None
    """Preprocessing of input images (`vitarium.catalog.Preprocessing`); set by `create_model` and `load`."""
    stem: nn.Module
    stages: nn.ModuleList
    """Submodules of a pyramid, the stem being optional; see `forward_stages`."""
    labels: list[str] | None = None
    """Class names in the order of the logits; set by training and `load`."""

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

    # ---- defined by subclasses

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the map of each stage before the final norm, (B, dim_i, H / stride_i, W / stride_i), rounded as in the authors' code.

        The default is that of a pyramid: the optional `stem`, then each of `stages` on the previous map, with channels-last memory. A stage
        is called as stage(map, self.run_blocks).
        """
        x = image.contiguous(memory_format=torch.channels_last)
        x = self.stem(x) if hasattr(self, "stem") else x
        for stage in self.stages:
            x = stage(x, self.run_blocks)
            yield x

    # ---- forward passes

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the last map after the final norm, (B, num_features, h, w)."""
        self.check_image(image)
        for x in self.forward_stages(image):  # noqa: B007 - earlier maps are freed during the loop
            pass
        return self.norm(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, num_classes) of the last map, or with `pre_logits` its pooled and normed features (B, num_features).

        With global_pool "" the map is returned unchanged.
        """
        if self.global_pool == "":
            return features
        x = self.head_norm(self.pool(features))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def pool(self, features: Tensor) -> Tensor:
        """Pool the output of `forward_features` by `global_pool`: (B, C, h, w) -> (B, C)."""
        return POOLS[self.global_pool](features)

    def as_map(self, features: Tensor, image_size: Sequence[int]) -> Tensor:
        """Return the features of a stage as a map (B, C, h, w), given the height and width of the image. The default returns them as is."""
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
        """Return the maps of selected stages. Same interface as timm's `forward_intermediates`.

        Args:
            x: images, (B, in_chans, H, W).
            indices: stages: an int n for the last n, a list (negative indices count from the end), None for all.
            norm: apply the final norm to the map of the last stage.
            stop_early: stop after the last selected stage (only together with `intermediates_only`).
            output_fmt: "NCHW" ("NCTHW" for clips), the only supported format.
            intermediates_only: return only the maps.

        Returns:
            list of maps (B, dim_i, h_i, w_i); without `intermediates_only`, a pair (final features, maps).

        Raises:
            InputError: an index out of range or another output_fmt.
        """
        if output_fmt not in ("NCHW", f"NC{self.axes}"):  # timm's wrapper always passes the first
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
        """Resolve timm's stage indices (see `forward_intermediates`) to a list of non-negative ones.

        Raises:
            InputError: an index out of range.
        """
        return take_indices(indices, len(self.feature_info), type(self).__name__)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove modules that the selected stages do not need (later stages, norm, head), as timm's method. Return the stage indices."""
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
        """Run blocks in sequence, each called as block(x, *args); in training with gradient checkpointing if it is enabled."""
        checkpointing = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        for block in blocks:
            x = checkpoint(block, x, *args, use_reentrant=False) if checkpointing else block(x, *args)
        return x

    def fuse(self) -> Backbone:
        """Fold batch norms and parallel branches into adjacent layers for inference, in place; this cannot be undone.

        Outputs in evaluation mode stay equal to 1e-5. A fused model is in evaluation mode, cannot be trained further, and can only be saved
        as a state_dict().
        """
        for part in list(self.modules()):
            if fold := getattr(part, "fold", None):
                fold()
        return self.eval()

    # ---- input checks

    def check_image(self, image: Tensor) -> None:
        """Check that the model accepts an input.

        Raises:
            InputError: wrong rank, channels, layout, dtype, size or device; the message states the input and what is accepted.
        """
        check_image(self, image, self.in_chans, axes=self.axes, min_size=self.min_size)

    # ---- timm's interface

    def get_classifier(self) -> nn.Module:
        """Return the head: a linear layer, or the identity if num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a newly initialised one for `num_classes` (0: no head), and optionally the pooling.

        Args:
            global_pool: one of `pools` ("avg", "max", ...), or "" for no pooling, only without classes; None keeps the current one.

        Raises:
            InputError: another pooling, or no pooling with classes.
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
        """Return the names of parameters with two or more axes that get no weight decay (parameters with one axis never do)."""
        return set()

    def group_matcher(self, coarse: bool = False) -> Any:
        """Return layer groups for layer-wise decay in timm's format: stem, one group per block (per stage if `coarse`), head."""
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
        """Enable or disable gradient checkpointing: activations inside blocks are recomputed in the backward pass to save memory."""
        self.grad_checkpointing = enable

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's configuration of input and head. timm's factory sets it, without what only the module knows (pool_size, first_conv)."""
        if "_timm_cfg" in self.__dict__:
            return self.__dict__["_timm_cfg"]
        pre = self.preprocessing
        values = {} if pre is None else dict(mean=pre.mean, std=pre.std, interpolation=pre.interpolation, crop_pct=pre.crop_pct)
        size = 224 if pre is None else pre.image_size
        return dict(num_classes=self.num_classes, classifier="head", **values) | self._geometry((self.in_chans, size, size))

    @default_cfg.setter
    def default_cfg(self, cfg: dict[str, Any]) -> None:
        geometry = self._geometry(cfg.get("input_size") or (self.in_chans, 224, 224))
        self.__dict__["_timm_cfg"] = cfg | {key: value for key, value in geometry.items() if cfg.get(key) is None}

    def _geometry(self, input_size: tuple[int, ...]) -> dict[str, Any]:
        """Return timm's input_size, pool_size (size of the map before pooling, None for tokens) and first_conv (() for none)."""
        stride = int(self.feature_info[-1]["reduction"])  # type: ignore[call-overload]
        pool_size = tuple(-(-side // stride) for side in input_size[-2:]) if type(self).as_map is Backbone.as_map else None
        first = self.first_conv
        if first is None:
            first = next((name for name, part in self.named_modules() if isinstance(part, (nn.Conv2d, nn.Conv3d))), ())
        return dict(input_size=input_size, pool_size=pool_size, first_conv=first)

    pretrained_cfg = default_cfg
    """Alias under timm's newer name."""


class VideoBackbone(Backbone):
    """Base class of video backbones: floating-point clips (B, in_chans, T, H, W) -> logits (B, num_classes).

    Maps have the shape (B, dim_i, T / frame_stride_i, h_i, w_i).

    Args:
        min_frames: minimum number of frames of a clip.
        stages, options: see `Backbone`.
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
        """Inflate a kernel of an image checkpoint over the frames (see `vitarium.nn.inflation`); return None for any other tensor."""
        if tensor.ndim == 4 and len(shape) == 5 and tensor.shape == (*shape[:2], *shape[3:]):
            return inflate_kernel(tensor, shape[2])
        return None


def take_indices(indices: int | Sequence[int] | None, count: int, owner: str, kind: str = "stages") -> list[int]:
    """Resolve timm's feature indices to a list of non-negative ones.

    Args:
        indices: an int n for the last n, a list (negative indices count from the end), None for all.
        count: number of features.
        owner, kind: name of the model and of its features, for the error message.

    Raises:
        InputError: an index out of range.
    """
    if indices is None:
        return list(range(count))
    wanted = range(count - indices, count) if isinstance(indices, int) else [i + count if i < 0 else i for i in indices]
    if wrong := [i for i in wanted if not 0 <= i < count]:
        raise InputError(f"{owner} has {count} {kind} (0 to {count - 1}); {wrong} is not among them")
    return list(wanted)


def init_head(head: nn.Linear, std: float = 0.02) -> None:
    """Initialise a head in place with small random weights and a zero bias, so that it starts near the uniform prediction."""
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
