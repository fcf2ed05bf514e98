"""State of a player in a run, and its turns: losses, gradients, clipping and optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitarium.data.loader import mix, seed_generators
from vitarium.errors import DataError
from vitarium.training.base import Batch
from vitarium.training.draws import Draws, player_key
from vitarium.training.evaluation import to_device
from vitarium.training.optim import Average, clip_gradients
from vitarium.training.players import ONLY, Player
from vitarium.training.recipe import PlayerRecipe
from vitarium.training.schedules import Rates
from vitarium.training.steppers import Stepper

if TYPE_CHECKING:
    from vitarium.training.run import Run


@dataclass
class Seat:
    """State of one player in a run.

    Attributes:
        module: the learner as Fabric wrapped it for this player's gradients; calling it gives the losses.
        parameters: the player's parameters that are trained in the current phase.
        guarded: (module, name) of the buffers that belong to other players.
    """

    name: str
    player: Player
    settings: PlayerRecipe
    stepper: Stepper
    average: Average | None = None
    module: Any = None
    optimizer: Any = None
    rates: Rates | None = None
    parameters: list[Tensor] = field(default_factory=list)
    guarded: list[tuple[nn.Module, str]] = field(default_factory=list)

    def due(self, step: int) -> bool:
        """Return whether the player takes a turn at a step; a player whose parameters are all frozen takes none."""
        return self.player.due(step) and bool(self.parameters)


class StepBatches:
    """The batches of one step, read once, and kept if they are iterated again.

    Args:
        source: iterator over the batches of the run.
        count: batches per step.
        again: whether they are iterated more than once.
    """

    def __init__(self, source: Iterator[Batch], count: int, *, again: bool):
        self.source, self.left, self.again = source, count, again
        self.kept: list[Batch] = []
        self.indices: list[list[int]] = []

    def __iter__(self) -> Iterator[Batch]:
        yield from list(self.kept)
        while self.left:
            batch = next(self.source)
            self.left -= 1
            self.indices.append(batch["index"].tolist())
            if self.again:
                self.kept.append(batch)
            yield batch


@dataclass(frozen=True)
class Outcome:
    """Result of one turn.

    Attributes:
        seat: of the player.
        losses: means over the step's batches, on the device.
        norm: of the gradient before clipping, on the device.
        finite: whether loss and gradient are finite, in all processes.
    """

    seat: Seat
    losses: dict[str, Tensor]
    norm: Tensor
    finite: bool


class Turn:
    """One player's part of a step; implements `vitarium.training.steppers.Passes`."""

    def __init__(self, run: Run, seat: Seat, batches: StepBatches):
        self.run, self.seat, self.batches = run, seat, batches
        self.parameters = seat.parameters
        self.lazy = seat.player.lazy_at(run.state.step)

    def buffers(self) -> Iterable[Tensor]:
        """Return all buffers of the learner."""
        return self.run.learner.buffers()

    def zero_grad(self) -> None:
        """Clear the player's gradients."""
        self.seat.optimizer.zero_grad()

    def accumulate(self) -> dict[str, Tensor]:
        """Add the gradients of the step's batches to `.grad`; return their mean losses, or {} if no image could be read."""
        run, fabric = self.run, self.run.fabric
        count, seen = run.recipe.accumulate, 0
        seed_step(run, self.seat.name)  # a second pass draws the same numbers as the first
        run.learner.draws = Draws(run.recipe.seed, run.state.step, self.seat.name)
        means: dict[str, Tensor] = {}
        for number, batch in enumerate(self.batches):
            if not len(batch["index"]):
                if fabric.world_size > 1:
                    raise DataError(f"none of a batch's {run.recipe.batch_size} images can be read in process {fabric.global_rank}")
                continue
            seen += 1
            placed = to_device({**batch, "position": run.positions(batch, number)}, fabric.device)
            with fabric.no_backward_sync(self.seat.module, enabled=number < count - 1):
                losses = self.seat.module(placed, self.seat.name, self.lazy)
                fabric.backward(losses["loss"] / count)
            for name, value in losses.items():
                mean = value.detach() / count
                means[name] = means[name] + mean if name in means else mean
        return means

    def take(self) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the turn's clipped gradients; return its mean losses, and the norm of the gradient before clipping."""
        assert self.seat.rates is not None
        self.seat.rates.apply(self.seat.optimizer, self.run.state.step)
        self.zero_grad()
        losses = self.seat.stepper.gradients(self)
        norm = clip_gradients(self.parameters, self.seat.settings.clip) if losses else torch.tensor(math.nan)
        return losses or {"loss": norm}, norm


def seed_step(run: Run, player: str) -> None:
    """Set all global generators from (seed, step, rank, player), so that the random numbers of a step do not depend on earlier steps."""
    key: tuple[int, ...] = run.recipe.seed, run.state.step, run.fabric.global_rank
    if player != ONLY:
        key += (player_key(player),)
    seed_generators(*key)
    if run.fabric.device.type != "cpu":
        torch.get_device_module(run.fabric.device).manual_seed(mix(*key))


def kept_buffers(places: Iterable[tuple[nn.Module, str]]) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Return the buffers of (module, name), each with a copy of its values."""
    return [(module, name, module._buffers[name], module._buffers[name].clone()) for module, name in places]  # type: ignore[misc,union-attr]


@torch.no_grad()
def restore_buffers(kept: Iterable[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    """Restore the buffers of `kept_buffers`, also where a buffer was replaced by another tensor."""
    for module, name, buffer, values in kept:
        buffer.copy_(values)
        module._buffers[name] = buffer


def foreign_buffers(learner: nn.Module, player: Player, others: Iterable[Player]) -> list[tuple[nn.Module, str]]:
    """Return (module, name) of the buffers that belong only to other players."""
    own = {id(buffer) for buffer in player.own_buffers()}
    theirs = {id(buffer) for other in others for buffer in other.own_buffers()} - own
    return [(module, name) for module in learner.modules() for name, buffer in module._buffers.items() if id(buffer) in theirs]
