"""Numbers of a training that change with the step, by their path in a recipe.

objective.KEY               a number of the learner's settings; keys of inner sections behind dots
method.SLUG.OPTION          a live option of a method on the model
optimizer.weight_decay      of the tensors that have a weight decay (DINO: 0.04 to 0.4 along a cosine)
optimizer.momentum          momentum, or the first beta
model.drop_path_rate        the largest rate of stochastic depth; the others in proportion (early and late stochastic depth)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from vitarium.catalog.applying import methods_on
from vitarium.errors import UsageError, nearest
from vitarium.training.base import Learner
from vitarium.training.recipe import Course, Optimizer, Recipe
from vitarium.training.settings import check


def value_at(course: Course, step: int, total: int, per_epoch: int) -> float:
    """Return the value of a course at a step, from 0 to `total`."""
    start, end = course.start.steps(total, per_epoch), course.until.steps(total, per_epoch)
    if step < start:
        return course.from_
    share = min(1.0, (step - start) / (end - start)) if end > start else 1.0
    if course.shape == "cosine":
        share = 0.5 * (1 - math.cos(math.pi * share))
    return course.from_ + (course.to - course.from_) * share


class Target:
    """A number that changes with the step.

    Args:
        path: in a recipe.
        usual: its value outside of courses and phases.

    Raises:
        UsageError: it is not a number.
    """

    def __init__(self, path: str, usual: Any):
        if isinstance(usual, bool) or not isinstance(usual, int | float):
            raise UsageError(f"{path} is {usual!r}, and only numbers can change by the step")
        self.path = path
        self.usual: float = usual
        self.now: float = usual

    def set(self, value: float, models: Sequence[nn.Module]) -> None:
        """Set the number, rounded where it is an integer.

        Args:
            models: the model and its moving averages, for options of methods.

        Raises:
            UsageError: out of its range.
        """
        number = round(value) if isinstance(self.usual, int) else float(value)
        if number != self.now:
            self.write(number, models)
            self.now = number

    def attach(self, optimizer: Any) -> None:
        """Add an optimizer of the run; only the numbers of optimizers need it."""

    def write(self, value: float, models: Sequence[nn.Module]) -> None:
        """Write the number to its place."""
        raise NotImplementedError


class SettingTarget(Target):
    """A number of a learner's settings, at keys that are separated by dots."""

    def __init__(self, path: str, learner: Learner, rest: str):
        self.learner, self.keys = learner, rest.split(".")
        section: Any = learner.settings
        for depth, key in enumerate(self.keys):
            known = list(getattr(type(section), "model_fields", {}))
            if key not in known:
                name = ".".join(["objective", *self.keys[: depth + 1]])
                raise UsageError(
                    f"values: {name} is no setting of {learner.objective or type(learner).__name__}{nearest(key, known)} "
                    f"(settings: {', '.join(known) or 'none'})"
                )
            section = getattr(section, key)
        super().__init__(path, section)

    def write(self, value: float, models: Sequence[nn.Module]) -> None:
        settings = self.learner.settings
        values = settings.model_dump()
        inner = values
        for key in self.keys[:-1]:
            inner = inner[key]
        inner[self.keys[-1]] = value
        self.learner.settings = check(type(settings), values, f"values: {self.path}={value:g}")


class MethodTarget(Target):
    """A live option of a method on the learner's model and its moving averages."""

    def __init__(self, path: str, learner: Learner, rest: str):
        self.learner = learner
        self.slug, _, self.option = rest.partition(".")
        methods = {report.method.slug: report.method for report in methods_on(learner.model)}
        if self.slug not in methods:
            raise UsageError(
                f"values: {path}: no method {self.slug!r} is on the model{nearest(self.slug, methods)} "
                f"(on it: {', '.join(methods) or 'none'}; vitarium train --apply {self.slug} puts it there)"
            )
        method = methods[self.slug]
        if self.option not in method.tunable:
            raise UsageError(
                f"values: {path}: {self.slug} cannot change {self.option!r} while attached{nearest(self.option, method.tunable)} "
                f"(it can: {', '.join(method.tunable) or 'none'})"
            )
        super().__init__(path, getattr(method, self.option))

    def write(self, value: float, models: Sequence[nn.Module]) -> None:
        for model in {id(model): model for model in (self.learner.model, *models)}.values():
            for report in methods_on(model):
                if report.method.slug == self.slug:
                    report.tune(**{self.option: value})


class OptimizerTarget(Target):
    """Weight decay or momentum of the optimizers of all players."""

    def __init__(self, path: str, recipe: Recipe, rest: str):
        if rest not in ("weight_decay", "momentum"):
            known = ("weight_decay", "momentum")
            hint = "; for the learning rate see schedule" if rest == "lr" else nearest(rest, known)
            raise UsageError(f"values: {path} cannot change with the step{hint} (accepted: {', '.join(known)})")
        self.recipe, self.key = recipe, rest
        self.optimizers: list[tuple[Any, list[bool]]] = []  # with the groups that have the number
        settings = recipe.optimizer
        first = settings.betas[0] if settings.betas else 0.9
        usual = settings.weight_decay if rest == "weight_decay" else settings.momentum if settings.momentum is not None else first
        if rest == "weight_decay" and not usual:
            raise UsageError(f"values: {path} needs an optimizer.weight_decay above 0, which says that there are tensors with a decay")
        super().__init__(path, float(usual))

    def attach(self, optimizer: Any) -> None:
        groups = optimizer.param_groups
        chosen = [bool(g["weight_decay"]) if self.key == "weight_decay" else "momentum" in g or "betas" in g for g in groups]
        if self.key == "momentum" and not all(chosen):
            raise UsageError(f"values: {self.path}: the optimizer {self.recipe.optimizer.name} has no momentum")
        self.optimizers.append((optimizer, chosen))

    def set(self, value: float, models: Sequence[nn.Module]) -> None:
        self.now = float(value)
        self.write(self.now, models)  # always, because a restored optimizer has the number of its checkpoint

    def write(self, value: float, models: Sequence[nn.Module]) -> None:
        check(Optimizer, {**self.recipe.optimizer.model_dump(), self.key: value}, f"values: {self.path}={value:g}")
        for optimizer, chosen in self.optimizers:
            for group, has in zip(optimizer.param_groups, chosen, strict=True):
                if has and self.key == "momentum" and "betas" in group:
                    group["betas"] = (value, *group["betas"][1:])
                elif has:
                    group[self.key] = value


class DropPathTarget(Target):
    """Rates of stochastic depth: the largest is set, and the others stay in proportion to it."""

    def __init__(self, path: str, learner: Learner, rest: str):
        if rest != "drop_path_rate":
            raise UsageError(f"values: {path} cannot change with the step{nearest(rest, ['drop_path_rate'])} (accepted: drop_path_rate)")
        parts = [m for m in learner.model.modules() if type(m).__name__.endswith("DropPath") and hasattr(m, "drop_prob")]
        self.rates: list[tuple[Any, float]] = [(part, float(part.drop_prob or 0.0)) for part in parts]  # type: ignore[arg-type]
        usual = max((rate for _, rate in self.rates), default=0.0)
        if not usual:
            raise UsageError(f"values: {path}: the model has no stochastic depth; set model_arguments.drop_path_rate above 0")
        super().__init__(path, usual)

    def write(self, value: float, models: Sequence[nn.Module]) -> None:
        if not 0 <= value < 1:
            raise UsageError(f"values: {self.path} must be at least 0 and less than 1, got {value:g}")
        for part, rate in self.rates:
            part.drop_prob = rate * value / self.usual


def target_of(path: str, learner: Learner, recipe: Recipe) -> Target:
    """Return the number at a path.

    Args:
        path: as in the module's docstring.
        learner: that has the setting, or whose model has the method or the stochastic depth.
        recipe: that sets the optimizer.

    Raises:
        UsageError: there is nothing at the path, or not a number that can change.
    """
    kind, _, rest = path.partition(".")
    if kind == "objective" and rest:
        return SettingTarget(path, learner, rest)
    if kind == "method" and rest:
        return MethodTarget(path, learner, rest)
    if kind == "optimizer" and rest:
        return OptimizerTarget(path, recipe, rest)
    if kind == "model" and rest:
        return DropPathTarget(path, learner, rest)
    raise UsageError(
        f"{path!r} is not the path of a value; paths are objective.KEY, method.SLUG.OPTION, optimizer.weight_decay, optimizer.momentum and "
        "model.drop_path_rate"
    )
