"""Record a golden: fill the authors' model by names and shapes, run it on inputs generated from names, write the outputs.

    python -m tests.golden.write swin-tiny_w7_224 --model swin_transformer:SwinTransformer \
        --config '{"img_size": 224}' \
        --input x=2,3,224,224 --source "microsoft/Swin-Transformer@COMMIT models/swin_transformer.py SwinTransformer"

The module of `--model` must be importable: put a checkout of the authors' repository on PYTHONPATH. Its output may be a tensor, a list or
tuple of tensors (recorded as output_0, output_1, ...), or a dict of them. `--run MODULE:FUNCTION` names a function (model, **inputs)
-> dict of tensors for models that are called in another way, or whose intermediate values are wanted.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.golden import FOLDER, fill_value, make_input

MOST = 8192
"""Elements of an output that are stored; of a larger one every k-th."""


def outputs_of(value: Any) -> dict[str, Tensor]:
    """Return the tensors of a model's output by name."""
    if isinstance(value, Tensor):
        return {"output": value}
    if isinstance(value, list | tuple):
        return {f"output_{i}": part for i, part in enumerate(value) if isinstance(part, Tensor)}
    return {name: part for name, part in value.items() if isinstance(part, Tensor)}


def write(
    name: str,
    model: nn.Module,
    inputs: dict[str, dict[str, Any]],
    run: Callable[..., Any] | None = None,
    *,
    source: str,
    config: dict[str, Any],
    notes: str = "",
    overrides: list[tuple[str, str]] | tuple[()] = (),
    dtype: torch.dtype = torch.float64,
    folder: Path = FOLDER,
) -> dict[str, Any]:
    """Fill `model`, run it in eval mode without gradients, and write NAME.json and NAME.npz.

    Args:
        name: SLUG-VARIANT.
        model: the authors'; its parameters and buffers are overwritten.
        inputs: name -> {"shape": [...], "kind": "normal" | "uniform" | "randint:K"}.
        run: (model, **inputs) -> tensors; None: `model(**inputs)`, then `model(*inputs)` where the names are not its parameters'.
        source: "owner/repo@commit path Class", or "package==version Class".
        config: arguments that built the model.
        notes: what a reader must know to repeat it.
        overrides: (regular expression, rule) pairs for the fill, the first match by name: "keep", "zeros", "ones", "scale:S", "shift:B:S".
        dtype: of weights and inputs.
        folder: where the two files go.

    Returns:
        the content of NAME.json.

    Raises:
        ValueError: an output is not finite, so that overrides are needed to tame the fill.
    """
    model = model.to(dtype).eval()
    model.load_state_dict({key: fill_value(key, value, overrides) for key, value in model.state_dict().items()}, strict=True)
    tensors = {key: make_input(key, spec) for key, spec in inputs.items()}
    tensors = {key: x.to(dtype) if x.is_floating_point() else x for key, x in tensors.items()}
    with torch.no_grad():
        found = outputs_of(run(model, **tensors) if run is not None else model(*tensors.values()))
    arrays, described = {}, {}
    for key, value in found.items():
        flat = value.detach().double().reshape(-1)
        if not flat.isfinite().all():
            raise ValueError(f"{name}: the output {key} is not finite; tame the fill with --override 'NAME_PATTERN=scale:0.1'")
        stride = max(1, -(-flat.numel() // MOST))
        arrays[key] = flat[::stride].numpy()
        described[key] = {
            "shape": list(value.shape),
            "stride": stride,
            "mean": flat.mean().item(),
            "std": flat.std(unbiased=False).item(),
        }
    short = lambda kind: str(kind).removeprefix("torch.")
    doc = {
        "name": name,
        "source": source,
        "config": config,
        "notes": notes,
        "dtype": short(dtype),
        "overrides": [list(pair) for pair in overrides],
        "inputs": inputs,
        "outputs": described,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state": {key: [short(value.dtype), *value.shape] for key, value in model.state_dict().items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(doc, separators=(",", ":")) + "\n", encoding="utf-8")
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    return doc


def find(path: str) -> Any:
    """Return what "package.module:Name" stands for."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def parse_input(text: str) -> tuple[str, dict[str, Any]]:
    """Parse "x=2,3,224,224" or "labels=2:randint:1000"."""
    name, _, rest = text.partition("=")
    shape, _, kind = rest.partition(":")
    return name, {"shape": [int(n) for n in shape.split(",") if n], **({"kind": kind} if kind else {})}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="SLUG-VARIANT")
    parser.add_argument("--model", required=True, metavar="MODULE:CLASS", help="the authors' class or function that builds the model")
    parser.add_argument("--config", default="{}", help="its arguments as JSON")
    parser.add_argument("--input", action="append", required=True, metavar="NAME=SHAPE[:KIND]", help="in the order of the call")
    parser.add_argument("--run", metavar="MODULE:FUNCTION", help="(model, **inputs) -> dict of tensors")
    parser.add_argument("--source", required=True, help='"owner/repo@commit path Class"')
    parser.add_argument("--notes", default="")
    parser.add_argument("--override", action="append", default=[], metavar="PATTERN=RULE", help="of the fill, by name")
    parser.add_argument("--dtype", default="float64", choices=["float64", "float32"])
    given = parser.parse_args(arguments)
    config = json.loads(given.config)
    doc = write(
        given.name,
        find(given.model)(**config),
        dict(map(parse_input, given.input)),
        find(given.run) if given.run else None,
        source=given.source,
        config=config,
        notes=given.notes,
        overrides=[(pattern, rule) for pattern, _, rule in (text.rpartition("=") for text in given.override)],
        dtype=getattr(torch, given.dtype),
    )
    print(f"{FOLDER / given.name}.json: {doc['parameters']:,} parameters, outputs {', '.join(doc['outputs'])}")


if __name__ == "__main__":
    main()
