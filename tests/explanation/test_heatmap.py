"""Heat maps: increasing lightness of the colours, and position of the map on the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vitarium.catalog import Preprocessing
from vitarium.explanation.heatmap import CAPTION, captioned, colours, grid_of, input_picture, overlay, seen_box


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L*, 0 to 100."""
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def test_lightness_rises_evenly():
    rise = np.diff(lightness(colours(np.linspace(0, 1, 65))))
    assert rise.min() > 0
    assert rise.max() < 2.6 * rise.mean()
    assert colours(np.array([[-1.0, 2.0]])).tolist() == colours(np.array([[0.0, 1.0]])).tolist()


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (32, 32), (3000, 1000)])
def test_overlays_keep_the_pictures_shape(size):
    drawn = overlay(Image.new("L", size, 100), np.zeros((8, 8)), Preprocessing(8, crop_pct=1.0))
    assert drawn.mode == "RGB"
    assert drawn.width / drawn.height == pytest.approx(size[0] / size[1], rel=0.01)
    assert max(drawn.size) <= 1024


def test_heat_lies_where_the_model_looked():
    heat = np.zeros((10, 10))
    heat[0, 0] = 1
    picture = Image.new("RGB", (600, 300), "grey")
    left, top, right, lower = seen_box(picture.size, Preprocessing(10, crop_pct=1.0))
    assert (left, top, right, lower) == (150, 0, 450, 300)
    values = np.asarray(overlay(picture, heat, Preprocessing(10, crop_pct=1.0))).astype(int)
    warm = values[..., 0] - values[..., 2]
    row, column = np.unravel_index(warm.argmax(), warm.shape)
    assert row < 30
    assert 150 <= column < 180
    assert values[100, 50].max() < values[100, 300].max()  # what the crop left out is dark
    inside = seen_box((600, 300), Preprocessing(224, crop_pct=0.875))
    assert inside == pytest.approx((168.75, 18.75, 431.25, 281.25), abs=0.1)


def test_a_grid_with_captions():
    sheet = grid_of([Image.new("RGB", (10, 20))] * 3, ["a", "b", "c"], columns=2, side=50)
    assert sheet.size == (2 * 58 - 8, 2 * (58 + CAPTION) - 8)


def test_a_caption_and_a_scale_stand_below_the_drawing():
    drawn = Image.new("RGB", (240, 100), "blue")
    sheet = captioned(drawn, ["cat, 35.9 %", "grad_cam"])
    assert sheet.size == (240, 100 + 3 * CAPTION + 4)
    assert sheet.crop((0, 0, 240, 100)).tobytes() == drawn.tobytes()
    last = np.asarray(sheet)[-(CAPTION // 2)]
    assert (last == colours([0.0])[0]).all(1).any()
    assert (last == colours([1.0])[0]).all(1).any()
    plain = captioned(drawn, ["cat", "token_tree"], scale=False)
    assert plain.height == 100 + 2 * CAPTION + 4
    assert np.asarray(plain)[100:].min() < 128


def test_what_the_model_sees_comes_back():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
    preparation = Preprocessing(8, crop_pct=1.0)
    assert np.array_equal(np.asarray(input_picture(preparation(picture), preparation)), np.asarray(picture))
    grey = Preprocessing(8, (0.5,), (0.5,), crop_pct=1.0)
    assert input_picture(grey(picture), grey).mode == "RGB"
    assert input_picture(torch.rand(3, 4, 4), None).size == (4, 4)
