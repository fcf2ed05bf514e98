"""Several players: guarantees of the loop for each, also after a kill and with two processes."""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time

import pytest
import torch
from torch import nn

from tests.training.duel import RECIPE, Duel, duel
from tests.training.test_fit import lines, timeless
from tests.training.test_kill import in_child
from tests.training.tiny import assert_same_weights, tiny_data, tiny_recipe, weights
from vitarium.errors import TrainingStopped, UsageError
from vitarium.training import fit, load_recipe
from vitarium.training.checkpoint import load_run
from vitarium.training.players import Player, checked_players
from vitarium.training.steppers import Stepper

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, forks and gloo of POSIX")
EVERYTHING = ("accumulate=2", "checkpoint_minutes=1e-9")
PARTS = {"norm": True, "dropout": 0.2, "every": 2}
PLAIN = ("augment={}", "budget.steps=7")


class Broken(Duel):
    """Something bad happens to one player at chosen steps."""

    at: tuple[int, ...] = ()
    who = "generator"
    fault = staticmethod(lambda losses: {**losses, "loss": losses["loss"] * math.nan})

    def loss(self, batch, player):
        losses = super().loss(batch, player)
        return self.fault(losses) if self.step in self.at and player == self.who else losses


def broken(at, who="generator", fault=None, **options) -> Broken:
    learner = Broken(**options)
    learner.at, learner.who = tuple(at), who
    if fault:
        learner.fault = fault
    return learner


def interrupt(losses):
    signal.raise_signal(signal.SIGTERM)
    return losses


# ---- a turn concerns one player


def test_others_require_no_gradients_during_a_turn(tmp_path):
    class Watching(Duel):
        def loss(self, batch, player):
            learns = {name.split(".")[0] for name, p in self.named_parameters() if p.requires_grad}
            assert learns == {"model" if player == "generator" else "discriminator"}
            return super().loss(batch, player)

    _, _, learner = duel(tmp_path, "budget.steps=3", learner=Watching())
    assert all(p.requires_grad for p in learner.parameters())


@posix
def test_after_an_interrupt_all_parameters_learn_again(tmp_path):
    learner = broken([1], "discriminator", interrupt)
    with pytest.raises(KeyboardInterrupt):
        duel(tmp_path, learner=learner)
    assert all(p.requires_grad for p in learner.parameters())


@pytest.mark.parametrize("shared", [False, True])
def test_buffers_of_others_do_not_change_unless_the_player_says_so(tmp_path, shared):
    """The discriminator sees three batches a turn (real, made, and real again for R1), and one in the generator's turns."""

    class Watching(Duel):
        counts = ()

        def loss(self, batch, player):
            self.counts = (
                *self.counts,
                (player, int(self.model.norm.num_batches_tracked), int(self.discriminator.norm.num_batches_tracked)),
            )
            return super().loss(batch, player)

    _, _, learner = duel(tmp_path, "budget.steps=2", learner=Watching(norm=True, shared=shared))
    first, second = (0, 3), (1, 3 + shared)  # (generator, discriminator) passes before the turns of step 0's generator and step 1
    assert learner.counts == (
        ("discriminator", 0, 0),
        ("generator", *first),
        ("discriminator", *second),
        ("generator", second[0], second[1] + 2),
    )


def test_a_buffer_that_is_exchanged_comes_back(tmp_path):
    class Exchanging(Duel):
        def loss(self, batch, player):
            if player == "generator":
                self.discriminator.norm.running_mean = torch.full((8,), 9.0)
            return super().loss(batch, player)

    _, _, learner = duel(tmp_path, "budget.steps=2", learner=Exchanging(norm=True))
    assert (learner.discriminator.norm.running_mean < 9).all()


def test_each_player_has_its_own_optimizer_schedule_clip_and_average(tmp_path):
    recipe = tiny_recipe(
        *RECIPE,
        "schedule={warmup: 0.0}",
        "players={generator: {optimizer: {name: sgd, lr: 0.5}, schedule: {name: constant}, clip: {value: 0.001}, ema: {decay: 0.5}}}",
    )
    mine, other = recipe.player("generator"), recipe.player("discriminator")
    assert (mine.optimizer.name, mine.optimizer.lr, mine.optimizer.weight_decay) == ("sgd", 0.5, recipe.optimizer.weight_decay)
    assert (mine.schedule.name, mine.schedule.warmup.amount, mine.clip.value, mine.clip.norm) == ("constant", 0.0, 0.001, None)
    assert (other.optimizer, other.clip, other.ema) == (recipe.optimizer, recipe.clip, recipe.ema)
    learner = Duel()
    before = weights(learner.model)
    fit(learner, tiny_data(), recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"steps": 1})}), tmp_path)
    _, tensors = load_run(tmp_path / "last.ckpt")
    assert list(tensors["averages"]) == ["generator"]
    for name, value in before.items():  # Nesterov's first step is 1.9 times the gradient, and half of it is averaged
        moved = (tensors["learner"][f"model.{name}"] - value).abs().max()
        decay = 0.5 * 1.9 * recipe.optimizer.weight_decay * value.abs().max()
        assert moved <= 0.5 * 1.9 * 0.001 + decay + 1e-7
        torch.testing.assert_close(tensors["averages"]["generator"][name], (value + tensors["learner"][f"model.{name}"]) / 2)


def test_steps_per_player_and_lazy_regularizers(tmp_path):
    _, _, learner = duel(tmp_path, "budget.steps=8", every=3)
    turns = [(entry["step"], entry["player"]) for entry in learner.seen if "name" not in entry]
    assert [step for step, player in turns if player == "generator"] == [0, 3, 6]
    assert [step for step, player in turns if player == "discriminator"] == list(range(8))
    assert [entry["step"] for entry in learner.seen if entry.get("name") == "r1"] == [0, 3, 6]


def test_a_lazy_regularizer_is_scaled_by_its_interval():
    learner = Duel()
    batch = {"image": torch.randn(4, 3, 8, 8), "index": torch.arange(4)}
    plain = learner(batch, "discriminator")
    lazy = learner(batch, "discriminator", ("r1",))
    torch.testing.assert_close(lazy["loss"], plain["loss"] + 3 * lazy["r1"])
    assert not lazy["r1"].requires_grad
    assert lazy["r1"] == pytest.approx(float(learner.regularize(batch, "discriminator", "r1").detach()))


def test_one_player_alone_may_take_sharpness_aware_steps(tmp_path):
    _, _, learner = duel(tmp_path, "budget.steps=2", "players={generator: {optimizer: {sam: {rho: 0.1}}}}")
    passes = [entry["player"] for entry in learner.seen if "name" not in entry]
    assert passes == ["discriminator", "generator", "generator"] * 2
    first, second = (entry for entry in learner.seen[:4] if entry["player"] == "generator")
    assert torch.equal(first["noise"], second["noise"])


# ---- draws


def draws(learner: Duel) -> dict:
    return {
        (e["step"], e["player"], int(i)): row for e in learner.seen if "noise" in e for i, row in zip(e["index"], e["noise"], strict=True)
    }


def test_adding_a_player_leaves_the_draws_of_others_unchanged(tmp_path):
    _, two, _ = duel(tmp_path / "two", "budget.steps=4", dropout=0.5)
    _, three, learner = duel(tmp_path / "three", "budget.steps=4", dropout=0.5, third=True)
    assert_same_weights({name: value for name, value in three.items() if not name.startswith("third")}, two)
    by_player = {player: torch.stack([row for key, row in draws(learner).items() if key[1] == player]) for player in ("third", "generator")}
    assert not torch.isclose(by_player["third"], by_player["generator"]).any()


def test_samples_draw_the_same_however_the_batch_is_divided(tmp_path):
    _, large, one = duel(tmp_path / "one", *PLAIN, "batch_size=16")
    _, small, two = duel(tmp_path / "two", *PLAIN, "batch_size=8", "accumulate=2")
    first, second = draws(one), draws(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, rtol=1e-5, atol=1e-6)


def test_draws_differ_by_step_sample_and_call():
    learner = Duel()
    batch = {"image": torch.zeros(3, 1, 1, 1)}
    numbers = torch.cat([learner.noise(batch, 4), learner.noise(batch, 4), learner.uniform(batch, 4)])
    assert len(numbers.unique()) == numbers.numel()
    learner.draws.restart()
    assert torch.equal(learner.noise(batch, 4), numbers[:3])


@posix
def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    double, expected, _ = duel(tmp_path / "one", *PLAIN, "batch_size=16", every=2)
    single, found, _ = duel(tmp_path / "two", *PLAIN, "batch_size=8", every=2, devices=2)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert single.history[-1]["train_discriminator.loss"] == pytest.approx(double.history[-1]["train_discriminator.loss"], rel=1e-4)


# ---- resuming


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    began = time.monotonic()
    result, final, _ = duel(folder, *EVERYTHING, learner=broken([], **PARTS))
    return folder, result, final, time.monotonic() - began


def assert_ends_as(folder, unbroken):
    expected_folder, expected, final, _ = unbroken
    result, found, _ = duel(folder, *EVERYTHING, learner=broken([], **PARTS))
    assert_same_weights(found, final)
    assert lines(folder) == lines(expected_folder)
    assert timeless(result.history) == timeless(expected.history)


@posix
def test_resumed_equals_unbroken(tmp_path, unbroken):
    for stop, who in ((3, "discriminator"), (4, "generator"), (13, "discriminator")):
        with pytest.raises(KeyboardInterrupt, match=f"interrupted at step {stop + 1} of 24"):
            duel(tmp_path, *EVERYTHING, learner=broken([stop], who, interrupt, **PARTS))
    assert_ends_as(tmp_path, unbroken)


def work(folder) -> None:
    duel(folder, *EVERYTHING, learner=broken([], **PARTS))


@posix
def test_killed_at_any_instant_it_goes_on(tmp_path, unbroken):
    rng, kills = random.Random(0), 0
    for _ in range(5):
        child = in_child(work, tmp_path)
        child.join(rng.uniform(0.1, 0.7) * unbroken[3])
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
    assert kills
    assert_ends_as(tmp_path, unbroken)


# ---- losses that are not finite


def test_a_step_that_is_not_finite_is_skipped_for_this_player_alone(tmp_path):
    result, final, _ = duel(tmp_path, "budget.steps=6", learner=broken([5]))
    assert (result.skipped, result.skips) == (1, {"generator": 1})
    _, whole, _ = duel(tmp_path / "other", "budget.steps=6")
    _, tensors = load_run(tmp_path / "last.ckpt")
    _, others = load_run(tmp_path / "other" / "last.ckpt")
    for name in whole:  # the last step's generator is left out, and nothing else
        same = torch.equal(tensors["learner"][name], others["learner"][name])
        assert same == name.startswith("discriminator"), name
    assert lines(tmp_path)[-1]["generator.skipped"] == "1"
    assert lines(tmp_path)[-1]["discriminator.skipped"] == "0"
    assert all(torch.isfinite(value).all() for value in final.values())


def test_only_a_players_own_steps_in_a_row_stop_the_run(tmp_path):
    result, _, _ = duel(tmp_path / "apart", "budget.steps=9", learner=broken([1, 2, 4, 5, 7]))
    assert result.skips == {"generator": 5}
    with pytest.raises(
        TrainingStopped, match=r"loss or gradient of the player generator was not finite.*lower players.generator.optimizer.lr"
    ):
        duel(tmp_path / "together", learner=broken([3, 4, 5]))


# ---- what is written and shown


def test_losses_by_player_in_the_log_and_in_progress(tmp_path):
    told = []
    fit(Duel(), tiny_data(), tiny_recipe(*RECIPE, "budget.steps=6"), tmp_path, progress=told.append)
    row = lines(tmp_path)[0]
    wanted = {f"{player}.{name}" for player in ("discriminator", "generator") for name in ("loss", "lr", "grad_norm", "skipped")}
    assert wanted | {"discriminator.real", "discriminator.r1"} <= row.keys()
    assert told[-1].losses.keys() == {"discriminator", "generator"}
    assert told[-1].loss == pytest.approx(sum(told[-1].losses.values()))


def test_a_number_that_comes_late_gets_its_column(tmp_path):
    class Late(Duel):
        def loss(self, batch, player):
            losses = super().loss(batch, player)
            return losses | ({"late": losses["loss"].detach()} if self.step > 3 else {})

    duel(tmp_path, "budget.steps=6", learner=Late())
    assert [row["generator.late"] == "" for row in lines(tmp_path)] == [True, False]


# ---- what is refused


def test_wrong_players_are_refused():
    with pytest.raises(UsageError, match=r"every must be a whole number of at least 1, got 0"):
        Player(nn.Linear(1, 1), every=0)
    with pytest.raises(UsageError, match=r"lazy\['r1'\]"):
        Player(nn.Linear(1, 1), lazy={"r1": 0.5})
    with pytest.raises(UsageError, match=r"ema=MODULE"):
        Player([nn.Linear(1, 1)], ema=True)
    learner = Duel()
    with pytest.raises(
        UsageError, match=r"players.generater: Duel has no such player; did you mean generator\? \(its players: discriminator"
    ):
        checked_players(learner, tiny_recipe("players={generater: {clip: {norm: 1}}}"))
    learner.loose = nn.Linear(1, 1)
    with pytest.raises(UsageError, match=r"loose.weight of Duel requires gradients and belongs to no player \(discriminator, generator\)"):
        checked_players(learner, tiny_recipe())


def test_a_single_parameter_may_be_a_player(tmp_path):
    class Patch(Duel):
        """An adversarial patch against a frozen judge."""

        def __init__(self):
            super().__init__()
            self.discriminator.requires_grad_(False)
            self.model.requires_grad_(False)
            self.patch = nn.Parameter(torch.zeros(3, 8, 8))

        def players(self):
            return {"patch": Player([self.patch])}

        def loss(self, batch, player):
            return {"loss": self.discriminator(batch["image"] + self.patch).mean()}

    _, final, learner = duel(tmp_path, "budget.steps=3", learner=Patch())
    assert final["patch"].abs().sum() > 0
    assert_same_weights(weights(learner.discriminator), weights(Duel().discriminator))
    loose = nn.Parameter(torch.zeros(1))
    Patch.players = lambda self: {"patch": Player([loose, self.patch])}
    with pytest.raises(UsageError, match=r"player patch of Patch has parameters that are not the learner's"):
        checked_players(learner, tiny_recipe())


def test_a_recipes_players_are_checked():
    with pytest.raises(UsageError, match=r"players.generator: optimizer.lrr is not a setting; did you mean lr"):
        load_recipe("dcgan", ["players.generator.optimizer.lrr=1"])
    with pytest.raises(UsageError, match=r"players.generator: optimiser is not a setting; did you mean optimizer"):
        load_recipe("dcgan", ["players.generator.optimiser.lr=1"])


def test_sharding_refuses_several_players():
    from vitarium.training.sharding import check_shardable

    with pytest.raises(UsageError, match="learners of one player"):
        check_shardable(Duel(), tiny_recipe("ema=null"))


# ---- extra passes and other steppers


class Attacked(Duel):
    """The discriminator learns on images that a first pass moved against it."""

    def first_pass(self, batch, player):
        if player == "generator":
            return batch
        image = batch["image"].detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.discriminator(image).sum(), image)
        return {**batch, "image": batch["image"] - 0.1 * slope.sign(), "clean": batch["image"]}

    def loss(self, batch, player):
        losses = super().loss(batch, player)
        if player == "discriminator":
            losses["moved"] = (batch["image"] - batch["clean"]).abs().amax().detach()
        return losses


def test_a_first_pass_changes_the_batch_that_the_loss_sees(tmp_path):
    duel(tmp_path, "budget.steps=3", learner=Attacked())
    assert float(lines(tmp_path)[0]["discriminator.moved"]) == pytest.approx(0.1, rel=1e-5)
    assert "generator.moved" not in lines(tmp_path)[0]


class Halving(Stepper):
    """Two passes, of which the mean gradient counts."""

    passes = 2

    def gradients(self, turn):
        losses = turn.accumulate()
        turn.accumulate()
        for parameter in turn.parameters:
            parameter.grad.div_(2)
        return losses


@posix
def test_a_learner_may_choose_a_stepper(tmp_path):
    """Equal passes: the mean of their gradients is that of one."""

    class Chosen(Duel):
        def stepper(self, settings, player):
            return Halving() if player == "generator" else super().stepper(settings, player)

    _, expected, _ = duel(tmp_path / "one", "budget.steps=3", dropout=0.2)
    _, found, learner = duel(tmp_path / "two", "budget.steps=3", learner=Chosen(dropout=0.2))
    assert_same_weights(found, expected)
    assert sum(entry["player"] == "generator" for entry in learner.seen) == 2 * 3


def test_a_single_player_may_skip_steps(tmp_path):
    """`every` of the only player: no turn at odd steps, also where a resumed run logs before its first turn."""

    class Alternate(Broken):
        def players(self):
            return {"discriminator": Player(self.discriminator, every=2)}

        def before_step(self, step, total_steps):
            super().before_step(step, total_steps)
            if step in self.at:
                signal.raise_signal(signal.SIGTERM)

        def loss(self, batch, player):
            return Duel.loss(self, batch, player)

    def made(at=()):
        learner = Alternate()
        learner.model.requires_grad_(False)
        learner.at = at
        return learner

    _, whole, learner = duel(tmp_path / "whole", "budget.steps=5", "log_every=1", learner=made())
    assert [entry["step"] for entry in learner.seen] == [0, 2, 4]
    with pytest.raises(KeyboardInterrupt):
        duel(tmp_path / "parts", "budget.steps=5", "log_every=1", learner=made([2]))
    _, resumed, _ = duel(tmp_path / "parts", "budget.steps=5", "log_every=1", learner=made())
    assert_same_weights(resumed, whole)
