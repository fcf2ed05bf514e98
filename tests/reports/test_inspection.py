"""Inspection of a comparison's data, its baselines, learning curves, expected time, and warnings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.reports.fixtures import make_comparison, make_images, make_trial
from vitarium.data import BrokenImage, ImageData, open_data
from vitarium.reports.baselines import PIXELS, pixel_regression
from vitarium.reports.curves import still_improving
from vitarium.reports.duplicates import find_duplicates
from vitarium.reports.estimate import LONG, MARGIN, STEP, Estimate, estimate
from vitarium.reports.inspection import Inspection, inspect
from vitarium.reports.looking import look
from vitarium.reports.page import render
from vitarium.reports.results import Comparison, warnings_of
from vitarium.training import load_recipe
from vitarium.training.tasks import Metric
from vitarium.training.tasks.classify import ACCURACY


def drawn(seed: int, side: int = 64) -> Image.Image:
    """A smooth random image with structure."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


class Shown:
    """Images with class numbers and names; None cannot be read."""

    def __init__(self, name: str, images: list[Image.Image | None], targets: list[int]):
        self.name, self.images, self.targets = name, images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = self.images[index]
        if image is None:
            raise BrokenImage(self.describe(index), "cut off")
        return image, self.targets[index]

    def describe(self, index: int) -> str:
        return f"{self.name}/{index}.png"


def compressed(image: Image.Image, path: Path) -> Image.Image:
    image.resize((50, 50)).save(path, quality=70)
    return Image.open(path)


@pytest.fixture
def messy(tmp_path: Path) -> ImageData:
    """Eight training images, the last one equal to the first with another label; two of four held-out ones are copies, one is broken."""
    first = [drawn(i) for i in range(7)]
    train = Shown("train", [*first, first[0].copy()], [0, 1, 0, 1, 0, 1, 0, 1])
    val = Shown("val", [first[2].copy(), compressed(first[3], tmp_path / "a.jpg"), drawn(50), None], [0, 1, 0, 1])
    return ImageData("messy", train, val, ["cat", "dog"])


def test_copies_near_copies_and_contradictions_are_found_and_named(messy: ImageData):
    found = find_duplicates(messy, look(messy))
    assert (found.looked, found.total) == (11, 12)
    assert (found.equal, found.near, found.leaked, found.contradicting) == (2, 1, 2, 1)
    names = {(leak["first"], leak["second"], leak["kind"]) for leak in found.leaks}
    assert names == {("train/2.png", "val/0.png", "equal"), ("train/3.png", "val/1.png", "near")}
    [against] = found.contradictions
    assert {against["first"], against["second"]} == {"train/0.png", "train/7.png"}
    assert sorted(against["labels"]) == ["cat", "dog"]
    leakage, contradiction = found.sentences()
    assert "2 held-out images are also among the training images" in leakage
    assert "train/3.png ~ val/1.png" in leakage
    assert "with another label" in contradiction


def test_the_number_of_contradictions_does_not_depend_on_the_order():
    import itertools

    image = drawn(0)
    for labels in set(itertools.permutations([0, 1, 1, 1, 2])):
        data = ImageData("equal", Shown("train", [image] * 4, list(labels[:4])), Shown("val", [image], [labels[4]]), ["a", "b", "c"])
        found = find_duplicates(data, look(data))
        assert found.contradicting == 2
        assert all("b" in pair["labels"] and pair["labels"][0] != pair["labels"][1] for pair in found.contradictions)


def test_similar_drawings_and_flat_images_are_no_duplicates():
    digits = open_data("digits")
    assert find_duplicates(digits, look(digits, most=600)).sentences() == []
    flat = [Image.new("RGB", (32, 32), (level,) * 3) for level in range(40)]
    data = ImageData("flat", Shown("train", flat[:20], [0] * 20), Shown("val", flat[20:], [0] * 20), ["x"])
    assert find_duplicates(data, look(data)).near == 0


def test_of_a_large_set_a_sample_is_looked_at_and_this_is_said(messy: ImageData):
    looked = look(messy, seed=3, most=6)
    assert len(looked) <= 6
    assert [*looked.index] == [*look(messy, seed=3, most=6).index]
    many = find_duplicates(messy, look(messy, most=11, seed=1))
    assert "a sample of" in " ".join(many.sentences())


def test_the_inspection_has_sizes_counts_and_examples_and_comes_back(messy: ImageData):
    found = inspect(messy, classes=True)
    assert found.sizes == {"least": [50, 50], "median": [64, 64], "most": [64, 64]}
    assert found.counts == [[4, 2], [4, 2]]
    assert {one.label for one in found.examples} == {"cat", "dog"}
    assert [one.label for one in found.examples[:2]] == ["cat", "dog"], "of every class in turn"
    assert Inspection.from_dict(found.to_dict()) == found


def test_pixels_separate_bright_from_dark_and_not_noise():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 120, (20, 20, 3)).astype(np.uint8)) for _ in range(80)]
    bright = [Image.fromarray(np.asarray(image) + np.uint8(100 * (i % 2))) for i, image in enumerate(noise)]
    targets = [i % 2 for i in range(80)]

    def accuracy(images: list[Image.Image]) -> float:
        data = ImageData("data", Shown("train", images[:60], targets[:60]), Shown("val", images[60:], targets[60:]), ["dark", "light"])
        found = pixel_regression(data, look(data))
        assert found is not None
        assert (found["name"], found["side"], found["train"], found["val"]) == (PIXELS, 20, 60, 20)
        return found["accuracy"]

    assert accuracy(bright) == 1.0
    assert accuracy(noise) < 0.9


def test_too_few_images_have_no_regression(messy: ImageData):
    assert pixel_regression(messy, look(messy)) is None


# ---- learning curves


def history(scores: list[float], name: str = "accuracy") -> list[dict[str, float]]:
    return [{"step": 10.0 * i, name: score} for i, score in enumerate(scores)] + [{"step": 5.0, "train_loss": 1.0}]


@pytest.mark.parametrize(
    ("scores", "rises"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], True),
        ([1 - math.exp(-i) for i in range(12)], False),  # flat at the end
        ([0.1, 0.5, 0.9, 0.95, 0.93, 0.96, 0.92, 0.95, 0.94], False),  # noise
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], False),
        ([0.1, 0.2, 0.3], False),  # too few
    ],
)
def test_a_curve_still_rises_where_its_last_third_gains_more_than_noise(scores: list[float], rises: bool):
    gain = still_improving(history(scores), ACCURACY)
    assert (gain is not None) == rises
    if gain is not None:
        assert gain == pytest.approx(0.3)  # four points, 0.1 apart


def test_a_loss_improves_by_falling():
    falling = [1 / (1 + i) for i in range(4)] + [0.2 - 0.03 * i for i in range(5)]
    assert still_improving(history(falling, "loss"), Metric("loss", "min")) is not None
    assert still_improving(history(falling[::-1], "loss"), Metric("loss", "min")) is None


# ---- warnings, on the page and in Python


def test_what_speaks_against_the_numbers_is_said_everywhere(tmp_path: Path, messy: ImageData):
    from dataclasses import replace

    quiet = make_comparison(tmp_path)
    assert warnings_of(quiet) == []
    trials = [replace(quiet.trials[0], load=0.4, history=history([0.1 * i for i in range(10)])), *quiet.trials[1:]]
    comparison = replace(quiet, trials=trials, inspection=inspect(messy, classes=True))
    small, leak, against, rising, load = comparison.warnings
    assert "the models see 16x16 pixels, and the images have 64x64 (median): a larger input (--image-size 64)" in small
    assert "held-out" in leak
    assert "another label" in against
    assert "still improving when the training ended: swin_pico; train longer" in rising
    assert "--steps 1200 (now 600)" in rising
    assert "up to 40 % of the processor while swin_pico were timed" in load
    assert not any("no model is better" in text for text in comparison.warnings)
    weak = replace(comparison, inspection=replace(comparison.inspection, baselines=[{"name": "regression", "accuracy": 0.999}]))
    assert weak.warnings == comparison.warnings  # it stands in the recommendation
    assert weak.recommendation.sentence.startswith("No model is better than regression (99.9")
    assert "Train longer" in weak.recommendation.sentence
    every = replace(quiet, trials=[replace(trial, load=0.4) for trial in quiet.trials])
    assert "while the models were timed" in every.warnings[0]
    assert "timed under load" not in render(every, make_images(every)), "no news in the table"
    page = render(comparison, make_images(comparison), {0: drawn(0)})
    assert all(text in page for text in ("still improving", "timed under load", "input 16x16 pixels", "train/2.png = val/0.png"))
    assert page.count('alt="A training image of cat"') == 1, "examples that can be read"
    assert Comparison.from_dict(comparison.to_dict(), tmp_path) == comparison


def test_the_regression_is_a_row_and_no_candidate(tmp_path: Path):
    inspection = Inspection(baselines=[{"name": PIXELS, "accuracy": 0.999, "side": 16, "train": 100, "val": 50}])
    comparison = make_comparison(tmp_path, baseline={"accuracy": 0.1}, inspection=inspection)
    assert comparison.baselines() == {"constant answer": 0.1, PIXELS: 0.999}
    assert comparison.best.name == "convnext_pico"
    assert comparison.recommendation.model in [trial.name for trial in comparison.trials]
    assert "Logistic regression: on 16x16 pixels of 100 training images" in render(comparison, {})


def test_models_that_do_not_beat_the_baseline_are_not_praised(tmp_path: Path):
    inspection = Inspection(baselines=[{"name": PIXELS, "accuracy": 0.985, "side": 16, "train": 100, "val": 50}])
    comparison = make_comparison(tmp_path, inspection=inspection)
    assert comparison.best.score > 0.985
    assert comparison.recommendation.sentence.startswith(f"No model is clearly better than {PIXELS} (98.50 % against 98.60 %")
    page = render(comparison, make_images(comparison))
    assert 'class="badge">recommended' not in page
    assert "Use " not in comparison.recommendation.sentence
    alone = make_comparison(tmp_path, trials=comparison.trials[:1])
    assert 'class="badge"' not in render(alone, make_images(alone)), "one model is neither recommended nor the most accurate"


# ---- the expected time


def test_an_estimate_is_the_forward_pass_times_the_steps(monkeypatch: pytest.MonkeyPatch):
    digits = open_data("digits")
    monkeypatch.setattr("vitarium.reports.estimate._timed", lambda model, batch: 0.01 * batch)
    before = torch.random.get_rng_state()
    recipe = load_recipe("pico", ["budget.steps=100", "batch_size=10", "image_size=16"])
    found = estimate(["timm/vit_pico", "no_such_model"], digits, recipe, gpu=False)
    assert found.seconds == pytest.approx({"timm/vit_pico": 100 * 0.1 * STEP * MARGIN})
    assert torch.equal(before, torch.random.get_rng_state())
    epochs = load_recipe("pico", ["budget.epochs=2", "batch_size=100", "image_size=16"])
    assert estimate(["timm/vit_pico"], digits, epochs, gpu=False).steps == 2 * (len(digits.train) // 100)
    minutes = load_recipe("pico", ["budget.minutes=3"])
    assert estimate(["a", "b"], digits, minutes, gpu=False).seconds == {"a": 180, "b": 180}


def test_a_long_estimate_comes_with_shorter_ways():
    text = Estimate({"large": 3 * LONG, "small": LONG}, 10_000).text()
    assert text.startswith("Estimated time: 8.0 hours (large 6.0 hours, small 2.0 hours). Shorter: ")
    assert "--steps 1250" in text
    assert "large takes 75% of the time" in text
    assert "--engine ray" in text
    assert "Shorter" not in Estimate({"large": LONG / 2}, 10).text()


def test_trials_of_earlier_versions_have_no_load():
    trial = make_trial("swin_pico")
    values = trial.to_dict()
    del values["load"]
    again = type(trial).from_dict(values)
    assert not again.disturbed
    assert again == trial


# ---- a runtime


def test_a_runtime_has_a_column_and_decides_the_recommendation(tmp_path: Path):
    from dataclasses import replace

    from vitarium.verbs.compare import all_cells, headers

    plain = make_comparison(tmp_path, baseline={"accuracy": 0.1})
    fast = {trial.name: 10.0 for trial in plain.trials} | {"convnext_pico": 0.01}
    trials = [replace(t, runtime="openvino", runtime_latency_ms=fast[t.name], runtime_throughput=5.0) for t in plain.trials]
    comparison = replace(plain, trials=trials)
    assert plain.recommendation.model == "timm/resnet_pico"
    assert comparison.recommendation.model == "convnext_pico"
    assert headers(comparison)[3] == ">openvino"
    assert {len(row) for row in all_cells(comparison)} == {len(headers(comparison))}
    assert comparison.table()[0]["runtime_latency_ms"] == 0.01
    page = render(comparison, make_images(comparison))
    assert "OpenVINO" in page
    assert "OpenVINO" not in render(plain, make_images(plain))

    refused = [replace(trials[0], runtime_latency_ms=None, runtime_throughput=None, runtime_refusal="no such operator"), *trials[1:]]
    comparison = replace(plain, trials=refused)
    assert comparison.warnings == ["no timing of swin_pico with openvino: no such operator"]
    assert comparison.recommendation.model == "timm/resnet_pico", "then by PyTorch's latency"
    assert any("-" in row for row in all_cells(comparison))
    assert "PyTorch&#39;s latency decides" in render(comparison, make_images(comparison))
    comparison.write()


def test_thousands_of_equal_images_are_one_pair_each():
    blank = Image.new("RGB", (8, 8))
    data = ImageData("blank", Shown("train", [blank] * 1500, [0] * 1500), Shown("val", [blank] * 1500, [0] * 1500), ["x"])
    found = find_duplicates(data, look(data))
    assert (found.equal, found.leaked) == (2999, 1500)
