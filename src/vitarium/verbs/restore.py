"""Restore images with a trained restorer, such as one for super-resolution."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.errors import DataError, UsageError
from vitarium.files import check_output, save_image
from vitarium.training.tasks.base import TableData
from vitarium.verbs.opening import Notify, find_device, find_images, name_of, open_model, quiet
from vitarium.verbs.result import Result

if TYPE_CHECKING:
    from torch import nn

    from vitarium.generation.restoration.restorer import Restorer


@dataclass(repr=False)
class Restored(Result):
    """Restored images.

    Attributes:
        model: file or name.
        folder: holds the results.
        rows: one per image, in the order of the files: {"image", "size", "restored", "restored_size", "seconds"}, or {"image", "error"}.
            Sizes are [width, height] in pixels.
    """

    model: str
    folder: Path
    rows: list[dict[str, Any]]

    @property
    def broken(self) -> list[dict[str, Any]]:
        """Rows of images that could not be restored."""
        return [row for row in self.rows if "error" in row]

    def facts(self) -> dict[str, Any]:
        return {"model": self.model, "images": len(self.rows), "not readable": len(self.broken), "folder": self.folder}

    def tables(self) -> list[TableData]:
        table = TableData("", ["image", ">pixels", "restored", ">pixels", ">seconds", "~"])
        for row in self.rows:
            if "error" in row:
                table.rows.append([row["image"], "", "skipped", "", "", row["error"]])
                continue
            sizes = ["x".join(map(str, row[key])) for key in ("size", "restored_size")]
            table.rows.append([row["image"], sizes[0], row["restored"], sizes[1], f"{row['seconds']:.1f}", ""])
        return [table]

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "images": self.rows}


def restore(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str] | nn.Module,
    output: str | os.PathLike[str],
    *,
    checkpoint: str | None = None,
    tile: int = 256,
    overlap: int = 32,
    ensemble: bool = False,
    device: str = "auto",
    notify: Notify = quiet,
) -> Restored:
    """Restore images of any size, tile by tile, and write them as PNG files.

    An unreadable image has a row with its error.

    Args:
        images: files and folders; folders are searched at any depth.
        model: a file of `vitarium.save`, a model's name, or a restorer.
        output: folder for the results; an image of a folder gets its path inside that folder.
        checkpoint: weights for a name.
        tile: side of the tiles, pixels of the input; memory grows with it. 0: no tiles.
        overlap: overlap of neighbouring tiles, pixels of the input.
        ensemble: take the mean of the results in the 8 orientations of each tile: a little better, at 8 times the time.
        device: "auto", "cpu", "cuda", ...
        notify: called with messages about progress.

    Raises:
        UsageError: a model that restores no images, tiles too small for the model, two results of one name, or a result that would replace
            its image.
        DataError: a folder without images, or no image could be restored.
        CheckpointError: weights that are not available.
    """
    folder = Path(output)
    files = find_images(images, folder, notify)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output must be a folder, {folder} is a file")
    named = [Path(p) for p in ([images] if isinstance(images, str | os.PathLike) else images)]
    places = name_results(files, named, folder)
    check_output(*places)
    opened = open_restorer(model, checkpoint)
    opened.to(find_device(device))
    rows = []
    for number, (file, place) in enumerate(zip(files, places, strict=True), start=1):
        notify(f"Restoring {number} of {len(files)}: {file}")
        rows.append(restore_file(opened, file, place, tile, overlap, ensemble))
    found = Restored(name_of(model), folder, rows)
    if len(found.broken) == len(rows):
        raise DataError("no image could be restored:\n" + "\n".join(f"  {row['image']}: {row['error']}" for row in found.broken[:10]))
    return found


def open_restorer(model: str | os.PathLike[str] | nn.Module, checkpoint: str | None) -> Restorer:
    """Return a trained restorer in eval mode.

    Raises:
        UsageError: a model of another kind.
    """
    from vitarium.generation.restoration.restorer import Restorer

    opened = open_model(model, checkpoint)
    if not isinstance(opened, Restorer):
        raise UsageError(f"{name_of(model)} does not restore images; 'vitarium train drct_pico' makes a model that does")
    return opened


def name_results(files: list[str], named: list[Path], output: Path) -> list[Path]:
    """Return the path of each result: below `output`, by the image's path inside the folder that was named, ending in .png.

    Raises:
        UsageError: two results would have one name, or one would replace its own image.
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


def restore_file(model: Restorer, file: str, place: Path, tile: int, overlap: int, ensemble: bool = False) -> dict[str, Any]:
    """Restore one image and return its row of `Restored`.

    Raises:
        UsageError: tiles too small for the model.
        WriteError: the result cannot be written.
    """
    from vitarium.data.bad_files import BrokenImage
    from vitarium.data.images import open_image
    from vitarium.errors import InputError
    from vitarium.generation.restoration.tiling import restore_image

    begin = time.perf_counter()
    try:
        original = open_image(file)
        restored = restore_image(model, original, tile=tile, overlap=overlap, ensemble=ensemble)
    except BrokenImage as error:
        return {"image": file, "error": error.reason}
    except InputError as error:
        return {"image": file, "error": str(error)}
    save_image(restored, place)
    seconds = round(time.perf_counter() - begin, 3)
    return {"image": file, "size": list(original.size), "restored": str(place), "restored_size": list(restored.size), "seconds": seconds}
