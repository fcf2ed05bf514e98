"""`vitarium search`: the pictures of an index that are most like a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import err, out, print_json, table
from vitarium.cli.options import BatchSize, Checkpoint, Device
from vitarium.errors import CheckpointError, DataError, UsageError
from vitarium.verbs.opening import find_device, open_model

if TYPE_CHECKING:
    from torch import nn

    from vitarium.perception.retrieval.index import Index

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@configurable
def search(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="A file that `vitarium index` wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures, and folders that are searched to the bottom.")],
    top_k: Annotated[int, typer.Option(min=1, help="Pictures told for each, the nearest first.")] = 5,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL|FILE", help="The model of the index.", show_default="where it was when it was indexed")
    ] = None,
    checkpoint: Checkpoint = None,
    itself: Annotated[bool, typer.Option("--itself", help="Tell a query that is in the index, too.")] = False,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write: .png or .jpg, a sheet of pictures; .json.", show_default="none")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Find the pictures of an index that are most like given ones, by the cosine of their vectors (1: the same).

    A picture that cannot be read is named and skipped (exit code 3 if none can be read).
    """
    from vitarium.files import write_json
    from vitarium.perception.retrieval.index import Index, embed_files
    from vitarium.verbs.opening import find_images as find_pictures

    if output is not None and output.suffix.lower() not in (*ENDINGS, ".json"):
        raise UsageError(f"--output must end in {', '.join(ENDINGS)} or .json, got {output}")
    found = Index.load(index)
    files = find_pictures(images)
    opened = open_indexed(found, index, model, checkpoint)
    opened.to(find_device(device))
    with err().status(f"Looking at {len(files)} pictures"):
        vectors, broken = embed_files(opened, files, batch_size)
    if not vectors:
        raise DataError("no picture could be read:\n" + "\n".join(f"  {file}: {reason}" for file, reason in broken[:10]))
    rows = look_up(found, files, vectors, dict(broken), top_k, itself)
    if output is not None:
        write_json(output, rows) if output.suffix == ".json" else draw(rows, output)
    (print_json if as_json else show)(rows)
    if broken:
        err().print(f"[yellow]{len(broken)} of {len(files)} pictures could not be read[/]")
    if output is not None:
        err().print(f"written: {output}", markup=False, style="dim")


def open_indexed(found: Index, index: Path, model: str | None, checkpoint: str | None) -> nn.Module:
    """The model that made an index.

    Raises:
        CheckpointError: it is not there, or another.
    """
    from vitarium.perception.retrieval.index import model_fingerprint

    source = model or found.model
    if model is None and Path(source).is_absolute() and not Path(source).exists():
        raise CheckpointError(f"the model of {index} is no longer at {source}; name it: --model FILE")
    opened = open_model(source, checkpoint)
    if model_fingerprint(opened) != found.fingerprint:
        raise CheckpointError(
            f"{index} was made by another model than {source} (or before its weights changed); make it anew: "
            f"vitarium index FOLDER --model {source} --output {index}"
        )
    return opened


def look_up(
    found: Index, files: list[str], vectors: dict[str, Any], broken: dict[str, str], top_k: int, itself: bool
) -> list[dict[str, Any]]:
    """For each file {"image", "found": [{"image", "similarity"}, ...]}, or {"image", "error"}."""
    import os

    import torch

    readable = [file for file in files if file in vectors]
    cosines, places = found.search(torch.stack([vectors[file] for file in readable]), top_k + 1)
    rows: dict[str, dict[str, Any]] = {}
    for file, near, where in zip(readable, cosines.tolist(), places.tolist(), strict=True):
        own = os.path.realpath(file)
        pairs = [(found.files[i], value) for value, i in zip(near, where, strict=True)]
        pairs = [(name, value) for name, value in pairs if itself or os.path.realpath(name) != own][:top_k]
        rows[file] = {"image": file, "found": [{"image": name, "similarity": round(value, 6)} for name, value in pairs]}
    return [rows.get(file) or {"image": file, "error": broken.get(file, "not readable")} for file in files]


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """A sheet of pictures: a row a query, at most 50."""
    from vitarium.data.bad_files import BrokenImage
    from vitarium.data.images import open_image
    from vitarium.files import atomic_path
    from vitarium.perception.retrieval.sheet import Found, sheet

    def opened(file: str) -> Any:
        try:
            return open_image(file).convert("RGB")
        except BrokenImage:
            return None

    drawn = []
    for row in [row for row in rows if "found" in row][:50]:
        query = opened(row["image"])
        if query is not None:
            captions = [f"{one['similarity']:.3f} {_short(Path(one['image']).stem)}" for one in row["found"]]
            drawn.append((query, [Found(opened(one["image"]), text) for one, text in zip(row["found"], captions, strict=True)]))
    try:
        with atomic_path(output) as temporary:
            sheet(drawn).save(temporary, format={".png": "png", ".webp": "webp"}.get(output.suffix.lower(), "jpeg"))
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error}") from error


def _short(name: str) -> str:
    """At most 12 letters, the last ones among them: pictures of one folder differ at their ends."""
    return name if len(name) <= 12 else f"{name[:5]}..{name[-5:]}"


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each picture that was found."""
    from rich.markup import escape

    result = table("picture", ">", "~found", ">similarity")
    for row in rows:
        if "error" in row:
            result.add_row(escape(row["image"]), "", f"[yellow]unreadable: {escape(row['error'])}[/]", "")
        for rank, one in enumerate(row.get("found", []), start=1):
            result.add_row(escape(row["image"]) if rank == 1 else "", str(rank), escape(one["image"]), f"{one['similarity']:.3f}")
    out().print(result)
