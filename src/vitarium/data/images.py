"""Opening of image files: each is decoded completely and upright, or raises an error with the reason."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
import warnings
from typing import TYPE_CHECKING, BinaryIO

from vitarium.catalog.preprocessing import BRIGHTNESS, check_brightness
from vitarium.data.bad_files import BrokenImage
from vitarium.errors import InputError
from vitarium.files import NotRegular, open_regular

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset(["jpg", "jpeg", "jpe", "jfif", "jif", "mpo", "png", "apng", "webp", "bmp", "dib", "gif", "tif", "tiff"]) | frozenset(
    ["ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "jpx", "jpf", "jpc", "avif", "avifs"]
)
"""File extensions of images, in lower case."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # JPEG includes MPO, pairs of stereo cameras
"""Formats that Pillow may decode, whatever the file's name: EPS, for example, would start another program."""

SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")

OTHER_SIGNATURES = (
    b"\xff\x4f\xff\x51",
    b"\0\0\0\x0cjP  ",
    *(b"P%d" % kind + space for kind in range(1, 7) for space in (b"\n", b" ", b"\r")),
)
"""First bytes of JPEG 2000 and of the PPM formats. AVIF has its name at the fifth byte."""

ORIENTATION_KEYS = frozenset(["exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"])
"""Entries of Pillow's `info` in which it looks for the orientation of an image; TIFF has it among its tags."""

MAX_PIXELS = 128_000_000
"""Largest number of pixels of a mask or a video's frame."""

MAX_MEMORY = 1_030_000_000
"""Largest memory of an image in bytes, checked before decoding: of its pixels as stored and of those in the model's mode, which are held at
the same time (see `memory_of`)."""

BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Bytes per pixel of Pillow's modes; of all others 4."""

MAX_ASPECT = 200
"""Largest aspect ratio: the shorter side may be scaled up to the model's input, and the longer side grows with it."""

PAUSES = (0.05, 0.1, 0.2)
"""Seconds before each new attempt to read a file from a slow or unreliable disk."""


def is_image_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an image by its name; hidden files are not (macOS leaves "._photo.jpg" beside "photo.jpg")."""
    name = os.path.basename(os.fspath(path))
    return not name.startswith(".") and os.path.splitext(name)[1][1:].lower() in EXTENSIONS


def has_signature(path: str | os.PathLike[str]) -> bool:
    """Return whether a file begins as an image in an accepted format, for files without an ending; False if it cannot be read."""
    try:
        with open_regular(path) as file:
            return begins_like_image(file.read(16))
    except OSError:
        return False


def begins_like_image(head: bytes) -> bool:
    """Return whether a file with these first 16 bytes begins as an image in an accepted format."""
    if head.startswith(b"RIFF"):  # sounds and films begin like this, too
        return head[8:12] == b"WEBP"
    return head.startswith((*SIGNATURES, *OTHER_SIGNATURES)) or head[4:12] in (b"ftypavif", b"ftypavis")


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image file: decoded, its first frame, turned upright, in the mode in which it was stored.

    Raises:
        BrokenImage: it cannot be read (after four attempts), is not an image, is cut off, would need too much memory, or has values whose
            brightness is not known (see `check_brightness`).
    """
    return decode_image(read_bytes(path), os.fspath(path))


def check_header(path: str | os.PathLike[str]) -> None:
    """Check that a file is there and begins like an image of an accepted format and size; a file that is cut off later passes.

    Raises:
        BrokenImage: it is not.
    """
    try:
        with open_regular(path) as file:
            _open(file, os.fspath(path)).close()
    except Exception:  # decoders raise all kinds of errors; the second, complete attempt finds the reason
        open_image(path)


def image_size(content: bytes, name: str) -> tuple[int, int]:
    """Return width and height of the bytes of an image file, in pixels as they are stored, without decoding them.

    Raises:
        BrokenImage: they do not begin as an image of an accepted format and size.
    """
    try:
        with _open(io.BytesIO(content), name) as image:
            return image.size
    except Exception:  # the complete attempt finds the reason
        return decode_image(content, name).size


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file; `name` is used in messages. See `open_image`."""
    image = _decode(content, name)
    if image.mode in ("I", "F"):
        if image.format == "TIFF" and image.mode == "I":
            raise BrokenImage(name, f"32-bit whole numbers, of which no value is known to be white; {BRIGHTNESS}")
        try:
            check_brightness(image)
        except InputError as error:
            raise BrokenImage(name, str(error)) from error
    return image


def open_mask(path: str | os.PathLike[str]) -> Image.Image:
    """Open an image file whose values are numbers of classes or segments, of any bit depth. See `open_image`."""
    return _decode(read_bytes(path), os.fspath(path))


def _decode(content: bytes, name: str) -> Image.Image:
    from PIL import Image, ImageOps

    if not content:
        raise BrokenImage(name, "the file is empty")
    try:
        image = _open(io.BytesIO(content), name)
        image.load()
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:  # beyond Pillow's own limit, 179 megapixels
        pixels = int(re.findall(r"\d+", str(error))[0])
        raise BrokenImage(name, _too_large(pixels, 4 * pixels)) from error
    except Exception as error:  # decoders raise all kinds of errors on broken bytes
        raise BrokenImage(name, _reason(content, error)) from error
    if image.format == "TIFF" or not ORIENTATION_KEYS.isdisjoint(image.info):
        with contextlib.suppress(Exception):  # broken EXIF data does not make an image unusable
            ImageOps.exif_transpose(image, in_place=True)
    return image


def _open(file: BinaryIO, name: str) -> Image.Image:
    """Open an image without decoding it, and check its size."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns from 89 megapixels on; our limit is an error
        image = Image.open(file, formats=FORMATS)
        _check_size(image, name)
    return image


def read_bytes(path: str | os.PathLike[str], offset: int = 0, size: int | None = None) -> bytes:
    """Read a file, or `size` bytes of it from `offset` on. If the disk fails, reading is tried again with growing delays.

    Raises:
        BrokenImage: it cannot be read, ends early, or is larger than any accepted image.
    """
    for pause in (*PAUSES, None):
        try:
            with open_regular(path) as file:
                wanted = os.fstat(file.fileno()).st_size if size is None else size
                if wanted > 4 * MAX_PIXELS:
                    raise BrokenImage(path, f"the file has {wanted / 1e9:.1f} GB; at most {4 * MAX_PIXELS / 1e9:.1f} GB are read")
                file.seek(offset)
                content = file.read(wanted)
        except NotRegular as error:
            raise BrokenImage(path, str(error.strerror)) from error
        except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:  # another attempt finds the same
            raise BrokenImage(path, str(error.strerror).lower()) from error
        except OSError as error:
            if pause is None:
                tries = f"(tried {len(PAUSES) + 1} times)"
                raise BrokenImage(path, f"{(error.strerror or str(error)).lower()} {tries}") from error
            time.sleep(pause)
        else:
            if len(content) < wanted:
                raise BrokenImage(path, f"the file ends at byte {offset + len(content):,}, {wanted - len(content):,} bytes early")
            return content
    raise AssertionError("the last attempt returns or raises")


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if memory_of(image) > MAX_MEMORY:
        raise BrokenImage(name, _too_large(width * height, memory_of(image)))
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BrokenImage(name, f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other; crop it")


def memory_of(image: Image.Image) -> int:
    """Return the bytes that an image needs: decoded and, unless it is stored so, converted to RGB (see `to_mode`)."""
    converted = 0 if image.mode == "RGB" else BYTES["L"] + 4 if image.mode.startswith("I") or image.mode == "F" else 4
    return image.size[0] * image.size[1] * (BYTES.get(image.mode, 4) + converted)


def _too_large(pixels: int, memory: int) -> str:
    limit = f"at most {MAX_MEMORY / 1e9:.1f} GB is used"
    return f"{pixels / 1e6:.0f} megapixels would need {memory / 1e9:.1f} GB of memory; {limit}: make it smaller"


def _reason(content: bytes, error: Exception) -> str:
    """Return the reason, in plain words, why Pillow cannot read some bytes."""
    from PIL import UnidentifiedImageError

    head = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "an SVG drawing, not an image made of pixels; export it as PNG"
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "a web page (HTML), not an image; it was probably saved by a failed download"
    if isinstance(error, UnidentifiedImageError) and content.startswith(SIGNATURES):
        return "the image is damaged at its beginning"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in an accepted format ({', '.join(FORMATS)}); it begins with {content[:8]!r}"
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return f"the image is cut off (the file has {len(content):,} bytes)"
    return f"damaged ({str(error) or type(error).__name__})"
