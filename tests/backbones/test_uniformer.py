"""What is true of UniFormer alone; what is true of every backbone is tested once, in test_contract.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.golden import assert_matches_golden, fill_value
from vitarium.backbones.uniformer import UniFormer, UniFormerDense, UniFormerLight, UniFormerTokenLabel, UniFormerVideo
from vitarium.backbones.uniformer.blocks import DividedBlock, GlobalBlock
from vitarium.backbones.uniformer.light import EvolvingBlock
from vitarium.errors import InputError, UsageError
from vitarium.nn import inflate, inflate_kernel


def stages_and_logits(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    _, maps = model.forward_intermediates(image)
    return {f"stage{i + 1}": m for i, m in enumerate(maps)} | {"logits": model(image)}


def filled(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: fill_value(name, tensor) for name, tensor in model.state_dict().items()})
    return model.double().eval()


def test_equals_the_authors_model():
    assert_matches_golden("uniformer-small", vitarium.create_model("uniformer_small"), stages_and_logits)


def test_light_equals_the_authors_model():
    def run(model: UniFormerLight, image: Tensor) -> dict[str, Tensor]:
        *_, (x, cls) = model.forward_tokens(image)
        return {"features": model.norm(x), "cls_token": cls, "logits": model(image)}

    assert_matches_golden("uniformer-xxs-128", vitarium.create_model("uniformer_light_xxs"), run)


def test_video_equals_the_authors_model():
    def run(model: UniFormerVideo, video: Tensor) -> dict[str, Tensor]:
        return {"features": model.forward_features(video), "logits": model(video)}

    assert_matches_golden("uniformer-video-small-8x96", vitarium.create_model("uniformer_video_small", num_classes=400), run)


def test_dense_equals_the_authors_model():
    def run(model: UniFormerDense, image: Tensor) -> dict[str, Tensor]:
        maps = model.forward_intermediates(image, intermediates_only=True)
        return {f"stage{i + 1}": m for i, m in enumerate(maps)}

    model = vitarium.create_model("uniformer_dense_small_h14", depths=(1, 1, 4, 1), window_size=7, num_classes=0)
    assert_matches_golden("uniformer-dense-hybrid-160x192", model, run)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("small", 21.545),
        ("small_plus", 24.03),
        ("base", 49.8),
        ("light_xxs", 10.215),
        ("light_xs", 16.5),
        ("tl_large", 100),
        ("video_small", 21.4),
    ],
)
def test_parameter_counts(name: str, millions: float):
    classes = 400 if name.startswith("video") else 1000
    with torch.device("meta"):
        model = vitarium.create_model(f"uniformer_{name}", num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
