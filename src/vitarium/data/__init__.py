"""Data: labelled images from folders, archives, other libraries' data sets, embedded samples and the scene renderer."""

from __future__ import annotations

from vitarium.data.bad_files import BadFiles, BrokenImage
from vitarium.data.image_set import ImageData, ImageSet, Subset, stratified_split
from vitarium.data.opening import open_data
from vitarium.data.sample import Sample

__all__ = ["BadFiles", "BrokenImage", "ImageData", "ImageSet", "Sample", "Subset", "open_data", "stratified_split"]
