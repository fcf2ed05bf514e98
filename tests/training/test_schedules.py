"""Learning rates against the authors' numbers, their formulas, and the schedulers of timm and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.golden import read_golden
from tests.training.test_optim import close, each_golden, golden
from tests.training.tiny import tiny_recipe
from vitarium.errors import UsageError
from vitarium.training.recipe import Optimizer, Schedule
from vitarium.training.schedules import Rates, cosine

TOTAL, EPOCH = 120, 10


def rates(lr: float = 0.1, **schedule) -> list[float]:
    """Rates of all steps, and of the one after them."""
    made = Rates(Schedule(**schedule), Optimizer(lr=lr), total_steps=TOTAL, steps_per_epoch=EPOCH, total_batch=1)
    return [made.at(step) for step in range(TOTAL + 1)]


def stepped(scheduler, optimizer, update) -> list[float]:
    """Rates that a scheduler sets for all steps."""
    found = []
    for step in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        update(scheduler, step + 1)
    return found


def of_timm(kind, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = kind(optimizer, t_in_epochs=False, **options)
    return stepped(scheduler, optimizer, lambda made, step: made.step_update(step))


def of_torch(kind, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = kind(optimizer, **options)
    return stepped(scheduler, optimizer, lambda made, step: made.step() if step < TOTAL else None)


@each_golden
def test_mae_schedule_equals_the_authors(name: str):
    c = read_golden(name)["config"]
    epochs = np.linspace(0, c["epochs"], 41)
    ours = [cosine(e, base=c["lr"], final=c["min_lr"], total=c["epochs"], warmup=c["warmup_epochs"]) for e in epochs]
    close(torch.tensor(ours, dtype=torch.float64), golden(name, "mae_lr"))
    close(0.5 * torch.tensor(ours, dtype=torch.float64), golden(name, "mae_lr_scaled"))


@each_golden
def test_dino_schedule_equals_the_authors(name: str):
    c = read_golden(name)["config"]
    total, warmup = 7 * c["epochs"], 7 * c["warmup_epochs"]
    ours = [cosine(i, base=c["lr"], final=c["min_lr"], total=total, warmup=warmup, inclusive=True) for i in range(total)]
    close(torch.tensor(ours, dtype=torch.float64), golden(name, "dino_cosine"))


def test_rates_scale_with_the_batch_and_follow_the_formula():
    schedule = Schedule(warmup="2 epochs", warmup_lr=1e-4, min_lr=1e-3)
    rates = Rates(schedule, Optimizer(lr=0.1, reference_batch=256), total_steps=100, steps_per_epoch=10, total_batch=128)
    assert [rates.at(0), rates.at(20), rates.at(100)] == pytest.approx([5e-5, 0.05, 5e-4], rel=1e-12)
    for step in range(100):
        low, high, start = 5e-4, 0.05, 5e-5
        expected = start + (high - start) * step / 20 if step < 20 else low + (high - low) * (1 + math.cos(math.pi * (step - 20) / 80)) / 2
        assert abs(rates.at(step) - expected) < 1e-12
    constant = Rates(Schedule(name="constant", warmup=0), Optimizer(lr=0.1), total_steps=5, steps_per_epoch=5, total_batch=1)
    assert {constant.at(step) for step in range(6)} == {0.1}


@pytest.mark.parametrize("prefix", [True, False])
def test_a_cosine_with_warm_up_and_cool_down_equals_timms(prefix):
    from timm.scheduler import CosineLRScheduler

    ours = rates(warmup="20 steps", warmup_lr=1e-3, min_lr=1e-2, cooldown="30 steps", warmup_prefix=prefix)
    fall = TOTAL - 30 - (20 if prefix else 0)
    options = dict(t_initial=fall, lr_min=1e-2, warmup_t=20, warmup_lr_init=1e-3, warmup_prefix=prefix)
    assert ours[:TOTAL] == pytest.approx(of_timm(CosineLRScheduler, **options), rel=1e-12)
    assert ours[90:] == pytest.approx([1e-2] * 31, rel=1e-12)


@pytest.mark.parametrize("power", [0.9, 2.0])
def test_a_polynomial_equals_timms_and_torchs(power):
    from timm.scheduler import PolyLRScheduler
    from torch.optim.lr_scheduler import PolynomialLR

    ours = rates(name="polynomial", power=power, warmup=0)
    assert ours[:TOTAL] == pytest.approx(of_torch(PolynomialLR, total_iters=TOTAL, power=power), rel=1e-9)
    ours = rates(name="polynomial", power=power, warmup="20 steps", min_lr=1e-3)
    theirs = of_timm(PolyLRScheduler, power=power, t_initial=TOTAL - 20, lr_min=1e-3, warmup_t=20, warmup_prefix=True)
    assert ours[:TOTAL] == pytest.approx(theirs, rel=1e-9)


def test_linear_equals_torchs():
    from torch.optim.lr_scheduler import LinearLR

    theirs = of_torch(LinearLR, start_factor=1.0, end_factor=0.1, total_iters=TOTAL)
    assert rates(name="linear", warmup=0, min_lr=0.01)[:TOTAL] == pytest.approx(theirs, rel=1e-9)


def test_steps_equal_torchs():
    """timm's milestones take effect one step earlier."""
    from torch.optim.lr_scheduler import MultiStepLR, StepLR

    ours = rates(name="step", warmup=0, milestones=("30 steps", "8 epochs", 0.75), gamma=0.5)
    assert ours[:TOTAL] == pytest.approx(of_torch(MultiStepLR, milestones=[30, 80, 90], gamma=0.5), rel=1e-12)
    ours = rates(name="step", warmup=0, every="3 epochs", gamma=0.1, min_lr=2e-4)
    assert ours[:TOTAL] == pytest.approx([max(2e-4, value) for value in of_torch(StepLR, step_size=30, gamma=0.1)], rel=1e-12)


@pytest.mark.parametrize("rise", [0.3, 0.1])
def test_one_cycle_equals_torchs(rise):
    from torch.optim.lr_scheduler import OneCycleLR

    theirs = of_torch(OneCycleLR, max_lr=0.1, total_steps=TOTAL, pct_start=rise, cycle_momentum=False)
    ours = rates(name="one_cycle", warmup=rise, warmup_lr=4e-3, min_lr=4e-7)
    assert ours[:TOTAL] == pytest.approx(theirs, rel=1e-9)


def test_vars_schedule_follows_its_formula():
    """Warm-up over 2 %, 5 % of the rest at the peak, then a line to a tenth, which the authors reach in the last step."""
    ours = rates(name="linear", warmup=0.05, warmup_lr=5e-4, hold=0.0475, min_lr=0.01)
    warmup, hold = 6, 6
    for step in range(TOTAL):
        over = (step - warmup) / (TOTAL - warmup)
        expected = 5e-4 + (0.1 - 5e-4) * step / warmup if step < warmup else 0.1
        if step >= warmup + hold:
            expected = 0.01 + 0.09 * (1 - over) / (1 - hold / (TOTAL - warmup))
        assert ours[step] == pytest.approx(expected, rel=1e-9)


def test_a_rate_by_epoch_is_constant_within_it():
    by_step, by_epoch = (rates(warmup="2 epochs", updates=kind) for kind in ("step", "epoch"))
    assert by_epoch[:TOTAL] == [by_step[step // EPOCH * EPOCH] for step in range(TOTAL)]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("schedule={name: step}", "step needs milestones or every"),
        ("schedule={milestones: [0.5]}", "cosine has no milestones and no every, which belong to name: step"),
        ("schedule={name: linear, power: 2}", "linear has no power, which belongs to name: polynomial"),
        ("schedule={name: step, every: 0.5, gamma: 2}", "gamma"),
        ("schedule={name: exponential}", "schedule.name"),
        ("schedule={cooldown: -1}", "schedule.cooldown"),
    ],
)
def test_wrong_settings_are_named(assignment, message):
    with pytest.raises(UsageError, match=message):
        tiny_recipe(assignment)


def test_recipes_without_the_later_settings_keep_their_digest():
    """The run of version 0.1.0 has only the four earlier keys."""
    assert set(tiny_recipe().identity()["schedule"]) == {"name", "warmup", "warmup_lr", "min_lr"}
    assert "cooldown" in tiny_recipe("schedule={cooldown: 0.1}").identity()["schedule"]
    assert tiny_recipe().digest() != tiny_recipe("schedule={cooldown: 0.1}").digest()


def test_a_schedule_whose_parts_exceed_the_training_ends_at_its_end():
    found = rates(warmup=0.5, hold=0.4, cooldown=0.9, min_lr=0.01)
    assert found[59] < found[60] == found[107] == 0.1
    assert found[108:] == [0.01] * 13


def test_any_number_of_regular_milestones_takes_no_time_and_equals_their_list():
    schedule, optimizer = Schedule(name="step", warmup="0 steps", every="7 steps", gamma=0.9, milestones=("30 steps",)), Optimizer(lr=1.0)
    some = Rates(schedule, optimizer, total_steps=100, steps_per_epoch=10, total_batch=1)
    listed = [30, *range(7, 100, 7)]
    assert [some.at(step) for step in range(120)] == [0.9 ** sum(step >= m for m in listed) for step in range(120)]
    every = Schedule(name="step", warmup="0 steps", every="1 steps", gamma=0.5)
    assert Rates(every, optimizer, total_steps=10**12, steps_per_epoch=10, total_batch=1).at(3) == 0.125
