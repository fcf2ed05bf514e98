"""`vitarium restore`: pictures made larger, or better, by a trained restorer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import err, out, print_json, table
from vitarium.cli.options import Checkpoint, Device
from vitarium.errors import DataError, UsageError
from vitarium.verbs.opening import find_device, open_model

if TYPE_CHECKING:
    from vitarium.generation.restoration.restorer import Restorer


@configurable
def restore(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures, and folders that are searched to the bottom.")],
    model: Annotated[str, typer.Option(metavar="MODEL|FILE", help="A file that `vitarium.save` wrote, or a model's name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results, written as PNG.")],
    checkpoint: Checkpoint = None,
    tile: Annotated[int, typer.Option(min=0, help="Side of the tiles, pixels of the input; memory grows with it. 0: no tiles.")] = 256,
    overlap: Annotated[int, typer.Option(min=0, help="How far tiles overlap, pixels of the input.")] = 32,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Restore pictures of any size, tile by tile. One that cannot be read is named and skipped (exit code 3 if none can be read)."""
    from vitarium.verbs.opening import find_images as find_pictures

    files = find_pictures(images)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output must be a folder, {output} is a file")
    places = name_results(files, images, output)
    opened = open_restorer(model, checkpoint).to(find_device(device))
    rows = []
    with err().status(f"Restoring {len(files)} pictures") as status:
        for number, (file, place) in enumerate(zip(files, places, strict=True), start=1):
            status.update(f"Restoring {number} of {len(files)}: {file}")
            rows.append(restore_file(opened, file, place, tile, overlap))
    broken = [row for row in rows if "error" in row]
    if len(broken) == len(rows):
        raise DataError("no picture could be restored:\n" + "\n".join(f"  {row['image']}: {row['error']}" for row in broken[:10]))
    (print_json if as_json else show)(rows)
    if broken:
        err().print(f"[yellow]{len(broken)} of {len(rows)} pictures could not be restored[/]")


def open_restorer(model: str, checkpoint: str | None) -> Restorer:
    """A trained restorer in eval mode.

    Raises:
        UsageError: the model is of another kind.
    """
    from vitarium.generation.restoration.restorer import Restorer

    opened = open_model(model, checkpoint)
    if not isinstance(opened, Restorer):
        raise UsageError(f"{model} does not restore pictures; 'vitarium train drct_pico' makes a model that does")
    return opened


def name_results(files: list[str], named: list[Path], output: Path) -> list[Path]:
    """Where each result goes: below `output` by its path inside the folder that was named, ending in .png.

    Raises:
        UsageError: two results would have one name, or one would replace its own picture.
    """
    places: dict[Path, str] = {}
    for file in files:
        folder = next((path for path in named if path.is_dir() and Path(file).is_relative_to(path)), Path(file).parent)
        place = (output / Path(file).relative_to(folder)).with_suffix(".png")
        if place in places:
            raise UsageError(f"the results of {places[place]} and {file} would both be {place}; restore them into two folders")
        if place.exists() and place.samefile(file):
            raise UsageError(f"the result of {file} would replace it; choose another --output")
        places[place] = file
    return list(places)


def restore_file(model: Restorer, file: str, place: Path, tile: int, overlap: int) -> dict[str, Any]:
    """{"image", "size", "restored", "restored_size", "seconds"}, or {"image", "error"}. Sizes are [width, height]."""
    from vitarium.data.bad_files import BrokenImage
    from vitarium.data.images import open_image
    from vitarium.errors import InputError
    from vitarium.files import atomic_path
    from vitarium.generation.restoration.tiling import restore_picture

    begin = time.perf_counter()
    try:
        picture = open_image(file)
        restored = restore_picture(model, picture, tile=tile, overlap=overlap)
    except BrokenImage as error:
        return {"image": file, "error": error.reason}
    except InputError as error:
        return {"image": file, "error": str(error)}
    try:
        with atomic_path(place) as temporary:
            restored.save(temporary, format="png")
    except OSError as error:
        raise UsageError(f"cannot write {place}: {error}") from error
    seconds = round(time.perf_counter() - begin, 3)
    return {"image": file, "size": list(picture.size), "restored": str(place), "restored_size": list(restored.size), "seconds": seconds}


def show(rows: list[dict[str, Any]]) -> None:
    """A line a picture."""
    from rich.markup import escape

    result = table("picture", ">pixels", "restored", ">pixels", ">seconds", "~")
    for row in rows:
        if "error" in row:
            result.add_row(escape(row["image"]), "", "[yellow]skipped[/]", "", "", f"[yellow]{escape(row['error'])}[/]")
            continue
        sizes = ["x".join(map(str, row[key])) for key in ("size", "restored_size")]
        result.add_row(escape(row["image"]), sizes[0], escape(row["restored"]), sizes[1], f"{row['seconds']:.1f}", "")
    out().print(result)
