import errno
import os
import resource
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data.pictures import bomb, broken_kinds, encoded, exif_turned, odd_kinds, picture, put
from vitarium.catalog.preprocessing import Preprocessing, to_mode
from vitarium.data import BadFiles, BrokenImage, images
from vitarium.data.images import decode_image, is_image_file, memory_of, open_image, open_mask
from vitarium.errors import DataError, InputError
from vitarium.files import open_regular


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(images, "PAUSES", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("name", odd_kinds())
def test_reads_odd_pictures(tmp_path, name):
    image = open_image(put(tmp_path / name, odd_kinds()[name]))
    assert image.size in ((12, 10), (24, 16))
    for mean in ((0.5,), (0.5,) * 3):
        tensor = Preprocessing(8, mean, mean)(image)
        assert tensor.shape == (len(mean), 8, 8)
        assert tensor.isfinite().all()


def test_turns_a_picture_upright():
    upright = picture(size=(24, 16))
    upright.paste("black", (0, 0, 24, 8))  # the upper half
    image = decode_image(exif_turned(upright), "turned")
    assert image.size == (24, 16)
    values = np.asarray(image, float)
    assert values[:6].mean() < 20 < 90 < values[10:].mean()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_turns_an_image_of_every_format_upright(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode_image(encoded(picture(size=(24, 16)), kind, exif=exif), "x").size == (16, 24)


def test_takes_the_first_frame():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime")]
    image = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x")
    assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_with_broken_exif_data_is_a_picture():
    content = encoded(picture(), "JPEG", exif=b"Exif\0\0" + bytes(range(30)))
    assert decode_image(content, "x").size == (12, 10)


@pytest.mark.parametrize("name", broken_kinds())
def test_refuses_broken_pictures(tmp_path, name):
    content, reason = broken_kinds()[name]
    path = put(tmp_path / name, content)
    with pytest.raises(BrokenImage, match=reason) as caught:
        open_image(path)
    assert caught.value.path == str(path)
    assert caught.value.exit_code == 3


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
@pytest.mark.parametrize("kind", [(30_000, 30_000), (13_000, 12_000, 8, 6), (13_000, 13_000, 16, 6)])  # above and below Pillow's own limit
def test_a_bomb_takes_no_memory(kind, recwarn):
    content = bomb(*kind)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with pytest.raises(BrokenImage, match=r"megapixels would need .* GB"):
        decode_image(content, "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 100e6
    assert not recwarn.list


def test_the_limit_is_of_memory():
    """151 megapixels of a large camera are read as RGB, and not with alpha, for which a second form is in memory at the same time."""
    for mode, memory in (("RGB", 4), ("L", 5), ("P", 5), ("1", 5), ("I;16", 7), ("RGBA", 8), ("CMYK", 8), ("F", 9)):
        image = Image.new(mode, (100, 10))
        assert memory_of(image) == 1000 * memory
        assert (151_000_000 * memory > images.MAX_MEMORY) == (memory > 6)


def test_refuses_a_strip_that_resizing_would_blow_up():
    with pytest.raises(BrokenImage, match="1 x 5000 pixels"):
        decode_image(encoded(Image.new("L", (1, 5000))), "strip.png")


def test_what_is_called_a_picture_is_no_program(monkeypatch):
    with pytest.raises(BrokenImage, match="not an image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "photo.jpg")


def test_an_svg_is_named_as_one():
    with pytest.raises(BrokenImage, match="SVG"):
        decode_image(b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "x.png")


GREY = {  # one rule for all images of a data set: what does not say what is white is refused
    "16 bits": (np.uint16, [0, 65535], None),
    "a share": (np.float32, [0, 1], None),
    "a small share": (np.float32, [0, 0.5], None),
    "measurements": (np.float32, [0, 10000], r"values from 0 to 10000; accepted: 8 or 16 bits per channel"),
    "bytes as floats": (np.float32, [0, 255], "values from 0 to 255"),
    "negative": (np.float32, [-1, 1], "values from -1 to 1"),
    "a border of NaN": (np.float32, [np.nan, 1], "60 of its values are NaN or infinite; replace them"),
    "infinite": (np.float32, [0, np.inf], "NaN or infinite"),
    "32 bits": (np.int32, [0, 255], "32-bit whole numbers, of which no value is known to be white"),
    "32 bits, small": (np.int32, [0, 1], "32-bit whole numbers"),
}


@pytest.mark.parametrize("kind", GREY)
def test_grey_values_are_read_by_one_rule_or_refused(tmp_path, kind):
    dtype, (low, high), words = GREY[kind]
    values = np.full((10, 12), low, dtype)
    values[:, 6:] = high
    file = tmp_path / "a.tif"
    Image.fromarray(values).save(file)
    if words is not None:
        with pytest.raises(BrokenImage, match=words):
            open_image(file)
        assert open_mask(file).size == (12, 10)  # its values may be numbers of classes
        return
    grey = np.asarray(to_mode(open_image(file), 1))
    assert grey[0, 0] == 0
    assert grey[0, -1] == round(255 * high / (65535 if dtype == np.uint16 else 1))


def test_images_in_memory_follow_the_same_rule():
    assert np.asarray(to_mode(Image.fromarray(np.full((4, 4), 65535, np.int32)), 3)).min() == 255
    for values in (np.full((4, 4), 70000, np.int32), np.full((4, 4), 2.0, np.float32), np.full((4, 4), np.nan, np.float32)):
        with pytest.raises(InputError, match="accepted: 8 or 16 bits"):
            to_mode(Image.fromarray(values), 3)


def test_asks_a_flaky_disk_again(tmp_path, monkeypatch):
    path = put(tmp_path / "a.png")
    tries = []

    def flaky(*args, **kwargs):
        tries.append(args)
        if len(tries) < 4:
            raise OSError(5, "Input/output error")
        return open_regular(*args, **kwargs)

    monkeypatch.setattr(images, "open_regular", flaky)
    assert open_image(path).size == (12, 10)
    assert len(tries) == 4


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_gives_a_file_up_at_once_that_is_gone_or_closed(monkeypatch, code):
    tries = []

    def refused(*args, **kwargs):
        tries.append(args)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(images, "open_regular", refused)
    with pytest.raises(BrokenImage, match=rf"gone\.png: {os.strerror(code).lower()}$"):
        open_image("gone.png")
    assert len(tries) == 1


def test_gives_up_a_disk_that_fails(monkeypatch):
    def failing(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(images, "open_regular", failing)
    with pytest.raises(BrokenImage, match=r"a\.png: input/output error \(tried 4 times\)$"):
        open_image("a.png")


def test_refuses_a_file_larger_than_any_picture(tmp_path):
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.truncate(4 * images.MAX_PIXELS + 1)  # sparse
    with pytest.raises(BrokenImage, match=r"has 0\.5 GB"):
        open_image(path)


def test_image_files_by_name():
    assert all(map(is_image_file, ["a.jpg", "x/ä b.JPEG", "a.b.Png", "t.tiff"]))
    assert not any(map(is_image_file, ["a.txt", "._a.jpg", ".a.png", "jpg", "a.npy", "a.jpg.txt"]))


def test_bad_files_are_counted_once_and_listed(tmp_path):
    bad = BadFiles(limit=0.5)
    bad.write(tmp_path)
    assert not list(tmp_path.iterdir())
    for path, reason in (("b.jpg", "empty"), ("a.jpg", "cut off"), ("b.jpg", "empty")):
        bad.record(path, reason)
    bad.check(4)
    bad.write(tmp_path)
    assert (tmp_path / "bad_files.txt").read_text() == "b.jpg\tempty\na.jpg\tcut off\n"
    with pytest.raises(DataError, match=r"2 of 3 images cannot be read \(66.7 %; at most 50 %(.|\n)*b.jpg: empty\n  a.jpg"):
        bad.check(3)


@pytest.mark.parametrize("limit", [-0.1, 1.1])
def test_bad_files_refuse_a_share_that_is_none(limit):
    with pytest.raises(DataError, match="must be from 0 to 1"):
        BadFiles(limit)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.timeout(60)
def test_a_named_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path / "pipe.png", tmp_path / "link.png")
    for path in (tmp_path / "pipe.png", tmp_path / "link.png", "/dev/null"):
        with pytest.raises(BrokenImage, match="a named pipe, a socket or a device, not a file"):
            open_image(path)
        with pytest.raises(BrokenImage, match="a named pipe"):
            images.check_header(path)
        assert not images.has_signature(path)
