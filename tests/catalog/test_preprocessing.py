"""Preprocessing of images in any of Pillow's modes equals timm's evaluation transform."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as T

from vitarium.catalog import Preprocessing, preprocessing
from vitarium.catalog.preprocessing import to_mode
from vitarium.errors import UsageError

PLAIN = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop_pct=1.0)


def picture(width=60, height=40, seed=0) -> Image.Image:
    values = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (32, 32), (200, 7), (7, 7)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_equals_timms_evaluation_transform(size, interpolation):
    timm_data = pytest.importorskip("timm.data")
    ours = Preprocessing(32, interpolation=interpolation)
    theirs = timm_data.create_transform(
        (3, 32, 32), is_training=False, interpolation=interpolation, mean=ours.mean, std=ours.std, crop_pct=ours.crop_pct
    )
    torch.testing.assert_close(ours(picture(*size)), theirs(picture(*size)))


@pytest.mark.parametrize("channels", [1, 3])
def test_normalises_bit_for_bit_as_torchvision(channels):
    preprocessing = Preprocessing(24, (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels], crop_pct=1.0)
    values = np.random.default_rng(0).integers(0, 256, (24, 24, channels), dtype=np.uint8)
    image = Image.fromarray(values if channels == 3 else values[..., 0])
    expected = T.normalize(T.to_dtype(T.to_image(image), scale=True), list(preprocessing.mean), list(preprocessing.std))
    assert torch.equal(preprocessing(image), expected)
    assert preprocessing(image).stride() == expected.stride()


def test_gives_float32_of_the_asked_shape():
    tensor = Preprocessing(24, (0.5,), (0.5,), crop_pct=1.0)(picture())
    assert (tensor.shape, tensor.dtype) == ((1, 24, 24), torch.float32)
    assert -1 <= tensor.min() <= tensor.max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "LA", "RGBA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_takes_every_mode(mode, channels):
    image = picture()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "LAB":
        image = Image.new("LAB", (60, 40))
    elif mode == "F":
        image = Image.fromarray(np.asarray(image.convert("L"), np.float32) / 255)
    else:
        image = image.convert(mode)
    converted = to_mode(image, channels)
    assert converted.mode == {1: "L", 3: "RGB"}[channels]
    assert converted.size == (60, 40)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "I", "F", "LA", "RGBA", "I;16"])
def test_large_images_are_converted_in_strips(mode, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    grey = Image.fromarray(pixels[..., 0])
    special = {
        "I;16": pixels[..., 0].astype(np.uint16) * 257,
        "I": pixels[..., 0].astype(np.int32) * 257,
        "F": pixels[..., 0] / np.float32(255),
    }
    image = (
        Image.fromarray(special[mode]) if mode in special else Image.fromarray(pixels).convert(mode) if mode != "1" else grey.convert("1")
    )
    whole = [np.asarray(to_mode(image, channels)) for channels in (1, 3)]
    monkeypatch.setattr(preprocessing, "STRIP", 7 * 60)
    for channels, wanted in zip((1, 3), whole, strict=True):
        np.testing.assert_array_equal(np.asarray(to_mode(image, channels)), wanted)


def test_sixteen_bits_keep_their_relative_brightness():
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for image in (
        Image.fromarray(ramp.astype(np.uint16)),
        Image.fromarray(ramp.astype(np.int32)),
        Image.fromarray((ramp / 65535).astype(np.float32)),
    ):
        np.testing.assert_allclose(np.asarray(to_mode(image, 1)), ramp / 65535 * 255, atol=0.51)


def test_alpha_is_laid_over_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(to_mode(clear, 3)).min() == 255
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert np.asarray(to_mode(palette, 3)).min() == 255


def test_is_a_value():
    one = Preprocessing(32, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "bilinear", 0.9)
    assert one == Preprocessing(**one.to_dict())
    assert hash(one) == hash(Preprocessing(**one.to_dict()))
    assert one.channels == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(image_size=0), "image_size must be at least 1 pixel, got 0"),
        (dict(crop_pct=0), r"crop_pct must lie in \(0, 1\], got 0"),
        (dict(crop_pct=1.5), r"crop_pct must lie in \(0, 1\], got 1.5"),
        (dict(interpolation="bicubik"), "did you mean bicubic"),
        (dict(mean=(0.5,)), "mean and std need 1 or 3 values each"),
        (dict(mean=(0.5,) * 2, std=(0.5,) * 2), "mean and std need 1 or 3 values each"),
        (dict(mean=(0.5,), std=(0.0,)), "std above 0"),
        (dict(mean=(), std=()), "mean and std need 1 or 3 values each"),
    ],
)
def test_refuses_values_out_of_range(options, words):
    with pytest.raises(UsageError, match=words):
        Preprocessing(**options)


def test_crops_the_centre():
    image = Image.new("RGB", (96, 32), "black")
    image.paste("white", (32, 0, 64, 32))
    assert Preprocessing(32, **PLAIN)(image).min() == 1
