"""Predictions without PyTorch equal those with it, for images of every mode; what they cannot give takes the usual path."""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as T

import vitarium
from tests.data.pictures import exif_turned, odd_kinds, picture, put
from vitarium.catalog.answers import FORMS, decided, ranked
from vitarium.catalog.preprocessing import INTERPOLATIONS, Preprocessing, to_mode
from vitarium.data.images import open_image
from vitarium.training.tasks.classify import ranked as ranked_by_torch
from vitarium.verbs import light, predict

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of every kind, a broken one, and a trained classifier with a temperature."""
    place = tmp_path_factory.mktemp("light")
    for name, content in odd_kinds().items():
        put(place / "images" / name, content)
    (place / "images/broken.png").write_bytes(b"no image")
    torch.manual_seed(0)
    model = vitarium.create_model("timm/vit_pico", num_classes=7, image_size=16, depth=1)
    model.labels = list("abcdefg")
    vitarium.catalog.record.training_of(model).temperature = 0.5
    vitarium.save(model, place / "model.safetensors")
    return place


def test_a_prepared_image_equals_torchvisions(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(60):
        size = tuple(int(side) for side in rng.integers(1, 90, 2))
        preprocessing = Preprocessing(
            int(rng.integers(1, 40)), interpolation=INTERPOLATIONS[number % 4], crop_pct=float(rng.uniform(0.5, 1))
        )
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
        shorter, side = int(preprocessing.image_size / preprocessing.crop_pct), preprocessing.image_size
        resized = T.resize(image, [shorter], interpolation=T.InterpolationMode(preprocessing.interpolation), antialias=True)
        wanted = np.asarray(T.center_crop(resized, [side, side]))
        assert np.array_equal(np.asarray(preprocessing.square(image)), wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_every_mode_is_prepared_as_for_the_model(tmp_path, channels):
    preprocessing = Preprocessing(9, (0.4,) * channels, (0.2,) * channels)
    for name, content in odd_kinds().items():
        image = open_image(put(tmp_path / name, content))
        array = preprocessing.array(image)
        assert array.dtype == np.float32
        assert np.array_equal(array, preprocessing(image).numpy())
        by_torchvision = T.normalize(T.to_dtype(T.to_image(preprocessing.square(to_mode(image, channels))), scale=True), [0.4], [0.2])
        np.testing.assert_allclose(array, by_torchvision, atol=1e-6)


def test_answers_equal_those_of_the_tasks():
    torch.manual_seed(0)
    names = [f"n{i}" for i in range(30)]
    for scale in (0.1, 1, 30, 1000):
        logits = scale * torch.randn(30)
        wanted = ranked_by_torch((logits / 0.7).softmax(-1), names, 5)["predictions"]
        found = ranked(logits.numpy(), names, 5, 0.7)["predictions"]
        clear = [one["label"] for one in wanted if one["probability"] > 1e-6]  # the order of equal ones is arbitrary
        assert [one["label"] for one in found][: len(clear)] == clear
        assert [one["probability"] for one in found] == pytest.approx([one["probability"] for one in wanted], abs=1e-6)
        shares = decided(logits.numpy(), names, 5)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert [shares[name] for name in names] == pytest.approx(logits.sigmoid().tolist(), abs=1e-6)
    assert "not finite" in ranked(np.array([0, np.nan], np.float32), names, 5)["error"]


def test_a_call_equals_the_usual_one(folder, monkeypatch):
    def close(one, other):
        assert [row["image"] for row in one] == [row["image"] for row in other]
        for a, b in zip(one, other, strict=True):
            assert a.get("error") == b.get("error")
            pairs = zip(a.get("predictions", ()), b.get("predictions", ()), strict=True)
            assert all(p["probability"] == pytest.approx(q["probability"], abs=1e-5) for p, q in pairs)

    model = folder / "model.safetensors"
    wanted = vitarium.predict(folder / "images", model, top_k=3)
    made = vitarium.predict(folder / "images", model, top_k=3, runtime="onnxruntime")  # exports
    close(made.rows, wanted.rows)
    monkeypatch.setattr(predict, "open_model", None)  # from here on, nothing opens the model
    found = vitarium.predict(folder / "images", model, top_k=3, runtime="onnxruntime", batch_size=4)
    close(found.rows, wanted.rows)
    assert found.to_dict()["task"] == "classify"
    assert [table.columns for table in found.tables()] == [table.columns for table in wanted.tables()]
    assert predict.to_csv(found.rows, found.task).splitlines()[0] == predict.to_csv(wanted.rows, wanted.task).splitlines()[0]
    assert f"{wanted.rows[1]['predictions'][0]['label']} " in repr(found)


def test_it_imports_no_torch(folder):
    model, image = folder / "model.safetensors", put(folder / "turned.jpg", exif_turned(picture()))
    vitarium.predict(image, model, runtime="onnxruntime")
    code = f"""
import sys
from vitarium.cli.app import app
try:
    app(["predict", {str(image)!r}, "--model", {str(model)!r}, "--runtime", "onnxruntime", "--json"])
except SystemExit as end:
    assert not end.code
print([name for name in ("torch", "torchvision", "timm", "sklearn", "scipy", "onnx") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]")
    [row] = json.loads(done.stdout)
    assert row["predictions"][0]["label"] == vitarium.predict(image, model).rows[0]["predictions"][0]["label"]


@pytest.mark.skipif(find_spec("openvino") is None, reason="no openvino")
def test_a_command_imports_openvino_without_its_converter(folder):
    model, image = folder / "model.safetensors", put(folder / "one.jpg", exif_turned(picture()))
    vitarium.predict(image, model, runtime="openvino")  # keeps the graph
    code = f"""
import sys
from vitarium.cli import main
sys.argv = ["vitarium", "predict", {str(image)!r}, "--model", {str(model)!r}, "--runtime", "openvino", "--json"]
try:
    main()
except SystemExit as end:
    assert not end.code
print([name for name in ("openvino", "torch", "openvino_telemetry") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("['openvino']")
    [row] = json.loads(done.stdout)
    assert row["predictions"][0]["label"] == vitarium.predict(image, model).rows[0]["predictions"][0]["label"]


def test_what_needs_the_model_takes_the_usual_path(folder, tmp_path):
    images = [str(folder / "images/broken.png")]
    options = dict(limit=5, batch_size=4, notify=lambda text: None)
    model = vitarium.create_model("timm/vit_pico", num_classes=0, image_size=16, depth=1)
    vitarium.save(model, tmp_path / "none.safetensors")
    assert light.predict(images, tmp_path / "none.safetensors", "onnxruntime", **options) is None  # no graph
    assert light.predict(images, "swin_pico", "onnxruntime", **options) is None  # no file
    assert light.predict(["clip.mp4"], folder / "model.safetensors", "onnxruntime", **options) is None


def test_a_label_in_a_csv_file_controls_no_terminal():
    rows = [{"image": "a.png", "predictions": [{"label": "\x1b[31mred", "probability": 1.0}]}]
    text = predict.to_csv(rows, FORMS["classify"])
    assert text.splitlines()[1] == "a.png,\\x1b[31mred,1.000000,"
