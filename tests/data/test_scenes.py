import pickle

import numpy as np
import pytest

from vitarium.data import open_data
from vitarium.data.scenes import ANSWERS, CATEGORIES, STUFF, THINGS, Scenes
from vitarium.data.scenes.far_sum import draw_far_sum, far_sum_label, handwriting
from vitarium.data.scenes.same_shape import CELLS, MARKS, draw_same_shape, same_shape_label
from vitarium.data.scenes.shapes import FEET, SHAPES
from vitarium.data.scenes.size_transfer import draw_size_transfer
from vitarium.data.scenes.tasks import TASKS
from vitarium.data.scenes.textures import draw_textures
from vitarium.data.scenes.tissue import draw_tissue
from vitarium.data.scenes.two_scales import LETTERS, RADII
from vitarium.errors import UsageError

SCENES = [Scenes(image_size=32, seed=5)[index] for index in range(48)]


def test_a_scene_is_a_function_of_seed_and_number():
    again, other = Scenes(image_size=32, seed=5), Scenes(image_size=32, seed=6)
    for index in (47, 3):
        assert np.array_equal(again[index].image, SCENES[index].image)
        assert again[index].layout == SCENES[index].layout
        assert (again[index].question, again[index].answer) == (SCENES[index].question, SCENES[index].answer)
        assert not np.array_equal(other[index].image, SCENES[index].image)


def test_a_scene_shows_the_same_at_every_size():
    for size in (16, 50, 96):
        scene = Scenes(image_size=size, seed=5)[7]
        assert scene.image.shape == (size, size, 3)
        assert scene.layout == SCENES[7].layout
        small = scene.boxes[0] / size - SCENES[7].boxes[0] / 32
        assert np.abs(small).max() < 0.1


def test_scenes_have_no_end_unless_they_are_given_one():
    assert Scenes(image_size=16)[10**12].image.dtype == np.uint8
    with pytest.raises(TypeError, match="are unlimited"):
        len(Scenes())
    few = Scenes(image_size=16, length=3)
    assert len(list(few)) == len(few) == 3
    with pytest.raises(IndexError, match="0 to 2"):
        few[3]


@pytest.mark.parametrize("options", [{"image_size": 8}, {"seed": -1}, {"length": -1}])
def test_refuses_what_cannot_be_drawn(options):
    with pytest.raises(UsageError, match="got"):
        Scenes(**options)


def test_classes_are_balanced_and_known_before_drawing():
    assert [scene.label for scene in SCENES] == [Scenes().label(i) for i in range(48)]
    assert np.bincount([scene.label for scene in SCENES]).tolist() == [6] * len(THINGS)


@pytest.mark.parametrize("scene", SCENES[:16])
def test_labels_agree_with_each_other(scene):
    count = len(scene.things)
    assert scene.image.dtype == np.uint8
    assert scene.masks.shape == (count, 32, 32)
    assert scene.masks.sum(0).max() <= 1, "visible parts do not overlap"
    assert scene.boxes.dtype == np.float32
    for mask, (x1, y1, x2, y2), label in zip(scene.masks, scene.boxes.astype(int), scene.labels, strict=True):
        assert mask.sum() >= 3
        inside = mask[y1:y2, x1:x2]
        assert inside.sum() == mask.sum()
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
        assert (scene.categories[mask] == label).all()
    assert set(np.flatnonzero(scene.multi_label)) == set(scene.labels)
    assert scene.labels[0] == scene.label
    assert all(CATEGORIES[c] in STUFF for c in np.unique(scene.categories[scene.instances == 0]))


@pytest.mark.parametrize("scene", SCENES[:16])
def test_panoptic_segments_tile_the_picture(scene):
    segments, infos = scene.panoptic
    assert sorted(np.unique(segments)) == [info["id"] for info in infos]
    for info in infos:
        part = segments == info["id"]
        assert info["area"] == part.sum()
        assert (scene.categories[part] == info["category_id"]).all()
        assert info["isthing"] == (info["category_id"] < len(THINGS))
    assert sum(info["isthing"] for info in infos) == len(scene.things)


@pytest.mark.parametrize("scene", SCENES[:16])
def test_what_is_nearer_hides_what_is_further(scene):
    depths = [thing.depth for thing in scene.things]
    assert depths == sorted(depths)
    for mask, depth in zip(scene.masks, depths, strict=True):
        assert np.allclose(scene.depth[mask], depth)
    sky = scene.categories == CATEGORIES.index("sky")
    assert (scene.depth[sky] == 100).all()
    ground = np.where(scene.categories == CATEGORIES.index(scene.layout.ground), scene.depth, np.nan)
    rows = [np.nanmin(row) for row in ground if not np.isnan(row).all()]
    assert rows == sorted(rows, reverse=True), "ground is further the higher it is seen"
    assert scene.depth.min() > 0


def test_every_question_has_its_answer_in_the_scene():
    kinds = set()
    for scene in SCENES:
        words = scene.question.rstrip("?").split()
        present = [thing.kind for thing in scene.things]
        kinds.add(words[0])
        assert scene.answer in ANSWERS
        if words[0] == "How":
            name = next(kind for kind in THINGS if words[2] in (f"{kind}s", f"{kind}es"))
            assert scene.answer == str(present.count(name))
        elif words[:2] == ["What", "colour"]:
            assert [thing.colour for thing in scene.things if thing.kind == words[-1]] == [scene.answer]
        elif words[:2] == ["Is", "there"]:
            assert scene.answer == ("yes" if words[-1] in present else "no")
        elif words[0] == "Is":
            places = {thing.kind: thing.x for thing in scene.things}
            assert scene.answer == ("yes" if places[words[2]] < places[words[-1]] else "no")
        elif words[0] == "Which":
            assert scene.answer == next(kind for kind in present if f"the {kind}" in scene.question)
        else:
            assert scene.answer == scene.layout.ground
    assert kinds == {"How", "What", "Is", "Which"}


def test_captions_say_what_is_there():
    for scene in SCENES:
        nearest = scene.things[0]
        assert scene.caption.startswith(("A ", "An "))
        assert f"{nearest}" in scene.caption
        assert f"on {scene.layout.ground}" in scene.caption
        assert f"{scene.layout.sky} sky" in scene.caption
        assert ("more things" in scene.caption) == (len(scene.things) > 3)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fit_their_circle_and_have_soft_edges(name):
    v, u = np.meshgrid(*2 * [np.linspace(-1.3, 1.3, 261, dtype=np.float32)], indexing="ij")
    distance = SHAPES[name](u, v)
    assert distance.dtype == np.float32
    assert distance[np.hypot(u, v) > 1.03].min() > 0
    assert FEET[name] == pytest.approx(v[distance < 0].max(), abs=0.015)
    assert 0.15 < (distance < 0).mean() / (np.hypot(u, v) < 1).mean() < 0.95
    slope = np.hypot(*np.gradient(distance, 0.01))[np.abs(distance) < 0.02]
    assert np.median(slope) == pytest.approx(1, abs=0.1), "a unit of distance is a unit of length, or edges would be too soft or too hard"


# ---- as image sets


def test_scenes_as_data():
    data = open_data("scenes:image_size=20,length=40", val_fraction=0.25)
    assert data.classes == list(THINGS)
    assert data.image_size == 20
    assert (len(data.train), len(data.val)) == (30, 10)
    image, target = data.val[0]
    assert image.size == (20, 20)
    assert target == data.val.targets[0] == 30 % len(THINGS)
    assert data.val.describe(0) == "scenes class #30"
    assert np.array_equal(np.asarray(image), Scenes(20)[30].image)
    first = np.asarray(data.train[0][0])
    assert np.array_equal(first, np.asarray(data.train[0][0])), "kept images are not changed by their users"
    assert not np.array_equal(first, np.asarray(open_data("scenes:image_size=20,length=40", seed=1).train[0][0]))
    assert open_data("scenes", image_size=24).train[0][0].size == (24, 24)
    assert pickle.loads(pickle.dumps(data.train))[3][1] == data.train[3][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size=3", r"no option 'size=3'; did you mean image_size.*accepted: image_size=64, length=2000, task=class"),
        ("task", "no option 'task'"),
        ("task=clas", r"no task 'clas'; did you mean class.*accepted: class, same_shape"),
        ("image_size=8", "at least 16, got '8'"),
        ("length=many", "whole number of at least 16, got 'many'"),
        ("length=3", "at least 16"),
        ("length=40,length=50", "set length twice"),
    ],
)
def test_says_which_options_there_are(options, message):
    with pytest.raises(UsageError, match=message):
        open_data(f"scenes:{options}")


def marks_of(image):
    """Places (column, row) of what is much brighter than the ground, gathered by cell."""
    bright = np.asarray(image).min(-1) > 130
    side = len(bright) // CELLS
    return bright.reshape(CELLS, side, CELLS, side).any((1, 3))


def test_two_marks_lie_in_cells_of_their_own():
    images = [draw_same_shape(index, 0, 64) for index in range(200)]
    cells = [marks_of(image) for image in images]
    assert all(c.sum() == 2 for c in cells)
    distances = [np.abs(np.diff(np.argwhere(c), axis=0)).max() for c in cells]
    assert set(distances) == {1, 2, 3}, "up to three cells apart"
    data = open_data("scenes:task=same_shape,length=100")
    assert data.classes == ["different", "same"]
    assert data.name == "scenes-same_shape"
    assert sum(data.train.targets) == 40
    assert np.array_equal(np.asarray(data.train[7][0]), images[7])


def test_one_mark_alone_carries_no_information():
    """Each shape is as frequent under both answers, so that what is summed over cells says nothing."""
    shapes = {0: [], 1: []}
    for index in range(400):
        rng = np.random.default_rng((0, index))
        first = rng.integers(len(MARKS))
        shapes[same_shape_label(index)].append(first)
    assert abs(np.mean(shapes[0]) - np.mean(shapes[1])) < 0.15


# ---- tasks that need a mechanism

NEEDING = ("far_sum", "textures", "two_scales", "size_transfer", "fine_parts", "tissue")
SHOWN = {"size_transfer": 0.16, "two_scales": 0.1}
"""Accuracy above chance that colours may give where shapes cover different areas; else 0.06."""


@pytest.mark.parametrize("task", NEEDING)
def test_images_of_a_task_are_a_function_of_seed_and_index(task):
    data, again = (open_data(f"scenes:task={task},length=200") for _ in range(2))
    other = open_data(f"scenes:task={task},length=200", seed=1)
    assert data.image_size == 32
    assert len(data.classes) == len(set(data.classes))
    for one, two in ((data.train, again.train), (data.val, again.val)):
        assert np.ptp(np.bincount(one.targets, minlength=len(data.classes))) <= 1, "classes are balanced"
        assert np.array_equal(np.asarray(one[3][0]), np.asarray(two[3][0]))
    assert not np.array_equal(np.asarray(other.train[3][0]), np.asarray(data.train[3][0]))
    everything = {part[i][0].tobytes() for part in (data.train, data.val) for i in range(len(part))}
    assert len(everything) == 200, "no image is in both parts, or twice in one"
    assert TASKS[task].draw(10**12, 0, 64).shape == (64, 64, 3), "there are images without end, of other sizes"


@pytest.mark.parametrize("task", NEEDING)
def test_colours_do_not_show_the_class(task):
    """Mean and spread of each colour, with their products, are classified hardly better than by chance."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    images = np.stack([TASKS[task].draw(index, 0, 32) for index in range(3000)]) / 255
    seen = np.concatenate([images.mean((1, 2)), images.std((1, 2))], 1)
    labels = [TASKS[task].label(index) for index in range(3000)]
    model = make_pipeline(StandardScaler(), PolynomialFeatures(2), LogisticRegression(max_iter=300)).fit(seen[:2000], labels[:2000])
    chance = 1 / len(TASKS[task].classes)
    assert model.score(seen[2000:], labels[2000:]) < chance + SHOWN.get(task, 0.06)


def test_digits_of_far_sum_are_other_handwriting_in_each_part():
    for training, held_out in zip(handwriting(False), handwriting(True), strict=True):
        assert len(training) > 3 * len(held_out) > 60
        assert not {digit.tobytes() for digit in training} & {digit.tobytes() for digit in held_out}
    data = open_data("scenes:task=far_sum,length=100")
    assert np.array_equal(np.asarray(data.train[7][0]), draw_far_sum(7, 0, 32))
    assert np.array_equal(np.asarray(data.val[7][0]), draw_far_sum(87, 0, 32, held_out=True))
    assert not np.array_equal(np.asarray(data.val[7][0]), draw_far_sum(87, 0, 32))


def test_letters_of_two_scales_have_the_same_cells():
    """All letters fill as many cells, and the small shapes have equal areas: neither cells one by one nor their means show both."""
    assert {sum(line.count("#") for line in lines) for lines in LETTERS.values()} == {7}
    v, u = np.meshgrid(*2 * [np.linspace(-0.5, 0.5, 801, dtype=np.float32)], indexing="ij")
    areas = [(SHAPES[shape](u / radius, v / radius) < 0).mean() for shape, radius in RADII.items()]
    assert max(areas) < 1.02 * min(areas)


def test_only_the_canvas_of_size_transfer_grows():
    areas = {}
    for size in (32, 64):
        images = np.stack([draw_size_transfer(index, 0, size) for index in range(2400)])
        areas[size] = (images.min(-1) > 145).mean()
    assert areas[64] == pytest.approx(areas[32], rel=0.06)


def test_a_quarter_of_the_side_does_not_show_textures():
    """Means of squares of four pixels have the same spread in all classes."""
    images = np.stack([draw_textures(index, 0, 32).mean(-1) for index in range(1200)])
    reduced = images.reshape(-1, 8, 4, 8, 4).mean((2, 4))
    spread = reduced.std((1, 2)).reshape(200, -1).mean(0)
    assert spread.max() < 1.1 * spread.min()


def test_nuclei_of_all_classes_cover_the_same_area():
    images = np.stack([draw_tissue(index, 0, 32).mean(-1) for index in range(1200)])
    covered = (images < np.median(images, (1, 2), keepdims=True) - 25).mean((1, 2)).reshape(300, -1).mean(0)
    assert covered.min() > 0.08
    assert covered.max() < 1.15 * covered.min()


def test_one_digit_of_far_sum_shows_little():
    """Each digit lies in a quadrant of its own, on one diagonal, and logistic regression on the pixels stays near chance."""
    from sklearn.linear_model import LogisticRegression

    images = np.stack([draw_far_sum(index, 0, 32).min(-1) for index in range(3000)]) / 255
    inked = (images.reshape(-1, 2, 16, 2, 16) > 0.55).any((2, 4))
    assert (inked.sum((1, 2)) <= 2).all()
    assert (inked[:, 0, 0] & inked[:, 1, 1]).any()
    assert (inked[:, 0, 1] & inked[:, 1, 0]).any()
    labels = [far_sum_label(index) for index in range(3000)]
    model = LogisticRegression(C=0.1, max_iter=200).fit(images[:2000].reshape(2000, -1), labels[:2000])
    assert model.score(images[2000:].reshape(1000, -1), labels[2000:]) < 0.32
