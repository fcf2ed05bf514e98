"""Phases and values by step of a recipe: trained parameters, resolution and scheduled numbers.

    phases:
      - {until: 0.3, freeze: [model.stages.0, model.stages.1], image_size: 224}
      - {image_size: 384}
    values:
      method.evit.keep: {from: 1.0, to: 0.7, until: 0.5, shape: cosine}
      optimizer.weight_decay: {from: 0.04, to: 0.4}

They are functions of the step only, so that a run resumed on either side of a boundary equals an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from vitarium.catalog.calling import call, example_inputs
from vitarium.catalog.create import preprocessing_of
from vitarium.errors import UsageError, VitariumError, nearest
from vitarium.training.base import Learner
from vitarium.training.evaluation import evaluating
from vitarium.training.recipe import Phase, Recipe
from vitarium.training.values import target_of, value_at

PLAIN = Phase()
"""Phase without any change: after the last phase, and in recipes without phases."""


def phases_of(learner: Learner, recipe: Recipe) -> tuple[Phase, ...]:
    """Return the recipe's phases, or the learner's own if the recipe has none."""
    return recipe.phases or tuple(learner.phases())


# ---- trained parameters


def matching(module: nn.Module, patterns: Iterable[str], where: str) -> set[str]:
    """Return the names of the parameters that match patterns, or that are inside modules that match.

    Args:
        module: whose `named_parameters` are searched.
        patterns: shell patterns of whole names, such as "model.stages.*", "model.blocks.0" or "*.bias".
        where: name of the patterns in messages.

    Raises:
        UsageError: a pattern matches nothing; the message gives near names.
    """
    names = [name for name, _ in module.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")}
        if not matched:
            known = [*(name for name, _ in module.named_modules() if name), *names]
            raise UsageError(f"{where}: {pattern!r} matches no parameter of {type(module).__name__}{nearest(pattern, known)}")
        found |= matched
    return found


def learning_by_phase(learner: Learner, recipe: Recipe) -> list[set[str]]:
    """Return the names of the trained parameters for each phase and for the steps after the last one.

    Raises:
        UsageError: a pattern matches nothing, or a phase freezes all parameters.
    """
    usual = {name for name, p in learner.named_parameters() if p.requires_grad}
    sets = []
    phases = phases_of(learner, recipe)
    for number, phase in enumerate([*phases, PLAIN]):
        learns = usual - matching(learner, phase.freeze, f"phases.{number}.freeze")
        learns |= matching(learner, phase.train, f"phases.{number}.train")
        if not learns:
            raise UsageError(f"phases.{number} leaves no parameter of {type(learner).__name__} that learns")
        sets.append(learns)
    return sets if not phases or phases[-1].until is not None else sets[:-1]


@contextlib.contextmanager
def settled(learner: Learner, recipe: Recipe) -> Iterator[None]:
    """Set `requires_grad` of the parameters that are trained in any phase, as after the training; restore it on exit.

    Raises:
        UsageError: see `learning_by_phase`.
    """
    ever = set[str]().union(*learning_by_phase(learner, recipe))
    before = [(parameter, parameter.requires_grad) for parameter in learner.parameters()]
    require_gradients(learner, ever)
    try:
        yield
    finally:
        for parameter, learns in before:
            parameter.requires_grad_(learns)


def require_gradients(learner: nn.Module, learns: set[str]) -> None:
    """Set `requires_grad` of the parameters with these names to True, and of all others to False."""
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(name in learns)


def hold_norms(learner: nn.Module, managed: set[str], learns: set[str]) -> None:
    """Put frozen batch norms into eval mode, so that they keep their statistics, and trained ones into training mode.

    Args:
        managed: names of the parameters that phases freeze and unfreeze.
        learns: those that are trained now.
    """
    for name, module in learner.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            own = {f"{name}.{inner}" for inner, _ in module.named_parameters(recurse=False)} & managed
            if own:
                module.train(bool(own & learns))


# ---- phases and values of a run


class Plan:
    """A recipe's phases and courses for one learner.

    Args:
        learner: with the parameters that require gradients before any phase.
        recipe: with the phases and values.

    Raises:
        UsageError: a pattern or path without match, a value out of range, or an image size that the model does not support.
    """

    def __init__(self, learner: Learner, recipe: Recipe):
        self.learner, self.recipe, self.phases = learner, recipe, phases_of(learner, recipe)
        self.learning = learning_by_phase(learner, recipe)
        self.before = {name: p.requires_grad for name, p in learner.named_parameters()}
        self.ever = set[str]().union(*self.learning)
        self.managed = self.ever | {name for name, learns in self.before.items() if learns}
        paths = dict.fromkeys([*recipe.values, *(path for phase in self.phases for path in phase.values)])
        self.targets = [target_of(path, learner, recipe) for path in paths]
        self.usual_size: int = preprocessing_of(learner.model).image_size
        self._check_values()
        for size in dict.fromkeys(phase.image_size for phase in self.phases):
            if size is not None and size != self.usual_size:
                self._check_size(size)
        self.total, self.per_epoch = 0, 1
        self.ends: list[int] = []

    def attach(self, optimizer: Any) -> None:
        """Add an optimizer whose groups the paths "optimizer.KEY" change; before its state is restored."""
        for target in self.targets:
            target.attach(optimizer)

    def place(self, total_steps: int, steps_per_epoch: int) -> None:
        """Compute the steps at which phases end.

        Raises:
            UsageError: a phase ends before the one before it.
        """
        self.total, self.per_epoch = total_steps, steps_per_epoch
        ends = [total_steps if p.until is None else p.until.steps(total_steps, steps_per_epoch) for p in self.phases]
        if ends != sorted(ends):
            raise UsageError(f"phases must end one after the other; of {total_steps} steps they end at {', '.join(map(str, ends))}")
        self.ends = ends

    def phase_at(self, step: int) -> int:
        """Return the number of the phase of optimizer step 0, 1, ...; after the last phase, their count."""
        return sum(end <= step for end in self.ends)

    def phase(self, number: int) -> Phase:
        """Return the phase with a number from `phase_at`."""
        return self.phases[number] if number < len(self.phases) else PLAIN

    def image_size(self, number: int) -> int:
        """Return the side of the square input in a phase, pixels."""
        return self.phase(number).image_size or self.usual_size

    def set_values(self, step: int, number: int, models: Sequence[nn.Module]) -> None:
        """Set every number of the recipe's paths to its value at a step of a phase.

        Args:
            models: the model's moving averages, which have its methods too.
        """
        fixed = self.phase(number).values
        for target in self.targets:
            course = self.recipe.values.get(target.path)
            value = target.usual if course is None else value_at(course, step, self.total, self.per_epoch)
            target.set(fixed.get(target.path, value), models)

    def set_image_size(self, number: int, models: Iterable[nn.Module]) -> None:
        """Set the image size of a phase in the `preprocessing` of the models."""
        for model in (self.learner.model, *models):
            _resize(model, self.image_size(number))

    def leave(self, models: Sequence[nn.Module]) -> None:
        """Set the final state: parameters trained in any phase require gradients; values and image size are those of the last step."""
        last = self.phase_at(max(0, self.total - 1))
        require_gradients(self.learner, self.ever)
        self.set_values(self.total, last, models)
        self.set_image_size(last, models)

    def undo(self, models: Sequence[nn.Module]) -> None:
        """Restore the `requires_grad`, values and image size from before the training."""
        for name, parameter in self.learner.named_parameters():
            parameter.requires_grad_(self.before[name])
        for target in self.targets:
            target.set(target.usual, models)
        for model in (self.learner.model, *models):
            _resize(model, self.usual_size)

    def _check_values(self) -> None:
        for target in self.targets:
            course = self.recipe.values.get(target.path)
            tried = [phase.values[target.path] for phase in self.phases if target.path in phase.values]
            for value in [*tried, *((course.from_, course.to) if course else ()), target.usual]:
                target.set(value, ())

    def _check_size(self, size: int) -> None:
        model = self.learner.model
        try:
            if getattr(model, "preprocessing", None) is not None:  # otherwise its inputs are unknown
                with evaluating(model):
                    call(model, example_inputs(model, 2, size))
        except (VitariumError, ValueError, RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"phases: the model cannot take images of {size} pixels ({reason})") from error


def _resize(model: nn.Module, size: int) -> None:
    preprocessing = preprocessing_of(model)
    if preprocessing.image_size != size:
        model.preprocessing = dataclasses.replace(preprocessing, image_size=size)  # type: ignore[assignment]
