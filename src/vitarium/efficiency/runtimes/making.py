"""Making of a model's graph for a runtime: exported, compared with the model, and kept."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog.answers import FORMS
from vitarium.catalog.calling import call, example_inputs
from vitarium.catalog.create import preprocessing_of
from vitarium.catalog.states import fingerprint
from vitarium.efficiency.export import WORST, compare, export
from vitarium.efficiency.quantization.layers import QuantizedLayer
from vitarium.efficiency.runtimes.cache import Entry, Slot, digest_of, exporters, own_name, put, slot_in_cache, slots_of
from vitarium.efficiency.runtimes.graph import KeptGraph
from vitarium.efficiency.runtimes.running import Reads, executed
from vitarium.efficiency.runtimes.sessions import open_session, version_of
from vitarium.errors import CheckpointError, MissingExtra, UsageError, VitariumError, WriteError
from vitarium.files import sha256

TOLERANCE = 1e-3
"""Largest relative error of a graph (root mean square; see `vitarium.efficiency.export.Exported`). A method that writes its own graph may
name another."""
Notify = Callable[[str], None]


def find_graph(model: nn.Module, runtime: str, *, source: str | os.PathLike[str] | None, reads: Reads | None, notify: Notify) -> KeptGraph:
    """Return the kept graph of a model for a runtime; it is made, or checked under this runtime, if it was not yet.

    Args: as for `run_with`.

    Raises:
        UsageError, CheckpointError: the runtime does not take the model; the message has the reason.
        WriteError: the graph can be kept neither beside the file nor in the user's cache.
    """
    name, file = reads.__name__ if reads is not None else "forward", source is not None
    if _writer(model, reads) is not None:  # its graph is of one runtime
        name = own_name(runtime)
    _check_dtype(model, runtime)
    if source is not None:
        digest, slots = digest_of(source), slots_of(source, name)
    else:
        digest = _identity(model)
        slots = [slot_in_cache(f"{digest[:16]}-{name}")]
    versions, this = exporters(), version_of(runtime)
    places = [(slot, _kept(slot, digest, versions, runtime)) for slot in slots]
    found = next(((slot, entry) for slot, entry in places if file and entry is not None and this in entry.checked), None)
    if found is None:
        blank = Entry(digest, versions, "", [], [], None, True)
        found = _Making(model, reads, runtime, notify, blank, always=not file).in_first(places)
    slot, entry = found
    return KeptGraph(slot.path, entry.graph, entry.inputs, entry.shapes, entry.batch, entry.single)


def _kept(slot: Slot, digest: str, versions: dict[str, str], runtime: str) -> Entry | None:
    """Return the entry of a place whose graph opens in a runtime; None if there is none."""
    kept = slot.read(digest, versions)
    return kept[0] if kept is not None and _opens(runtime, kept[1]) else None


@dataclass(frozen=True)
class _Making:
    """The making of a graph in one of several places.

    Attributes:
        model, reads, runtime, notify: see `run_with`.
        blank: the entry of a new graph.
        always: whether a graph that was checked before is compared again.
    """

    model: nn.Module
    reads: Reads | None
    runtime: str
    notify: Notify
    blank: Entry
    always: bool

    def in_first(self, places: Sequence[tuple[Slot, Entry | None]]) -> tuple[Slot, Entry]:
        """Make or check the graph in the first place that can be written, of places with their entries.

        Raises:
            WriteError: none can be written.
            VitariumError: see `written`.
        """
        *others, (last, kept) = places
        for slot, entry in others:
            try:
                return slot, self.written(slot, entry)
            except WriteError as error:
                slot.remove(graph=entry is None)
                fault = str(error).partition("; ")[0]
                self.notify(f"{fault}; the graph is kept in {last.folder} instead\n")
        return last, self.written(last, kept)

    def written(self, slot: Slot, entry: Entry | None) -> Entry:
        """Return the written entry of a graph that was compared with the model; the graph is made if there is no entry.

        Raises:
            WriteError: the place cannot be written.
            VitariumError: the runtime does not take the model.
        """
        module, this = executed(self.model, self.reads), version_of(self.runtime)
        try:
            if entry is None:
                self.notify(f"Exporting the graph for {self.runtime} (once)")
                entry = _make(self.model, self.reads, self.runtime, slot, copy.deepcopy(self.blank))
            if this not in entry.checked or self.always:
                self.notify(f"Comparing the graph with the model in {self.runtime}")
                tolerance = _tolerance(self.model) if entry.own else TOLERANCE
                entry.checked[this] = _check(module, self.runtime, slot, entry, tolerance)
        except (MissingExtra, WriteError):  # no fault of the model
            raise
        except VitariumError as error:
            reason = str(error).partition("; --format")[0]  # advice for an export
            others = "eager and onnxruntime work" if entry is not None and _works_in_onnxruntime(entry) else "eager works"
            raise type(error)(f"{self.runtime} does not take this model: {reason}; --runtime {others}, and compile may") from error
        slot.write(entry)
        return entry


def _check_dtype(model: nn.Module, runtime: str) -> None:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if odd := [dtype for dtype in dtypes if dtype is not torch.float32]:
        raise UsageError(
            f"{runtime} takes float32 models, and this one has {str(odd[0]).removeprefix('torch.')} weights; --runtime eager works"
        )


def _identity(model: nn.Module) -> str:
    """Return a hash of weights, structure, methods and preprocessing."""
    digest = hashlib.sha256(fingerprint(model.state_dict()).encode())
    methods = [str(report.method) for report in getattr(model, "methods", ())]
    digest.update(f"{getattr(model, 'spec', None)!r} {methods} {preprocessing_of(model)} {model!r}".encode())
    return digest.hexdigest()


def _opens(runtime: str, content: bytes) -> bool:
    try:
        open_session(runtime, content)
    except Exception:  # each runtime raises its own; the graph is made again
        return False
    return True


def _make(model: nn.Module, reads: Reads | None, runtime: str, slot: Slot, entry: Entry) -> Entry:
    """Export a graph to its place, and describe it. A model that takes no variable batch gets a graph for one sample."""
    module, write = executed(model, reads), _writer(model, reads)
    inputs, size = example_inputs(module, 2), preprocessing_of(model).image_size
    temporary = slot.path.with_suffix(f".{os.getpid()}.onnx")
    try:
        entry.own = write is not None and write(model, runtime, temporary, size)
        if not entry.own:
            entry.batch, error = _export(module, temporary)
            entry.checked[version_of("onnxruntime")] = error
        put(slot.path, temporary.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)
    with torch.no_grad():
        entry.single = isinstance(call(module.eval(), inputs), Tensor)
    entry.inputs, entry.shapes = list(inputs), [list(value.shape[1:]) for value in inputs.values()]
    entry.graph, entry.about = sha256(slot.path), about(model)
    return entry


def _writer(model: nn.Module, reads: Reads | None) -> Callable[..., bool] | None:
    """Return the function by which the last method writes its own graph of the model's forward (see `vitarium.efficiency.runtimes`)."""
    reports = getattr(model, "methods", None) or []
    return getattr(reports[-1].method, "write_graph", None) if reports and reads is None else None


def _tolerance(model: nn.Module) -> float:
    """Return the largest error of the graph that the last method writes."""
    found = getattr(model.methods[-1].method, "graph_tolerance", TOLERANCE)  # type: ignore[index,union-attr]
    if not 0 < found <= WORST:
        raise ValueError(f"graph_tolerance must be above 0 and at most {WORST:g}, got {found}")
    return found


def _works_in_onnxruntime(entry: Entry) -> bool:
    return any(name.startswith("onnxruntime ") for name in entry.checked)


def _export(module: nn.Module, path: Path) -> tuple[int | None, float]:
    """Export with a variable batch, or else for one sample; return the batch, and the error in ONNX Runtime."""
    try:
        done = export(module, path, tolerance=TOLERANCE)
    except UsageError as error:
        if "--batch 1" not in str(error):
            raise
        done = export(module, path, batch=1, tolerance=TOLERANCE)
    return done.batch, done.error


def _check(module: nn.Module, runtime: str, slot: Slot, entry: Entry, tolerance: float) -> float:
    """Return the error of a graph's outputs in a runtime.

    Raises:
        UsageError: the runtime cannot open it.
        CheckpointError: the error is above the tolerance.
    """
    try:
        session = open_session(runtime, slot.path.read_bytes())
    except Exception as error:  # each runtime raises its own
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(f"it cannot open the graph ({first.strip()})") from error
    twin = copy.deepcopy(module).cpu().eval()
    rounded = entry.own or any(isinstance(layer, QuantizedLayer) for layer in twin.modules())

    def run(*values: Tensor) -> Any:
        return [torch.from_numpy(output) for output in session(*(value.numpy() for value in values))]

    with torch.no_grad():
        found = compare(run, twin, None, [entry.batch] if entry.batch else [1, 3], rounded=rounded)
    if found == float("inf"):
        raise CheckpointError(f"{runtime} returns outputs of other shapes than the model's")
    if not found <= tolerance:
        raise CheckpointError(f"the outputs of the graph differ by {found:.2g} of their root mean square (accepted: {tolerance:g})")
    return found


def about(model: nn.Module) -> dict[str, Any]:
    """Return the facts on a model that an answer needs beside its outputs, as JSON values; {} for answers that need the model itself."""
    from vitarium.catalog.heads import has_trained_head
    from vitarium.catalog.record import training_of
    from vitarium.training.tasks import task_of

    try:
        task = task_of(model)
    except VitariumError:
        return {}
    if task.name not in FORMS or not has_trained_head(model):
        return {}
    found = {
        "task": task.record(),
        "labels": getattr(model, "labels", None),
        "preprocessing": preprocessing_of(model).to_dict(),
        "temperature": training_of(model).temperature,
    }
    return json.loads(json.dumps(found))
