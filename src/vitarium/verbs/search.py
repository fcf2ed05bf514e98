"""Search an index for the images most similar to given ones."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.errors import CheckpointError, DataError, UsageError
from vitarium.files import check_output, save_image
from vitarium.texts import printable
from vitarium.training.tasks.base import TableData
from vitarium.verbs.opening import Notify, execute, find_images, name_of, open_model, quiet
from vitarium.verbs.result import Result, kept

if TYPE_CHECKING:
    from torch import nn

    from vitarium.perception.retrieval.index import Index

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
SHEET_ROWS = 50
"""Largest number of queries on a sheet."""


@dataclass(repr=False)
class Found(Result):
    """The images of an index that are most similar to given ones.

    Attributes:
        index: file of the index.
        rows: one per query, in the order of the files: {"image", "found": [{"image", "similarity"}, ...]}, the most similar first, or
            {"image", "error"}. Similarities are cosines; 1 is equal.
    """

    index: str
    rows: list[dict[str, Any]]

    @property
    def broken(self) -> list[dict[str, Any]]:
        """Rows of images that could not be read."""
        return [row for row in self.rows if "error" in row]

    def facts(self) -> dict[str, Any]:
        return {"index": self.index, "queries": len(self.rows), "not readable": len(self.broken)}

    def tables(self) -> list[TableData]:
        table = TableData("", ["image", ">", "~found", ">similarity"])
        for row in self.rows:
            if "error" in row:
                table.rows.append([row["image"], "", f"not readable: {row['error']}", ""])
            for rank, one in enumerate(row.get("found", []), start=1):
                table.rows.append([row["image"] if rank == 1 else "", str(rank), one["image"], f"{one['similarity']:.3f}"])
        return [table]

    def to_dict(self) -> dict[str, Any]:
        return {"index": self.index, "images": self.rows}


def search(
    index: str | os.PathLike[str],
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    top_k: int = 5,
    model: str | os.PathLike[str] | nn.Module | None = None,
    checkpoint: str | None = None,
    itself: bool = False,
    batch_size: int = 32,
    device: str = "auto",
    runtime: str = "eager",
    output: str | os.PathLike[str] | None = None,
    notify: Notify = quiet,
) -> Found:
    """Find the images of an index that are most similar to given ones, by the cosine of their vectors.

    An unreadable image has a row with its error.

    Args:
        index: a file of `vitarium.index`.
        images: files and folders; folders are searched at any depth.
        top_k: images to find for each.
        model: the model of the index; None: opened from its path when the index was made.
        checkpoint: weights for a name.
        itself: also find a query that is in the index itself.
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda", ...
        runtime: what executes the model: "eager", "compile", "onnxruntime" or "openvino" (see `vitarium.efficiency.runtimes`).
        output: a sheet of images (.png, .jpg, .webp), or a .json file.
        notify: called with messages about progress.

    Raises:
        UsageError: an output of another ending.
        DataError: a folder without images, or no image could be read.
        CheckpointError: there is no index, or its model is missing or has changed.
    """
    from vitarium.files import write_json
    from vitarium.perception.retrieval.embedding import embeddings_of
    from vitarium.perception.retrieval.index import Index, embed_files

    path = None if output is None else Path(output)
    if path is not None and path.suffix.lower() not in (*ENDINGS, ".json"):
        raise UsageError(f"--output must end in {', '.join(ENDINGS)} or .json, got {path}")
    if top_k < 1:
        raise UsageError(f"top_k must be at least 1, got {top_k}")
    check_output(path)
    found = Index.load(Path(index))
    files = find_images(images, path, notify)
    opened = open_indexed(found, index, model, checkpoint)
    source = found.model if model is None else model
    opened = execute(opened, runtime, device=device, reads=embeddings_of, source=source, notify=notify)
    notify(f"Embedding {len(files)} images")
    vectors, broken = embed_files(opened, files, batch_size)
    if not vectors:
        raise DataError("no image could be read:\n" + "\n".join(f"  {file}: {reason}" for file, reason in broken[:10]))
    rows = look_up(found, files, vectors, dict(broken), top_k, itself)
    result = Found(os.fspath(index), rows)
    if path is not None:
        with kept(result):
            write_json(path, rows) if path.suffix == ".json" else draw(rows, path)
    return result


def open_indexed(
    found: Index, index: str | os.PathLike[str], model: str | os.PathLike[str] | nn.Module | None, checkpoint: str | None
) -> nn.Module:
    """Return the model that made an index.

    Raises:
        CheckpointError: it is missing, or is another model.
    """
    from vitarium.perception.retrieval.index import model_fingerprint

    if model is None and Path(found.model).is_absolute() and not Path(found.model).exists():
        raise CheckpointError(f"the model of {index} is no longer at {found.model}; name it: --model FILE")
    source = found.model if model is None else model
    opened = open_model(source, checkpoint)
    if model_fingerprint(opened) != found.fingerprint:
        raise CheckpointError(
            f"{index} was made by another model than {name_of(source)} (or before its weights changed); make it again: "
            f"vitarium index FOLDER --model {shlex.quote(name_of(source))} --output {shlex.quote(str(index))}"
        )
    return opened


def look_up(
    found: Index, files: list[str], vectors: dict[str, Any], broken: dict[str, str], top_k: int, itself: bool
) -> list[dict[str, Any]]:
    """Return the rows of `Found`."""
    import torch

    readable = [file for file in files if file in vectors]
    cosines, places = found.search(torch.stack([vectors[file] for file in readable]), top_k + 1)
    rows: dict[str, dict[str, Any]] = {}
    for file, near, where in zip(readable, cosines.tolist(), places.tolist(), strict=True):
        own = os.path.realpath(file)
        pairs = [(found.files[i], value) for value, i in zip(near, where, strict=True)]
        pairs = [(below_here(name), value) for name, value in pairs if itself or os.path.realpath(name) != own][:top_k]
        rows[file] = {"image": file, "found": [{"image": name, "similarity": round(value, 6)} for name, value in pairs]}
    return [rows.get(file) or {"image": file, "error": broken.get(file, "not readable")} for file in files]


def below_here(path: str) -> str:
    """Return a path relative to the working folder if it lies below it, else the absolute path."""
    here = os.path.join(os.getcwd(), "")
    return path.removeprefix(here)


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """Write a sheet with a row for each query, at most `SHEET_ROWS`.

    Raises:
        WriteError: the file cannot be written.
    """
    from vitarium.perception.retrieval.sheet import Found as Shown
    from vitarium.perception.retrieval.sheet import sheet

    drawn = []
    for row in [row for row in rows if "found" in row][:SHEET_ROWS]:
        query = _opened(row["image"])
        if query is not None:
            captions = [f"{one['similarity']:.3f} {_short(printable(Path(one['image']).stem, ''))}" for one in row["found"]]
            drawn.append((query, [Shown(_opened(one["image"]), text) for one, text in zip(row["found"], captions, strict=True)]))
    save_image(sheet(drawn), output, {".png": "png", ".webp": "webp"}.get(output.suffix.lower(), "jpeg"))


def _opened(file: str) -> Any:
    """Return an image; None if it cannot be read."""
    from vitarium.data.bad_files import BrokenImage
    from vitarium.data.images import open_image

    try:
        return open_image(file).convert("RGB")
    except BrokenImage:
        return None


def _short(name: str) -> str:
    """Return at most 12 letters with the last ones, because names in one folder differ at their ends."""
    return name if len(name) <= 12 else f"{name[:5]}..{name[-5:]}"
