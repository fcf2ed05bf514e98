"""Learning rates as pure functions of the step, so that checkpoints do not contain them and a resumed run continues exactly.

    rise  (warmup)   ->  peak (hold)  ->  fall, along the schedule's shape  ->  min_lr (cooldown)

timm's and torch's schedulers have the same formulas as objects with a state; the tests compare with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from vitarium.training.recipe import Optimizer, Schedule

SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda share, power: 1.0,
    "cosine": lambda share, power: 0.5 * (1 + math.cos(math.pi * share)),
    "one_cycle": lambda share, power: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share, power: 1 - share,
    "polynomial": lambda share, power: (1 - share) ** power,
}
"""Name of a schedule -> height of the rate between its end (0) and its peak (1), from the share of the fall that is over."""


def cosine(
    step: float, *, base: float, final: float, total: float, warmup: float = 0, start: float = 0.0, inclusive: bool = False
) -> float:
    """Return a value that rises linearly from `start` to `base`, then falls along half a cosine to `final`: the schedule of DeiT, MAE,
    Swin, ConvNeXt and DINO.

    It is used for rates, weight decays, teacher momenta and temperatures. `step`, `total` and `warmup` share any unit (steps, or
    fractional epochs as in MAE).

    Args:
        inclusive: whether the last step of the rise already has `base` (DINO's table of whole steps), not the first step after it.
    """
    if step < warmup:
        return start + (base - start) * step / (warmup - 1 if inclusive and warmup > 1 else warmup)
    if total <= warmup:
        return final
    return final + (base - final) * SHAPES["cosine"](min(1.0, (step - warmup) / (total - warmup)), 1.0)


class Rates:
    """Learning rate as a pure function of the step.

    Args:
        schedule, optimizer: from the recipe.
        total_steps: optimizer steps of the whole training.
        steps_per_epoch: for stretches given in epochs.
        total_batch: images per step over accumulation and processes, for the linear scaling rule.
    """

    def __init__(self, schedule: Schedule, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int, total_batch: int):
        factor = total_batch / optimizer.reference_batch if optimizer.reference_batch else 1.0
        self.schedule, self.total, self.per_epoch = schedule, total_steps, max(1, steps_per_epoch)
        self.base, self.start, self.final = optimizer.lr * factor, schedule.warmup_lr * factor, schedule.min_lr * factor
        warmup, hold, cooldown = (s.steps(total_steps, steps_per_epoch) for s in (schedule.warmup, schedule.hold, schedule.cooldown))
        self.warmup = min(warmup, total_steps)
        last = total_steps
        if schedule.name == "one_cycle":  # as torch's, the peak and the end are reached in the last step of each part
            self.warmup, last = max(0, self.warmup - 1), max(1, last - 1)
        self.fall = self.warmup + hold if schedule.warmup_prefix else 0
        self.end = max(last - cooldown, self.fall)
        self.every = schedule.every.steps(total_steps, steps_per_epoch) if schedule.every else 0
        self.milestones = [m.steps(total_steps, steps_per_epoch) for m in schedule.milestones]

    def at(self, step: int) -> float:
        """Return the rate of step 0, 1, ... (of a group with lr_scale 1)."""
        if self.schedule.updates == "epoch":
            step = step // self.per_epoch * self.per_epoch
        if step < self.warmup:
            return self._rise(step)
        if self.schedule.name == "step":
            return max(self.final, self.base * self.schedule.gamma ** self._lowered(step))
        if step < self.fall or self.schedule.name == "constant":
            return self.base
        share = min(1.0, (step - self.fall) / (self.end - self.fall)) if self.end > self.fall else 1.0
        return self.final + (self.base - self.final) * SHAPES[self.schedule.name](share, self.schedule.power)

    def _lowered(self, step: int) -> int:
        """Return how many milestones a step has reached; regular ones, of which there may be many, end before the training does."""
        regular = min(step, self.total - 1) // self.every if self.every else 0
        return regular + sum(step >= milestone for milestone in self.milestones)

    def _rise(self, step: int) -> float:
        if self.schedule.name == "one_cycle":
            return self.base + (self.start - self.base) * SHAPES["cosine"](step / self.warmup, 1.0)
        return self.start + (self.base - self.start) * step / self.warmup

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rate of every group, times its lr_scale; returns the unscaled rate."""
        rate = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate
