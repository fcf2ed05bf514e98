"""Verbs with a runtime: the answers of each kind of model are those of PyTorch, or the runtime is refused for the stated reason.

One model a kind by default; with EVERY_VARIANT=1 every family of the catalog, and OpenVINO as well.
"""

import importlib.util
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

import vitarium
from vitarium.catalog import list_models
from vitarium.catalog.calling import call, example_inputs
from vitarium.efficiency.runtimes import GRAPHS, run_with
from vitarium.errors import CheckpointError, UsageError

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
EVERY = bool(os.environ.get("EVERY_VARIANT"))
RUNTIMES = [name for name in GRAPHS if importlib.util.find_spec(name)] if EVERY else ["onnxruntime"]
PICO = list_models("*_pico")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtimes") / "images"
    rng = np.random.default_rng(0)
    for i in range(5):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20 + i, 24, 3), np.uint8)).save(path)
    return folder


def saved(name, folder, apply=(), **options):
    torch.manual_seed(0)
    model = vitarium.create_model(name, **options).eval()
    vitarium.apply(model, *apply, quiet=True)
    vitarium.save(model, folder / "model.safetensors")
    return folder / "model.safetensors"


def numbers(value):
    """Return the numbers in an answer, in order."""
    if isinstance(value, dict):
        return [x for part in value.values() for x in numbers(part)]
    if isinstance(value, list):
        return [x for part in value for x in numbers(part)]
    return [value] if isinstance(value, float | int) else []


KINDS = {
    "multi-label, its head is a pooled classifier": ("thorax_mae_pico", {}),
    "an embedding": ("vpt_proxies_pico", {}),
    "several inputs, and a named tuple of outputs": ("thorax_mae_pretrain_pico", {}),
    "segments from a dictionary of outputs": ("kmax_deeplab_pico", {}),
    "a classifier with integer layers": ("timm/vit_pico", {"num_classes": 3, "image_size": 16, "depth": 1, "apply": ["int8"]}),
}


@pytest.mark.parametrize("kind", KINDS if EVERY else ["an embedding", "several inputs, and a named tuple of outputs"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_answers_are_those_of_pytorch(kind, runtime, images, tmp_path):
    name, options = KINDS[kind]
    file = saved(name, tmp_path, **options)
    if runtime == "openvino" and "apply" in options:  # its rounding with a step per row (2026.4) changes the shape
        with pytest.raises(CheckpointError, match="openvino does not take this model: its outputs have other shapes"):
            vitarium.predict(images, file, runtime=runtime)
        return
    wanted, found = vitarium.predict(images, file), vitarium.predict(images, file, runtime=runtime)
    assert numbers(found.rows) == pytest.approx(numbers(wanted.rows), rel=2e-2 if "apply" in options else 1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("drct_pico", "restores images of every size"), ("var_tokenizer_pico", "codes and images are made by two parts of the model")],
)
def test_tasks_that_need_the_model_refuse_with_the_reason(name, reason, images, tmp_path):
    file = saved(name, tmp_path)
    with pytest.raises(UsageError, match=f"runs with --runtime eager only: .*{reason}"):
        vitarium.predict(images, file, runtime="onnxruntime")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_device_that_a_runtime_lacks_is_refused(images, tmp_path):
    file = saved("timm/vit_pico", tmp_path, num_classes=2, image_size=16, depth=1)
    with pytest.raises(UsageError, match=r"onnxruntime runs on the CPU here, and the device is cuda: leave --device out"):
        vitarium.predict(images, file, runtime="onnxruntime", device="cuda")


def test_metrics_features_and_searches_are_those_of_pytorch(images, tmp_path):
    file = saved("timm/vit_pico", tmp_path, num_classes=2, image_size=16, depth=1)
    runtime = RUNTIMES[-1]
    plain, fast = (vitarium.evaluate(file, images, split="all", runtime=one) for one in ("eager", runtime))
    assert numbers(fast.metrics) == pytest.approx(numbers(plain.metrics), abs=1e-4)
    vitarium.index(images, file, tmp_path / "plain.index")
    vitarium.index(images, file, tmp_path / "fast.index", runtime=runtime)
    query = images / "a/0.png"
    plain, fast = (
        vitarium.search(tmp_path / f"{name}.index", query, runtime=one, itself=True)
        for name, one in (("plain", "eager"), ("fast", runtime))
    )
    assert numbers(fast.rows) == pytest.approx(numbers(plain.rows), abs=1e-4)
    plain, fast = (vitarium.probe(file, "digits", runtime=one) for one in ("eager", runtime))
    assert fast.knn == pytest.approx(plain.knn, abs=0.02)
    names = sorted(path.stem for path in (tmp_path / "model.safetensors.vitarium").glob("*.onnx"))
    assert names == ["embeddings_of", "forward", "pooled_features"]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", PICO if EVERY else ["dit_pico"])
def test_every_family_runs_or_refuses(name, runtime):
    torch.manual_seed(0)
    model = vitarium.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some layers begin at zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    fast, reason = None, ""
    try:
        fast = run_with(model, runtime)
    except UsageError as error:
        reason = str(error)
    if fast is None:
        assert "does not take this model: " in reason
        return
    inputs = example_inputs(model, 3, seed=1)
    with torch.no_grad():
        for wanted, found in zip(tree_leaves(call(model, inputs)), tree_leaves(call(fast, inputs)), strict=True):
            if isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
                assert (found - wanted).square().mean().sqrt() <= 1e-3 * wanted.square().mean().sqrt() + 1e-6
