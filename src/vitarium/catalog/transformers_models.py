"""Vision models of transformers behind timm's conventions: logits, features, pooling, intermediate maps, layers.

    model = vitarium.create_model("hf/./dinov2", pretrained=True)
    tokens = model.forward_features(image)                       transformers' last_hidden_state
    pooled = model.forward_head(tokens, pre_logits=True)         the input of its own classifier
    maps = model.forward_intermediates(image, [5, 11], intermediates_only=True)

B batch, N tokens, C channels, H and W sides of the image in pixels, h and w of a map in cells.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog.preprocessing import Preprocessing
from vitarium.errors import InputError, UsageError
from vitarium.nn.backbone import take_indices
from vitarium.ops.maps import as_map, as_tokens


@dataclass(frozen=True)
class Tower:
    """Attribute paths of the parts of a transformers vision tower.

    Args:
        blocks: path of the list of blocks, or of stages in a pyramid.
        norm: name of the norm after the blocks.
        prefix: tokens before the patches, without registers; None for a pyramid, whose features are maps.
        last: inside a stage, path of the list whose last member returns the stage's map; "" for the stage itself.
        normed: whether last_hidden_state went through `norm`.
    """

    blocks: str
    norm: str
    prefix: int | None
    last: str = ""
    normed: bool = True


TOWERS = {
    "ViTModel": Tower("layers", "layernorm", 1),
    "DeiTModel": Tower("layers", "layernorm", 2),
    "BeitModel": Tower("layers", "layernorm", 1),
    "Dinov2Model": Tower("encoder.layer", "layernorm", 1),
    "Dinov2WithRegistersModel": Tower("encoder.layer", "layernorm", 1),
    "CLIPVisionModel": Tower("encoder.layers", "post_layernorm", 1, normed=False),
    "SiglipVisionModel": Tower("encoder.layers", "post_layernorm", 0),
    "SwinModel": Tower("encoder.layers", "layernorm", None, last="blocks"),
    "ConvNextModel": Tower("encoder.stages", "layernorm", None, normed=False),
}
"""Class of a tower -> its parts, in transformers 5."""


def _class_and_patches(tower: Any, x: Tensor) -> Tensor:
    first = 1 + getattr(tower.config, "num_register_tokens", 0)
    return torch.cat([x[:, 0], x[:, first:].mean(1)], 1)


POOLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "ViTForImageClassification": lambda tower, x: x[:, 0],
    "DeiTForImageClassification": lambda tower, x: x[:, 0],
    "DeiTForImageClassificationWithTeacher": lambda tower, x: x[:, :2].mean(1),
    "BeitForImageClassification": lambda tower, x: tower.pooler(x),
    "Dinov2ForImageClassification": _class_and_patches,
    "Dinov2WithRegistersForImageClassification": _class_and_patches,
    "CLIPForImageClassification": lambda tower, x: x[:, 1:].mean(1),
    "SiglipForImageClassification": lambda tower, x: x.mean(1),
    "SwinForImageClassification": lambda tower, x: x.mean((2, 3)),
    "ConvNextForImageClassification": lambda tower, x: tower.layernorm(x.mean((2, 3))),
    "CLIPVisionModel": lambda tower, x: tower.post_layernorm(x[:, 0]),
    "SiglipVisionModel": lambda tower, x: tower.head(x) if tower.use_head else x.mean(1),
}
"""Class of a classifier (or of a tower without one) -> function (tower, last_hidden_state) that returns the input of the head."""


class VisionTower(nn.Module):
    """A tower for which transformers has no classifier (CLIP's and SigLIP's vision models), with a linear head on its pooled output.

    Args:
        tower: transformers' module.
        num_labels: classes of the head; 0 for none.
    """

    def __init__(self, tower: Any, num_labels: int):
        super().__init__()
        self.config = tower.config
        self.vision_model = tower
        self.classifier = nn.Linear(tower.config.hidden_size, num_labels) if num_labels else nn.Identity()
        self.config.num_labels = num_labels

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """Image (B, 3, H, W) -> an object with `logits`, as transformers' classifiers give."""
        hidden = self.vision_model(pixel_values=pixel_values, **options).last_hidden_state
        pooled = POOLS[type(self.vision_model).__name__](self.vision_model, hidden)
        return SimpleNamespace(logits=self.classifier(pooled))


class TransformersClassifier(nn.Module):
    """An image classifier of transformers with the interface of our models: image (B, 3, H, W) -> logits (B, num_classes).

    Position tables of another size are interpolated as transformers does. `wrap` also adds timm's feature methods to classes whose parts
    are known.
    """

    labels: list[str] | None = None

    def __init__(self, model: Any, preprocessing: Preprocessing):
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.num_classes: int = model.config.num_labels
        names = [str((model.config.id2label or {}).get(i, f"LABEL_{i}")) for i in range(self.num_classes)]
        if names and not any(name.startswith("LABEL_") for name in names):
            self.labels = names

    def forward(self, image: Tensor) -> Tensor:
        return self.model(pixel_values=image, **self._size_options(image)).logits

    def _size_options(self, image: Tensor) -> dict[str, Any]:
        return {}

    def get_classifier(self) -> Any:
        """The head: a linear layer, or identity where there are no classes; two of them in a model that was distilled."""
        if hasattr(self.model, "distillation_classifier"):
            return self.model.cls_classifier, self.model.distillation_classifier
        return getattr(self.model, "classifier", None) or nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes` (0: none). The pooling is the architecture's own: `global_pool` must be None.

        Raises:
            UsageError: the head is no linear layer (then `num_classes` must be given when the model is created), or another pooling.
        """
        if global_pool is not None:
            raise UsageError(f"{type(self.model).__name__} has one pooling, its own; leave global_pool out, got {global_pool!r}")
        names = [
            n for n in ("classifier", "cls_classifier", "distillation_classifier") if isinstance(getattr(self.model, n, None), nn.Module)
        ]
        like = next(self.model.parameters())
        for name in names:
            old = getattr(self.model, name)
            width = getattr(old, "in_features", None) or self._head_width()
            if not isinstance(old, nn.Linear | nn.Identity) or width is None:
                kind = f"{type(self.model).__name__} is a {type(old).__name__}"
                raise UsageError(f"the head of {kind}; pass num_classes to create_model instead")
            setattr(self.model, name, nn.Linear(width, num_classes).to(like) if num_classes else nn.Identity())
        if not names:
            raise UsageError(f"{type(self.model).__name__} has no head that is known here; pass num_classes to create_model instead")
        self.model.config.num_labels = self.model.num_labels = self.num_classes = num_classes
        self.labels = None

    def _head_width(self) -> int | None:
        return None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: activations inside blocks are computed again in the backward pass.

        Raises:
            UsageError: transformers does not support it for this architecture.
        """
        part = next(part for part in self.model.modules() if hasattr(part, "gradient_checkpointing_enable"))
        if not part.supports_gradient_checkpointing:
            if enable:
                raise UsageError(f"transformers' {type(part).__name__} does not support gradient checkpointing; leave it off")
            return
        part.gradient_checkpointing_enable() if enable else part.gradient_checkpointing_disable()


class TransformersBackbone(TransformersClassifier):
    """A classifier of transformers whose parts are known (see `TOWERS`), with timm's feature methods.

    `feature_info` lists the blocks of a plain vision transformer or the stages of a pyramid, as timm does.
    """

    def __init__(self, model: Any, preprocessing: Preprocessing):
        super().__init__(model, preprocessing)
        self._tower_name, tower = next((name, part) for name, part in model.named_children() if type(part).__name__ in TOWERS)
        self._parts = parts = TOWERS[type(tower).__name__]
        config, path = tower.config, f"model.{self._tower_name}"
        patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
        self.patch_size = patch
        count = len(tower.get_submodule(parts.blocks))
        if parts.prefix is not None:
            widths, strides = [config.hidden_size] * count, [patch] * count
        else:
            first = getattr(config, "embed_dim", None)
            widths = [first * 2**i for i in range(count)] if first else list(config.hidden_sizes)
            strides = [patch * 2**i for i in range(count)]
        self.feature_info = [
            dict(num_chs=width, reduction=stride, module=f"{path}.{parts.blocks}.{i}")
            for i, (width, stride) in enumerate(zip(widths, strides, strict=True))
        ]
        self.num_features = widths[-1]
        self.head_hidden_size = self._head_width()
        size: Any = config.image_size if isinstance(config.image_size, int) else tuple(config.image_size)
        takes_flag = "interpolate_pos_encoding" in inspect.signature(inspect.unwrap(tower.embeddings.forward)).parameters
        self._made_for = ((size, size) if isinstance(size, int) else size) if takes_flag else None
        """Image size (H, W) that transformers requires unless interpolation is enabled; None: it always interpolates, or has no position
        table."""

    @property
    def tower(self) -> Any:
        """transformers' bare vision model."""
        return getattr(self.model, self._tower_name)

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens before the patches; 0 in a pyramid."""
        return (self._parts.prefix or 0) + (getattr(self.tower.config, "num_register_tokens", 0) if self._parts.prefix else 0)

    def _head_width(self) -> int:
        twice = POOLS.get(type(self.model).__name__) is _class_and_patches
        return self.feature_info[-1]["num_chs"] * (2 if twice else 1)

    def _size_options(self, image: Tensor) -> dict[str, Any]:
        other = self._made_for is not None and (image.shape[-2], image.shape[-1]) != self._made_for
        return {"interpolate_pos_encoding": True} if other else {}

    # ---- features

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the tower's last_hidden_state: tokens (B, N, C), or the map (B, C, h, w) of a pyramid."""
        x = self.tower(pixel_values=image, **self._size_options(image)).last_hidden_state
        return self._as_map(x, len(self.feature_info) - 1, image) if self._parts.prefix is None else x

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) from the output of `forward_features`, or with `pre_logits` the input of the head, (B, C)."""
        owner = self.tower if isinstance(self.model, VisionTower) else self.model
        pooled = POOLS[type(owner).__name__](self.tower, features)
        if pre_logits:
            return pooled
        head = self.get_classifier()
        if isinstance(head, tuple):
            return (head[0](features[:, 0]) + head[1](features[:, 1])) / 2
        return head(pooled)

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
        """Return the maps of chosen blocks (stages, in a pyramid), as timm's method of this name.

        Args:
            x: image, (B, 3, H, W).
            indices: an int for the last n, a list (negative counts from the end), None for all.
            return_prefix_tokens: whether to give each as a pair (map, prefix tokens (B, P, C)); not of a pyramid.
            norm: whether to apply the final norm to them (in a pyramid: only to the last stage's, if there is such a norm).
            stop_early: accepted for timm's sake; all blocks run.
            output_fmt: "NCHW", or for plain vision transformers "NLC": patch tokens (B, h w, C).
            intermediates_only: whether to leave out the final features.

        Returns:
            list of maps (B, C_i, h_i, w_i); without `intermediates_only`, a pair (output of `forward_features`, maps).

        Raises:
            InputError: an index out of range, another output_fmt, or tokens that were merged or dropped, which form no map.
        """
        plain = self._parts.prefix is not None
        accepted = ("NCHW", "NLC") if plain else ("NCHW",)
        if output_fmt not in accepted or (return_prefix_tokens and not plain):
            raise InputError(f"{type(self.model).__name__} gives {' or '.join(accepted)} maps{'' if plain else ' without prefix tokens'}")
        chosen = self._take_indices(indices)
        with self._outputs_of(chosen) as seen:
            features = self.forward_features(x)
        found: list[Any] = []
        for i in chosen:
            tokens = seen[i]
            if norm and (plain or (i == len(self.feature_info) - 1 and self._parts.normed)):
                tokens = getattr(self.tower, self._parts.norm)(tokens)
            map_ = self._as_map(tokens, i, x)
            if output_fmt == "NLC":
                map_ = as_tokens(map_)
            found.append((map_, tokens[:, : self.num_prefix_tokens]) if return_prefix_tokens else map_)
        return found if intermediates_only else (features, found)

    def _take_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        return take_indices(indices, len(self.feature_info), type(self.model).__name__, "blocks or stages")

    @contextmanager
    def _outputs_of(self, chosen: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Yield a dictionary, number of a block or stage -> its output, that a forward pass in this thread fills."""
        seen: dict[int, Tensor] = {}
        thread = threading.get_ident()

        def reader(i: int) -> Callable[[nn.Module, Any, Any], None]:
            def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if threading.get_ident() == thread:
                    seen[i] = output[0] if isinstance(output, tuple) else output

            return read

        blocks = self.tower.get_submodule(self._parts.blocks)
        places = {i: blocks[i].get_submodule(self._parts.last)[-1] if self._parts.last else blocks[i] for i in set(chosen)}
        hooks = [place.register_forward_hook(reader(i)) for i, place in places.items()]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _as_map(self, x: Tensor, index: int, image: Tensor) -> Tensor:
        """Return a block's or stage's output as a map (B, C, h, w)."""
        if x.ndim == 4:
            return x
        height, width = image.shape[-2:]
        if self._parts.prefix is None:  # patches are padded to whole ones, and each merging rounds up
            rows, columns = -(-height // self.patch_size), -(-width // self.patch_size)
            rows, columns = -(-rows // 2**index), -(-columns // 2**index)
        else:
            rows, columns = height // self.patch_size, width // self.patch_size
        patches = x[:, self.num_prefix_tokens :]
        if patches.shape[1] != rows * columns:
            raise InputError(f"{patches.shape[1]} tokens form no map of {rows}x{columns}: a token reduction is at work; undo it first")
        return as_map(patches, (rows, columns))

    # ---- training

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters with two or more axes that are excluded from weight decay (one-dimensional ones always are)."""
        free = ("_token", "_tokens", "_embedding", "_embeddings", "position_embedding.weight", "position_bias_table", "probe")
        return {name for name, _ in self.named_parameters() if name.endswith(free)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the parameter groups for layer-wise decay in timm's format: embeddings, one group per block (per stage if `coarse`), the
        rest."""
        start = self.feature_info[0]["module"].removesuffix(f"{self._parts.blocks}.0").replace(".", r"\.")
        blocks = self._parts.blocks.replace(".", r"\.")
        layers: list[tuple[str, tuple[int, ...] | None]]
        if self._parts.prefix is not None or coarse:
            layers = [(rf"^{start}{blocks}\.(\d+)", None)]
        else:
            layers = [
                (rf"^{start}{blocks}\.(\d+)\.downsampling_layer", (0,)),
                (rf"^{start}{blocks}\.(\d+)\.downsample", (99998,)),
                (rf"^{start}{blocks}\.(\d+)\.(?:blocks|layers)\.(\d+)", None),
            ]
        return dict(stem=rf"^{start}(?:embeddings|pre_layrnorm)", blocks=[*layers, (r"norm|pooler|head|classifier", (99999,))])


def wrap(model: Any, preprocessing: Preprocessing) -> TransformersClassifier:
    """Wrap a transformers model in the interface of our models, with feature methods if its parts are known."""
    name = type(model).__name__
    known = isinstance(model, VisionTower) or name in POOLS
    found = [part for part in model.children() if type(part).__name__ in TOWERS] if known else []
    readable = len(found) == 1 and _has(found[0], TOWERS[type(found[0]).__name__].blocks)
    return (TransformersBackbone if readable else TransformersClassifier)(model, preprocessing)


def _has(module: nn.Module, path: str) -> bool:
    """Return whether a submodule of this path exists; releases of transformers before 5 have other paths."""
    return any(name == path for name, _ in module.named_modules())
