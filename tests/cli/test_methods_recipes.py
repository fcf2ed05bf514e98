"""`vitarium methods` and `vitarium recipes`: what they list equals the code, and which methods fit a model."""

import dataclasses
import json

import pytest

import vitarium
from vitarium.catalog.methods import find_method, list_methods
from vitarium.catalog.recipes import recipe_rows
from vitarium.errors import UsageError
from vitarium.training.learners import find_learner
from vitarium.training.opening import list_recipes, load_recipe, with_changes
from vitarium.verbs.methods import FAMILIES


def test_every_method_is_listed_with_its_options(run):
    listed = {row["name"]: row for row in json.loads(run("methods", "--json").out)["methods"]}
    assert sorted(listed) == list_methods()
    for name, row in listed.items():
        cls = find_method(name)
        assert FAMILIES[row["family"]] == cls.kind
        assert row["training"] == cls.training
        saved = [f.name for f in dataclasses.fields(cls) if f.metadata.get("saved", True)]
        assert [option["name"] for option in row["options"]] == saved
        assert all(option["help"] for option in row["options"]), name
        assert row["summary"]


def test_methods_are_chosen_by_family_and_need(run):
    assert [row.name for row in vitarium.methods(family="pruning", training="none").rows] == ["sparse_prune"]
    assert [row.name for row in vitarium.methods(training="images").rows] == ["mptq_vit"]
    assert "structure" in run("methods", "--family", "pruning", "--options").out
    with pytest.raises(UsageError, match="did you mean pruning"):
        vitarium.methods(family="prunning")  # type: ignore[arg-type]
    assert run("methods", "swim_pico").code == 2
    assert "did you mean swin_pico" in run("methods", "swim_pico").err


def test_the_methods_that_fit_a_model_are_those_that_apply_takes():
    for name in ("swin_pico", "van_pico", "timm/vit_pico", "t_tame_pico"):
        listed = vitarium.methods(name).rows
        for row in listed:
            if row.training == "images":
                continue
            model = vitarium.create_model(name)
            if row.fits:
                assert vitarium.apply(model, row.name, quiet=True).methods
                continue
            with pytest.raises(UsageError) as refused:
                vitarium.apply(model, row.name, quiet=True)
            assert row.reason in str(refused.value)
    assert {row.name for row in vitarium.methods("swin_pico").rows if row.fits} == {"int4w", "int8", "mptq_vit", "sparse_prune"}


def test_a_refusal_and_compress_without_methods_name_those_that_fit(run):
    vitarium.save(vitarium.create_model("swin_pico", num_classes=2), "m.safetensors")
    refused = run("compress", "m.safetensors", "--apply", "evit", "-o", "s.safetensors")
    assert refused.code == 2
    assert "methods that fit this Swin: int4w, int8, mptq_vit, sparse_prune ('vitarium methods' describes them)" in refused.err
    without = run("compress", "m.safetensors", "-o", "s.safetensors")
    assert without.code == 2
    for name in ("int4w", "int8", "mptq_vit", "sparse_prune"):
        assert f"--apply {name}" in without.err
    assert "evit" not in without.err


def test_every_recipe_is_listed_as_it_is_read(run):
    listed = {row["name"]: row for row in json.loads(run("recipes", "--json").out)["recipes"]}
    assert sorted(listed) == list_recipes()
    for name, row in listed.items():
        recipe = load_recipe(name)
        assert row["learner"] == recipe.objective["name"]
        assert row["model"] == (recipe.model or "")
        assert row["task"] == find_learner(row["learner"]).task_name.partition(":")[0]
        assert row["summary"], f"{name} needs a first line that says what it trains"


def test_recipes_are_chosen_by_model_and_task():
    assert "kmax_deeplab" in {row.name for row in vitarium.recipes("kmax_deeplab_pico").rows}
    assert (
        {row.task for row in vitarium.recipes("swin_pico").rows} == {"classify"} == {row.task for row in vitarium.recipes("timm/vit").rows}
    )
    assert vitarium.recipes("swin_pico", task="segment").rows == []
    assert len(recipe_rows()) == len(vitarium.recipes().rows)
    with pytest.raises(UsageError, match="did you mean panoptic"):
        vitarium.recipes(task="panoptik")
    with pytest.raises(UsageError, match="did you mean swin_pico"):
        vitarium.recipes("swim_pico")
    with pytest.raises(UsageError, match="photos is a data set, neither a recipe nor a model: every recipe takes it with --data photos"):
        vitarium.recipes("photos")
    with pytest.raises(UsageError, match=r"no recipe and no model is called 'run' \("):
        vitarium.recipes("run")


@pytest.mark.parametrize("name", list_recipes())
def test_the_settings_of_a_recipe_are_all_of_its_numbers(name):
    """Given as changes, they make the same recipe of any other that has none of its own."""
    shown = vitarium.recipes(name)
    recipe = load_recipe(name)
    again = with_changes(recipe, [f"{row.key}={row.value}" for row in shown.settings])
    assert again.model_dump(exclude={"objective"}) == recipe.model_dump(exclude={"objective"})
    learner = find_learner(recipe.objective["name"])
    assert again.settings_of(learner) == recipe.settings_of(learner)


def test_settings_are_shown_with_their_source(run):
    rows = {row["key"]: row for row in json.loads(run("recipes", "pico", "--json").out)["settings"]}
    assert rows["budget.steps"] == {"key": "budget.steps", "value": "900", "source": "recipe"}
    assert rows["objective.mixing.until"] == {"key": "objective.mixing.until", "value": "0.6", "source": "recipe"}
    assert rows["optimizer.weight_decay"]["value"] == "0.05"
    assert rows["objective.mixing.cutmix"] == {"key": "objective.mixing.cutmix", "value": "0", "source": "default"}
    assert rows["schedule.hold"]["source"] == "default"
    table = run("recipes", "pico").out
    assert "eval_every" in table
    assert run("recipes", "picco").code == 2
    assert "did you mean pico" in run("recipes", "picco").err
    assert run("recipes", "pico", "--task", "classify").code == 2
