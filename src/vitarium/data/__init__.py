"""Labelled images from wherever they lie: embedded, folders, archives, other libraries' data sets, or drawn."""

from __future__ import annotations

import os

from vitarium.data.bad_files import BadFiles, BrokenImage
from vitarium.data.image_set import ImageData, ImageSet, Subset, stratified_split
from vitarium.errors import DataError

__all__ = ["BadFiles", "BrokenImage", "ImageData", "ImageSet", "Subset", "open_data", "stratified_split"]


def open_data(spec: str | os.PathLike[str], *, seed: int = 0, val_fraction: float = 0.2) -> ImageData:
    """Open a data set for classification.

    Args:
        spec: "digits".
        seed: of the split, where the data has none.
        val_fraction: share that is held out, where the data has no split.

    Raises:
        DataError: nothing of this name.
    """
    if spec == "digits":
        from vitarium.data.digits import open_digits

        return open_digits(seed=seed, val_fraction=val_fraction)
    raise DataError(f"no data called {str(spec)!r}; there is 'digits'")
