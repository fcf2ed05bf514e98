"""Every recipe of the library: its settings and schedule are usable, and a pico model of its family takes two steps with them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.verbs.test_round_trip import RECIPES, files  # noqa: F401 (a fixture)
from vitarium.catalog import find_model
from vitarium.data.image_set import View
from vitarium.files import is_model_file
from vitarium.training import Recipe, find_learner, fit, list_recipes, load_recipe
from vitarium.training.opening import with_changes
from vitarium.training.schedules import Rates
from vitarium.verbs.opening import apply_methods, open_model, quiet

BACKBONES = (
    *("convit", "convnext", "crossformer", "crossvit", "cvt", "dct_histo", "dependencyvit", "dit_routing", "fmvit", "hornet", "maformer"),
    *("maxvit", "s2aformer", "spectformer", "svt", "swin", "t2t_vit", "tic", "tinyvit", "tnt", "transnext", "uniformer", "van", "vim"),
)
TWO_STEPS = (
    *("budget.steps=2", "batch_size=2", "accumulate=1", "repeats=1", "precision=32-true", "eval_every=1.0", "num_workers=0", "log_every=1"),
)
SPECIAL = {
    "dit": (["objective.samples=0"], "dit_pico", None),  # its sampler belongs to Gaussian diffusion
    "uniformer_video": ([], None, "scenes:task=action,length=40"),
    "var_tokenizer": (["objective.perceptual=null"], None, None),  # which needs weights of others
}
"""Recipe -> changes, model and data in place of those of its objective."""

CLASSIFIERS = ("classification", "dit_routing", "token_labelling")


def test_every_backbone_has_its_recipe():
    """Under its own name, with a model of its family."""
    for slug in BACKBONES:
        recipe = load_recipe(slug)
        assert find_model(recipe.model)[0].slug == slug
        assert recipe.objective["name"] in CLASSIFIERS


@pytest.mark.parametrize("name", list_recipes())
def test_the_schedule_of_each_recipe_is_whole(name):
    """It rises to the peak, and falls to its end; batches are of the reference, in a training of many epochs."""
    recipe = load_recipe(name)
    total = recipe.budget.steps or round(100 * (recipe.budget.epochs or 1))
    rates = Rates(
        recipe.schedule, recipe.optimizer, total_steps=total, steps_per_epoch=100, total_batch=recipe.optimizer.reference_batch or 1
    )
    found = [rates.at(step) for step in {*range(0, total, max(1, total // 500)), total - 1}]
    assert all(math.isfinite(rate) and rate >= 0 for rate in found)
    peak = max(recipe.optimizer.lr, recipe.schedule.min_lr)
    assert 0.95 * recipe.optimizer.lr <= max(found) <= peak * (1 + 1e-9)


def small(name: str, given: dict[str, str]) -> tuple[Recipe, str, str]:
    """Return a recipe with few steps and small images, a pico model for it, and data."""
    recipe = load_recipe(name)
    objective = recipe.objective["name"]
    pico, changes, model, data = RECIPES[objective]
    arguments = {}
    if objective in CLASSIFIERS:
        changes, data, model, arguments = ["image_size=16"], "digits", pico_of(recipe.model), recipe.model_arguments
    else:
        changes = [f"image_size={load_recipe(pico).image_size}".replace("None", "null"), *changes]
    for special, (more, other_model, other_data) in SPECIAL.items():
        if name == special:
            changes, model, data = [*changes, *more], other_model or model, other_data or data
    own = load_recipe(pico)
    fill = lambda text: next((text.replace(key, value) for key, value in given.items() if key in text), text)
    ends = [(number + 1) / len(recipe.phases) for number in range(len(recipe.phases))]
    phases = [phase.model_copy(update={"image_size": None, "until": end}) for phase, end in zip(recipe.phases, ends, strict=True)]
    recipe = recipe.model_copy(update={"phases": tuple(phases), "model_arguments": arguments})
    recipe = with_changes(recipe, [*TWO_STEPS, *map(fill, changes)])
    return recipe, fill(model or own.model), fill(data or own.data)


def pico_of(model: str) -> str:
    """Return the pico model of the family of a model's name."""
    if model.startswith("timm/"):
        return "timm/vit_pico"
    family, _ = find_model(model.partition(".")[0])
    return f"{family.name}_pico"


@pytest.mark.parametrize("name", [name for name in list_recipes() if not name.endswith("_pico")])
def test_each_recipe_takes_two_steps(name, files, tmp_path):  # noqa: F811
    recipe, model, source = small(name, {**files, "STORE": str(tmp_path / "store")})
    kind = find_learner(recipe.objective["name"])
    task = kind.task_for(recipe.settings_of(kind))
    data = task.open(source, seed=0, val_fraction=0.3, image_size=recipe.image_size)
    if source in ("digits", "fashion"):
        data = replace(data, train=View(data.train, range(8)), val=View(data.val, range(8)))
    recipe = recipe.model_copy(update={"image_size": recipe.image_size or data.image_size})
    learner = kind.create(open_model(model) if is_model_file(model) else model, data, recipe)
    apply_methods(learner.model, recipe.apply, data, quiet)
    result = fit(learner, data, recipe, tmp_path / "run")
    assert (result.steps, result.skipped) == (2, 0)
    assert Path(tmp_path / "run" / "last.ckpt").exists()
