"""Graphs that are kept: beside the file of their model, or in the user's cache. Imports no torch.

    FILE.vitarium/forward.onnx      the graph of its forward; or of another function, under its name; or for one runtime (`own_name`)
    FILE.vitarium/forward.json      what it was made of: `Entry`

A graph belongs to the content of its model, by sha256, and to the versions that exported it. A changed file gets a new graph, which
replaces the old one; a damaged one is made again. So is one that was not made here: a folder that came with a download could hold a graph
of other answers, or one that reads other files (OpenVINO opens what a graph names as external data). Entries are therefore signed with a
key of the user's cache, and an entry without its signature is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vitarium.files import atomic_path, cache_folder, sha256, write_json
from vitarium.version import __version__

FORMAT, ENDING, KEPT = 2, ".vitarium", 16
"""Version of an entry, ending of the folder beside a model's file, and number of graphs that are kept in the user's cache."""
KEY, KEY_BYTES = "graphs.key", 32
"""File in the user's cache with the key of signatures, and its length."""


@dataclass
class Entry:
    """A kept graph.

    Attributes:
        model: sha256 of the model's file, or of its weights and structure.
        versions: of the libraries that exported it.
        graph: sha256 of the ONNX file.
        inputs: names of the model's arguments, in the order of the graph's inputs.
        shapes: of one sample of each.
        batch: number of samples that the graph takes at once; None: any.
        single: whether the model's output is one tensor.
        checked: runtime with its version -> error of its outputs (see `vitarium.efficiency.export.Exported`).
        about: facts on the model for answers without it (see `vitarium.efficiency.runtimes.making`).
        own: whether the model's last method wrote the graph (see `vitarium.efficiency.runtimes`).
    """

    model: str
    versions: dict[str, str]
    graph: str
    inputs: list[str]
    shapes: list[list[int]]
    batch: int | None
    single: bool
    checked: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    own: bool = False


@dataclass(frozen=True)
class Slot:
    """A place for a graph.

    Attributes:
        folder: beside the model's file, or in the user's cache.
        name: of the graph's file, without ending.
    """

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        """The graph's file."""
        return self.folder / f"{self.name}.onnx"

    def read(self, model: str, versions: Mapping[str, str]) -> tuple[Entry, bytes] | None:
        """Return the entry and the ONNX file of a model, or None if there is none, or a damaged, an outdated or a foreign one.

        Args:
            model: see `Entry`.
            versions: of the libraries that would export it now.
        """
        try:
            record = json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8"))
            if not hmac.compare_digest(record.pop("signature"), _signature(record)) or record.pop("format") != FORMAT:
                return None
            entry = Entry(**record)
            if entry.model != model or entry.versions != versions:
                return None
            content = self.path.read_bytes()
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
        return (entry, content) if hashlib.sha256(content).hexdigest() == entry.graph else None

    def write(self, entry: Entry) -> None:
        """Write the entry of a graph whose file is in place; graphs of other contents of the model are removed from the folder.

        Raises:
            OSError: it, or the key of its signature, cannot be written.
        """
        record = {"format": FORMAT, **asdict(entry)}
        write_json(self.path.with_suffix(".json"), {**record, "signature": _signature(record)})
        if self.folder.suffix == ENDING:
            _remove([file for file in self.folder.glob("*.json") if _model_of(file) != entry.model])
        else:
            newest = sorted(self.folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
            _remove(newest[KEPT:])

    def remove(self, *, graph: bool = True) -> None:
        """Remove a graph whose writing failed, and the folder beside the model's file if it is empty.

        Args:
            graph: whether the graph's files are removed; False: they are those of an earlier call, and stay.
        """
        if graph:
            _remove([self.path.with_suffix(".json")])
        if self.folder.suffix == ENDING:
            with contextlib.suppress(OSError):  # not empty, or missing
                self.folder.rmdir()


def own_name(runtime: str) -> str:
    """Return the name of the forward's graph that a method writes itself for one runtime (see `vitarium.efficiency.runtimes`)."""
    return f"forward-{runtime}"


def slots_of(source: str | os.PathLike[str], name: str) -> list[Slot]:
    """Return the places of a file's graph, the preferred one first: beside it, unless its folder is read-only, and in the user's cache, in
    case that nothing can be written there (a full disk)."""
    path = Path(source).resolve()
    folder = path.with_name(path.name + ENDING)
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    beside = [Slot(folder, name)] if os.access(folder if folder.is_dir() else path.parent, os.W_OK) else []
    return [*beside, slot_in_cache(f"{name}-{digest}")]


def slot_in_cache(name: str) -> Slot:
    """Return a place in the user's cache."""
    return Slot(cache_folder() / "graphs", name)


def exporters() -> dict[str, str]:
    """Return the versions of the libraries that export a graph."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"vitarium": __version__}
    for package in ("torch", "onnxscript"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def digest_of(source: str | os.PathLike[str]) -> str:
    """Return the sha256 of a model's file."""
    return sha256(source)


def put(path: Path, content: bytes) -> None:
    """Write a graph atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _signature(record: Mapping[str, Any]) -> str:
    """Return the signature of an entry, without it, under the user's key."""
    return hmac.new(_key(), json.dumps(record, sort_keys=True).encode(), "sha256").hexdigest()


def _key() -> bytes:
    """Return the user's key; it is made at its first use."""
    path = cache_folder() / KEY
    with contextlib.suppress(FileNotFoundError):
        found = path.read_bytes()
        if len(found) == KEY_BYTES:
            return found
    made = os.urandom(KEY_BYTES)
    put(path, made)
    path.chmod(0o600)
    return made


def _model_of(file: Path) -> str | None:
    """Return the model of an entry's file; None if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _remove(entries: list[Path]) -> None:
    for file in entries:
        for path in (file, file.with_suffix(".onnx")):
            with contextlib.suppress(OSError):
                path.unlink()
