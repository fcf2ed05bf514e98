"""Building the model of a recipe, with fresh or given weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from vitarium.catalog.checkpoints import load_checkpoint
from vitarium.catalog.class_lists import order_note
from vitarium.catalog.create import create_model
from vitarium.catalog.heads import fresh_names, head_names
from vitarium.catalog.saving import load
from vitarium.data.loader import generators_kept, seed_generators
from vitarium.errors import UsageError
from vitarium.files import is_model_file

if TYPE_CHECKING:
    from vitarium.data import ImageData
    from vitarium.training.recipe import Recipe

log = logging.getLogger("vitarium")


def build_model(
    name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None, **arguments: Any
) -> nn.Module:
    """Build a model for the data's classes; its random weights depend on the recipe's seed alone.

    Args:
        name: name of the model, or a model, which is returned after `checkpoint` was loaded into it.
        data: gives the number and the names of the classes, if it has any.
        recipe: gives the seed, the image size and the model's arguments.
        pretrained, checkpoint: initial weights.
        arguments: further constructor arguments; the recipe's take precedence.

    Raises:
        UsageError, CheckpointError: see `create_model` and `load_checkpoint`.
    """
    classes = list(data.classes) or None
    if isinstance(name, nn.Module):
        if checkpoint is not None:
            load_checkpoint(name, checkpoint)
        return name
    given = dict(arguments, image_size=recipe.image_size, **({"num_classes": len(data.classes)} if data.classes else {}))
    with generators_kept():
        seed_generators(recipe.seed)
        model = create_model(name, pretrained=pretrained, **{**given, **recipe.model_arguments})
    if checkpoint is not None:
        named = load_checkpoint(model, checkpoint, classes=classes).names_classes
    else:
        named = getattr(model, "labels", None) is not None
    if classes:
        if (pretrained or checkpoint is not None) and not named and has_loaded_head(model, len(classes)):
            log.warning("%s", order_note(classes))
        model.labels = classes  # type: ignore[assignment]
    return model


def has_loaded_head(model: nn.Module, count: int) -> bool:
    """Return whether a model has a head of `count` classes whose weights were loaded."""
    return getattr(model, "num_classes", None) == count and bool(head_names(model)) and not fresh_names(model)


def open_trained(
    name: str | nn.Module, useless: str | None, *, pretrained: bool = False, checkpoint: str | None = None, **arguments: Any
) -> nn.Module:
    """Open a model that a learner starts from: an object, a file, or a name with its weights.

    Args:
        name: a model; a file of `vitarium.save`; or a model's name with `pretrained` or `checkpoint`.
        useless: why a model without weights is refused, for the message, such as "has nothing to explain"; None: it is accepted.
        pretrained, checkpoint: its weights.
        arguments: of `create_model`, for a name.

    Raises:
        UsageError: a name without weights.
        CheckpointError: the file or the weights cannot be read.
    """
    if isinstance(name, nn.Module):
        return name
    if is_model_file(name):
        return load(name)
    if useless is not None and not pretrained and checkpoint is None:
        raise UsageError(
            f"{name} without weights {useless}: give --model a file that 'vitarium train' or vitarium.save wrote, or --pretrained, or "
            "--checkpoint FILE"
        )
    return create_model(name, pretrained=pretrained, checkpoint=checkpoint, **arguments)
