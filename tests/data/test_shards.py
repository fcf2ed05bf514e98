import io
import json
import pickle
import tarfile

import pytest

from tests.data.pictures import encoded, picture, put
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.data import BadFiles, BrokenImage, open_data
from vitarium.data.loader import Loader
from vitarium.data.shards import expand_braces
from vitarium.errors import DataError


def write(path, members):
    """A tar file of {name: bytes or text}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(numbers, classes=2, ending="png", label=lambda n: {"cls": str(n)}):
    members = {}
    for n in numbers:
        members[f"s/{n:04d}.{ending}"] = encoded(picture(n), "JPEG" if ending == "jpg" else "PNG")
        members |= {f"s/{n:04d}.{key}": value for key, value in label(n % classes).items()}
    return members


def numbers(image_set):
    return [int(image_set.describe(i).split("/")[-1].split(".")[0]) for i in range(len(image_set))]


def test_a_folder_of_shards_is_read_at_random_places(tmp_path):
    for shard in range(3):
        write(tmp_path / f"x-{shard}.tar", samples(range(10 * shard, 10 * shard + 10)))
    data = open_data(tmp_path)
    assert data.classes == ["0", "1"]
    assert (len(data.train), len(data.val)) == (24, 6)
    assert sorted(numbers(data.train) + numbers(data.val)) == list(range(30))
    for index in (23, 0, 7):
        number = numbers(data.train)[index]
        image, target = data.train[index]
        assert image.tobytes() == picture(number).tobytes()
        assert target == number % 2
    assert data.train.describe(0).startswith(str(tmp_path / "x-0.tar"))


def test_webdatasets_own_writer(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for part, count in (("train", 12), ("val", 6)):
        (tmp_path / part).mkdir()
        with webdataset.ShardWriter(str(tmp_path / part / "%03d.tar"), maxcount=5, verbose=0) as writer:
            for n in range(count):
                writer.write({"__key__": f"{n:05d}", "jpg": picture(n), "json": {"label": n % 3, "other": [1]}})
    data = open_data(tmp_path)
    assert data.classes == ["0", "1", "2"]
    assert (numbers(data.train), numbers(data.val)) == (list(range(12)), list(range(6)))
    assert data.val.targets == [0, 1, 2] * 2


def test_parts_by_the_names_of_shards(tmp_path):
    for name in ("set-train-0", "set-train-1", "set-val-0", "set-test-0"):
        write(tmp_path / f"{name}.tar", samples(range(4)))
    data = open_data(tmp_path)
    assert (len(data.train), len(data.val)) == (8, 4)
    assert "set-val-0" in data.val.describe(0)
    write(tmp_path / "extra.tar", samples(range(4)))
    with pytest.raises(DataError, match=r"neither: extra\.tar"):
        open_data(tmp_path)


def test_patterns(tmp_path):
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    for shard in range(3):
        write(tmp_path / f"ü x-{shard}.tar", samples(range(6)))
    assert len(open_data(f"{tmp_path}/ü x-{{0..1}}.tar").train) == 10
    assert len(open_data(f"wds:{tmp_path}/ü*.tar").train) == 14
    with pytest.raises(DataError, match=r"2 of 5 shards do not exist: .*x-3\.tar"):
        open_data(f"{tmp_path}/ü x-{{0..4}}.tar")


def test_class_names(tmp_path):
    write(tmp_path / "a" / "0.tar", samples(range(8), label=lambda n: {"cls": "01"[n]}))
    (tmp_path / "a/classes.txt").write_text("cat\ndog\n")
    assert open_data(tmp_path / "a").classes == ["cat", "dog"]
    write(tmp_path / "b" / "train/0.tar", samples(range(8), label=lambda n: {"cls": ("cat", "dog")[n]}))
    write(tmp_path / "b" / "val/0.tar", samples(range(8), label=lambda n: {"json": json.dumps({"cls": ("cat", "dog")[n]})}))
    assert open_data(tmp_path / "b").val.targets == [0, 1] * 4
    (tmp_path / "b/classes.json").write_text('{"dog": 0, "cat": 1}')
    data = open_data(tmp_path / "b")
    assert data.classes == ["dog", "cat"]
    assert data.val.targets == [1, 0] * 4


def test_labels_with_gaps_are_names(tmp_path):
    write(tmp_path / "0.tar", samples(range(12), classes=3, label=lambda n: {"cls": str((2, 10, 3)[n])}))
    data = open_data(tmp_path)
    assert data.classes == ["2", "3", "10"]


def test_a_broken_picture_is_left_out_by_its_name(tmp_path):
    members = samples(range(10))
    members["s/0004.png"] = members["s/0004.png"][:100]
    members["s/0007.png"] = b""
    write(tmp_path / "train-0.tar", members)
    write(tmp_path / "val-0.tar", samples(range(4)))
    data = pickle.loads(pickle.dumps(open_data(tmp_path).train))
    bad = BadFiles(0.5)
    seen = [i for b in Loader(data, Preprocessing(8), batch_size=3, bad_files=bad).epoch(0) for i in b["index"].tolist()]
    assert seen == [0, 1, 2, 3, 5, 6, 8, 9]
    assert [path for path, _ in bad.items()] == [f"{tmp_path}/train-0.tar/s/0004.png", f"{tmp_path}/train-0.tar/s/0007.png"]


def test_a_shard_that_shrinks_later_is_noticed(tmp_path):
    path = write(tmp_path / "0.tar", samples(range(8)))
    data = open_data(tmp_path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BrokenImage, match="bytes early"):
        data.train[len(data.train) - 1]


def damage(content, kind):
    return {
        "cut in an image": content[: 5 * 512 + 100],
        "cut between members": content[: 8 * 512],
        "cut in a header": content[: 6 * 512 + 100],
        "header flipped": content[: 4 * 512] + b"\xff" * 512 + content[5 * 512 :],
        "zeroed inside": content[: 4 * 512] + bytes(1024) + content[6 * 512 :],
        "empty": b"",
        "no tar": b"not a tar file " * 100,
    }[kind]


@pytest.mark.parametrize(
    "kind", ["cut in an image", "cut between members", "cut in a header", "header flipped", "zeroed inside", "empty", "no tar"]
)
def test_a_damaged_shard_is_named(tmp_path, kind):
    path = write(tmp_path / "0.tar", samples(range(8)))
    path.write_bytes(damage(path.read_bytes(), kind))
    with pytest.raises(DataError, match=r"0\.tar is (damaged at|cut off at|not a whole tar file)"):
        open_data(tmp_path)


FAULTS = {
    "label out of range": ({"classes.txt": "a\nb\n"}, {"0.png": None, "0.cls": "2"}, r"label 2 is out of range; accepted: 0 to 1"),
    "negative label": ({}, {"0.png": None, "0.cls": "-1"}, r"label -1 is out of range; accepted: 0 and above"),
    "unknown name": ({"classes.txt": "cat\ndog\n"}, {"0.png": None, "0.cls": "dgo"}, r"'dgo' is not among the 2 .*did you mean dog"),
    "no label": ({}, {"0.png": None, "0.txt": "a caption"}, r"1 of 1 samples have no label .*: 0\.tar/0\.png"),
    "json without label": ({}, {"0.png": None, "0.json": "{}"}, "have no label"),
    "json that is none": ({}, {"0.png": None, "0.json": "{"}, r"0\.json is not JSON"),
    "a list as label": ({}, {"0.png": None, "0.json": '{"label": [1]}'}, "must be a class number or name"),
    "no images": ({}, {"0.txt": "a", "0.cls": "1"}, "no images inside"),
    "two images of a key": ({}, {"0.png": None, "0.jpg": None, "0.cls": "1"}, r"two images of one key: 0\.png and 0\.jpg"),
    "classes that are none": ({"classes.json": "7"}, {"0.png": None, "0.cls": "1"}, "cannot read the classes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_says_what_is_wrong(tmp_path, fault):
    beside, members, message = FAULTS[fault]
    for name, text in beside.items():
        put(tmp_path / name, text.encode())
    write(tmp_path / "0.tar", {k: encoded(picture()) if v is None else v for k, v in members.items()})
    with pytest.raises(DataError, match=message):
        open_data(tmp_path)


def test_compressed_shards_are_named_as_such(tmp_path):
    put(tmp_path / "a.tar.gz", b"x")
    with pytest.raises(DataError, match=r"it holds a\.tar\.gz: unpack"):
        open_data(f"wds:{tmp_path}")
