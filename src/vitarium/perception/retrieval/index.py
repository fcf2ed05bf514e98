"""An index: the unit vectors of many pictures in one file, and the pictures nearest to a vector.

The file is safetensors: `embeddings` (N, E) float32, and a record of paths, sizes and times of change, of the model and its fingerprint.
Search is exact, by cosine, with faiss where it is installed and with torch where not; both give the same pictures in the same order.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog.create import preprocessing_of
from vitarium.catalog.states import existing, fingerprint, looks_like_safetensors, read_safetensors
from vitarium.data.bad_files import BadFiles
from vitarium.data.folders import FileImages
from vitarium.data.loader import Loader
from vitarium.errors import CheckpointError, UsageError
from vitarium.files import atomic_path
from vitarium.nn.modes import evaluating
from vitarium.perception.retrieval.embedding import embeddings_of

KEY, FORMAT = "vitarium_index", 1
SPARE = 32
"""Candidates beyond those asked for, so that equal cosines at the end of the list are ordered alike by every search."""
SAVE_EVERY = 2048
"""Pictures between two writings of an index that is being made."""


@dataclass
class Index:
    """Pictures with their vectors.

    Args:
        model: file or name of the model that made the vectors.
        fingerprint: of its weights.
        files: paths of the pictures, as they can be opened from where the index was made.
        stamps: (bytes, time of change in ns) of each file.
        embeddings: unit vectors (N, E), float32, on the CPU.
        broken: (path, reason) of files that could not be read.
    """

    model: str
    fingerprint: str
    files: list[str] = field(default_factory=list)
    stamps: list[tuple[int, int]] = field(default_factory=list)
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    broken: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        record = {"format": FORMAT} | {k: getattr(self, k) for k in ("model", "fingerprint", "files", "stamps", "broken")}
        with atomic_path(path) as temporary:
            try:
                save_file({"embeddings": self.embeddings.contiguous()}, temporary, {KEY: json.dumps(record)})
            except SafetensorError as error:
                raise OSError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """
        Raises:
            CheckpointError: missing, damaged, no index, or one of a newer version.
        """
        path = existing(path)
        advice = f"{path} is no index of pictures; 'vitarium index FOLDER --model FILE --output {path}' makes one"
        if not looks_like_safetensors(path):
            raise CheckpointError(advice)
        tensors, metadata = read_safetensors(path)
        if KEY not in metadata or "embeddings" not in tensors:
            raise CheckpointError(advice)
        try:
            record = json.loads(metadata[KEY])
            if record.pop("format") != FORMAT:
                raise CheckpointError(f"{path} was written by a newer vitarium: pip install --upgrade vitarium")
            record["stamps"] = [(int(size), int(changed)) for size, changed in record["stamps"]]
            record["broken"] = [(str(file), str(reason)) for file, reason in record["broken"]]
            index = cls(**record, embeddings=tensors["embeddings"])
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is a damaged index; delete it and make it anew") from error
        if not len(index.files) == len(index.stamps) == len(index.embeddings):
            raise CheckpointError(f"{path} is a damaged index ({len(index.files)} files, {len(index.embeddings)} vectors); make it anew")
        return index

    def search(self, queries: Tensor, count: int, *, engine: str = "auto") -> tuple[Tensor, Tensor]:
        """Cosines (Q, k) and places in `files` (Q, k) of the nearest pictures of each query (Q, E), k = min(count, N).

        Pictures with equal cosines come in the order of the index.

        Args:
            engine: "faiss", "torch", or "auto": faiss where it is installed.

        Raises:
            UsageError: vectors of another length.
        """
        if queries.shape[1] != self.embeddings.shape[1]:
            raise UsageError(f"the index holds vectors of {self.embeddings.shape[1]} numbers, the queries have {queries.shape[1]}")
        if engine == "auto":
            engine = "faiss" if importlib.util.find_spec("faiss") else "torch"
        wide = min(count + SPARE, len(self))
        queries = queries.float().cpu()
        places = (_faiss if engine == "faiss" else _torch)(self.embeddings, queries, wide)
        places = places.sort(dim=1).values  # in the order of the index first, so that the stable sort below keeps it
        cosines = torch.einsum("qe,qne->qn", queries.double(), self.embeddings[places].double()).float()
        order = cosines.argsort(dim=1, descending=True, stable=True)[:, :count]
        return cosines.gather(1, order), places.gather(1, order)


def _torch(embeddings: Tensor, queries: Tensor, count: int) -> Tensor:
    return torch.cat([(some @ embeddings.mT).topk(count, dim=1).indices for some in queries.split(256)])


def _faiss(embeddings: Tensor, queries: Tensor, count: int) -> Tensor:
    from vitarium.errors import require

    flat = require("faiss", "retrieval").IndexFlatIP(embeddings.shape[1])
    flat.add(embeddings.numpy())
    return torch.from_numpy(flat.search(queries.numpy(), count)[1])


def stamp_of(file: str) -> tuple[int, int]:
    """Bytes and time of change of a file, (0, 0) where it is gone."""
    try:
        found = os.stat(file)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def model_fingerprint(model: nn.Module) -> str:
    """sha256 of a model's weights."""
    return fingerprint(model.state_dict())


def update(
    index: Index,
    model: nn.Module,
    files: Sequence[str],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], Any] = lambda done, total: None,
    save: Callable[[Index], Any] = lambda index: None,
) -> tuple[int, int]:
    """Bring an index up to date: `files` are then in it and no others, in their order; those that have not changed are not read again.

    Args:
        index: of the same model; changed in place.
        model: in eval mode; any that `embeddings_of` takes.
        files: pictures.
        progress: called with the number of pictures looked at and of all that have to be.
        save: called with the index from time to time on the way, so that an interrupted work is not lost.

    Returns:
        how many pictures were read, and how many of the old ones are gone.
    """
    known = {file: i for i, file in enumerate(index.files)}
    stamps = {file: stamp_of(file) for file in files}
    rows: dict[str, Tensor] = {f: index.embeddings[i] for f, i in known.items() if f in stamps and index.stamps[i] == stamps[f]}
    new = [file for file in files if file not in rows]
    gone = sum(file not in stamps for file in known)
    broken: list[tuple[str, str]] = []

    def store() -> None:
        index.files = [file for file in files if file in rows]
        index.stamps = [stamps[file] for file in index.files]
        index.embeddings = torch.stack([rows[file] for file in index.files]) if index.files else torch.empty(0, 0)
        index.broken = broken

    saved = 0
    for done, found, unreadable in _embed(model, new, batch_size):
        rows |= found
        broken = unreadable
        progress(done, len(new))
        if done - saved >= SAVE_EVERY:
            store()
            save(index)
            saved = done
    store()
    return len(new) - len(broken), gone


def _embed(model: nn.Module, files: Sequence[str], batch_size: int) -> Iterator[tuple[int, dict[str, Tensor], list[tuple[str, str]]]]:
    """Pictures looked at so far, the vectors of the last batch by file, and all that could not be read so far."""
    if not files:
        return
    bad_files = BadFiles(1.0)
    loader = Loader(FileImages(list(files), [0] * len(files)), preprocessing_of(model), batch_size=batch_size, bad_files=bad_files)
    place = next(model.parameters(), torch.empty(0))
    for number, batch in enumerate(loader.epoch(0), start=1):
        vectors = torch.empty(0)
        if len(batch["index"]):
            with evaluating(model, inference=True):
                vectors = embeddings_of(model, batch["image"].to(place)).cpu()
        found = {files[i]: vector.clone() for i, vector in zip(batch["index"].tolist(), vectors, strict=True)}
        for file, vector in list(found.items()):
            if not vector.isfinite().all():
                bad_files.record(file, "the model's output is not finite")
                del found[file]
        yield min(number * batch_size, len(files)), found, bad_files.items()


def embed_files(model: nn.Module, files: Sequence[str], batch_size: int = 32) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The unit vectors of picture files by path, and those that could not be read, with reasons."""
    rows: dict[str, Tensor] = {}
    broken: list[tuple[str, str]] = []
    for _, found, unreadable in _embed(model, files, batch_size):
        rows |= found
        broken = unreadable
    return rows, broken
