"""Inputs of every registered model: wrong ones work or are refused by `InputError`, empty batches give empty results, half precision is
finite."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitarium
from vitarium.catalog import families
from vitarium.catalog.calling import call, example_inputs
from vitarium.errors import InputError
from vitarium.nn.inputs import check_floats, check_image, foreign_sizes

NAMES = [f"{f.name}_pico" for f in families() if "pico" in f.variants]
REFUSED = {
    "array",
    "list",
    "str",
    "image",
    "int",
    "extra axis",
    "complex",
    "bool",
    "meta",
    "sparse",
    "last",
    "more channels",
    "no channels",
}
"""Kinds of values that no model takes; of the others some are valid for some arguments."""


@functools.cache
def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return vitarium.create_model(name).eval()


def wrong_values(value: Tensor) -> Iterator[tuple[str, Any]]:
    """Yield kinds of wrong values of an argument, made from a valid one."""
    yield from {
        "array": value.numpy(),
        "list": value[0].tolist(),
        "none": None,
        "str": "cat.png",
        "image": Image.new("RGB", (8, 8)),
        "int": 3,
    }.items()
    yield from {"fewer axes": value[0], "extra axis": value[None], "scalar": value.new_zeros(())}.items()
    yield from {"complex": value.to(torch.complex64), "bool": value > 0, "meta": value.to("meta"), "sparse": value.to_sparse()}.items()
    if value.is_floating_point():
        yield from {"uint8": value.byte(), "int64": value.long(), "float64": value.double(), "bfloat16": value.bfloat16()}.items()
    else:
        yield from {"float": value.float(), "negative": value - 100, "large": value + 10**6}.items()
    yield from {"shorter": value[:1], "longer": torch.cat([value, value]), "empty": value[:0]}.items()
    if value.ndim >= 4:
        yield from {"last": value.movedim(1, -1), "more channels": torch.cat([value, value], 1), "no channels": value[:, :0]}.items()
        yield from {"no rows": value[..., :0, :], "no columns": value[..., :0], "one pixel": value[..., :1, :1]}.items()
        yield from {
            "7 x 7": value[..., :7, :7],
            "odd": value[..., :-1, :],
            "one row": value[..., :1, :],
            "wide": torch.cat([value] * 3, -1),
        }.items()


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_are_refused_by_one_kind_of_error(name: str):
    model = built(name)
    inputs = example_inputs(model, 2)
    with torch.no_grad():
        for argument, value in inputs.items():
            for kind, wrong in wrong_values(value):
                said = refusal(model, {**inputs, argument: wrong})
                if said is None:
                    assert kind not in REFUSED, f"{argument}: {kind} was accepted"
                else:
                    assert type(model).__name__ in said or argument in said, f"{argument}: {kind}: {said}"


def refusal(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """Return the message of a model's `InputError`, None if it works. Any other error fails the test."""
    try:
        call(model, inputs)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_gives_an_empty_result(name: str):
    model = built(name)
    with torch.no_grad():
        outputs = [call(model, {k: v[:count] for k, v in example_inputs(model, 2).items()}) for count in (0, 2)]
    empty, full = ([v for v in tensors(output) if v.ndim > 1] for output in outputs)
    assert empty
    assert [tuple(v.shape[1:]) for v in empty] == [tuple(v.shape[1:]) for v in full]
    assert all(v.shape[0] == 0 for v in empty)


def tensors(output: Any) -> list[Tensor]:
    """Return all tensors of an output."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_finite_where_float32_is(name: str):
    """With the initial weights in bfloat16 and float16; with ten times larger matrices in bfloat16, which has the range of float32.

    Float16 ends at 65504: activations of large weights that exceed it in float32 (convolutions between norms) cannot be held in it.
    """
    for dtype, factor in ((torch.bfloat16, 1), (torch.float16, 1), (torch.bfloat16, 10)):
        model = copy.deepcopy(built(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor if parameter.ndim > 1 else 1)
            inputs = example_inputs(model, 2)
            full = [v for v in tensors(call(model, inputs)) if v.is_floating_point()]
            half = {k: v.to(dtype) if v.is_floating_point() and k != "t" else v for k, v in inputs.items()}
            low = [v for v in tensors(call(model.to(dtype), half)) if v.is_floating_point()]
        assert all(v.isfinite().all() for v, w in zip(low, full, strict=True) if w.isfinite().all()), (dtype, factor)


def test_messages_state_the_fault_and_the_remedy():
    model = nn.Conv2d(3, 4, 1)
    good = torch.zeros(2, 3, 8, 8)
    for words, wrong in {
        "a list; convert it with torch.as_tensor": [[1.0]],
        r"an array \(2, 3, 8, 8\) of float32; convert it with torch.as_tensor": good.numpy(),
        r"an image of 8x6 pixels; model.preprocessing\(image\)\[None\]": Image.new("RGB", (8, 6)),
        "None; give it a tensor": None,
        "a str; vitarium.predict reads files": "cat.png",
        r"add a batch axis with image\[None\]": good[0],
        r"image.permute\(0, 3, 1, 2\)": good.movedim(1, -1),
        "create the model with in_chans=1": good[:, :1],
        "divide by 255": good.byte(),
        r"convert one of them with .to\(dtype\)": good.double(),
        r"move one of them with .to\(device\)": good.to("meta"),
        r"convert it with .to_dense\(\)": good.to_sparse(),
        "at least 4x4 pixels, got 8x2": good[..., :2],
    }.items():
        with pytest.raises(InputError, match=words):
            check_image(model, wrong, 3, min_size=4)
    check_image(model, good, 3, min_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        check_image(model, good.bfloat16(), 3)
    with pytest.raises(InputError, match=r"noise \(B, 5\), got torch.float32 \(2, 4\)"):
        check_floats(model, torch.zeros(2, 4), ("B", 5), "noise")


def test_the_sizes_of_a_wrapped_model_of_another_library_are_refused_in_words():
    model = built("t_tame_pico")
    with pytest.raises(InputError, match=r"TTAME does not take images of 12x12 pixels .* its own size is 16x16"):
        model(torch.zeros(1, 3, 12, 12))
    with pytest.raises(RuntimeError, match="a fault of its own"), foreign_sizes(model, torch.zeros(1, 3, 16, 16), 3):
        raise RuntimeError("a fault of its own")
