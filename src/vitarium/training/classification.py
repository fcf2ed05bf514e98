"""Classification: cross entropy on hard, smoothed, mixed or given soft targets, or binary cross entropy per class."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.errors import UsageError, nearest
from vitarium.training.base import Batch, Learner
from vitarium.training.learners import learner
from vitarium.training.settings import Section, Share

if TYPE_CHECKING:
    from vitarium.data import ImageData
    from vitarium.training.recipe import Recipe


def _weights(value: Any) -> Any:
    """Return class weights as they were given; raises ValueError for anything else."""
    if value is None or value == "balanced":
        return value
    if not isinstance(value, dict):
        raise ValueError("takes balanced, or a factor for each of some classes as {NAME: FACTOR, ...}")
    for name, factor in value.items():
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise ValueError(f"the factor of class {name} must be a number of 0 or more, got {factor!r}")
    return {str(name): factor for name, factor in value.items()}  # YAML reads the name 7 as a number


class Loss(Section):
    """Settings of the loss: cross entropy on hard or soft targets, or binary cross entropy per class (DeiT-III).

    Args:
        name: which of them.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: factor of each class in the cross entropy: "balanced", for images / (classes x images of the class), which is 1 on
            average; or {name: factor}, 1 for classes that are not named. None: all are 1.
    """

    name: Literal["cross_entropy", "binary"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Annotated[Literal["balanced"] | dict[str, float] | None, BeforeValidator(_weights)] = None

    @model_validator(mode="after")
    def _weights_have_their_loss(self) -> Loss:
        if self.class_weights is not None and self.name != "cross_entropy":
            raise ValueError("class_weights belong to name: cross_entropy")
        return self


class Mixing(Section):
    """Settings of Mixup and CutMix (timm's): Beta parameters (0: off), probability of mixing a batch, and of CutMix if both are on.

    `until` is the share of the training after which nothing is mixed: a model that sees unmixed images and hard labels at the end is
    better calibrated.
    """

    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    probability: Share = 1.0
    cutmix_probability: Share = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"
    until: Share = 1.0

    @property
    def on(self) -> bool:
        """Return whether any batch is mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0


@learner("classification", task="classify")
class ClassificationLearner(Learner):
    """Train a classifier.

    A model that returns a pair of logits in training (a class token and a distillation token) is trained on the
    mean of both losses.

    Args:
        model: image (B, C, H, W) -> logits (B, num_classes); `num_classes` is its attribute.
        settings: loss and mixing. Mixup and CutMix draw from NumPy's global generator, which the loop seeds at each step.

    Raises:
        UsageError: the model has no classes.
    """

    class Settings(Section):
        """Settings of classification.

        Args:
            loss: cross entropy or binary, and label smoothing.
            mixing: Mixup and CutMix.
        """

        loss: Loss = Loss()
        mixing: Mixing = Mixing()

    class_weights: Tensor | None

    def __init__(self, model: nn.Module, settings: Any = None):
        super().__init__(model, settings)
        self.num_classes = int(getattr(model, "num_classes", 0))
        if self.num_classes < 1:
            raise UsageError(f"{type(model).__name__} has no classes to learn; create it with num_classes=N")
        self._mix: Any = None
        self._mix_settings: Any = None
        self._share = 0.0  # of the training that is over
        self.register_buffer("class_weights", None, persistent=False)  # a function of settings and data, which a run identifies anyway

    @classmethod
    def create(
        cls, name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> Learner:
        """Create the learner with its model, and the weights of the classes from the training data; see `Learner.create`."""
        learner = super().create(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint)
        if isinstance(learner, ClassificationLearner) and (wanted := learner.criterion_settings.class_weights) is not None:
            if wanted == "balanced" == recipe.sampling:
                raise UsageError(
                    "sampling: balanced already shows every class equally often; with class_weights: balanced rare classes would count "
                    "twice. Leave one of them out (balanced sampling for rare classes that need to be seen more often, else the weights)"
                )
            learner.class_weights = class_weights(wanted, data.train.targets, data.classes)
        return learner

    @property
    def criterion_settings(self) -> Loss:
        """Return the loss of the settings; the default for a learner without one."""
        return getattr(self.settings, "loss", None) or Loss()

    @property
    def mixing(self) -> Mixing:
        """Return the mixing of the settings; the default for a learner without one."""
        return getattr(self.settings, "mixing", None) or Mixing()

    def before_step(self, step: int, total_steps: int) -> None:
        """Note the share of the training that is over, for `Mixing.until`."""
        self._share = step / total_steps

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss. Target: class numbers (B,) or soft targets (B, num_classes)."""
        image, target = batch["image"], batch["target"]
        if self.mixing.on and self._share < self.mixing.until and target.ndim == 1:
            image, target = self.mixed(image, target)
        logits = self.model(image)
        if isinstance(logits, tuple | list):
            losses = [self.criterion(each, target) for each in logits]
            return {"loss": torch.stack(losses).mean()}
        return {"loss": self.criterion(logits, target)}

    def criterion(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of logits (B, num_classes) for classes (B,) or shares (B, num_classes); mixed targets are already
        smoothed."""
        smoothing = self.criterion_settings.label_smoothing if target.ndim == 1 else 0.0
        if self.criterion_settings.class_weights is not None:
            if self.class_weights is None:
                raise UsageError("class_weights need the training data: create the learner by its method create(name, data, recipe)")
            # a mean over the images, not over their weights, which would depend on how a batch is divided among processes
            weight = self.class_weights.to(logits.dtype)
            return F.cross_entropy(logits, target, weight, label_smoothing=smoothing, reduction="none").mean()
        if self.criterion_settings.name == "cross_entropy":
            return F.cross_entropy(logits, target, label_smoothing=smoothing)
        if target.ndim == 1:
            off = smoothing / self.num_classes
            target = torch.full_like(logits, off).scatter_(1, target[:, None], 1.0 - smoothing + off)
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))

    def mixed(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images (B, C, H, W) and classes (B,) into images and shares (B, num_classes). An odd last image is unchanged.

        The shares sum to 1; for the binary loss every class with a share has the target 1, unsmoothed (DeiT-III).
        """
        from timm.data import Mixup
        from timm.data.mixup import mixup_target

        binary = self.criterion_settings.name == "binary"
        smoothing = 0.0 if binary else self.criterion_settings.label_smoothing
        if self._mix is None or self._mix_settings is not self.settings:  # values by step replace the settings
            self._mix_settings, m = self.settings, self.mixing
            self._mix = Mixup(
                m.mixup,
                m.cutmix,
                None,
                m.probability,
                m.cutmix_probability,
                m.mode,
                label_smoothing=smoothing,
                num_classes=self.num_classes,
            )
        even = len(image) // 2 * 2
        shares = mixup_target(target, self.num_classes, smoothing=smoothing)
        if even:
            image = image.clone()  # timm mixes in place
            shares[:even] = self._mix(image[:even].flatten(1, -3), target[:even])[1]  # all frames of a clip are mixed in the same way
        return image, shares.gt(0).to(shares.dtype) if binary else shares


def class_weights(wanted: str | Mapping[str, float], targets: Sequence[int], classes: Sequence[str]) -> Tensor:
    """Return the factor of each class in the loss, (C,) float32.

    Args:
        wanted: "balanced", or factors by name (see `Loss`).
        targets: class numbers of the training images.
        classes: names of the classes.

    Raises:
        UsageError: a name that is none of the classes'.
    """
    if isinstance(wanted, str):
        counts = Counter(targets)
        return torch.tensor([len(targets) / (len(classes) * counts[number]) if counts[number] else 0.0 for number in range(len(classes))])
    if unknown := [name for name in wanted if name not in classes]:
        known = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
        raise UsageError(f"class_weights: no class is called {unknown[0]!r}{nearest(unknown[0], classes)} (there are: {known})")
    return torch.tensor([float(wanted.get(name, 1.0)) for name in classes])
