"""COCO files, masks and tar archives of others: each is read, or refused with an error of the library, in bounded time and memory."""

import io
import json
import random
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from tests.data.pictures import encoded, picture, put
from vitarium.data import BrokenImage, open_data
from vitarium.data.shards import expand_braces
from vitarium.errors import DataError

HEIGHT, WIDTH = 10, 12
SQUARE = [2, 2, 6, 2, 6, 6, 2, 6]


def coco():
    """Four images with one polygon each; the first one also has run lengths."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(4)],
        "annotations": [
            *(
                {"id": i, "image_id": i, "category_id": 7, "bbox": [2, 2, 4, 4], "iscrowd": 0, "segmentation": [list(SQUARE)]}
                for i in range(4)
            ),
            {"id": 9, "image_id": 0, "category_id": 3, "iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [20, 20, 80]}},
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


def write(folder, doc, part="train2017"):
    for i in range(4):
        put(folder / part / f"{i}.jpg")
    file = folder / "annotations" / f"instances_{part}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(doc if isinstance(doc, str) else json.dumps(doc))
    return file


ODD = [None, "x", [1], {"a": 1}, True, 1.5, -1, 10**30, 1e308, [], {}]
PLACES = {
    "image id": ("images", 1, "id"),
    "file name": ("images", 1, "file_name"),
    "height": ("images", 1, "height"),
    "width": ("images", 1, "width"),
    "image": ("images", 1),
    "images": ("images",),
    "image of an annotation": ("annotations", 1, "image_id"),
    "category of an annotation": ("annotations", 1, "category_id"),
    "box": ("annotations", 1, "bbox"),
    "number of a box": ("annotations", 1, "bbox", 2),
    "crowd": ("annotations", 1, "iscrowd"),
    "segmentation": ("annotations", 1, "segmentation"),
    "polygon": ("annotations", 1, "segmentation", 0),
    "corner": ("annotations", 1, "segmentation", 0, 3),
    "annotation": ("annotations", 1),
    "annotations": ("annotations",),
    "size of run lengths": ("annotations", 4, "segmentation", "size"),
    "run lengths": ("annotations", 4, "segmentation", "counts"),
    "run length": ("annotations", 4, "segmentation", "counts", 1),
    "category": ("categories", 0),
    "category id": ("categories", 0, "id"),
    "category name": ("categories", 0, "name"),
    "categories": ("categories",),
}
HARMLESS = {
    "crowd": [True],
    "box": [None],
    "number of a box": [1.5],
    "corner": [1.5, -1],
    "category name": ["x", -1, 10**30],
    "annotations": [],
}
"""Odd values that stand for something."""


@pytest.mark.parametrize("place", PLACES)
def test_every_entry_of_a_coco_file_is_checked(tmp_path, place):
    """Eleven odd values at each place: 253 forged files."""
    pytest.importorskip("pycocotools")
    read, longest = [], 0
    for odd in ODD:
        doc = coco()
        here = doc
        for key in PLACES[place][:-1]:
            here = here[key]
        here[PLACES[place][-1]] = odd
        start = time.perf_counter()
        try:
            data = open_data(write(tmp_path, doc), task="instance")
            [part[i] for part in (data.train, data.val) for i in range(len(part))]
            read.append(repr(odd))
        except (DataError, BrokenImage) as error:
            longest = max(longest, len(str(error)))
        assert time.perf_counter() - start < 20
    assert [value for value in read if value not in map(repr, HARMLESS.get(place, []))] == []
    assert longest < 3000


FORGED = {
    "file outside": (("images", 0, "file_name"), "../secret.jpg", r"leads out of the folder of the images \(\.\.\)"),
    "hidden way out": (("images", 0, "file_name"), "a/../../secret.jpg", "leads out of"),
    "absolute file": (("images", 0, "file_name"), "/etc/passwd", "is an absolute path"),
    "absolute file of Windows": (("images", 0, "file_name"), "C:\\secret.jpg", "is an absolute path"),
    "share of Windows": (("images", 0, "file_name"), "\\\\host\\secret.jpg", "is an absolute path"),
    "zero byte": (("images", 0, "file_name"), "a\0.jpg", "file_name must be a path"),
    "long name": (("images", 0, "file_name"), "a" * 300 + ".jpg", r"images\[0\]|there is no file"),
    "huge image": (("images", 0, "height"), 10**9, "its size is 1000000000 x 12"),
    "negative image": (("images", 0, "width"), -12, "its size is 10 x -12"),
    "half a pixel": (("images", 0, "width"), 12.5, "width must be a whole number, it is 12.5"),
    "far corner": (("annotations", 0, "segmentation", 0, 0), 1e308, "a corner of a polygon is 1e"),
    "infinite corner": (("annotations", 0, "segmentation", 0, 0), "1e999", "a corner of a polygon is '1e999'"),
    "corner as text": (("annotations", 0, "segmentation", 0, 0), "2", "a corner of a polygon is '2'"),
    "negative run length": (("annotations", 4, "segmentation", "counts"), [-20, 60, 80], "whole numbers from 0 on, one is -20"),
    "run length with a fraction": (("annotations", 4, "segmentation", "counts"), [20.5, 19.5, 80], "whole numbers from 0 on, one is 20.5"),
    "too many run lengths": (("annotations", 4, "segmentation", "counts"), [0] * 300 + [120], "it has 301 run lengths"),
    "run lengths too long": (("annotations", 4, "segmentation", "counts"), [20, 10**20], "cover a number of more than 20 digits pixels"),
    "far box": (("annotations", 0, "bbox"), [1e300, 0, 1, 1], "lies outside the image"),
    "endless box": (("annotations", 0, "bbox"), [0, 0, 1e308, 1e308], "lies outside the image"),
}


@pytest.mark.parametrize("fault", FORGED)
def test_forged_entries_of_a_coco_file_are_named(tmp_path, fault):
    keys, value, words = FORGED[fault]
    doc = coco()
    here = doc
    for key in keys[:-1]:
        here = here[key]
    here[keys[-1]] = value
    put(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match=words):
        open_data(write(tmp_path, doc), task="instance")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"images": NaN}', "it holds NaN, which JSON does not have"),
        ("[" * 100_000, "is not COCO's json"),
        ('{"images": [], "annotations": [], "categories": [{"id": ' + "9" * 5000 + ', "name": "a"}]}', "is not COCO's json"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ("\0", "is not COCO's json"),
    ],
)
def test_json_that_is_hardly_any_is_refused(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        open_data(write(tmp_path, text), task="instance")


def compressed(mask):
    """The compressed run lengths of a mask by pycocotools."""
    rle = pytest.importorskip("pycocotools.mask")
    return rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def test_run_lengths_are_drawn_as_by_pycocotools(tmp_path):
    masks = [np.random.default_rng(i).random((HEIGHT, WIDTH)) < share for i, share in enumerate((0.5, 0.05, 0.95, 0.0))]
    masks[3][2:, 3] = True
    doc = coco()
    doc["annotations"] = [
        {"id": i, "image_id": i, "category_id": 7, "segmentation": {"size": [HEIGHT, WIDTH], "counts": compressed(mask)}}
        for i, mask in enumerate(masks)
    ]
    data = open_data(write(tmp_path, doc), task="instance")
    for part in (data.train, data.val):
        for i in range(len(part)):
            number = int(part.describe(i).split("/")[-1][0])
            assert np.array_equal(part[i][1].masks[0], masks[number])


def test_damaged_run_lengths_are_broken_images(tmp_path):
    """Each character of a compressed text replaced by others: never pycocotools' error, and never a mask of another size."""
    good, reasons = compressed(np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5), []
    for position in range(0, len(good), 5):
        for sign in "o?P0~\x7f\u00ff":
            doc = coco()
            doc["annotations"] = doc["annotations"][:4]
            doc["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": good[:position] + sign + good[position + 1 :]}
            data = open_data(write(tmp_path, doc), task="instance")
            part, i = next((p, i) for p in (data.train, data.val) for i in range(len(p)) if p.describe(i).endswith("/0.jpg"))
            try:
                assert part[i][1].masks.shape == (1, HEIGHT, WIDTH)
            except BrokenImage as error:
                reasons.append(str(error))
    assert len(reasons) > 40
    assert all("cannot be drawn: its run lengths" in reason for reason in reasons)


def test_images_without_annotations_are_evaluated(tmp_path):
    pytest.importorskip("pycocotools")
    for part, annotated in (("train2017", 3), ("val2017", 2)):
        doc = coco()
        doc["annotations"] = [note for note in doc["annotations"] if note["image_id"] < annotated]
        write(tmp_path, doc, part)
    data = open_data(tmp_path, task="instance")
    assert (len(data.train), len(data.val)) == (3, 4)
    assert [len(data.val[i][1].labels) for i in range(4)] == [2, 1, 0, 0]
    assert data.val[3][1].masks.shape == (0, HEIGHT, WIDTH)
    (note,) = data.notes
    assert note.endswith("images without annotations: 1 of 4 for training, which are left out, 2 of 4 held out, which are kept")
    assert len(open_data(tmp_path, task="semantic").val[3][1].labels) == 0


# ---- masks


def masked(folder, values, classes="ground\nhouse\n", count=4):
    for i in range(count):
        put(folder / "images" / f"{i}.jpg")
        mask = np.full((HEIGHT, WIDTH), values[0], np.uint8)
        mask[3:] = values[i % len(values)]
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    (folder / "classes.txt").write_text(classes)
    return folder


def test_masks_of_0_and_255_are_refused_and_mapped(tmp_path):
    masked(tmp_path, [0, 255])
    with pytest.raises(
        DataError, match=r"have the value 255, which stands for void .* occur in no mask: 1 \(house\); if 255 is class 1, write"
    ):
        open_data(tmp_path, task="semantic")
    data = open_data(f"masks:{tmp_path},map=255:1", task="semantic")
    found = [part[i][1].labels.tolist() for part in (data.train, data.val) for i in range(len(part))]
    assert sorted(found) == [[0], [0], [0, 1], [0, 1]]
    assert open_data(masked(tmp_path / "more", [0, 1, 255]), task="semantic").classes == ["ground", "house"]
    data = open_data(masked(tmp_path / "none", [0]), task="semantic")
    assert any("these classes occur in no mask: 1 (house)" in note for note in data.notes)
    with pytest.raises(DataError, match=r"house is the only class; if 255 is class 1, write .* and name both classes"):
        open_data(masked(tmp_path / "one", [0, 255], "house\n"), task="semantic")


def test_values_of_masks_are_mapped(tmp_path):
    masked(tmp_path, [0, 128, 200], classes="a\nb\nc\n")
    data = open_data(f"masks:{tmp_path},map=128:1+200:2", task="semantic")
    found = {label for part in (data.train, data.val) for i in range(len(part)) for label in part[i][1].labels.tolist()}
    assert found == {0, 1, 2}
    plain = open_data(tmp_path, task="semantic")
    with pytest.raises(BrokenImage, match=r"map=\d+:CLASS in masks:PATH,map=\d+:CLASS reads a value as a class"):
        [part[i] for part in (plain.train, plain.val) for i in range(len(part))]


# ---- tar shards


def shard(folder, kind):
    """A small archive of eight samples, with long names and extended headers."""
    file = io.BytesIO()
    formats = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}
    with tarfile.open(fileobj=file, mode="w", format=formats[kind]) as tar:
        for n in range(8):
            name = f"{'ö' * 60 if kind == 'pax' else 'folder' * 20}/{n}" if n % 2 and kind != "ustar" else f"{n}"
            for ending, content in (("png", encoded(picture(n))), ("cls", str(n % 2).encode())):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def mutated(content, generator):
    """Change headers: bytes, numbers in their fields (with a right check sum), whole blocks, and the end."""
    changed = bytearray(content)
    blocks = [at for at in range(0, len(content) - 512, 512) if content[at + 257 : at + 262] == b"ustar"]
    for _ in range(generator.randint(1, 3)):
        at, way = generator.choice(blocks), generator.randrange(6)
        if way == 0:  # the size: octal digits, a huge or negative binary number, or text
            sizes = [
                b"77777777777\0",
                b"\x80" + b"\xff" * 11,
                b"\xff" * 12,
                b"\xff" * 4 + bytes(8),
                b"-0000000001\0",
                b"x" * 12,
                b"\x80\x7f" + bytes(10),
            ]
            changed[at + 124 : at + 136] = generator.choice(sizes)
        elif way == 1:
            changed[at + 156 : at + 157] = generator.choice([b"L", b"K", b"x", b"g", b"S", b"X", b"1", b"5", b"\0", b"7"])
        elif way == 2:
            place = at + generator.randrange(512)
            changed[place] = generator.randrange(256)
        elif way == 3:
            del changed[at : at + 512 * generator.randint(1, 2)]
        elif way == 4:
            changed[at : at + 512] = bytes(generator.randrange(256) for _ in range(512))
        else:
            place = generator.randrange(len(changed))
            changed[place : place + 40] = generator.choice(
                [b"30 size=-1024\n", b"99999999999 size=1\n", b"18 size=99999999999999999999\n", b"9 a=\xff\xfe\n", bytes(40)]
            )
        if way < 2 and len(changed) > at + 512:  # with a check sum that fits
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed[: generator.randrange(len(changed))] if generator.random() < 0.1 else changed)


@pytest.mark.parametrize("kind", ["pax", "gnu", "ustar"])
def test_mutated_shards_are_read_or_refused(tmp_path, kind):
    content, outcomes = shard(tmp_path, kind), []
    for seed in range(150):
        (tmp_path / "0.tar").write_bytes(mutated(content, random.Random(seed)))
        start = time.perf_counter()
        try:
            data = open_data(f"wds:{tmp_path}")
            outcomes.append("read")
            for i in range(len(data.train)):
                try:
                    data.train[i]
                except BrokenImage:
                    outcomes[-1] = "image"
        except DataError:
            outcomes.append("refused")
        assert time.perf_counter() - start < 10, f"seed {seed} took too long"
    assert outcomes.count("refused") > 50


def test_a_huge_size_in_a_header_takes_no_memory(tmp_path):
    content = bytearray(shard(tmp_path, "gnu"))
    at = content.index(b"././@LongLink")
    content[at + 124 : at + 136] = b"\x80" + bytes(6) + b"\x03" + bytes(4)  # 12 GB
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    (tmp_path / "0.tar").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"0\.tar is"):
        open_data(f"wds:{tmp_path}")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_patterns_of_endless_shards_are_refused():
    with pytest.raises(DataError, match="names 10,000,000,000 shards; at most 100,000"):
        expand_braces("x-{0..9999999999}.tar")
    with pytest.raises(DataError, match="at most 100,000"):
        expand_braces("x-{000..999}-{000..999}.tar")
    assert expand_braces("{a,b}-{8..10}.tar")[-1] == "b-10.tar"
    assert expand_braces("{1..%s}" % ("9" * 5000)) == ["{1..%s}" % ("9" * 5000)]


@pytest.mark.parametrize("label", ["9" * 5000, "-" + "9" * 5000, "x" * 5000])
def test_labels_of_thousands_of_characters_are_refused(tmp_path, label):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("0.png", encoded(picture())), ("0.cls", label.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"its label has 5,00\d characters"):
        open_data(f"wds:{tmp_path}")
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    (tmp_path / "b.png").write_bytes(encoded(picture(1)))
    (tmp_path / "t.csv").write_text(f"path,label\na.png,{label}\nb.png,{label}1\n")
    assert len(open_data(tmp_path / "t.csv", split="all").classes) == 2
