"""A model that is executed as an exported graph."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from vitarium.catalog.calling import call, example_inputs
from vitarium.efficiency.runtimes.running import Reads, Running, executed
from vitarium.efficiency.runtimes.sessions import Session, open_session
from vitarium.errors import CheckpointError, InputError, UsageError


@dataclass(frozen=True)
class KeptGraph:
    """A graph on disk.

    Attributes:
        path: of the ONNX file.
        digest: its sha256.
        inputs, shapes, batch, single: see `vitarium.efficiency.runtimes.cache.Entry`.
    """

    path: Path
    digest: str
    inputs: list[str]
    shapes: list[list[int]]
    batch: int | None
    single: bool


class Graph(Running):
    """A model that ONNX Runtime or OpenVINO executes on the CPU.

    Tensors on another device are moved, and the outputs are returned there.

    Args:
        model, runtime, reads: see `run_with`.
        graph: on disk; a copy of this module in another process opens it again.
    """

    def __init__(self, model: nn.Module, runtime: str, reads: Reads | None, graph: KeptGraph):
        super().__init__(model, runtime, reads)
        self.graph = graph
        self._session: Session | None = None
        self._form: tuple[TreeSpec, list[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_session": None}  # type: ignore[misc]  # a session belongs to one process

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return the model's outputs, from the graph.

        Raises:
            InputError: inputs of another size, or an argument that the graph holds as a constant.
        """
        values = self._values(args, named)
        place = values[0].device
        outputs = self._run([value.detach().cpu().numpy() for value in values])
        tensors = [torch.from_numpy(output).to(place) for output in outputs]
        if self.graph.single:
            return tensors[0]
        spec, leaves = self._form_of_output()
        rest = iter(tensors)
        return tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def _values(self, args: Sequence[Any], named: dict[str, Any]) -> list[Tensor]:
        """Return the graph's inputs of a call."""
        if self.reads is not None:
            found: dict[str, Any] = {self.graph.inputs[0]: args[0]}
        else:
            try:
                found = inspect.signature(self.model.forward).bind(*args, **named).arguments
            except TypeError as error:
                raise InputError(f"{type(self.model).__name__}: {error}") from error
            self._check_constants(found)
        values = [found[name] for name in self.graph.inputs if name in found]
        shapes = [list(value.shape[1:]) for value in values]
        if shapes != self.graph.shapes:
            raise InputError(f"the graph takes {self._texts(self.graph.shapes)} for each sample, got {self._texts(shapes)}")
        return values

    def _check_constants(self, given: dict[str, Any]) -> None:
        defaults = {p.name: p.default for p in inspect.signature(self.model.forward).parameters.values()}
        for name, value in given.items():
            if name not in self.graph.inputs and (isinstance(value, Tensor) or value != defaults[name]):
                raise InputError(
                    f"{type(self.model).__name__} is called with {name}, which is a constant in its graph ({name}={defaults[name]}); "
                    "choose --runtime eager"
                )

    def _texts(self, shapes: list[list[int]]) -> str:
        pairs = zip(self.graph.inputs, shapes, strict=False)
        return ", ".join(f"{name} {' x '.join(map(str, shape)) or 'a number'}" for name, shape in pairs)

    def _run(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Run the graph; one of a fixed batch on pieces of it, the last one padded with its first sample."""
        if self._session is None:
            self._session = self._opened()
        count, batch = len(values[0]), self.graph.batch
        if batch is None:
            return self._session(*values)
        pieces = []
        for start in range(0, count, batch):
            some = [value[start : start + batch] for value in values]
            padded = [np.concatenate([part, np.repeat(part[:1], batch - len(part), 0)]) for part in some]
            pieces.append([output[: len(some[0])] for output in self._session(*padded)])
        return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]

    def _opened(self) -> Session:
        try:
            content = self.graph.path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"the graph {self.graph.path} is not on this machine ({error.strerror}): on several machines, keep the model's file on a "
                "disk that all of them share, or choose --runtime eager"
            ) from error
        if hashlib.sha256(content).hexdigest() != self.graph.digest:
            raise CheckpointError(f"the graph {self.graph.path} was replaced since it was compared with the model; open the model again")
        try:
            return open_session(self.runtime, content)
        except Exception as error:  # each runtime raises its own
            first = str(error).strip().partition("\n")[0]
            raise UsageError(f"{self.runtime} cannot open the graph {self.graph.path} ({first}); choose --runtime eager") from error

    def _form_of_output(self) -> tuple[TreeSpec, list[Any]]:
        """Return the structure of the model's output with the values that are no tensors, from one call of the model."""
        if self._form is None:
            module = executed(self.model, self.reads)
            with torch.no_grad():
                leaves, spec = tree_flatten(call(module, example_inputs(module, 1)))
            self._form = spec, [torch.empty(0) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return self._form
