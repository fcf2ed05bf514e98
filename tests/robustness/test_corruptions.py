"""Corruptions: their sizes and strengths, equality with the reference library, and the benchmark."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.training.tiny import tiny_data, tiny_net
from vitarium.catalog import Preprocessing
from vitarium.data import BadFiles, ImageData
from vitarium.data.photos import sample_photos
from vitarium.errors import DataError, MissingExtra, UsageError
from vitarium.robustness import corruptions
from vitarium.robustness.benchmark import ALEXNET, AllCorruptions, CorruptionErrors, corruption_errors
from vitarium.robustness.corruptions import KINDS, available_kinds, corrupt

HERE = [pytest.param(kind, marks=() if kind in available_kinds() else pytest.mark.skip("no photographs")) for kind in KINDS]


@pytest.fixture(scope="module")
def photo():
    return sample_photos()[0][1].convert("RGB").resize((128, 128))


def change(photo, kind, severity, seed=0):
    found = corrupt(photo, kind, severity, np.random.default_rng(seed))
    assert (found.mode, found.size) == ("RGB", photo.size)
    return np.abs(np.asarray(found, dtype=float) - np.asarray(photo, dtype=float)).mean()


@pytest.mark.parametrize("kind", HERE)
def test_each_kind_grows_with_severity_and_is_a_function_of_its_generator(photo, kind):
    assert change(photo, kind, 3, seed=1) == change(photo, kind, 3, seed=1)
    if kind != "elastic_transform":  # the benchmark's first two severities bend, the others tremble
        assert 0 < change(photo, kind, 1) < change(photo, kind, 5)
    assert change(photo, kind, 4) > 0.5


@pytest.mark.parametrize("kind", HERE)
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (16, 16), (33, 90)])
def test_any_size_and_mode(kind, size):
    for mode in ("L", "RGBA"):
        found = corrupt(Image.new(mode, size, 0), kind, 5, np.random.default_rng(0))
        assert (found.size, found.mode) == (size, "RGB")


@pytest.mark.parametrize("kind", ["defocus_blur", "motion_blur", "zoom_blur", "contrast", "brightness"])
def test_a_small_picture_looks_like_the_large_one_made_small(kind):
    """Blurs are in proportion to the image. At half the size: closer to the large one's corruption than to no corruption."""
    large = sample_photos()[0][1].convert("RGB").resize((224, 224))
    small = large.resize((112, 112), Image.Resampling.BOX)
    expected = np.asarray(corrupt(large, kind, 4, np.random.default_rng(0)).resize((112, 112), Image.Resampling.BOX), dtype=float)
    found = np.asarray(corrupt(small, kind, 4, np.random.default_rng(0)), dtype=float)
    assert np.abs(found - expected).mean() < 0.25 * np.abs(np.asarray(small, dtype=float) - expected).mean()


class Legacy(np.random.RandomState):
    """NumPy's old generator, which the library uses, under the new one's names."""

    integers = np.random.RandomState.randint


@pytest.fixture
def library(monkeypatch):
    """imagecorruptions' own functions, with what today's libraries no longer have put in its place."""
    found = pytest.importorskip("importlib.util").find_spec("imagecorruptions")
    if found is None:
        pytest.skip("imagecorruptions is not installed")
    pytest.importorskip("cv2")
    pytest.importorskip("skimage")
    import scipy.ndimage
    import skimage.filters

    gaussian = skimage.filters.gaussian
    old = types.ModuleType("pkg_resources")
    old.resource_filename = lambda _, name: str(Path(found.submodule_search_locations[0]) / name)
    monkeypatch.setitem(sys.modules, "pkg_resources", old)
    moved = types.ModuleType("scipy.ndimage.interpolation")
    moved.map_coordinates = scipy.ndimage.map_coordinates
    monkeypatch.setitem(sys.modules, "scipy.ndimage.interpolation", moved)
    channels = lambda x, sigma, multichannel=False: gaussian(x, sigma=sigma, channel_axis=-1 if multichannel else None)
    monkeypatch.setattr(skimage.filters, "gaussian", channels)
    monkeypatch.setattr(np, "float_", np.float64, raising=False)
    for name in [name for name in sys.modules if name.startswith("imagecorruptions")]:
        monkeypatch.delitem(sys.modules, name)
    from imagecorruptions import corruptions as module

    yield module
    for name in [name for name in sys.modules if name.startswith("imagecorruptions")]:
        del sys.modules[name]


TOLERANCE = {"glass_blur": 0.7, "snow": 0.3, "impulse_noise": None, "frost": None}
"""Mean difference out of 255 where rounding to whole values on the way differs; None: drawn otherwise, so compared by strength alone."""


@pytest.mark.parametrize("severity", [1, 5])
def test_equals_the_library_draw_for_draw(library, severity):
    """At the size of the benchmark; `elastic_transform` follows the original, from which the library departs."""
    photo = sample_photos()[0][1].convert("RGB").resize((224, 224))
    x = np.asarray(photo) / 255
    for kind in available_kinds():
        if kind == "elastic_transform":
            continue
        np.random.seed(5)
        given = photo if kind in ("pixelate", "jpeg_compression") else np.asarray(photo).copy()
        theirs = np.asarray(getattr(library, kind)(given, severity), dtype=float).clip(0, 255).astype(np.uint8).astype(float)
        if kind == "pixelate":  # the same reduction; the library enlarges by nearest neighbours
            ours = np.asarray(corrupt(photo, kind, severity, np.random.default_rng(0)), dtype=float)
            assert np.abs(ours - theirs).mean() < 3
            continue
        ours = (KINDS[kind](x, severity - 1, Legacy(5), 1.0) * 255).clip(0, 255).astype(np.uint8).astype(float)
        tolerance = TOLERANCE.get(kind, 0.05)
        if tolerance is not None:
            assert np.abs(ours - theirs).mean() <= tolerance, kind
        else:
            ratio = np.abs(ours - 255 * x).mean() / np.abs(theirs - 255 * x).mean()
            assert ratio == pytest.approx(1, abs=0.15), kind


def test_mistakes_are_refused(photo, monkeypatch):
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match=r"unknown corruption 'fogg'; did you mean fog"):
        corrupt(photo, "fogg", 1, rng)
    with pytest.raises(UsageError, match="severity must be 1, 2, 3, 4 or 5, got 6"):
        corrupt(photo, "fog", 6, rng)
    monkeypatch.setattr(corruptions, "frost_photographs", lambda: ())
    assert "frost" not in available_kinds()
    with pytest.raises(MissingExtra, match=r"vitarium\[corruptions\]"):
        corrupt(photo, "frost", 1, rng)


# ---- the benchmark


class Bright(nn.Module):
    """Says whether an image's mean is above the middle."""

    num_classes = 2
    preprocessing = Preprocessing(8, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image):
        mean = image.mean((1, 2, 3)) * self.scale
        return torch.stack([-mean, mean], 1)


class Plain:
    """Dark images (class 0) and light ones (class 1)."""

    targets = (0, 1, 0, 1)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Image.new("RGB", (8, 8), ((70,) * 3, (180,) * 3)[index % 2]), index % 2

    def describe(self, index):
        return str(index)


def test_errors_are_counted_where_they_happen():
    found = corruption_errors(Bright(), Plain(), kinds=["brightness", "contrast"])
    assert found.clean == 0
    assert found.errors == {"brightness": [0.0, 0.0, 0.5, 0.5, 0.5], "contrast": [0.0] * 5}  # 70 + 0.3 * 255 > 127.5
    assert found.by_kind == {"brightness": pytest.approx(0.3), "contrast": 0.0}
    assert found.mean == pytest.approx(0.15)
    assert found.images == 4
    assert found.to_dict()["mean_corruption_error"] == found.mean


def test_an_error_does_not_depend_on_the_batch_or_on_what_else_is_measured():
    model, data = tiny_net().eval(), tiny_data()
    one = corruption_errors(model, data.val, kinds=["shot_noise", "fog"], severities=[2, 5], batch_size=7)
    two = corruption_errors(model, data.val, kinds=["fog", "shot_noise"], severities=[5], batch_size=640)
    assert {kind: errors[1:] for kind, errors in one.errors.items()} == two.errors
    assert model.training is False


def test_the_first_version_is_what_evaluation_sees():
    prepare = Preprocessing(8, crop_pct=0.8)
    picture = sample_photos()[0][1]
    seen = AllCorruptions(prepare, ["contrast"], [1, 2])(picture)
    assert seen.shape == (3, 3, 8, 8)
    assert torch.equal(seen[0], prepare(picture))
    assert AllCorruptions(Preprocessing(8, mean=(0.5,), std=(0.5,)), ["fog"], [1])(picture).shape == (2, 1, 8, 8)


def test_relative_to_alexnet_is_one_for_alexnet():
    assert list(ALEXNET) == list(KINDS)
    itself = CorruptionErrors(0.435, {kind: [error] * 5 for kind, error in ALEXNET.items()}, [1, 2, 3, 4, 5], 50_000)
    assert itself.over_alexnet == pytest.approx(1)
    assert itself.mean == pytest.approx(sum(ALEXNET.values()) / 15)


def test_refuses_what_cannot_be_measured(tmp_path):
    with pytest.raises(UsageError, match="did you mean fog"):
        corruption_errors(Bright(), Plain(), kinds=["fogs"])
    with pytest.raises(UsageError, match="severities from 1 to 5"):
        corruption_errors(Bright(), Plain(), severities=[0])
    data: ImageData = tiny_data()

    class Broken(Plain):
        def __getitem__(self, index):
            from vitarium.data import BrokenImage

            raise BrokenImage(f"{index}.png", "cut off")

    assert data.classes
    with pytest.raises(DataError):
        corruption_errors(Bright(), Broken(), kinds=["fog"], bad_files=BadFiles(limit=1.0))
