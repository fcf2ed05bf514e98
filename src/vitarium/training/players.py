"""Players: parts of a learner with their own optimizer steps.

    def players(self):
        return {
            "discriminator": Player(self.discriminator, lazy={"r1": 16}),
            "generator": Player(self.generator, every=2, ema=True),
        }

Learners with one player, which most are, do not define this method. With several, every step of the run gives each player a *turn* in the
order of the dict: loss, gradients, clipping and optimizer step, on the same batches. A recipe may set `players: {generator:
{optimizer: {lr: 1e-4}}}`; other values are those of the recipe's root.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vitarium.errors import UsageError, nearest

if TYPE_CHECKING:
    from vitarium.training.base import Learner
    from vitarium.training.recipe import Recipe

ONLY = "model"
"""Name of the only player of a learner that does not define `players`."""


@dataclass(frozen=True)
class Player:
    """A part of a learner with its own optimizer steps.

    Args:
        parts: the module whose parameters it trains, or several modules and parameters.
        every: it takes a turn at steps 0, every, 2 every, ...
        lazy: name of a regularizer -> k: `Learner.regularize(batch, player, name)` is added to the loss at steps 0, k, 2 k, ..., times k.
        ema: the module to average, if the recipe has a moving average; True: `parts`; False: none.
        buffers: modules of other players whose buffers may change during its turns.

    Raises:
        UsageError: `every` or a number of `lazy` below 1, or `ema=True` with several parts.
    """

    parts: nn.Module | Sequence[nn.Module | nn.Parameter]
    every: int = 1
    lazy: Mapping[str, int] = field(default_factory=dict)
    ema: bool | nn.Module = False
    buffers: Sequence[nn.Module] = ()

    def __post_init__(self) -> None:
        for name, value in {"every": self.every, **{f"lazy[{key!r}]": number for key, number in self.lazy.items()}}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"a player's {name} must be a whole number of at least 1, got {value!r}")
        if self.ema is True and not isinstance(self.parts, nn.Module):
            raise UsageError("a player of several parts must set the module to average: ema=MODULE")

    @property
    def _parts(self) -> Sequence[nn.Module | nn.Parameter]:
        return (self.parts,) if isinstance(self.parts, nn.Module) else self.parts

    @property
    def averaged(self) -> nn.Module | None:
        """The module to average."""
        if self.ema is True:
            assert isinstance(self.parts, nn.Module)
            return self.parts
        return self.ema or None

    def parameters(self) -> list[nn.Parameter]:
        """Return its parameters, each once, whether they require gradients or not."""
        found = [p for part in self._parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]
        return list({id(p): p for p in found}.values())

    def own_buffers(self) -> Iterable[Tensor]:
        """Return the buffers of its modules, and of those in `buffers`."""
        modules = [part for part in self._parts if isinstance(part, nn.Module)]
        return (buffer for module in [*modules, *self.buffers] for buffer in module.buffers())

    def due(self, step: int) -> bool:
        """Return whether it takes a turn at optimizer step 0, 1, ..."""
        return step % self.every == 0

    def lazy_at(self, step: int) -> tuple[str, ...]:
        """Return the names of the regularizers of its turn at a step."""
        return tuple(name for name, k in self.lazy.items() if step % k == 0)


def checked_players(learner: Learner, recipe: Recipe) -> dict[str, Player]:
    """Return a learner's players, checked.

    Raises:
        UsageError: there are none, the recipe has settings of a player that does not exist, a player has parameters that are not the
            learner's, or a parameter that requires gradients belongs to no player.
    """
    players = dict(learner.players())
    kind = type(learner).__name__
    if not players or any(not name.isidentifier() for name in players):
        raise UsageError(f"{kind}.players() must give at least one player, under names that are identifiers; got {list(players)}")
    if unknown := [name for name in recipe.players if name not in players]:
        raise UsageError(
            f"players.{unknown[0]}: {kind} has no such player{nearest(unknown[0], list(players))} (its players: {', '.join(players)})"
        )
    known = {id(p) for p in learner.parameters()}
    for name, player in players.items():
        if any(id(p) not in known for p in player.parameters()):
            raise UsageError(f"the player {name} of {kind} has parameters that are not the learner's, so no checkpoint would hold them")
    owned = {id(p) for player in players.values() for p in player.parameters()}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad and id(parameter) not in owned:
            raise UsageError(
                f"{name} of {kind} requires gradients and belongs to no player ({', '.join(players)}); "
                "add it to one, or set requires_grad_(False)"
            )
    return players
