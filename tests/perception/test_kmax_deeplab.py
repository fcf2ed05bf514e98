"""What is true of kMaX-DeepLab alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vitarium
from tests import golden
from tests.golden import assert_matches_golden
from vitarium.perception.kmax_deeplab import losses
from vitarium.perception.kmax_deeplab.parts import resize
from vitarium.perception.pyramid import feature_maps


def everything(model: torch.nn.Module, image: Tensor) -> dict[str, Tensor]:
    found = model(image)
    size = found["masks"].shape[-2:]
    maps = feature_maps(model.backbone, image)
    decoded = model.pixel_decoder(maps)
    return {
        "pred_logits": found["logits"],
        "pred_masks": found["masks"],
        "pixel_feature": found["pixels"],
        "panoptic_features": decoded[3],
        **{f"multi_scale{i}": decoded[i] for i in range(3)},
        "aux0_logits": found["aux"][0]["logits"],
        "aux0_masks": resize(found["aux"][0]["masks"], size),
        "aux_last_masks": resize(found["aux"][-1]["masks"], size),
        **{f"res{i + 2}": x for i, x in enumerate(maps)},
    }


def test_equals_the_authors_model(monkeypatch: pytest.MonkeyPatch):
    """float64 to 1e-6 as everywhere (measured: 4e-11). In float32 the filled batch norms amplify rounding to 1.1e-3 of the last logits,
    and an assignment that flips would change all that follows: the card asks for a comparison in float64."""
    monkeypatch.setitem(golden.TOLERANCE, torch.float32, 1e-2)
    assert_matches_golden("kmax_deeplab-convnext_tiny", vitarium.create_model("kmax_deeplab_convnext_tiny", drop_path_rate=0.0), everything)


def test_losses_and_matching_equal_the_authors():
    name = "kmax_deeplab-losses"
    doc = golden.read_golden(name)
    given = {key: golden.make_input(key, spec) for key, spec in doc["inputs"].items()}
    objects = torch.arange(doc["config"]["n_obj"])
    targets = [
        {"labels": given["labels"][i], "masks": given["segments"][i] == objects[:, None, None], "semantic": given["semantic"][i]}
        for i in range(2)
    ]
    prediction = {"logits": given["pred_logits"], "masks": given["pred_masks"], "pixels": F.normalize(given["pixel_feature"], dim=1)}
    found = losses.criterion()({**prediction, "semantic": given["aux_semantic_pred"]}, targets)
    matched = losses.match_and_prepare(prediction, targets)
    ours = dict(class_="ce", mask="mask", dice="dice", pixels="pixel_insdis", semantic="aux_semantic")
    outputs = {f"loss_{theirs}": found[mine.rstrip("_")][None] for mine, theirs in ours.items()} | {
        "matched_queries": torch.stack([queries for queries, _ in matched.pairs]),
        "matched_targets": torch.stack([chosen for _, chosen in matched.pairs]),
        "matched_dice": torch.stack(matched.dice),
        "matched_cls_prob": torch.stack(matched.probability),
    }
    error = golden.compare(name, outputs)
    assert error < 1e-12
    golden.RESULTS.append((name, error))
