"""Golden vectors: outputs of the authors' code for weights and inputs that are reproducible from names and shapes.

A golden is NAME.json (what was run: source, config, inputs, the state's names and shapes) and NAME.npz (every k-th element of what came
out). `assert_matches_golden` fills a state under the authors' names, loads it through the model's own rename table, runs the model in
float64 and in float32, and compares.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitarium.catalog import families

FOLDER = Path(__file__).parent
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # largest error over the output's standard deviation; may only be tightened

RESULTS: list[tuple[str, float]] = []
"""(golden, error in float64) of the comparisons of the running test; conftest moves them into the test's report."""


def read_golden(name: str) -> dict:
    """What NAME.json says."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def fill_value(name: str, tensor: Tensor, overrides: list[tuple[str, str]] | tuple = ()) -> Tensor:
    """The value that the tensor called `name` takes: a rule on name and shape alone. Integer tensors keep what they hold."""
    if not tensor.is_floating_point():
        return tensor
    noise = torch.from_numpy(np.asarray(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape)))).to(tensor)
    for pattern, rule in overrides:
        if re.search(pattern, name):
            kind, *numbers = rule.split(":")
            a, b = (*map(float, numbers), 0.0, 0.0)[:2]
            return {"keep": tensor, "zeros": 0 * noise, "ones": 0 * noise + 1, "scale": a * noise, "shift": a + b * noise}[kind]
    leaf = name.rsplit(".", 1)[-1]
    if tensor.ndim >= 2:
        return noise / 2 if tensor.shape[0] == 1 else noise / float(np.prod(tensor.shape[1:])) ** 0.5
    if leaf == "running_var":
        return 1 + 0.1 * noise.abs()
    if leaf.startswith(("gamma", "ls", "layer_scale")):
        return 0.5 + 0.1 * noise
    return 1 + 0.1 * noise if leaf.endswith("weight") else 0.1 * noise


def fill_state(shapes: dict[str, list], overrides: list | tuple = ()) -> dict[str, Tensor]:
    """A state of the names and shapes that a golden lists ({name: [dtype, *shape]}), filled by `fill_value`."""
    return {k: fill_value(k, torch.zeros(shape, dtype=getattr(torch, dtype)), overrides) for k, (dtype, *shape) in shapes.items()}


def make_input(name: str, spec: dict) -> Tensor:
    """The input called `name`: {"shape": [...], "kind": "normal" | "uniform" | "randint:K"}."""
    rng, shape = np.random.RandomState(zlib.crc32(("input:" + name).encode())), tuple(spec["shape"])
    kind, _, top = spec.get("kind", "normal").partition(":")
    if kind == "randint":
        return torch.from_numpy(np.asarray(rng.randint(0, int(top), shape), dtype=np.int64))
    return torch.from_numpy(np.asarray(rng.standard_normal(shape) if kind == "normal" else rng.random_sample(shape)))


def time_rates() -> Tensor:
    """The float32 rates (128,) of time embeddings, exp(-log(10000) k / 128), on the machine that made the goldens.

    The vector library rounds exp differently on other processors: single rates differ in the last bit, and angles of up to 999 times a rate
    enlarge this to 1e-5 of a network's output. Comparisons to 1e-9 use these rates.
    """
    return torch.from_numpy(np.load(FOLDER / "time_rates.npy"))


def compare(name: str, outputs: dict[str, Tensor]) -> float:
    """The largest error of the outputs against a golden, over each output's standard deviation."""
    doc, worst = read_golden(name), 0.0
    with np.load(FOLDER / f"{name}.npz") as arrays:
        for key, want in doc["outputs"].items():
            got = outputs[key]
            assert list(got.shape) == want["shape"], f"{key}: shape {list(got.shape)}, the golden has {want['shape']}"
            assert torch.isfinite(got).all(), f"{key} is not finite"
            flat = got.detach().double().reshape(-1)[:: want["stride"]].numpy()
            worst = max(worst, float(np.abs(flat - arrays[key]).max()) / (want["std"] or 1.0))
    return worst


def assert_matches_golden(
    name: str,
    model: nn.Module,
    run: Callable[..., dict[str, Tensor]],
    kept: dict[str, Tensor] | None = None,
    merged: int = 0,
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE),
) -> None:
    """The model, loaded with the golden's state under the authors' names, gives the golden's outputs.

    Args:
        name: golden, such as "swin-tiny_w7_224".
        model: of a registered family, built with the golden's config; its parameters are overwritten.
        run: (model, **inputs) -> the golden's outputs by name.
        kept: first values of tensors that the golden's overrides keep, by the authors' names.
        merged: how many fewer parameters the model has, because renaming makes one tensor of several.
        dtypes: float64 alone where the card asks for it, because a decision inside (an arg-max) makes a jump of any rounding.
    """
    doc = read_golden(name)
    official = next(f.dialects["official"] for f in families(name.split("-")[0]) if f.cls is type(model))
    model.double().load_state_dict(official(fill_state(doc["state"], doc["overrides"]) | (kept or {})), strict=True)
    assert sum(p.numel() for p in model.parameters()) == doc["parameters"] - merged
    inputs = {key: make_input(key, spec) for key, spec in doc["inputs"].items()}
    model.eval()
    for dtype in dtypes:
        tolerance = TOLERANCE[dtype]
        cast = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
        with torch.no_grad():
            error = compare(name, run(model.to(dtype), **cast))
        assert error <= tolerance, f"{name} in {dtype}: error {error:.2g} of a standard deviation, at most {tolerance:.0e} allowed"
        if dtype is torch.float64:
            RESULTS.append((name, error))
