"""Steppers: computation of the gradients of one player's step from its batches.

The loop clips and applies the gradients that a stepper leaves in `.grad`, independent of the number of passes. `Stepper` makes
one pass, `SharpnessAware` (`optimizer.sam` of a recipe) two. A learner can return another from `Learner.stepper`. A pass that only changes
the batch (a masked image, an attacked one) needs no stepper: see `Learner.first_pass`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from vitarium.training.optim import uphill
from vitarium.training.recipe import Sam


class Passes(Protocol):
    """Interface of a turn to a stepper."""

    parameters: list[Tensor]
    """The player's parameters that are trained at this step."""

    def buffers(self) -> Iterable[Tensor]:
        """All buffers of the learner."""

    def accumulate(self) -> dict[str, Tensor]:
        """One forward and backward pass over the step's batches: add to `.grad`, return the mean losses (empty: no image could be read).

        Every call uses the same batches and the same random numbers.
        """

    def zero_grad(self) -> None:
        """Clear the player's gradients."""


class Stepper:
    """One pass at the current weights."""

    passes = 1
    """Number of passes over the batches of a step."""

    def gradients(self, turn: Passes) -> dict[str, Tensor]:
        """Leave the gradients of a step in `.grad`.

        Returns:
            the mean losses of the step's batches, at the weights before the step.
        """
        return turn.accumulate()


class SharpnessAware(Stepper):
    """Gradients at the perturbed weights (SAM); losses and buffers are those of the first pass.

    Args:
        sam: settings of the perturbation.
    """

    passes = 2

    def __init__(self, sam: Sam):
        self.sam = sam

    def gradients(self, turn: Passes) -> dict[str, Tensor]:
        losses = turn.accumulate()
        if losses:
            with uphill(turn.parameters, turn.buffers(), self.sam):
                turn.zero_grad()
                turn.accumulate()
        return losses
