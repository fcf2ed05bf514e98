"""What is true of VAR alone: the authors' numbers, the cache, what each scale can see, editing, and its two learners."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.golden import RESULTS, assert_matches_golden, compare, fill_state, make_input, read_golden
from vitarium.catalog import find_model
from vitarium.errors import InputError, UsageError
from vitarium.generation import Generator
from vitarium.generation.var import VAR, VARTokenizer
from vitarium.generation.var.model import draw, official
from vitarium.generation.var.tokenizer import phi_of_scales
from vitarium.generation.var.transformer import ScaleTransformer, Steps

SMALL = dict(scales=(1, 2, 3, 4), dim=32, code_dim=16, vocab_size=512, image_size=64)


def in_scales(codes: Tensor, scales: tuple[int, ...] = (1, 2, 3, 4)) -> list[Tensor]:
    return list(codes.split([p * p for p in scales], 1))


def tokenizer_outputs(model: VARTokenizer, img: Tensor) -> dict[str, Tensor]:
    features = model.features(img)
    indices = model.quantizer(features).indices
    totals = model.totals(indices)
    ends = {"fhat": totals[-1], "fhat_first": totals[0], "rec": model.decode(indices)}
    return {"f": features, "indices": torch.cat(indices, 1).to(features.dtype), **ends}


def test_tokenizer_equals_the_authors():
    assert_matches_golden("var-vqvae_small", vitarium.create_model("var_tokenizer_256", **SMALL), tokenizer_outputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 1e-4)])
def test_transformer_equals_the_authors(dtype: torch.dtype, tolerance: float):
    """The golden was made in float32, which the authors' quantizer forces: float64 can be no nearer than float32's rounding."""
    doc = read_golden("var-transformer_d4")
    model = vitarium.create_model(
        "var_d16",
        depth=4,
        embed_dim=256,
        num_heads=4,
        tokenizer="var_tokenizer_256",
        tokenizer_arguments=SMALL,
        num_classes=10,
        image_size=64,
    )
    model.load_state_dict(official(fill_state(doc["state"], doc["overrides"])), strict=True)
    assert sum(p.numel() for p in model.parameters()) == doc["parameters"]
    model.to(dtype).eval()
    tokens, label = (make_input(name, doc["inputs"][name]) for name in ("tokens", "label"))
    with torch.no_grad():
        views = model.tokenizer.inputs(in_scales(tokens))
        image = model.generate(label, guidance=2.5, top_k=1, top_p=0)
        error = compare("var-transformer_d4", {"teacher_input": views, "logits": model.transformer(views, label), "greedy_image": image})
    assert error < tolerance
    if dtype is torch.float32:
        RESULTS.append(("var-transformer_d4", error))
