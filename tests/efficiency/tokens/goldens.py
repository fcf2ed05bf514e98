"""Goldens of methods: the authors' patched model against timm's model with our method on it."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import vitarium
from tests.golden import RESULTS, TOLERANCE, compare, fill_state, make_input, read_golden
from vitarium.catalog.methods import Method


def assert_model_matches(golden: str, method: Method, run: Callable[[nn.Module, Tensor], dict[str, Tensor]]) -> None:
    """A ViT of the golden's shape, filled as the golden says, reduced by the method, gives the golden's outputs.

    The ViT is timm's; ours, where the image has another size than the model, because timm resamples positions in another way.
    """
    doc = read_golden(golden)
    config = {key: doc["config"][key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")}
    if doc["inputs"]["image"]["shape"][-1] == config["img_size"]:
        model = timm.create_model("vit_tiny_patch16_224", **config).double().eval()
    else:
        config["image_size"] = config.pop("img_size")
        model = vitarium.create_model("thorax_mae_small", global_pool="token", **config).double().eval()
    model.load_state_dict(fill_state(doc["state"], doc["overrides"]), strict=True)
    assert sum(p.numel() for p in model.parameters()) == doc["parameters"]
    vitarium.apply(model, method, quiet=True)
    image = make_input("image", doc["inputs"]["image"])
    for dtype, tolerance in TOLERANCE.items():
        with torch.no_grad():
            outputs = run(model.to(dtype), image.to(dtype))
        if dtype is torch.float32:  # ranks of nearly equal scores may change places
            outputs |= {key: torch.from_numpy(_recorded(golden, key)) for key in outputs if key != "logits"}
        error = compare(golden, outputs)
        assert error <= tolerance, f"{golden} in {dtype}: error {error:.2g}"
        if dtype is torch.float64:
            RESULTS.append((golden, error))


def _recorded(golden: str, key: str):
    import numpy as np

    from tests.golden import FOLDER

    with np.load(FOLDER / f"{golden}.npz") as arrays:
        return arrays[key].reshape(read_golden(golden)["outputs"][key]["shape"])


def assert_functions_match(golden: str, run: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> None:
    """Pure functions on the golden's metric and x, in float64."""
    doc = read_golden(golden)
    metric, x = (make_input(key, doc["inputs"][key]) for key in ("metric", "x"))
    error = compare(golden, run(metric, x))
    assert error <= 1e-12
    RESULTS.append((golden, error))
