"""Images, good, odd and broken, for tests of reading."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed=0, size=(12, 10), mode="RGB"):
    """Noise, so that no two are alike and none compresses to nothing."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def put(path, content=None):
    """Write bytes, or a fresh image in the format that the name says."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        picture(zlib.crc32(path.name.encode())).save(path)
    else:
        path.write_bytes(content)
    return path


def bomb(width, height, depth=1, colour=0):
    """A black PNG, small on disk, large in memory; of one bit a pixel, else cut off (it is for checks that read the header)."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    pack = zlib.compressobj(9)
    rows = b"".join(pack.compress(bytes(width // 8 + 1)) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def exif_turned(image):
    """Stored lying on its side, with the EXIF mark that says so (orientation 6)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def odd_kinds():
    """Names and bytes of images that are unusual and must be read."""
    deep = Image.fromarray(np.linspace(0, 65535, 120).reshape(10, 12).astype(np.uint16))
    frames = [picture(1), picture(2), picture(3)]
    return {
        "16bit.png": encoded(deep),
        "cmyk.jpg": encoded(picture(mode="CMYK"), "JPEG"),
        "palette.png": encoded(picture().quantize(8)),
        "alpha.png": encoded(picture(mode="RGBA")),
        "turned.jpg": exif_turned(picture(size=(24, 16))),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }


def broken_kinds():
    """Names, bytes and a word of the reason of images that cannot be read."""
    whole = encoded(picture(size=(40, 40)))
    damaged = whole[:60] + bytes(40) + whole[100:]
    return {
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"\n<!DOCTYPE html><html>404 not found</html>", "HTML"),
        "cut.png": (whole[: len(whole) // 2], "cut off"),
        "damaged.png": (damaged, "damaged"),
        "text.png": (b"hello, this is not an image", "not an image"),
        "bomb.png": (bomb(20_000, 20_000), "400 megapixels would need 1.6 GB"),
    }
