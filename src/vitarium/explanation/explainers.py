"""Explainers: image and class -> a map of the evidence for the class. The base class and the registry.

    explainer = create_explainer("grad_cam", model)          # any classifier
    maps = explainer(image)                                  # (B, H, W) in [0, 1], for the model's own predictions
    maps = explainer(image, "cat")                           # or for a class by name or number, or one class per image

To add one, derive from `Explainer`, define `relevance`, and register it with `@explainer(name)`; `make index` records it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from vitarium.assignments import parse_call
from vitarium.catalog.class_choice import choose_class
from vitarium.catalog.classes import Classes
from vitarium.catalog.options import check_names
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.errors import InputError, UsageError
from vitarium.explanation.heatmap import overlay
from vitarium.explanation.reading import logits_of, to_pixels
from vitarium.nn.modes import evaluating

Target = int | str | Tensor | None
ExplainerClass = TypeVar("ExplainerClass", bound="type[Explainer]")


class Explainer:
    """Base of explainers: `explainer(image, target)` returns maps; subclasses define `relevance`.

    Args:
        model: a classifier, image (B, C, H, W) -> logits (B, num_classes). It is not changed.
    """

    name: ClassVar[str] = ""
    """Name for `create_explainer`."""
    by_class: ClassVar[bool] = True
    """True if the map depends on the target class."""
    trained: ClassVar[bool] = False
    """True if the explainer needs the trained model around the classifier; all others get the classifier alone."""
    has_scale: ClassVar[bool] = True
    """True if `picture` shows values of the map by `heatmap.colours`."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, image: Tensor, target: Target = None) -> Tensor:
        """Compute the maps of a batch.

        Args:
            image: (B, C, H, W), normalised as for the model.
            target: the class to explain: a number, a name among `model.labels`, or numbers (B,); None: the model's
                prediction.

        Returns:
            (B, H, W) in [0, 1]: 1 for the strongest evidence, 0 for the weakest; all 0 for a constant map.

        Raises:
            InputError: the image is not a floating-point batch.
            UsageError: unknown class, or the model is not a classifier.
        """
        if image.ndim != 4 or not image.is_floating_point():
            hint = "; add a batch axis with image[None]" if image.ndim == 3 else ""
            raise InputError(f"explainers take a floating-point image (B, C, H, W), got {image.dtype} {tuple(image.shape)}{hint}")
        wanted = None if target is None else target_numbers(self.model, target, len(image)).to(image.device)
        frozen = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for p in frozen:  # gradients of the weights are not needed
                p.requires_grad_(False)
            with evaluating(self.model):
                maps = self.relevance(image.detach(), wanted).detach()
        finally:
            for p in frozen:
                p.requires_grad_(True)
        size = (image.shape[-2], image.shape[-1])
        return scaled(maps if maps.shape[1:] == size else to_pixels(maps, size, self.cover(maps, size)))

    def relevance(self, image: Tensor, target: Tensor | None) -> Tensor:
        """Return the evidence before scaling, (B, h, w) at any resolution. Called in eval mode without gradients.

        Args:
            image: (B, C, H, W).
            target: class numbers (B,); None: the prediction (see `choose`).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define relevance")

    def cover(self, maps: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width in pixels that the cells of `relevance` cover (see `reading.covered`)."""
        return size

    def picture(self, picture: Image.Image, image: Tensor, heat: Tensor, preprocessing: Preprocessing | None) -> Image.Image:
        """Draw an explanation for `vitarium explain`: by default the map over the image.

        Args:
            picture: the image as given, any size and mode.
            image: (C, H, W), the model's input made from it.
            heat: (H, W) in [0, 1], the map.
            preprocessing: the model's, which locates its input in the image; None: the whole image.
        """
        return overlay(picture, heat.float().cpu().numpy(), preprocessing)

    def logits(self, image: Tensor) -> Tensor:
        """Return the classifier's logits, (B, num_classes)."""
        return logits_of(self.model, self.model(image))

    def choose(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return the target classes if given, else those with the largest logits, (B,)."""
        if target is None:
            return logits.argmax(dim=1)
        if int(target.max()) >= logits.shape[1]:
            raise UsageError(f"the model has classes 0 to {logits.shape[1] - 1}; {int(target.max())} is not among them")
        return target


def scaled(maps: Tensor) -> Tensor:
    """Stretch each map (B, H, W) to [0, 1]; a constant map becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


def target_numbers(model: nn.Module, target: int | str | Tensor, batch: int) -> Tensor:
    """Return class numbers (B,) from a class number or name, or from numbers (B,).

    Raises:
        UsageError: the model has no such class.
    """
    if isinstance(target, Tensor):
        if target.shape != (batch,) or target.is_floating_point():
            raise UsageError(f"target must hold whole numbers, one for each of {batch} images; got {target.dtype} {tuple(target.shape)}")
        numbers = target.long()
    else:
        numbers = torch.full((batch,), class_number(model, target))
    count = getattr(model, "num_classes", None)
    low, high = (int(numbers.min()), int(numbers.max())) if batch else (0, 0)
    if low < 0 or (isinstance(count, int) and count and high >= count):
        raise UsageError(f"the model has classes 0 to {(count or 0) - 1}; {low if low < 0 else high} is not among them")
    return numbers


def class_number(model: nn.Module, name: int | str) -> int:
    """Return the number of a class from its name or its number, as `vitarium.catalog.class_choice` reads them ("cat", "#3", 3).

    Raises:
        UsageError: the model has no such class; the message names similar ones.
    """
    count = getattr(model, "num_classes", None)
    names = list(getattr(model, "labels", None) or [])
    return choose_class(name, count if isinstance(count, int) else None, names or None)


# ---- the registry

EXPLAINERS: Classes[Explainer] = Classes("explainers", "explanation method")


def explainer(name: str) -> Callable[[ExplainerClass], ExplainerClass]:
    """Register an explainer under the slug of its system, or under another name."""

    return EXPLAINERS.register(name, lambda cls: setattr(cls, "name", name))


def list_explainers() -> list[str]:
    """Return the names of all explainers. Imports none of them."""
    return EXPLAINERS.names()


def find_explainer(name: str) -> type[Explainer]:
    """Return the class of an explainer. Imports only its file.

    Raises:
        UsageError: unknown name; the message names similar ones.
    """
    return EXPLAINERS.find(name)


def create_explainer(text: str, model: nn.Module, **options: Any) -> Explainer:
    """Create an explainer for a model.

    Args:
        text: its name, such as "grad_cam", with options, as "rise:masks=1000,cells=8".
        model: any classifier, or a model that holds one as `explained` (T-TAME's).
        options: of the explainer (arguments of its class); they override those in the text.

    Raises:
        UsageError: unknown name or option, or a value out of range.
        UnsupportedModel: the explainer does not support this model.
        MissingExtra: the explainer's library is not installed.
    """
    name, given = parse_call(text)
    cls = find_explainer(name)
    given |= options
    known = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "model")]
    check_names(name, given, known)
    return cls(model if cls.trained else getattr(model, "explained", model), **given)


def whole(name: str, value: Any, least: int = 1) -> int:
    """Check that an option is a whole number of at least `least`, and return it.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def share(name: str, value: Any) -> float:
    """Check that an option is a number above 0 and up to 1, and return it.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UsageError(f"{name} must be a number above 0 and up to 1, got {value!r}")
    return float(value)
