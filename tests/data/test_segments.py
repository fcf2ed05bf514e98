"""Images with segments: scenes, COCO's json, folders of masks; errors in them; joint transforms of images and segments."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from tests.data.pictures import picture, put
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.data import BrokenImage, open_data
from vitarium.data.coco import encode_panoptic
from vitarium.data.geometry import FitScale
from vitarium.data.joint import FitTransform, JitterTransform, Segmentation, pad_batch
from vitarium.data.loader import seed_generators
from vitarium.errors import DataError, UsageError

HEIGHT, WIDTH = 10, 12
CATEGORIES = [
    {"id": 7, "name": "cat", "isthing": 1},
    {"id": 3, "name": "dog", "isthing": 1},
    {"id": 100, "name": "sky", "isthing": 0},
]  # sorted by id: dog, cat, sky
TRUTH = np.zeros((HEIGHT, WIDTH), np.int32)
TRUTH[:4], TRUTH[5:9, 1:5], TRUTH[5:9, 7:11] = 70_000, 300, 2  # sky, a cat, a dog; the rest is void
RLE = {"size": [HEIGHT, WIDTH], "counts": [0, 20, 100]}  # column by column: the first two columns


def panoptic(folder, part, count=3, change=lambda doc: None):
    """A panoptic json with its images and PNGs."""
    names = [f"{i:03d}" for i in range(count)]
    doc = {
        "images": [{"id": i, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for i, n in enumerate(names)],
        "annotations": [
            {
                "image_id": i,
                "file_name": f"{n}.png",
                "segments_info": [
                    {"id": 70_000, "category_id": 100, "iscrowd": 0, "bbox": [0, 0, 12, 4]},
                    {"id": 300, "category_id": 7, "iscrowd": 0, "bbox": [1, 5, 4, 4]},
                    {"id": 2, "category_id": 3, "iscrowd": 1, "bbox": [7, 5, 4, 4]},
                ],
            }
            for i, n in enumerate(names)
        ],
        "categories": [dict(category) for category in CATEGORIES],
    }
    for n in names:
        put(folder / part / f"{n}.jpg")
        png = folder / "annotations" / f"panoptic_{part}" / f"{n}.png"
        png.parent.mkdir(parents=True, exist_ok=True)
        encode_panoptic(TRUTH).save(png)
    change(doc)
    return write(folder / "annotations" / f"panoptic_{part}.json", doc)


def instances(folder, part="train2017", change=lambda doc: None):
    """An instances json with polygons and run lengths."""
    doc = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(4)],
        "annotations": [
            {"id": 10 + i, "image_id": i, "category_id": 7, "bbox": [2, 2, 4, 4], "iscrowd": 0, "segmentation": [[2, 2, 6, 2, 6, 6, 2, 6]]}
            for i in range(4)
        ]
        + [{"id": 20, "image_id": 0, "category_id": 3, "bbox": [0, 0, 2, 10], "iscrowd": 1, "segmentation": dict(RLE)}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    for i in range(4):
        put(folder / part / f"{i}.jpg")
    change(doc)
    return write(folder / "annotations" / f"instances_{part}.json", doc)


def write(path, doc):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(doc))
    return path


# ---- what comes out


def test_scenes_with_one_class_of_things():
    """The same segments: eight kinds become class 0, six kinds of stuff follow; also for instances."""
    kinds, one = (open_data(f"scenes:length=10{more}", task="panoptic", image_size=32) for more in ("", ",things=one"))
    assert (one.classes, one.things) == (["thing", "sky", "hills", "grass", "sand", "snow", "water"], (0,))
    for index in range(8):
        (_, before), (_, after) = kinds.train[index], one.train[index]
        assert np.array_equal(before.masks, after.masks)
        assert after.labels.tolist() == [0 if label < 8 else label - 7 for label in before.labels.tolist()]
    assert open_data("scenes:length=10,things=one", task="instance", image_size=32).classes == ["thing"]


def test_scenes_have_a_segment_for_every_pixel():
    data = open_data("scenes:length=10", task="panoptic", image_size=32)
    image, target = data.train[3]
    assert (len(data.train), len(data.val), image.size) == (8, 2, (32, 32))
    assert (target.masks.sum(0) == 1).all()
    assert data.classes[:2] == ["circle", "square"]
    assert data.things == tuple(range(8))
    assert np.array_equal(target.masks, data.train[3][1].masks)  # kept, and the same
    merged, things = (open_data("scenes:length=10", task=task, image_size=32) for task in ("semantic", "instance"))
    assert merged.things == ()
    assert len(set(merged.train[3][1].labels.tolist())) == len(merged.train[3][1].labels)
    assert things.classes == data.classes[:8]
    assert things.train[3][1].labels.max() < 8


def test_panoptic_images_of_which_no_pixel_has_a_class_are_evaluated(tmp_path):
    panoptic(tmp_path, "train2017", 2)
    panoptic(tmp_path, "val2017", 3, change=set_in("annotations", 1, "segments_info", value=[]))
    data = open_data(tmp_path, task="panoptic")
    assert [len(data.val[i][1].labels) for i in range(len(data.val))] == [3, 0, 3]
    assert any("1 of 3 held out, which are kept" in note for note in data.notes)


def test_coco_panoptic(tmp_path):
    for part, count in (("train2017", 3), ("val2017", 2)):
        panoptic(tmp_path, part, count)
    data = open_data(tmp_path, task="panoptic")
    assert (len(data.train), len(data.val), data.classes, data.things) == (3, 2, ["dog", "cat", "sky"], (0, 1))
    assert data.train.describe(1).endswith("001.jpg")
    image, target = data.val[1]
    assert image.size == (WIDTH, HEIGHT)
    assert target.labels.tolist() == [2, 1, 0]
    assert target.crowds.tolist() == [False, False, True]
    assert np.array_equal(target.masks, np.stack([number == TRUTH for number in (70_000, 300, 2)]))
    assert open_data(tmp_path, task="semantic").train[0][1].labels.tolist() == [0, 1, 2]
    assert open_data(tmp_path, task="instance").classes == ["dog", "cat"]


def test_coco_instances(tmp_path):
    pytest.importorskip("pycocotools")
    data = open_data(instances(tmp_path), task="panoptic", val_fraction=0.25)
    assert (len(data.train), len(data.val), data.things) == (3, 1, (0, 1))
    _, target = next(data.train[i] for i in range(3) if data.train.describe(i).endswith("/0.jpg"))
    assert target.labels.tolist() == [1, 0]
    assert target.masks[0].sum() == 16
    assert target.masks[0][2:6, 2:6].all()
    assert target.masks[1][:, :2].all()
    assert target.masks[1].sum() == 20
    assert target.crowds.tolist() == [False, True]


@pytest.mark.parametrize("ade", [False, True])
def test_mask_folders(tmp_path, ade):
    for part, count in (("training", 3), ("validation", 2)) if ade else (("", 5),):
        for i in range(count):
            put(tmp_path / "images" / part / f"{i}.jpg")
            values = np.zeros((HEIGHT, WIDTH), np.uint8)
            values[2:], values[0, 0] = 1, 2 if ade else 255
            mask = tmp_path / ("annotations" if ade else "masks") / part / f"{i}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(mask)
    if ade:
        (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t3\t2\twall\n2\t0.1\t3\t2\tbuilding, edifice\n")
    else:
        (tmp_path / "classes.txt").write_text("ground\nhouse\n")
    data = open_data(tmp_path, task="semantic")
    assert (len(data.train), len(data.val)) == ((3, 2) if ade else (4, 1))
    assert data.classes == (["wall", "building"] if ade else ["ground", "house"])
    _, target = data.train[0]
    assert target.labels.tolist() == [0, 1]
    assert target.masks.sum((1, 2)).tolist() == ([96, 1] if ade else [23, 96])


# ---- what is wrong


def missing_picture(doc):
    doc["images"].append({"id": 99, "file_name": "gone.jpg", "height": 5, "width": 5})


def set_in(*keys, value):
    def change(doc):
        here = doc
        for key in keys[:-1]:
            here = here[key]
        here[keys[-1]] = value

    return change


FAULTS = [
    (panoptic, missing_picture, "image 99: there is no file"),
    (panoptic, set_in("annotations", 0, "segments_info", 0, "category_id", value=55), "there is no category 55"),
    (panoptic, set_in("annotations", 0, "segments_info", 0, "bbox", value=[3, 3, 0, 4]), "is empty"),
    (panoptic, set_in("annotations", 1, "segments_info", 2, "bbox", value=[3, 3, -2, 4]), "is inverted"),
    (panoptic, set_in("annotations", 1, "image_id", value=1234), "there is no image 1234"),
    (panoptic, set_in("annotations", 1, "file_name", value="gone.png"), "there is no file"),
    (panoptic, set_in("images", 1, "id", value=0), "listed twice"),
    (panoptic, set_in("images", 1, value={"file_name": "x"}), "lacks file_name, id, height or width"),
    (instances, set_in("annotations", 4, "segmentation", "size", value=[5, 5]), r"run lengths are for \[5, 5\]"),
    (instances, set_in("annotations", 4, "segmentation", "counts", value=[3, 4]), "cover 7 pixels, the image has 120"),
    (instances, set_in("annotations", 0, "segmentation", value=[[1, 1, 2, 2]]), "fewer than three corners"),
    (instances, set_in("annotations", 0, "segmentation", value=[]), "has no polygon"),
    (instances, set_in("annotations", 0, "bbox", value="wide"), r"annotation 10: its box must be \[x, y, width, height\], it is 'wide'"),
]


@pytest.mark.parametrize(("make", "change", "words"), FAULTS)
def test_faults_are_told_or_left_out(tmp_path, make, change, words):
    file = make(tmp_path, "train2017", change=change)
    with pytest.raises(DataError, match=words) as caught:
        open_data(file, task="panoptic")
    assert "broken=drop" in str(caught.value)
    assert len(open_data(f"coco:{file},broken=drop", task="panoptic").train) >= 1


def test_the_first_ten_of_many_are_told(tmp_path):
    def change(doc):
        for note in doc["annotations"]:
            for segment in note["segments_info"]:
                segment["category_id"] = 1000

    with pytest.raises(DataError, match="wrong in 36 places") as caught:
        open_data(panoptic(tmp_path, "train2017", 12, change), task="panoptic")
    assert str(caught.value).count("there is no category") == 10
    assert "and 26 more" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not COCO's json"), ("[]", "is not COCO's json"), ('{"images": []}', "is not COCO's json")],
)
def test_other_json_is_refused(tmp_path, text, words):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DataError, match=words):
        open_data(file, task="panoptic")


def test_parts_that_do_not_go_together_are_refused(tmp_path):
    panoptic(tmp_path, "train2017")
    panoptic(tmp_path, "val2017", change=set_in("categories", 0, "name", value="lion"))
    with pytest.raises(DataError, match="categories of train and val differ: cat, lion"):
        open_data(tmp_path, task="panoptic")


def test_pictures_of_another_size_than_the_json_says_are_broken(tmp_path):
    data = open_data(panoptic(tmp_path, "train2017", change=set_in("images", 0, "height", value=11)), task="panoptic")
    parts = [part for part in (data.train, data.val) for i in range(len(part)) if part.describe(i).endswith("000.jpg")]
    with pytest.raises(BrokenImage, match="the json file says 11 x 12"):
        [parts[0][i] for i in range(len(parts[0]))]


@pytest.mark.parametrize(
    ("spec", "words", "kind"),
    [
        ("nowhere", "no data called", DataError),
        ("scenes:task=class", r"scenes have no option 'task=class' \(accepted: image_size=64, length=2000, things=one\)", UsageError),
        ("scenes:things=all", "things of scenes must be kinds or one, got 'all'", UsageError),
        ("coco:{},broken=mend", "broken=refuse|drop", UsageError),
        ("{}", "images/ with masks/", DataError),
    ],
)
def test_other_specs_are_refused(tmp_path, spec, words, kind):
    with pytest.raises(kind, match=words.replace("|", r"\|")):
        open_data(spec.format(tmp_path), task="panoptic")


def test_masks_that_lack_or_do_not_fit(tmp_path):
    for name in ("a", "b", "c"):
        put(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.full((HEIGHT, WIDTH), 9, np.uint8)).save(tmp_path / "masks" / "a.png")
    picture(size=(WIDTH, HEIGHT)).save(tmp_path / "masks" / "b.png")
    with pytest.raises(DataError, match=r"needs a file classes\.txt"):
        open_data(tmp_path, task="semantic")
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="1 of 3 images have no mask"):
        open_data(tmp_path, task="semantic")
    data = open_data(f"masks:{tmp_path},broken=drop", task="semantic", val_fraction=0.5)
    reasons = []
    for part in (data.train, data.val):
        with pytest.raises(BrokenImage) as caught:
            part[0]
        reasons.append(str(caught.value))
    assert any("values that are not classes: 9" in reason for reason in reasons)
    assert any("grey or palette" in reason for reason in reasons)


# ---- changed together


def marked():
    """An image that is white where its one segment is."""
    masks = np.zeros((1, 40, 60), bool)
    masks[0, 5:30, 10:25] = True
    return Image.fromarray(np.repeat(masks[0][..., None] * np.uint8(255), 3, 2)), Segmentation(masks, np.array([2]))


@pytest.mark.parametrize("jitter", [(1.0, 1.0), (0.4, 0.4), (1.3, 1.3)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_segments_stay_on_their_pixels(jitter, flip):
    torch.manual_seed(0)
    transform = JitterTransform(Preprocessing(48, (0.5,), (0.5,), "nearest", 1.0), jitter=jitter, flip=flip, square=True)
    tensor, target = transform(*marked())
    assert tensor.shape == (1, 48, 48)
    assert target["masks"].shape == (1, 48, 48)
    height, width = target["size"].tolist()
    same = (tensor[0, :height, :width] > 0) == target["masks"][0, :height, :width]
    assert same.float().mean() > 0.97  # nearest pixels are rounded in two ways
    assert not target["masks"][0, height:].any()


def test_fitting_keeps_the_whole_picture_and_the_truth():
    tensor, target = FitTransform(Preprocessing(30, (0.5,), (0.5,), "bilinear", 1.0), square=True)(*marked())
    assert tensor.shape == (1, 30, 30)
    assert target["size"].tolist() == [20, 30]
    assert target["masks"].shape == (1, 40, 60)
    assert target["original_size"].tolist() == [40, 60]
    assert set(FitTransform(Preprocessing(30))(marked()[0], 0)[1]) == {"size", "original_size"}  # predict has no segments


def test_what_is_cropped_away_and_crowds_are_no_targets():
    image, target = marked()
    crowd = Segmentation(target.masks, target.labels, np.array([True]))
    assert len(JitterTransform(Preprocessing(48))(image, crowd)[1]["labels"]) == 0
    tiny = Segmentation(np.zeros((1, 40, 60), bool), target.labels)
    assert len(JitterTransform(Preprocessing(48))(image, tiny)[1]["labels"]) == 0


def test_the_generators_decide():
    """A transform is a function of the state that the loader sets for each (seed, epoch, index)."""
    image, target = marked()
    transform = pickle.loads(pickle.dumps(JitterTransform(Preprocessing(24), jitter=(0.5, 2), flip=0.5, color_jitter=0.4)))
    results = []
    for key in (1, 1, 2):
        seed_generators(key)
        results.append(transform(image, target))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1]["masks"], results[1][1]["masks"])
    assert results[0][0].shape != results[2][0].shape or not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_and_keypoints_move_with_the_masks(flip):
    image, segments = marked()
    top_left, size = (10, 5), (40, 60)
    objects = {
        "masks": tv_tensors.Mask(torch.from_numpy(np.repeat(segments.masks, 2, 0))),
        "boxes": tv_tensors.BoundingBoxes([[10, 5, 25, 30], [10, 5, 25, 30]], format="XYXY", canvas_size=size, dtype=torch.float32),
        "points": tv_tensors.KeyPoints([[top_left], [top_left]], canvas_size=size, dtype=torch.float32),
        "labels": torch.tensor([3, 4]),
        "iscrowd": torch.tensor([True, False]),
    }
    for seed in range(20):
        torch.manual_seed(seed)
        _, found = JitterTransform(Preprocessing(48), jitter=(0.8, 1.5), flip=flip, square=True)(image, objects)
        assert found["labels"].tolist() == [4]
        assert all(type(value) is torch.Tensor for value in found.values())
        rows, columns = (found["masks"][0].any(axis).nonzero() for axis in (1, 0))
        around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (found["boxes"][0] - around).abs().max() < 1.01
        if (found["boxes"][0] > 0).all() and (found["boxes"][0] < 48).all():  # nothing was cropped away
            corner = torch.stack([around[2 if flip else 0], around[1]])
            assert (found["points"][0, 0] - corner).abs().max() < 2.01  # a keypoint is the middle of a pixel
    boxes = {name: objects[name] for name in ("boxes", "labels")}
    assert len(JitterTransform(Preprocessing(48))(image, boxes)[1]["labels"]) == 2
    assert set(FitTransform(Preprocessing(48))(image, boxes)[1]) == {"boxes", "labels", "size", "original_size"}


def test_other_targets_are_refused():
    image, _ = marked()
    with pytest.raises(UsageError, match="needs masks or boxes, got labels"):
        JitterTransform(Preprocessing(48))(image, {"labels": torch.zeros(1)})
    with pytest.raises(UsageError, match="XYXY"):
        JitterTransform(Preprocessing(48))(image, {"boxes": torch.zeros(1, 4)})
    with pytest.raises(UsageError, match=r"range of factors above 0, got \(0, 1\)"):
        JitterTransform(Preprocessing(48), jitter=(0, 1))


@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_masks_are_sampled_in_the_middle(factor):
    """An even step between two halves stays where it is, and no factor shifts a mask by more than half a pixel."""
    ramp = torch.arange(60 * factor).expand(1, 4 * factor, -1)
    small = FitScale(60)({"image": Image.new("L", (60 * factor, 4 * factor)), "masks": tv_tensors.Mask(ramp)})["masks"]
    middles = (torch.arange(60) + 0.5) * factor - 0.5
    assert (small[0, 0] - middles).abs().max() <= 0.5


def test_padded_batches():
    batch, padding = pad_batch([torch.ones(3, 5, 7), torch.ones(3, 9, 4)], multiple=4)
    assert batch.shape == (2, 3, 12, 8)
    assert (batch.sum((1, 2, 3)) / 3).tolist() == [35, 36]
    assert (~padding).sum((1, 2)).tolist() == [35, 36]
