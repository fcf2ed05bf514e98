"""Retrieval index: the unit vectors of many images in one file, and nearest-neighbour search.

The file is safetensors: `embeddings` (N, E) float32, and a record of paths, sizes and modification times, of the model and its fingerprint.
Search is exact, by cosine, with faiss if it is installed and else with torch; both return the same images in the same order.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
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
from vitarium.engine import Engine, map_images
from vitarium.engine.images import PART_BATCHES, finished_parts
from vitarium.errors import CheckpointError, UsageError
from vitarium.files import atomic_path
from vitarium.nn.modes import evaluating
from vitarium.perception.retrieval.embedding import embeddings_of

KEY, FORMAT = "vitarium_index", 1
SPARE = 32
"""Number of extra candidates, so that every engine orders equal cosines at the end of the list in the same way."""


@dataclass
class Index:
    """Images with their vectors.

    Args:
        model: file or name of the model that computed the vectors.
        fingerprint: hash of its weights.
        files: absolute paths of the images. In the file, those below its folder are relative to it, so that both can be moved together and
            searched from any working folder.
        stamps: (bytes, modification time in ns) of each file.
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
        """Write the file atomically."""
        from safetensors.torch import save_file

        record = {"format": FORMAT, "relative_to": "index"} | {k: getattr(self, k) for k in ("model", "fingerprint", "stamps", "broken")}
        record["files"] = [_inside(file, os.path.dirname(os.path.abspath(path))) for file in self.files]
        with atomic_path(path) as temporary:
            save_file({"embeddings": self.embeddings.contiguous()}, temporary, {KEY: json.dumps(record)})

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Read an index.

        Raises:
            CheckpointError: missing, damaged, not an index, or of a newer version.
        """
        path = existing(path)
        advice = f"{path} is not an index of images; 'vitarium index FOLDER --model FILE --output {shlex.quote(str(path))}' makes one"
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
            texts, vectors = [record["model"], record["fingerprint"], *record["files"]], tensors["embeddings"]
            if not all(isinstance(text, str) for text in texts) or vectors.ndim != 2 or not vectors.is_floating_point():
                raise ValueError("a field of another type")
            record["files"] = _absolute(record["files"], path, earlier=record.pop("relative_to", None) is None)
            index = cls(**record, embeddings=tensors["embeddings"])
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is a damaged index; delete it and make it again") from error
        if not len(index.files) == len(index.stamps) == len(index.embeddings):
            raise CheckpointError(f"{path} is a damaged index ({len(index.files)} files, {len(index.embeddings)} vectors); make it again")
        return index

    def search(self, queries: Tensor, count: int, *, engine: str = "auto") -> tuple[Tensor, Tensor]:
        """Return cosines (Q, k) and positions in `files` (Q, k) of the nearest images of each query (Q, E), k = min(count, N).

        Images with equal cosines are in the order of the index.

        Args:
            engine: "faiss", "torch", or "auto": faiss if it is installed.

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
        places = places.sort(dim=1).values  # in the order of the index, which the stable sort below keeps
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


def _inside(file: str, folder: str) -> str:
    """Return a path relative to a folder that holds it, else the absolute path."""
    whole = os.path.abspath(file)
    return os.path.relpath(whole, folder) if whole.startswith(os.path.join(folder, "")) else whole


def _absolute(files: list[str], path: Path, *, earlier: bool) -> list[str]:
    """Return the absolute paths of an index's images.

    Args:
        files: relative to the index's folder, or absolute.
        path: of the index.
        earlier: relative to the working folder in which the index was made, as in version 0.1.0; tried first.
    """
    folder = os.path.dirname(os.path.abspath(path))
    here = os.getcwd() if earlier and files and os.path.exists(files[0]) else folder
    return [os.path.normpath(os.path.join(here, file)) for file in files]


def stamp_of(file: str) -> tuple[int, int]:
    """Return bytes and modification time of a file, (0, 0) if it does not exist."""
    try:
        found = os.stat(file)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def model_fingerprint(model: nn.Module) -> str:
    """Return the sha256 of a model's weights."""
    return fingerprint(model.state_dict())


def update(
    index: Index,
    model: nn.Module,
    files: Sequence[str],
    *,
    batch_size: int = 32,
    engine: str | Engine = "local",
    parts: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> tuple[int, int]:
    """Update an index to hold exactly `files`, in their order; unchanged files are not read again.

    Args:
        index: of the same model; changed in place.
        model: in eval mode; any model that `embeddings_of` supports.
        files: paths of images.
        batch_size: images at once.
        engine: where the images are embedded, see `vitarium.engine.map_images`.
        parts: folder of finished parts, so that an interrupted call continues; removed at the end. None: parts are not kept.
        progress: called with the number of images read and of all to be read.

    Returns:
        number of images read, and number of old ones removed.
    """
    known = {file: i for i, file in enumerate(index.files)}
    stamps = {file: stamp_of(file) for file in files}
    rows: dict[str, Tensor] = {f: index.embeddings[i] for f, i in known.items() if f in stamps and index.stamps[i] == stamps[f]}
    gone = sum(file not in stamps for file in known)
    earlier = finished_parts(parts, index.fingerprint) if parts is not None else []
    rows |= {f: vector for part in earlier for f, stamp, vector in _rows_of(part) if stamps.get(f) == stamp}
    new = [(file, stamps[file]) for file in files if file not in rows]
    found = map_images(
        _embed_part,
        new,
        shared=(model, batch_size),
        part_size=batch_size * PART_BATCHES,
        engine=engine,
        parts=parts,
        identity=index.fingerprint,
        keep=earlier,
        progress=progress,
    )
    rows |= {file: vector for part in found for file, _, vector in _rows_of(part)}
    index.files = [file for file in files if file in rows]
    index.stamps = [stamps[file] for file in index.files]
    index.embeddings = torch.stack([rows[file] for file in index.files]) if index.files else torch.empty(0, 0)
    index.broken = [(file, reason) for part in found for file, reason in part["broken"]]
    return len(new) - len(index.broken), gone


def _embed_part(items: Sequence[tuple[str, tuple[int, int]]], model: nn.Module, batch_size: int) -> dict[str, Any]:
    """Embed the files of a part: items are (file, stamp)."""
    vectors, broken = embed_files(model, [file for file, _ in items], batch_size)
    read = [(file, stamp) for file, stamp in items if file in vectors]
    stacked = torch.stack([vectors[file] for file, _ in read]) if read else torch.empty(0, 0)
    return {"files": [file for file, _ in read], "stamps": [stamp for _, stamp in read], "vectors": stacked, "broken": broken}


def _rows_of(part: dict[str, Any]) -> Iterator[tuple[str, tuple[int, int], Tensor]]:
    """Return file, stamp and vector of each readable image of a part."""
    for file, stamp, vector in zip(part["files"], part["stamps"], part["vectors"], strict=True):
        yield file, tuple(stamp), vector


def embed_files(model: nn.Module, files: Sequence[str], batch_size: int = 32) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Return the unit vectors of image files by path, and the unreadable ones with reasons."""
    rows: dict[str, Tensor] = {}
    bad_files = BadFiles(1.0)
    if not files:
        return rows, []
    loader = Loader(FileImages(list(files), [0] * len(files)), preprocessing_of(model), batch_size=batch_size, bad_files=bad_files)
    place = next(model.parameters(), torch.empty(0))
    for batch in loader.epoch(0):
        if not len(batch["index"]):
            continue
        with evaluating(model, inference=True):
            vectors = embeddings_of(model, batch["image"].to(place)).cpu()
        for i, vector in zip(batch["index"].tolist(), vectors, strict=True):
            if vector.isfinite().all():
                rows[files[i]] = vector.clone()
            else:
                bad_files.record(files[i], "the model's output is not finite")
    return rows, bad_files.items()
