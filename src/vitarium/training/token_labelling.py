"""Token labelling: every token of a classifier is trained on a label of its own (Jiang et al., "All Tokens Matter: Token Labeling for
Training Better Vision Transformers", 2021), as UniFormer-TL, SVT-H and SpectFormer-H are.

    vitarium train token_labelling_pico --set objective.teacher=TEACHER.safetensors

A model for it has two heads: one of the image, and one of each token of its last map. In evaluation its logits are those of the image plus
half the maximum over the tokens; in training

    loss = CE(image, label) + 0.5 mean over tokens of CE(token, scores of the teacher at its place)

MixToken: in a random box of the map after the stem, an image has the tokens of the batch's image in the opposite place (the batch is
reversed). The token logits are put back before the loss, and the image's label is mixed by the area of the box.

The authors' scores are label maps that an NFNet-F6 made once for ImageNet, five classes per place. Here a teacher makes them for each
augmented image: any classifier whose head can be applied at each place of its last map. Without a teacher, each token has its image's
label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog.create import create_model, preprocessing_of
from vitarium.catalog.saving import load
from vitarium.errors import UsageError
from vitarium.files import is_model_file
from vitarium.nn.modes import evaluating
from vitarium.training.base import Batch, Learner
from vitarium.training.building import build_model
from vitarium.training.distillation import renormalised
from vitarium.training.learners import learner
from vitarium.training.settings import Section

if TYPE_CHECKING:
    from vitarium.data import ImageData
    from vitarium.training.recipe import Recipe

Box = tuple[int, int, int, int]
"""Rows and columns of a box in a map: top, bottom, left, right, the ends excluded."""


@learner("token_labelling", task="classify")
class TokenLabellingLearner(Learner):
    """Train a classifier with a head of its tokens.

    Args:
        model: with `forward_dense(features)`, the logits of the image and of its tokens, and `first_tokens`, the module whose output
            MixToken mixes; UniFormer-TL, and SVT and SpectFormer with `token_label=True`.
        settings: weights, mixing and teacher.
        teacher: a classifier of the same classes; None: opened by the settings at the first loss.

    Raises:
        UsageError: another model.
    """

    class Settings(Section):
        """Settings of token labelling.

        Args:
            token_weight: weight of the loss of the tokens; that of the image has 1.
            mix: parameter of the Beta distribution of the share that MixToken leaves; 0: no mixing.
            label_smoothing: of the image's label, and of the tokens' without a teacher.
            teacher: a saved model, or the name of a pretrained one; None: each token has its image's label.
        """

        token_weight: Annotated[float, Field(ge=0)] = 0.5
        mix: Annotated[float, Field(ge=0)] = 1.0
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
        teacher: str | None = None

    settings: Settings

    def __init__(self, model: nn.Module, settings: Any = None, *, teacher: nn.Module | None = None):
        super().__init__(model, settings)
        if not hasattr(model, "forward_dense") or not hasattr(model, "aux_head"):
            raise UsageError(
                f"token labelling trains models with a head of the tokens, which {type(model).__name__} has not: uniformer_tl_small, or "
                "svt_h_small and spectformer_h_small with model_arguments={token_label: true}"
            )
        self.num_classes = int(model.num_classes)  # type: ignore[arg-type]
        self._teacher: tuple[nn.Module, ...] = ()  # in a tuple, because its weights are not the learner's
        if teacher is not None:
            self.set_teacher(teacher)

    @classmethod
    def create(
        cls, name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> TokenLabellingLearner:
        """Build the model, and open the teacher."""
        settings = recipe.settings_of(cls)
        made = cls(build_model(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint), settings)
        made.open_teacher()
        return made

    def set_teacher(self, teacher: nn.Module) -> None:
        """Use a teacher, which is frozen.

        Raises:
            UsageError: it has other classes than the model.
        """
        labels, own = getattr(teacher, "labels", None), getattr(self.model, "labels", None)
        if int(getattr(teacher, "num_classes", 0)) != self.num_classes or (labels and own and list(labels) != list(own)):
            raise UsageError(
                f"the teacher has {getattr(teacher, 'num_classes', 'no')} classes, the data {self.num_classes}; token labelling needs a "
                "teacher of the same classes in the same order"
            )
        self._teacher = (teacher.eval().requires_grad_(False),)

    def open_teacher(self) -> None:
        """Open the teacher of the settings, if there is one and it is not open."""
        source = self.settings.teacher
        if source is not None and not self._teacher:
            self.set_teacher(load(source) if is_model_file(source) else create_model(source, pretrained=True))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and its parts "image" and "tokens". Target: class numbers (B,)."""
        image, target = batch["image"], batch["target"]
        label = F.one_hot(target, self.num_classes).to(image.dtype)
        label = label * (1 - self.settings.label_smoothing) + self.settings.label_smoothing / self.num_classes
        box, scale = self.draw_box(image)
        logits, tokens = self.dense(image, box, scale)
        if box is not None:
            tokens = swapped(tokens, box, (1, 2))
            share = (box[1] - box[0]) * (box[3] - box[2]) / (tokens.shape[1] * tokens.shape[2])
            mixed = (1 - share) * label + share * label.flip(0)
        else:
            mixed = label
        of_image = F.cross_entropy(logits, mixed)
        of_tokens = F.cross_entropy(tokens.flatten(0, 2), self.token_targets(image, label, tokens).flatten(0, 2))
        loss = of_image + self.settings.token_weight * of_tokens
        return {"loss": loss, "image": of_image.detach(), "tokens": of_tokens.detach()}

    def dense(self, image: Tensor, box: Box | None, scale: int) -> tuple[Tensor, Tensor]:
        """Return the logits of images (B, K) and of their tokens (B, h, w, K), with MixToken in a box of the last map."""
        model: Any = self.model
        module, axes = model.first_tokens
        large = None if box is None else (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)
        with mixed_tokens(module, large, axes):
            features = model.forward_features(image)
        logits, tokens = model.forward_dense(features)
        return logits, tokens.reshape(len(tokens), *features.shape[-2:], -1)

    def token_targets(self, image: Tensor, label: Tensor, tokens: Tensor) -> Tensor:
        """Return the scores of each token's place, like `tokens` (B, h, w, K): the teacher's, or else the image's label."""
        self.open_teacher()
        if not self._teacher:
            return label[:, None, None].expand_as(tokens)
        teacher = self._teacher[0].to(image.device)
        own = preprocessing_of(teacher)
        asked = renormalised(image, preprocessing_of(self.model), own)
        if asked.shape[-1] != own.image_size and getattr(teacher, "dynamic_img_size", True) is not True:
            asked = F.interpolate(asked, own.image_size, mode="bicubic", antialias=True)
        with evaluating(teacher):
            scores = dense_scores(teacher, asked.to(next(teacher.parameters()).dtype)).to(tokens.dtype)
        return F.interpolate(scores, tokens.shape[1:3], mode="bilinear", antialias=True).permute(0, 2, 3, 1)

    def draw_box(self, image: Tensor) -> tuple[Box | None, int]:
        """Draw a box of the last map by NumPy's global generator, which the loop seeds; also return the scale from it to the first map.

        The box has sides in the ratio sqrt(1 - lambda) to the map's, lambda from Beta(mix, mix), and a centre anywhere; the part inside
        the map counts.
        """
        model: Any = self.model
        strides = [stage["reduction"] for stage in model.feature_info]
        scale = strides[-1] // strides[0]
        if not self.settings.mix:
            return None, scale
        height, width = (side // strides[0] // scale for side in image.shape[-2:])
        side = (1 - np.random.beta(self.settings.mix, self.settings.mix)) ** 0.5
        rows, columns = int(height * side), int(width * side)
        middle_y, middle_x = np.random.randint(max(1, height)), np.random.randint(max(1, width))
        top, bottom = (int(np.clip(middle_y + end, 0, height)) for end in (-(rows // 2), rows // 2))
        left, right = (int(np.clip(middle_x + end, 0, width)) for end in (-(columns // 2), columns // 2))
        return ((top, bottom, left, right), scale) if bottom > top and right > left else (None, scale)


def swapped(maps: Tensor, box: Box, axes: tuple[int, int]) -> Tensor:
    """Return maps of a batch with the content of a box taken from the reversed batch.

    Args:
        maps: the batch is the first axis.
        box: rows and columns.
        axes: of height and width.
    """
    top, bottom, left, right = box
    rows = torch.arange(maps.shape[axes[0]], device=maps.device)
    columns = torch.arange(maps.shape[axes[1]], device=maps.device)
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    shape = [1] * maps.ndim
    shape[axes[0]], shape[axes[1]] = inside.shape
    return torch.where(inside.reshape(shape), maps.flip(0), maps)


@contextlib.contextmanager
def mixed_tokens(module: nn.Module, box: Box | None, axes: tuple[int, int]) -> Iterator[None]:
    """Within the context, a module's output has the content of a box from the reversed batch; None: it is unchanged."""
    if box is None:
        yield
        return
    hook = module.register_forward_hook(lambda module, inputs, output: swapped(output, box, axes))
    try:
        yield
    finally:
        hook.remove()


def dense_scores(model: nn.Module, image: Tensor) -> Tensor:
    """Return a classifier's probabilities at each place of its last map: images (B, C, H, W) -> (B, K, h, w), with sum 1 over K.

    A model with a head of the tokens gives theirs; else its head is applied to each place as if it were the whole map (as ReLabel does).

    Raises:
        UsageError: the model has no map or tokens on a square grid.
    """
    net: Any = model
    if not hasattr(net, "forward_features") or not hasattr(net, "forward_head"):
        raise UsageError(
            f"{type(model).__name__} gives no features by place, which a teacher of tokens needs; use a model of ours or timm's"
        )
    features = net.forward_features(image)
    if hasattr(net, "forward_dense") and hasattr(net, "aux_head"):
        tokens = net.forward_dense(features)[1]
        return tokens.reshape(len(tokens), *features.shape[-2:], -1).softmax(-1).permute(0, 3, 1, 2)
    if features.ndim == 4:
        places, grid = map_places(net, features)
    else:
        places, grid = token_places(net, features)
    scores = net.forward_head(places).softmax(-1)
    return scores.reshape(len(image), *grid, -1).permute(0, 3, 1, 2)


def map_places(net: Any, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return each place of maps (B, C, h, w), or (B, h, w, C) as of some models of timm, as a map of its own, and (h, w)."""
    channels = getattr(net, "num_features", features.shape[1])
    if features.shape[1] != channels and features.shape[3] == channels:
        return features.reshape(-1, 1, 1, channels), (features.shape[1], features.shape[2])
    return features.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1), (features.shape[2], features.shape[3])


def token_places(net: Any, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return each patch token of (B, N, C) as a sequence of the head, repeated in the places of the class tokens too, and its grid.

    Raises:
        UsageError: no square grid.
    """
    patches = net.split_tokens(features)[1] if hasattr(net, "split_tokens") else features[:, int(getattr(net, "num_prefix_tokens", 0)) :]
    side = round(patches.shape[1] ** 0.5)
    if side**2 != patches.shape[1]:
        raise UsageError(f"the {patches.shape[1]} tokens of {type(net).__name__} are no square grid, which a teacher of tokens needs")
    length = features.shape[1] - patches.shape[1] + 1  # so that pooling by the class token and by the mean both give the patch
    return patches.reshape(-1, 1, patches.shape[2]).expand(-1, length, -1), (side, side)
