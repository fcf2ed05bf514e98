"""Tests of `vitarium generate` with an image and a mask, including user errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitarium


@pytest.fixture
def files(run, tmp_path: Path) -> Path:
    """A generator, a picture and masks in the folder that commands run in."""
    torch.manual_seed(0)
    vitarium.save(vitarium.create_model("var_pico"), "var.safetensors")
    pixels = np.random.RandomState(0).randint(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("picture.png")
    half = np.zeros((16, 16), dtype=np.uint8)
    half[:, 8:] = 255
    Image.fromarray(half).save("half.png")
    Image.fromarray(0 * half).save("none.png")
    Image.fromarray(half[:8]).save("small.png")
    return tmp_path


def test_makes_a_region_anew(run, files: Path):
    edit = ("--image", "picture.png", "--mask", "half.png")
    assert run("generate", "var.safetensors", *edit, "--classes", "3", "-n", "1", "-o", "made.npz").code == 0
    made, before = np.load(files / "made.npz")["arr_0"][0], np.asarray(Image.open(files / "picture.png"))
    assert (made[:, :8] == before[:, :8]).all()
    assert (made[:, 8:] != before[:, 8:]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "picture.png"], "go together"),
        (["--image", "picture.png", "--mask", "small.png"], "as large as the image"),
        (["--image", "picture.png", "--mask", "none.png"], "no white"),
        (["--set", "topk=3"], "did you mean top_k"),
    ],
)
def test_tells_what_is_wrong(run, files: Path, arguments: list[str], message: str):
    result = run("generate", "var.safetensors", *arguments)
    assert result.code == 2
    assert message in result.err
