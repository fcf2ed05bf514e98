"""A model that is executed by torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitarium.efficiency.limits import time_limit
from vitarium.efficiency.runtimes.running import Reads, Running, executed
from vitarium.errors import CheckpointError, UsageError

TOLERANCE = 1e-2
"""Largest relative error (root mean square) of compiled outputs, in the model's dtype."""


class Compiled(Running):
    """A model under torch.compile, for any number of samples. It is compiled at its first call, and compared with the model there.

    Args:
        model, reads: see `run_with`.
        limit: seconds for a compilation (see `vitarium.efficiency.limits`).
    """

    def __init__(self, model: nn.Module, reads: Reads | None, limit: float):
        super().__init__(model, "torch.compile", reads)
        self.limit = limit
        self._compiled: Any = None
        self._seen: set[tuple[Any, ...]] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": None, "_seen": set()}  # type: ignore[misc]  # compiled code belongs to one process

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return the model's outputs.

        Raises:
            UsageError: the compiler does not take the model, or needs more than the limit.
            CheckpointError: the outputs differ from the model's.
        """
        for value in (*args, *named.values()):
            if isinstance(value, Tensor) and value.ndim and len(value) > 1:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        kind = (torch.is_inference_mode_enabled(), *(self._kind(value) for value in (*args, *named.values())))
        if kind in self._seen:
            return self._compiled(*args, **named)
        found = self._first(args, named)
        self._seen.add(kind)
        return found

    @staticmethod
    def _kind(value: Any) -> Any:
        """Return what a new compilation may depend on: one sample or several, the other sides, the dtype, the device."""
        if not isinstance(value, Tensor):
            return repr(value)
        return value.shape[1:], value.ndim and len(value) == 1, value.dtype, value.device

    def _first(self, args: Any, named: Any) -> Any:
        """Compile for a kind of inputs, and compare with the model."""
        module = executed(self.model, self.reads)
        wanted = module(*args, **named)  # before the compiler: an error of the model itself is the user's
        if self._compiled is None:  # it has the length of the model, if any
            self._compiled = torch.compile(module)
        advice = "choose --runtime eager or onnxruntime"
        try:
            with time_limit(self.limit):
                found = self._compiled(*args, **named)
        except TimeoutError as late:
            torch.compiler.reset()
            raise UsageError(f"torch.compile of {type(self.model).__name__}: {late}; {advice}") from late
        except Exception as error:  # the compiler and its backend have no common class for their errors
            first = str(error).strip().partition("\n")[0]
            raise UsageError(f"torch.compile does not take {type(self.model).__name__}: {first}; {advice}") from error
        most = max((_difference(a, b) for a, b in zip(_floats(wanted), _floats(found), strict=True)), default=0.0)
        if not most <= TOLERANCE:
            raise CheckpointError(f"{self.what} differs by {most:.2g} of its root mean square under torch.compile; {advice}")
        return found


def _floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _difference(wanted: Tensor, found: Tensor) -> float:
    wanted, found = wanted.double(), found.double()
    return ((found - wanted).square().mean() / wanted.square().mean().clamp(min=1e-30)).sqrt().item()
