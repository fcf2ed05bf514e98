"""Phases and values by step: trained parameters, image size and numbers; resuming on either side of a boundary."""

from __future__ import annotations

import math
import signal
import sys

import pytest
import torch

import vitarium
from tests.training.duel import Duel, duel
from tests.training.test_fit import Breaks, Crash, crash, lines, timeless
from tests.training.tiny import assert_same_weights, tiny_data, tiny_net, tiny_recipe, weights
from vitarium.efficiency.tokens.evit import annealed_keep
from vitarium.errors import UsageError
from vitarium.nn import DropPath
from vitarium.training import ClassificationLearner, find_learner, fit, load_recipe
from vitarium.training import run as run_module
from vitarium.training.phases import Plan, matching, settled
from vitarium.training.recipe import Course
from vitarium.training.schedules import Rates, cosine
from vitarium.training.values import target_of, value_at
from vitarium.verbs.train import train as train_by_recipe

STILL = ("accumulate=1", "objective={name: classification}", "ema=null", "budget.steps=8", "log_every=1", "eval_every=2 steps")
FROZEN = "phases=[{until: 0.5, freeze: [model.conv, model.norm]}]"


class Watched(Breaks):
    """Notes of each step what learns, the size of the images, and the settings."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = []

    def loss(self, batch):
        learns = tuple(sorted({name.split(".")[1] for name, p in self.named_parameters() if p.requires_grad}))
        smoothing = self.settings.loss.label_smoothing
        self.seen.append({"step": self.step, "learns": learns, "size": batch["image"].shape[-1], "smoothing": smoothing})
        return super().loss(batch)


class Pooled(torch.nn.Module):
    """A net of any image size."""

    def __init__(self):
        super().__init__()
        net = tiny_net(norm=True, dropout=0.2)
        self.num_classes, self.preprocessing = 4, net.preprocessing
        self.conv, self.norm, self.drop, self.head = net.conv, net.norm, net.drop, torch.nn.Linear(8, 4)

    def forward(self, image):
        return self.head(self.drop(self.norm(self.conv(image)).relu().mean((2, 3))))


def train(folder, *assignments, net=None, at=(), fault=None):
    recipe = tiny_recipe(*STILL, *assignments)
    torch.manual_seed(0)
    learner = Watched.create(net or tiny_net(norm=True, dropout=0.2), tiny_data(), recipe)
    learner.at, learner.fault = tuple(at), fault or Breaks.fault
    result = fit(learner, tiny_data(), recipe, folder)
    return result, weights(learner.model), learner


def interrupt(learner, losses):
    signal.raise_signal(signal.SIGTERM)
    return losses


# ---- freezing and thawing


def test_frozen_parts_thaw_at_their_step(tmp_path):
    _, _, learner = train(tmp_path, FROZEN)
    assert [seen["learns"] for seen in learner.seen] == [("head",)] * 4 + [("conv", "head", "norm")] * 4
    assert all(p.requires_grad for p in learner.parameters())


def test_frozen_parts_do_not_move_and_keep_their_statistics(tmp_path):
    start = weights(tiny_net(norm=True, dropout=0.2))
    _, final, learner = train(tmp_path, "phases=[{freeze: [model.conv, model.norm]}]")
    changed = {name for name in start if not torch.equal(start[name], final[name])}
    assert changed == {"head.weight", "head.bias"}
    assert {name for name, p in learner.model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_a_phase_may_train_what_the_learner_had_frozen(tmp_path):
    net = tiny_net(norm=True, dropout=0.2)
    net.conv.requires_grad_(False)
    _, _, learner = train(tmp_path, "phases=[{until: 3 steps}, {until: 5 steps, train: [model.conv.weight]}, {}]", net=net)
    assert [seen["learns"] for seen in learner.seen] == [("head", "norm")] * 3 + [("conv", "head", "norm")] * 2 + [("head", "norm")] * 3


def test_a_frozen_player_takes_no_turn(tmp_path):
    _, _, learner = duel(tmp_path, "budget.steps=4", "phases=[{until: 2 steps, freeze: [model]}]")
    turns = [(entry["step"], entry["player"]) for entry in learner.seen if "name" not in entry]
    assert [step for step, player in turns if player == "generator"] == [2, 3]
    assert [step for step, player in turns if player == "discriminator"] == [0, 1, 2, 3]


def test_a_pattern_that_matches_nothing_is_refused_with_near_names():
    with pytest.raises(UsageError, match=r"phases.0.freeze: 'model.cnov' matches no parameter of .*did you mean .*model.conv"):
        Plan(Watched(tiny_net()), tiny_recipe("phases=[{freeze: [model.cnov]}]"))
    with pytest.raises(UsageError, match=r"phases.0.train: 'model.drop'"):
        Plan(Watched(tiny_net()), tiny_recipe("phases=[{train: [model.drop]}]"))
    with pytest.raises(UsageError, match=r"phases.0 leaves no parameter"):
        Plan(Watched(tiny_net()), tiny_recipe("phases=[{freeze: ['*']}]"))
    assert matching(tiny_net(), ["head", "*.weight"], "here") == {"head.weight", "head.bias", "conv.weight"}


def test_phases_must_follow_one_another(tmp_path):
    with pytest.raises(UsageError, match=r"phases.0.until is missing"):
        tiny_recipe("phases=[{freeze: [model]}, {until: 0.5}]")
    with pytest.raises(UsageError, match=r"of 8 steps they end at 4, 3"):
        train(tmp_path, "phases=[{until: 0.5}, {until: 3 steps}]")
    with pytest.raises(UsageError, match=r"phases.1.frezee is not a setting; did you mean freeze"):
        tiny_recipe("phases=[{until: 0.5}, {frezee: [model]}]")


def test_an_interrupt_leaves_a_learner_that_can_go_on(tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, FROZEN, at=[1], fault=crash)
    recipe = tiny_recipe(*STILL, FROZEN)
    learner = Watched.create(tiny_net(norm=True), tiny_data(), recipe)
    learner.at, learner.fault = (1,), interrupt
    with pytest.raises(KeyboardInterrupt):
        fit(learner, tiny_data(), recipe, tmp_path / "again")
    assert all(p.requires_grad for p in learner.parameters())
    with settled(learner, tiny_recipe("phases=[{freeze: [model.conv]}]")):
        assert not learner.model.conv.weight.requires_grad
    assert learner.model.conv.weight.requires_grad


# ---- another resolution


def test_another_image_size(tmp_path):
    result, _, learner = train(tmp_path, "phases=[{until: 0.5, image_size: 4}, {image_size: 12}]", net=Pooled())
    assert [seen["size"] for seen in learner.seen] == [4] * 4 + [12] * 4
    assert learner.model.preprocessing.image_size == 12
    assert result.steps == 8


def test_an_image_size_that_the_model_cannot_take_is_refused_at_once(tmp_path):
    with pytest.raises(UsageError, match=r"phases: the model cannot take images of 12 pixels"):
        train(tmp_path, "phases=[{until: 0.5}, {image_size: 12}]")
    assert not (tmp_path / "last.ckpt").exists()
    with pytest.raises(UsageError, match=r"a budget in minutes does not support"):
        train(tmp_path, "phases=[{until: 0.5, image_size: 12}]", "budget={minutes: 1}", net=Pooled())


# ---- numbers by step


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_courses_follow_their_formulas(shape):
    course = Course.model_validate({"from": 1.0, "to": 0.2, "start": "20 steps", "until": 0.6, "shape": shape})
    for step in range(101):
        share = min(1.0, max(0.0, (step - 20) / 40))
        if shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        assert value_at(course, step, 100, 10) == pytest.approx(1.0 - 0.8 * share, abs=1e-12)
    at_once = Course.model_validate({"from": 1.0, "to": 0.0, "start": 0.5, "until": 0.5})
    assert [value_at(at_once, step, 10, 1) for step in (4, 5, 10)] == [1.0, 0.0, 0.0]


def test_a_setting_of_the_learner_by_step_and_by_phase(tmp_path):
    path = "objective.loss.label_smoothing"
    phases = f"phases=[{{until: 2 steps, values: {{{path}: 0.5}}}}]"
    _, _, learner = train(tmp_path, f"values={{{path}: {{from: 0.0, to: 0.4, until: 4 steps, shape: linear}}}}", phases)
    assert [round(seen["smoothing"], 6) for seen in learner.seen] == [0.5, 0.5, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4]
    _, _, learner = train(tmp_path / "constant", phases)
    assert [seen["smoothing"] for seen in learner.seen] == [0.5, 0.5] + [0.0] * 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("objective.loss.label_smothing", r"objective.loss.label_smothing is no setting of classification; did you mean label_smoothing"),
        ("objective.lr", r"objective.lr is no setting of classification \(settings: loss, mixing\)"),
        ("objective.loss.name", r"objective.loss.name is 'cross_entropy', and only numbers can change"),
        (
            "optimizer.lr",
            r"optimizer.lr cannot change with the step; for the learning rate see schedule \(accepted: weight_decay, momentum\)",
        ),
        ("schedule.lr", r"'schedule.lr' is not the path of a value; paths are objective.KEY, method.SLUG.OPTION, optimizer.weight_decay"),
        ("model.drop_path", r"model.drop_path cannot change with the step; did you mean drop_path_rate"),
        ("model.drop_path_rate", r"the model has no stochastic depth; set model_arguments.drop_path_rate above 0"),
        ("method.evit.keep", r"no method 'evit' is on the model \(on it: none; vitarium train --apply evit puts it there\)"),
    ],
)
def test_unknown_paths_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        Plan(Watched(tiny_net()), tiny_recipe("objective={name: classification}", f"values={{{values}: {{from: 0.0, to: 0.1}}}}"))


def test_values_out_of_range_and_keys_are_refused():
    values = "values={objective.loss.label_smoothing: {from: 0.0, to: 2.0}}"
    with pytest.raises(UsageError, match=r"label_smoothing=2: loss.label_smoothing: .*less than 1"):
        Plan(Watched(tiny_net()), tiny_recipe("objective={name: classification}", values))
    with pytest.raises(UsageError, match=r"form is not a setting.*accepted: from, to, start, until, shape"):
        tiny_recipe("values={objective.a: {form: 1.0, to: 0.0}}")


class Deep(torch.nn.Module):
    """A net with stochastic depth."""

    def __init__(self):
        super().__init__()
        net = tiny_net(norm=True)
        self.num_classes, self.preprocessing = 4, net.preprocessing
        self.stem, self.paths = net, torch.nn.ModuleList([DropPath(0.1), DropPath(0.4)])

    def forward(self, image):
        x = self.stem(image)
        return self.paths[1](self.paths[0](x)) + x


class Recorded(Watched):
    """Notes the numbers of the optimizer and of stochastic depth."""

    def loss(self, batch):
        losses = super().loss(batch)
        rates = [round(part.drop_prob, 6) for part in getattr(self.model, "paths", [])]
        self.seen[-1] |= {"rates": rates, "groups": [dict(group, params=None) for group in getattr(self, "groups", [])]}
        return losses


def numbers_of(folder, *assignments, at=(), fault=None, net=None):
    """Train, with what was seen in each step."""
    recipe = tiny_recipe(*STILL, *assignments)
    learner = Recorded.create(net or Deep(), tiny_data(), recipe)
    learner.at, learner.fault = tuple(at), fault or Breaks.fault
    made = run_module.create_optimizer

    def create(*arguments):
        optimizer = made(*arguments)
        learner.groups = Live(optimizer)
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "create_optimizer", create)
        fit(learner, tiny_data(), recipe, folder)
    return learner


class Live:
    """The groups of an optimizer, which a restored state replaces."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __iter__(self):
        return iter(self.optimizer.param_groups)


WEIGHT_DECAY = "values={optimizer.weight_decay: {from: 0.04, to: 0.4}, model.drop_path_rate: {from: 0.0, to: 0.2, shape: linear}}"


def test_weight_decay_and_stochastic_depth_by_step(tmp_path):
    """The weight decay of DINO, of those tensors only that have one; the rates of stochastic depth keep their proportions."""
    learner = numbers_of(tmp_path, WEIGHT_DECAY, "optimizer.weight_decay=0.04")
    for step, seen in enumerate(learner.seen):
        expected = cosine(step, base=0.04, final=0.4, total=8)
        assert sorted(round(group["weight_decay"], 9) for group in seen["groups"]) == [0.0, round(expected, 9)]
        assert seen["rates"] == pytest.approx([0.05 * step / 8, 0.2 * step / 8], abs=1e-6)


def test_momentum_by_step(tmp_path):
    sgd = "optimizer={name: sgd, lr: 0.01, momentum: 0.9}"
    path = "values={optimizer.momentum: {from: 0.8, to: 0.9, shape: linear}}"
    learner = numbers_of(tmp_path / "sgd", sgd, path)
    assert [group["momentum"] for seen in learner.seen for group in seen["groups"][:1]] == pytest.approx(
        [0.8 + step / 80 for step in range(8)]
    )
    learner = numbers_of(tmp_path / "adamw", path)
    assert learner.seen[4]["groups"][0]["betas"] == pytest.approx((0.85, 0.999))


def test_numbers_of_the_optimizer_survive_a_resume(tmp_path):
    """The restored optimizer has the weight decay of its checkpoint, which is not that of the next step."""
    settings = (WEIGHT_DECAY, "optimizer.weight_decay=0.04", "checkpoint_minutes=1e-9")
    whole = numbers_of(tmp_path / "whole", *settings)
    with pytest.raises(Crash):
        numbers_of(tmp_path / "broken", *settings, at=(4,), fault=crash)
    resumed = numbers_of(tmp_path / "broken", *settings)
    assert_same_weights(weights(whole.model), weights(resumed.model))
    assert [seen["groups"] for seen in resumed.seen] == [seen["groups"] for seen in whole.seen[4:]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["values={optimizer.weight_decay: {from: 0.0, to: -1.0}}"], "weight_decay=-1: weight_decay"),
        (["values={optimizer.weight_decay: {from: 0.0, to: 0.1}}", "optimizer.weight_decay=0"], "needs an optimizer.weight_decay above 0"),
        (["values={model.drop_path_rate: {from: 0.0, to: 1.0}}"], "must be at least 0 and less than 1, got 1"),
    ],
)
def test_numbers_of_optimizer_and_model_are_checked(settings, message):
    with pytest.raises(UsageError, match=message):
        Plan(Watched(Deep()), tiny_recipe("objective={name: classification}", *settings))


def test_stochastic_depth_of_timms_and_our_models():
    """Both call their largest rate drop_path_rate, and both can change it."""
    for name in ("timm/vit_pico", "swin_pico"):
        model = vitarium.create_model(name, drop_path_rate=0.1)
        learner = ClassificationLearner(model)
        target_of("model.drop_path_rate", learner, tiny_recipe()).set(0.3, ())
        assert max(m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")) == pytest.approx(0.3)


# ---- resuming, and several processes

EVERYTHING = (
    "ema={decay: 0.9}",
    "accumulate=2",
    "phases=[{until: 3 steps, freeze: [model.conv, model.norm], image_size: 4}, {until: 6 steps, image_size: 12}]",
    "values={objective.loss.label_smoothing: {from: 0.0, to: 0.4, until: 5 steps}}",
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    result, final, _ = train(folder, *EVERYTHING, net=Pooled())
    return folder, result, final


@pytest.mark.parametrize("stops", [[0], [1, 2], [3, 5], [6]])
def test_resumed_equals_unbroken_across_boundaries(tmp_path, unbroken, stops):
    folder, expected, final = unbroken
    for stop in stops:
        with pytest.raises(KeyboardInterrupt, match=f"interrupted at step {stop + 1} of 8"):
            train(tmp_path, *EVERYTHING, net=Pooled(), at=[stop], fault=interrupt)
    result, resumed, _ = train(tmp_path, *EVERYTHING, net=Pooled())
    assert_same_weights(resumed, final)
    assert lines(tmp_path) == lines(folder)
    assert timeless(result.history) == timeless(expected.history)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's processes are tested on POSIX")
def test_two_processes_freeze_and_thaw_as_one(tmp_path):
    options = (*STILL, "augment={}", "num_workers=0", "budget.steps=6", "phases=[{until: 3 steps, freeze: [model.conv]}]")
    found = []
    for devices in (1, 2):
        recipe = tiny_recipe(*options, f"batch_size={16 // devices}")
        learner = ClassificationLearner.create(tiny_net(dropout=0.0), tiny_data(), recipe)
        fit(learner, tiny_data(), recipe, tmp_path / str(devices), devices=devices, accelerator="cpu")
        found.append(weights(learner.model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_a_finished_run_leaves_its_last_phase(tmp_path):
    for _ in range(2):  # trained, and then read from its folder
        _, _, learner = train(tmp_path, *EVERYTHING, net=Pooled())
        assert learner.model.preprocessing.image_size == 8
        assert learner.settings.loss.label_smoothing == pytest.approx(0.4)


# ---- users


def test_tinyvit_ends_at_a_larger_size(tmp_path):
    """The recipe `tinyvit_finetune_pico`: 12 pixels, then 16, which the saved model takes."""
    data = vitarium.open_data("digits")
    recipe = load_recipe("tinyvit_finetune_pico", ["budget.steps=10"])
    learner = find_learner("classification").create("tinyvit_pico", data, recipe)
    sizes = []
    hook = learner.model.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-1]) if module.training else None)
    result = fit(learner, data, recipe, tmp_path)
    hook.remove()
    assert sizes == [12] * 6 + [16] * 4
    vitarium.save(learner.model, tmp_path / "m.safetensors")
    assert vitarium.load(tmp_path / "m.safetensors").preprocessing.image_size == 16
    assert result.metrics["accuracy"] > 0


def test_evits_keep_rate_falls_as_the_authors(tmp_path):
    """The recipe `evit_pico`: the live option follows `annealed_keep`, in the model and in its moving average."""
    data = vitarium.open_data("digits")
    recipe = load_recipe("evit_pico", ["budget.steps=10", "log_every=1", "eval_every=2 steps"]).model_copy(update={"image_size": 16})
    learner = find_learner("classification").create("timm/vit_pico", data, recipe)
    vitarium.apply(learner.model, *recipe.apply, quiet=True)
    rates, evaluated = [], []
    learner.after_step = lambda step, total: rates.append(learner.model.methods[0].method.keep)
    learner.evaluate_batch = lambda model, batch, metrics: evaluated.append((model is learner.model, model.methods[0].method.keep))
    learner.summary = lambda metrics: {}
    fit(learner, data, recipe, tmp_path)
    assert rates == pytest.approx([annealed_keep(step, keep=0.5, start=1, steps=4) for step in range(10)], abs=1e-12)
    steps = [step for step in (2, 4, 6, 8, 10) for _ in range(len(evaluated) // 5)]
    assert all(not itself for itself, _ in evaluated)
    assert [keep for _, keep in evaluated] == pytest.approx([annealed_keep(step, keep=0.5, start=1, steps=4) for step in steps])
    vitarium.save(learner.model, tmp_path / "m.safetensors")
    assert vitarium.load(tmp_path / "m.safetensors").methods[0].method.keep == 0.5


def test_the_published_recipes_of_phases_build():
    for name in ("tinyvit_finetune", "evit"):
        assert load_recipe(name).phases or load_recipe(name).values


def test_the_recipes_of_evit_are_the_authors():
    """Of their two scripts at a total batch of 1024: rates that their code scales linearly from 512, and ends that it does not scale."""
    scratch, tuned = load_recipe("evit"), load_recipe("evit_finetune")
    rates = {
        name: Rates(recipe.schedule, recipe.optimizer, total_steps=300, steps_per_epoch=1, total_batch=1024)
        for name, recipe in (("scratch", scratch), ("tuned", tuned))
    }
    peak = 5e-4 * 1024 / 512
    assert rates["scratch"].at(5) == pytest.approx(1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * 5 / 300)) / 2)  # the cosine starts at 0
    assert (rates["scratch"].at(0), rates["scratch"].at(300)) == pytest.approx((1e-6, 1e-5))
    assert (rates["tuned"].at(0), rates["tuned"].at(300)) == pytest.approx((2e-5 * 1024 / 512, 2e-6))
    assert (tuned.optimizer.weight_decay, tuned.budget.epochs, tuned.values) == (1e-6, 30, {})


def test_a_duel_keeps_its_phases_over_a_resume(tmp_path):
    options = ("budget.steps=6", "phases=[{until: 2 steps, freeze: [model]}, {until: 4 steps, freeze: [discriminator.conv]}]")
    _, whole, _ = duel(tmp_path / "whole", *options)

    class Stopped(Duel):
        at = -1

        def before_step(self, step, total_steps):
            super().before_step(step, total_steps)
            if step == self.at:
                signal.raise_signal(signal.SIGTERM)

    for stop in (1, 3):
        learner = Stopped()
        learner.at = stop
        with pytest.raises(KeyboardInterrupt):
            duel(tmp_path / "parts", *options, learner=learner)
    _, resumed, _ = duel(tmp_path / "parts", *options, learner=Stopped())
    assert_same_weights(resumed, whole)


@pytest.mark.identity
def test_a_file_of_what_phases_trained_leaves_the_rest_out(tmp_path):
    """`vitarium train --trained-only` with a frozen trunk: the head alone is in the file, and the file is whole again with its base."""
    torch.manual_seed(0)
    base = vitarium.create_model("timm/vit_pico", num_classes=10, image_size=16)
    vitarium.save(base, tmp_path / "base.safetensors")
    changes = [
        "budget.steps=3",
        "ema=null",
        "phases=[{until: 0.5, freeze: [model], train: [model.head]}, {freeze: [model], train: [model.head, model.norm]}]",
    ]
    options = {"model": "timm/vit_pico", "checkpoint": str(tmp_path / "base.safetensors"), "changes": changes, "trained_only": True}
    done = train_by_recipe("pico", "digits", out=tmp_path / "run", **options)
    assert done.file.stat().st_size < 0.2 * (tmp_path / "base.safetensors").stat().st_size
    loaded, before = vitarium.load(done.file).state_dict(), base.state_dict()
    assert_same_weights(loaded, done.model.state_dict())
    assert {name for name in loaded if not torch.equal(loaded[name], before[name])} == {
        "head.weight",
        "head.bias",
        "norm.weight",
        "norm.bias",
    }
    with pytest.raises(UsageError, match="every parameter of this timm/vit_pico learns"):
        train_by_recipe("pico", "digits", out=tmp_path / "other", **{**options, "changes": ["budget.steps=3"]})
