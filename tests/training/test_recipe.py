"""Recipes: those of the library are valid, and user input results in a recipe or a helpful error."""

from __future__ import annotations

import copy
import math
import random
import re
import time

import pytest
import yaml

from tests.training.tiny import tiny_data
from vitarium.catalog import Preprocessing, find_model
from vitarium.data.loader import Loader
from vitarium.errors import UsageError
from vitarium.training import Recipe, list_recipes, load_recipe
from vitarium.training.boards import KINDS
from vitarium.training.opening import with_changes
from vitarium.training.schedules import Rates
from vitarium.training.settings import check, override, parse_yaml
from vitarium.training.shorthands import LOGGERS, names_of_loggers


@pytest.mark.parametrize("name", list_recipes())
def test_each_recipe_of_the_house_is_valid_and_its_model_takes_its_arguments(name):
    import inspect

    recipe = load_recipe(name)
    assert recipe.model is not None
    if recipe.model.startswith("timm/"):
        import timm

        from vitarium.catalog.foreign import TIMM_PICO

        assert timm.is_model(recipe.model[5:]) or recipe.model[5:] in TIMM_PICO
    else:
        family, _ = find_model(recipe.model.partition(".")[0])
        assert set(recipe.model_arguments) <= set(inspect.signature(family.cls).parameters)


@pytest.mark.parametrize("name", list_recipes())
def test_each_recipe_tells_its_command_in_its_header(name):
    from importlib import resources

    header = resources.files("vitarium.training").joinpath("recipes", f"{name}.yaml").read_text().split("\nmodel:")[0]
    assert f"train {name}" in header
    assert re.search(r"\d", header.partition(f"train {name}")[2]), "it should say how long it takes, or what comes out"
    if load_recipe(name).objective == {"name": "classification"}:
        assert "%" in header  # the accuracy


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.lrr=1", r"optimizer.lrr is not a setting; did you mean lr\? \(accepted: name, lr, "),
        ("batchsize=3", r"batchsize is not a setting; did you mean batch_size"),
        ("augment.flop=1", r"augment.flop is not a setting; did you mean flip"),
        ("ema={deca: 0.9}", r"ema.deca is not a setting; did you mean decay"),
        ("optimizer.lr=-1", r"optimizer.lr: input should be greater than 0, got -1"),
        ("optimizer.lr=.nan", r"optimizer.lr: input should be a finite number"),
        ("optimizer.name=adamww", r"timm has no such optimizer; did you mean adamw"),
        ("budget={steps: 3, epochs: 1}", r"give exactly one of steps, epochs, minutes \(given: steps, epochs\)"),
        ("budget={}", r"given: none"),
        ("clip={norm: 1, value: 1}", r"at most one of norm, tensor_norm, value"),
        ("schedule.warmup=7", r"a share of the training from 0 to 1, 'N epochs' or 'N steps', got 7"),
        ("budget.steps=1000000000001", r"budget.steps: input should be less than or equal to 1000000000000, got 1000000000001"),
        ("budget.epochs=1e300", r"budget.epochs: input should be less than or equal to 1000000000, got 1e\+300"),
        ("budget.minutes=1e300", r"budget.minutes: input should be less than or equal to 100000000, got 1e\+300"),
        ("eval_every=1e308 epochs", r"eval_every: must be at most 1,000,000,000,000 epochs, got '1e308 epochs'"),
        ("schedule.warmup=1e999999999 steps", r"schedule.warmup: must be at most 1,000,000,000,000 steps, got"),
        ("schedule.hold={amount: 1e300, unit: steps}", r"schedule.hold.amount: input should be less than or equal to 1000000000000"),
        ("schedule.cooldown={amount: 2, unit: share}", r"schedule.cooldown: a share must be from 0 to 1"),
        ("augment.policy=rand-m9-n1000000000", r"augment.policy: augmentation policy .*'n1000000000' is out of range; n .* at most 64"),
        ("model_arguments={depth: 100000}", r"model_arguments: depth must be at most 1,000 "),
        ("model_arguments={depths: [2, 1000000000]}", r"model_arguments: depths must be at most 1,000 "),
        ("model_arguments={embed_dim: 1000000000}", r"model_arguments: embed_dim must be at most 1,000,000 "),
        ("augment.policy=augmix-m3-w100000", r"'w100000' is out of range"),
        ("augment.policy=augmix-w3-d100000", r"'d100000' is out of range"),
        (f"schedule={{name: step, milestones: [{'0.5, ' * 1001}]}}", r"schedule.milestones: tuple should have at most 1000 items"),
        (f"phases=[{{freeze: [{'a, ' * 1001}]}}]", r"phases.0.freeze: tuple should have at most 1000 items"),
        ("precision=16", r"'32-true', 'bf16-mixed' or '64-true', got 16"),
        ("version=2", r"version: input should be 1, got 2"),
        ("optimizer", r"has the form KEY=VALUE"),
        ("a..b=1", r"has the form KEY=VALUE"),
        ("seed={a: &x 1, b: *x}", r"anchors and aliases are not accepted"),
        ("seed={a: 1, a: 2}", r"'a' is given twice"),
        ("seed=!!python/object:os.system {}", r"not plain YAML"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_accepted(assignment, message):
    with pytest.raises(UsageError, match=message):
        load_recipe("pico", [assignment])


def test_overrides_reach_nested_settings_and_replace_the_budget():
    recipe = load_recipe("deit", ["optimizer.lr=1e-4", "budget.minutes=2", "schedule.warmup=100 steps", "ema.decay=0.5"])
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.budget.minutes, recipe.budget.epochs) == (1e-4, 0.05, 2, None)
    assert recipe.schedule.warmup.steps(1000, 10) == 100
    assert recipe.ema is not None
    assert recipe.ema.decay == 0.5


@pytest.mark.parametrize(("text", "steps"), [("0.05", 50), ("5%", 50), ("5 epochs", 500), ("1 epoch", 100), ("20 steps", 20), ("2e-2", 20)])
def test_stretches(text, steps):
    assert load_recipe("pico", [f"eval_every={text}"]).eval_every.steps(1000, 100) == steps


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_pico", "swin_pico is a model: vitarium train pico --model swin_pico --data DIR"),
        ("timm/resnet18", "timm/resnet18 is a model: vitarium train pico --model timm/resnet18"),
        ("dit_pico", "dit_pico is a model: vitarium train "),
        ("digits", "digits is a data set, not a recipe: vitarium train pico --data digits"),
        ("my photos", "my photos is a folder, not a recipe: vitarium train pico --data 'my photos'"),
        ("m.safetensors", "m.safetensors is a file of a model: vitarium train RECIPE --model m.safetensors"),
    ],
)
def test_a_model_or_data_in_place_of_a_recipe(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    with pytest.raises(UsageError) as caught:
        load_recipe(name)
    assert str(caught.value).startswith(message)
    assert "'vitarium recipes' lists all recipes" in str(caught.value)


def test_an_unknown_recipe_and_an_unreadable_file(tmp_path):
    with pytest.raises(UsageError, match=r"no recipe 'pikko'; did you mean pico.*'vitarium recipes' lists all") as caught:
        load_recipe("pikko")
    assert len(str(caught.value)) < 200
    with pytest.raises(UsageError, match="cannot read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "big.yaml").write_text("# " + "x" * 70_000)
    with pytest.raises(UsageError, match="at most 65,536"):
        load_recipe(tmp_path / "big.yaml")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(UsageError, match="cannot read"):
        load_recipe(tmp_path / "binary.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(UsageError, match="must be a table of settings"):
        load_recipe(tmp_path / "list.yaml", ["seed=1"])


def test_a_billion_laughs_are_refused():
    bomb = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20))
    with pytest.raises(UsageError, match="anchors"):
        parse_yaml(bomb, "bomb")
    with pytest.raises(UsageError, match="nested too deeply"):
        parse_yaml("[" * 2_000, "tower")


def test_the_identity_leaves_out_what_does_not_change_the_outcome():
    recipe = load_recipe("pico")
    assert recipe.digest() == load_recipe("pico", ["log_every=3", "checkpoint_minutes=1", "num_workers=2"]).digest()
    assert recipe.digest() != load_recipe("pico", ["seed=1"]).digest()


ODD = [
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1e-3",
    "5 epochs",
    [],
    [1, 2],
    {},
    {"a": 1},
    {1: 2},
    10**30,
    b"x",
    "\0",
    "🦖",
]


def _mutate(values: dict, rng: random.Random) -> dict:
    """One to three changes anywhere: a value replaced, a key misspelt, removed or added, a section nested into itself."""
    values = copy.deepcopy(values)
    for _ in range(rng.randint(1, 3)):
        here: dict = values
        while True:
            inner = [v for v in here.values() if isinstance(v, dict) and v]
            if not inner or rng.random() < 0.4:
                break
            here = rng.choice(inner)
        key = rng.choice(list(here) or ["x"])
        kind = rng.randrange(5)
        if kind == 0:
            here[key] = copy.deepcopy(rng.choice(ODD))
        elif kind == 1:
            here[str(key)[:-1] or "y"] = here.pop(key, None)
        elif kind == 2:
            here.pop(key, None)
        elif kind == 3:
            here[rng.choice(["", "lr", "steps", "Ünknown", 7, None])] = copy.deepcopy(rng.choice(ODD))
        else:
            here[key] = copy.deepcopy(values)
    return values


def test_a_thousand_mutated_recipes_give_a_recipe_or_a_usage_error():
    rng = random.Random(0)
    bases = [load_recipe(name).model_dump(mode="json", exclude_none=True) for name in list_recipes()]
    outcomes = {True: 0, False: 0}
    for _ in range(1000):
        values = _mutate(rng.choice(bases), rng)
        try:
            recipe = check(Recipe, values, "mutant")
            assert recipe == check(Recipe, recipe.model_dump(mode="json"), "again")
            outcomes[True] += 1
        except UsageError as error:
            outcomes[False] += "mutant" in str(error)
    assert sum(outcomes.values()) == 1000
    assert min(outcomes.values()) > 50


def test_three_hundred_broken_texts_give_values_or_a_usage_error():
    rng = random.Random(1)
    base = yaml.safe_dump(load_recipe("swin").model_dump(mode="json"))
    named = 0
    for _ in range(300):
        text = list(base)
        for _ in range(rng.randint(1, 6)):
            text[rng.randrange(len(text))] = rng.choice("{}[]:,&*!|>%@`'\"\\#\t\0\n-? 0aé")
        try:
            check(Recipe, parse_yaml("".join(text), "text"), "text")
            named += 1
        except UsageError as error:
            named += "text" in str(error)
    assert named == 300


def test_override_does_not_change_what_it_is_given():
    values = {"a": {"b": 1}}
    assert override(values, ["a.b=2", "a.c.d=3"]) == {"a": {"b": 2, "c": {"d": 3}}}
    assert values == {"a": {"b": 1}}


def test_a_key_that_the_learner_does_not_read_is_an_error():
    with pytest.raises(UsageError, match=r"settings of diffusion: loss is not a setting[^\n]*\n[^\n]*mixing is not a setting"):
        load_recipe("dit", ["loss.label_smoothing=0.3", "mixing.mixup=0.8"])
    with pytest.raises(UsageError, match="label_smoothin is not a setting; did you mean label_smoothing"):
        load_recipe("pico", ["loss.label_smoothin=0.3"])


def test_loss_and_mixing_at_the_root_are_settings_of_classification(tmp_path):
    """As in recipes of version 0.1.0."""
    path = tmp_path / "old.yaml"
    path.write_text("budget: {steps: 5}\noptimizer: {lr: 1e-3}\nloss: {label_smoothing: 0.1}\nmixing: {mixup: 0.8}\n")
    old = load_recipe(path, ["mixing.mixup=0.2"])
    assert old.objective == {"name": "classification", "loss": {"label_smoothing": 0.1}, "mixing": {"mixup": 0.2}}
    assert old == load_recipe(path, ["objective.mixing.mixup=0.2"])
    assert load_recipe("pico", ["mixing={}"]).objective["mixing"] == {}


def test_another_objective_starts_from_its_defaults():
    assert load_recipe("pico", ["objective.name=multilabel"]).objective == {"name": "multilabel"}
    assert load_recipe("sparse_prune_pico", ["objective.weight=1", "objective.name=sparse_prune"]).objective["loss"]


def test_a_key_of_a_section_is_suggested_with_its_section():
    with pytest.raises(UsageError, match=r"steps is not a setting; did you mean budget\.steps\?"):
        load_recipe("pico", ["steps=20"])
    with pytest.raises(UsageError, match=r"lr is not a setting; did you mean optimizer\.lr\?"):
        load_recipe("pico", ["lr=1e-3"])


def test_changes_of_a_recipe_with_values_by_step():
    """`from`, which is no name in Python, survives the way through plain values."""
    changed = with_changes(load_recipe("evit"), ["batch_size=8"])
    assert (changed.batch_size, changed.values) == (8, load_recipe("evit").values)


EXTREMES = [
    "0",
    "-1",
    "1",
    "1000000000",
    "1000000000000000000",
    "1e300",
    "1e-300",
    ".nan",
    ".inf",
    "x",
    "[]",
    "{}",
    "1e18 steps",
    "1e300 epochs",
]
PATHS = [
    *("accumulate", "repeats", "log_every", "seed", "eval_every", "num_workers", "checkpoint_minutes"),
    *("budget.steps", "budget.epochs", "budget.minutes", "optimizer.lr", "optimizer.weight_decay", "optimizer.momentum"),
    *("optimizer.reference_batch", "optimizer.layer_decay", "schedule.warmup", "schedule.hold", "schedule.cooldown", "schedule.min_lr"),
    *("augment.pad_crop", "augment.color_jitter", "augment.erase", "clip.norm", "ema.decay", "batch_norm.momentum"),
]


def test_extreme_settings_are_refused_or_cost_nothing():
    """Plans of an epoch and rates of an accepted recipe are computed at once, and in little memory, whatever its numbers."""
    rng = random.Random(0)
    images, accepted = tiny_data().train, 0
    for _ in range(150):
        assignments = [f"{rng.choice(PATHS)}={rng.choice(EXTREMES)}"]
        if rng.random() < 0.3:
            assignments.append(f"schedule={{name: step, every: {rng.choice(EXTREMES)}}}")
        try:
            recipe = load_recipe("pico", assignments)
        except UsageError:
            continue
        accepted += 1
        began = time.perf_counter()
        loader = Loader(images, Preprocessing(8), batch_size=recipe.batch_size, seed=recipe.seed, repeats=recipe.repeats, shuffle=True)
        total, per_epoch = recipe.budget.steps or 10**12, max(1, len(loader.plan(0)) // recipe.accumulate)
        rates = Rates(recipe.schedule, recipe.optimizer, total_steps=total, steps_per_epoch=per_epoch, total_batch=recipe.batch_size)
        assert all(math.isfinite(rates.at(step)) for step in (0, 1, total // 2, total))
        recipe.eval_every.steps(total, per_epoch)
        assert time.perf_counter() - began < 2, assignments
    assert accepted > 20


@pytest.mark.parametrize(("given", "near"), [("foo", ""), ("none", ""), (["wandbb"], "; did you mean wandb\\?")])
def test_an_unknown_logger(given, near):
    with pytest.raises(UsageError, match=rf"^unknown logger '\w+'{near} \(loggers: tensorboard, wandb, mlflow; '' is log.csv alone\)$"):
        names_of_loggers(given)


def test_loggers_are_those_of_recipes():
    assert names_of_loggers("tensorboard, mlflow") == ["tensorboard", "mlflow"]
    assert names_of_loggers("") == []
    assert set(LOGGERS) == set(KINDS)
