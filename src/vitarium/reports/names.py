"""Names of the models of a comparison: the default ones, and checks before anything is built."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from vitarium.catalog import find_model
from vitarium.catalog.weights import has_published
from vitarium.data import ImageData
from vitarium.data.clips import holds_clips
from vitarium.data.opening import EMBEDDED_PREFIX
from vitarium.errors import UsageError, VitariumError, nearest
from vitarium.training import Recipe, find_learner
from vitarium.training.tasks import Task, parse_task

DEFAULT_MODELS = ("swin_pico", "convnext_pico", "swin_mlp_pico", "convnext_iso_pico", "timm/vit_pico", "timm/resnet_pico")
"""Six of different families, small enough to learn the embedded digits in seconds."""
FASHION_MODELS = ("timm/resnet_pico", "tinyvit_micro", "fmvit_micro", "s2aformer_micro", "convnext_pico", "timm/vit_pico")
"""Six of different families for 28x28 images: a network of convolutions, hybrids, and a plain vision transformer."""


def task_of_recipe(recipe: Recipe) -> Task:
    """Return the task of a recipe's learner."""
    learner = find_learner(recipe.objective["name"])
    return learner.task_for(recipe.settings_of(learner))


def default_recipe(data: str | os.PathLike[str] | None) -> str:
    """Return the name of the recipe of a comparison that names none: "fashion" for these images and without data, else "pico"."""
    name = "fashion" if data is None else os.fspath(data).removeprefix(EMBEDDED_PREFIX).partition(":")[0]
    return "fashion" if name == "fashion" else "pico"


def default_models(recipe: Recipe) -> list[str]:
    """Return the models that are compared where none are named: six small classifiers, or the recipe's for another task than theirs.

    Raises:
        UsageError: the recipe names no model.
    """
    if trains_like(recipe, "classification"):
        return list(FASHION_MODELS if recipe.data == "fashion" else DEFAULT_MODELS)
    if recipe.model is None:
        raise UsageError(f"name the models to compare (--models); the recipe names none, and is for the task {task_of_recipe(recipe).name}")
    return [recipe.model]


def trains_like(recipe: Recipe, learner: str) -> bool:
    """Return whether a learner trains models for the task of a recipe."""
    return parse_task(find_learner(learner).task_name).name == task_of_recipe(recipe).name


def check_names(names: Sequence[str]) -> None:
    """Refuse names that no model has, all at once, before anything is built.

    Raises:
        UsageError: unknown, doubled or no names.
    """
    if not names:
        raise UsageError("no models to compare; give names such as swin_pico or timm/vit_pico ('vitarium models' lists ours)")
    problems = [f"{name!r} is named twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for name in dict.fromkeys(names):
        try:
            _check_name(name)
        except VitariumError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))


def check_weights(names: Sequence[str], pretrained: bool) -> None:
    """Refuse models that are to start from published weights, of which none are known, before anything is opened or built.

    Args:
        names: known ones; a tag such as that of "swin_tiny.in22k" asks for published weights as `pretrained` does.

    Raises:
        UsageError: with the names of all of them.
    """
    wanted = names if pretrained else [name for name in names if _tagged(name)]
    if lacking := [name for name in wanted if not has_published(name)]:
        way = "compare without --pretrained, from random weights" if pretrained else "name them without what follows the dot"
        raise UsageError(f"no published weights are known of {', '.join(lacking)}; leave these models out (--models), or {way}")


def _tagged(name: str) -> bool:
    """Return whether one of our models is named with a tag of its weights."""
    return "." in name and not name.startswith(("timm/", "hf/"))


def may_start_better(names: Sequence[str]) -> bool:
    """Return whether published weights are known of one of the models that start from random ones without `pretrained`."""
    for name in names:
        with contextlib.suppress(VitariumError):  # a model of a package that is not installed here
            if not _tagged(name) and has_published(name):
                return True
    return False


def check_kind(names: Sequence[str], images: ImageData) -> None:
    """Refuse models of clips on images and the other way round, before anything is trained.

    Raises:
        UsageError: with the names of those.
    """
    clips = holds_clips(images.val)  # training samples may be groups of images
    if wrong := [name for name in names if sees_clips(name) != clips]:
        held, seen = ("clips", "single images") if clips else ("single images", "clips")
        raise UsageError(
            f"{images.name} holds {held}, and these models take {seen}: {', '.join(wrong)}; leave them out, or give them {seen}"
        )


def sees_clips(name: str) -> bool:
    """Return whether the model of this name takes clips."""
    if name.startswith(("timm/", "hf/")):
        return False
    family, variant = find_model(name.partition(".")[0])
    return family.variants[variant].get("frames") is not None


def _check_name(name: str) -> None:
    if name.startswith("timm/"):
        import timm

        from vitarium.catalog.foreign import TIMM_PICO

        bare = name.removeprefix("timm/")
        if bare not in TIMM_PICO and not timm.is_model(bare):
            raise UsageError(f"timm has no model {bare!r}{nearest(bare, [*TIMM_PICO, *timm.list_models()])}")
    elif not name.startswith("hf/"):  # those are looked up when their turn comes
        find_model(name.partition(".")[0])
