"""Visual towers of open_clip behind timm's conventions.

    clip, _, _ = open_clip.create_model_and_transforms("ViT-B-32", pretrained=FILE)
    model = OpenClipTower(clip)
    vitarium.probe(model, "flowers/")

B batch, N tokens, C channels, H and W sides of the image in pixels, h and w of a map in cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vitarium.catalog.preprocessing import Preprocessing
from vitarium.errors import InputError, UsageError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's normalization, which open_clip uses unless a model records another one."""


class OpenClipTower(nn.Module):
    """The visual tower of an open_clip model: image (B, 3, H, W) -> logits (B, num_classes), or without classes its image features.

    Args:
        model: an open_clip model with a `visual` part, or that part itself: its VisionTransformer.
        num_classes: classes of a new linear head on the image features; 0 for none.

    Raises:
        UsageError: the visual part is of another class (timm's inside open_clip, a ResNet), whose features open_clip does not separate.
    """

    labels: list[str] | None = None

    def __init__(self, model: Any, num_classes: int = 0):
        super().__init__()
        visual = getattr(model, "visual", model)
        if not all(hasattr(visual, part) for part in ("_embeds", "_pool", "transformer", "forward_intermediates")):
            raise UsageError(f"{type(visual).__name__} is no VisionTransformer of open_clip 2.30 or later; use its timm model directly")
        self.visual = visual
        size = visual.image_size[0] if isinstance(visual.image_size, tuple | list) else visual.image_size
        mean, std = getattr(visual, "image_mean", None) or MEAN, getattr(visual, "image_std", None) or STD
        self.preprocessing = Preprocessing(size, tuple(mean), tuple(std), "bicubic", 1.0)
        width, patch = visual.conv1.out_channels, visual.patch_size[0]
        count = len(visual.transformer.resblocks)
        self.feature_info = [dict(num_chs=width, reduction=patch, module=f"visual.transformer.resblocks.{i}") for i in range(count)]
        self.num_features = width
        self.head_hidden_size = visual.output_dim
        self.num_classes = num_classes
        self.head: nn.Module = nn.Linear(visual.output_dim, num_classes).to(visual.conv1.weight) if num_classes else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the tokens after the blocks, (B, N, C), the class token first; open_clip's final norm is part of its pooling."""
        if image.shape[-2:] != (self.preprocessing.image_size,) * 2:
            sides = "x".join(map(str, image.shape[-2:]))
            raise InputError(f"this open_clip tower takes images of {self.preprocessing.image_size} pixels a side, got {sides}")
        return self.visual.transformer(self.visual._embeds(image))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits from the output of `forward_features`, or with `pre_logits` open_clip's image features, (B, output_dim)."""
        pooled, _ = self.visual._pool(features)
        if self.visual.proj is not None:
            pooled = pooled @ self.visual.proj
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the maps of chosen blocks, as timm's method of this name.

        Args:
            x: image, (B, 3, H, W).
            indices: an int for the last n, a list, None for all.
            return_prefix_tokens: whether to give each as a pair (map, class token (B, 1, C)).
            norm: whether to apply the final norm to them.
            stop_early: whether to stop after the last chosen block (only together with `intermediates_only`).
            output_fmt: "NCHW" or "NLC".
            intermediates_only: whether to leave out the final features.

        Raises:
            InputError: another output_fmt.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise InputError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        given: Any = list(indices) if indices is not None and not isinstance(indices, int) else indices
        out = self.visual.forward_intermediates(
            x,
            indices=given,
            stop_early=stop_early and intermediates_only,
            normalize_intermediates=norm,
            intermediates_only=True,
            output_fmt=output_fmt,
            output_extra_tokens=True,
        )
        maps = out["image_intermediates"]
        if return_prefix_tokens:
            maps = list(zip(maps, out["image_intermediates_prefix"], strict=True))
        return maps if intermediates_only else (self.forward_features(x), maps)

    def get_classifier(self) -> nn.Module:
        """The head: a linear layer, or identity where there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes` (0: none). The pooling is the model's own: `global_pool` must be None.

        Raises:
            UsageError: another pooling.
        """
        if global_pool is not None:
            raise UsageError(f"open_clip's towers have one pooling, their own; leave global_pool out, got {global_pool!r}")
        like = self.visual.conv1.weight
        self.head = nn.Linear(self.visual.output_dim, num_classes).to(like) if num_classes else nn.Identity()
        self.num_classes, self.labels = num_classes, None

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters with two or more axes that are excluded from weight decay (one-dimensional ones always are)."""
        return {"visual.positional_embedding", "visual.class_embedding"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the parameter groups for layer-wise decay in timm's format: embeddings, one group per block, and the layers after the
        blocks."""
        blocks = [(r"^visual\.transformer\.resblocks\.(\d+)", None), (r"ln_post|proj|head|attn_pool", (99999,))]
        return dict(stem=r"^visual\.(?:conv1|class_embedding|positional_embedding|ln_pre)", blocks=blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: activations inside blocks are computed again in the backward pass."""
        self.visual.set_grad_checkpointing(enable)
