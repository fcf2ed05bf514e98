"""Token labelling: MixToken against its definition, the loss against a written-out one, teachers of several kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import vitarium
from vitarium.errors import UsageError
from vitarium.training.token_labelling import TokenLabellingLearner, dense_scores, mixed_tokens, swapped

MODELS = {
    "uniformer_tl_pico": {},
    "svt_pico": {"token_label": True},
    "spectformer_h_pico": {"token_label": True},
}


def made(name: str = "uniformer_tl_pico", **settings) -> TokenLabellingLearner:
    torch.manual_seed(0)
    model = vitarium.create_model(name, num_classes=4, image_size=32, **MODELS[name])
    return TokenLabellingLearner(model, TokenLabellingLearner.Settings(**settings))


def batch(count: int = 4, size: int = 32) -> dict:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, 3, size, size, generator=generator)
    return {"image": image, "target": torch.arange(count) % 4, "index": torch.arange(count)}


@pytest.mark.parametrize("axes", [(1, 2), (2, 3)])
def test_a_box_comes_from_the_reversed_batch(axes):
    maps = torch.randn(3, 5, 6, 7)
    found = swapped(maps, (1, 3, 2, 4), axes)
    for i in range(3):
        expected = maps[i].clone()
        region = (slice(1, 3), slice(2, 4)) if axes == (1, 2) else (slice(None), slice(1, 3), slice(2, 4))
        expected[region] = maps[2 - i][region]
        assert torch.equal(found[i], expected)
    assert torch.equal(swapped(found, (1, 3, 2, 4), axes), maps)  # twice is nothing


@pytest.mark.parametrize("name", MODELS)
def test_a_box_of_everything_gives_the_reversed_batch(name):
    """Mixed in the whole map after the stem, the model sees the batch in reverse; put back, the tokens are those of each image."""
    learner = made(name).eval()
    image = batch()["image"]
    logits, tokens = learner.dense(image, None, 1)
    _, scale = learner.draw_box(image)
    height, width = tokens.shape[1:3]
    mixed_logits, mixed = learner.dense(image, (0, height, 0, width), scale)
    torch.testing.assert_close(mixed_logits, logits.flip(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(swapped(mixed, (0, height, 0, width), (1, 2)), tokens, rtol=1e-4, atol=1e-5)
    module, _ = learner.model.first_tokens
    assert not module._forward_hooks  # it is gone


def test_the_loss_follows_its_definition():
    learner = made(label_smoothing=0.2, mix=0.0, token_weight=0.7).eval()
    some = batch()
    losses = learner.loss(some)
    logits, tokens = learner.model.forward_dense(learner.model.forward_features(some["image"]))
    label = torch.full((4, 4), 0.05).scatter(1, some["target"][:, None], 0.85)
    of_image = -(label * logits.log_softmax(1)).sum(1).mean()
    of_tokens = -(label[:, None, None] * tokens.log_softmax(3)).sum(3).mean()
    assert float(losses["loss"]) == pytest.approx(float(of_image + 0.7 * of_tokens), rel=1e-5)


def test_the_label_is_mixed_by_the_area(monkeypatch):
    learner = made(label_smoothing=0.0, token_weight=0.0).eval()
    some, box = batch(), (0, 1, 0, 2)
    monkeypatch.setattr(learner, "draw_box", lambda image: (box, 2))
    loss = learner.loss(some)["loss"]
    logits, tokens = learner.dense(some["image"], box, 2)
    share = 2 / tokens[0, ..., 0].numel()
    expected = (1 - share) * F.cross_entropy(logits, some["target"]) + share * F.cross_entropy(logits, some["target"].flip(0))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_boxes_lie_in_the_map_and_have_the_area_of_their_share():
    learner = made()
    image = torch.zeros(2, 3, 256, 256)
    np.random.seed(0)
    drawn = [learner.draw_box(image) for _ in range(400)]
    side = 256 // learner.model.feature_info[-1]["reduction"]
    areas = []
    for box, scale in drawn:
        top, bottom, left, right = box or (0, 0, 0, 0)
        assert 0 <= top <= bottom <= side and 0 <= left <= right <= side  # noqa: PT018
        assert scale * side * learner.model.feature_info[0]["reduction"] == 256
        areas.append((bottom - top) * (right - left) / side**2)
    assert 0.2 < np.mean(areas) < 0.5  # half of the map on average, less what falls outside


def test_no_box_leaves_the_output():
    module = torch.nn.Identity()
    with mixed_tokens(module, None, (1, 2)):
        assert torch.equal(module(torch.ones(2, 3, 3, 1)), torch.ones(2, 3, 3, 1))


@pytest.mark.parametrize(
    "name",
    ["swin_pico", "convnext_pico", "uniformer_tl_pico", "timm/vit_pico", "timm/resnet_pico", "convit_pico", "uniformer_pico"],
)
def test_scores_by_place_of_teachers(name):
    """They are probabilities, those of the head at each place alone."""
    torch.manual_seed(0)
    size = 64 if "resnet" in name else 32
    teacher = vitarium.create_model(name, num_classes=4, image_size=size).eval()
    with torch.no_grad():
        scores = dense_scores(teacher, batch(size=size)["image"])
    assert scores.shape[:2] == (4, 4)
    assert scores.shape[2] == scores.shape[3] > 1
    torch.testing.assert_close(scores.sum(1), torch.ones_like(scores[:, 0]))
    if name == "uniformer_pico":
        with torch.no_grad():
            features = teacher.forward_features(batch()["image"])
            places = torch.stack([teacher.forward_head(features[:, :, i : i + 1, j : j + 1]) for i in range(2) for j in range(2)], 2)
        torch.testing.assert_close(scores[:, :, :2, :2].flatten(2), places.softmax(1))


def test_a_teacher_sets_the_targets_and_is_no_part_of_the_learner():
    torch.manual_seed(0)
    teacher = vitarium.create_model("swin_pico", num_classes=4, image_size=32)
    learner = made()
    names = set(learner.state_dict())
    learner.set_teacher(teacher)
    assert set(learner.state_dict()) == names
    assert not any(p.requires_grad for p in teacher.parameters())
    some = batch()
    tokens = torch.zeros(4, 2, 2, 4)
    targets = learner.token_targets(some["image"], torch.zeros(4, 4), tokens)
    torch.testing.assert_close(targets.sum(-1), torch.ones(4, 2, 2))
    assert learner.loss(some)["loss"].requires_grad


def test_models_and_teachers_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="token labelling trains models with a head of the tokens, which Swin has not"):
        TokenLabellingLearner(vitarium.create_model("swin_pico", num_classes=4))
    with pytest.raises(UsageError, match="which SVT has not"):
        TokenLabellingLearner(vitarium.create_model("svt_pico", num_classes=4))
    with pytest.raises(UsageError, match="the teacher has 5 classes, the data 4"):
        made().set_teacher(vitarium.create_model("swin_pico", num_classes=5))
    with pytest.raises(UsageError, match="gives no features by place"):
        dense_scores(torch.nn.Linear(2, 2), torch.zeros(1, 2))
