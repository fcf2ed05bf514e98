"""Matching and set losses: brute force, and transformers' implementations of DETR, Deformable DETR and Mask2Former."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from vitarium.perception.matching import Matcher, mask_ce_cost, mask_dice_cost, match, places_of, relative_boxes
from vitarium.perception.set_losses import FocalClasses, Masks, SetCriterion, SoftmaxClasses, box_losses, uncertain_points


def detections(classes: int = 5):
    """A prediction of 6 queries, and targets of 3 and 1 boxes in images of 40 x 50 pixels."""
    torch.manual_seed(0)
    middle, size = torch.rand(2, 6, 2) * 0.4 + 0.3, torch.rand(2, 6, 2) * 0.3 + 0.05
    prediction = {"logits": torch.randn(2, 6, classes), "boxes": torch.cat([middle, size], -1)}
    targets = []
    for count in (3, 1):
        low = torch.rand(count, 2) * 15
        boxes = torch.cat([low, low + 5 + torch.rand(count, 2) * 15], -1)
        targets.append({"labels": torch.randint(0, classes - 1, (count,)), "boxes": boxes, "size": torch.tensor([40, 50])})
    return prediction, targets


def theirs(prediction, targets):
    outputs = {"logits": prediction["logits"], "pred_boxes": prediction["boxes"]}
    return outputs, [{"class_labels": t["labels"], "boxes": relative_boxes(t)} for t in targets]


@pytest.mark.parametrize("shape", [(6, 4), (3, 5), (4, 4), (5, 0)])
def test_matching_is_the_cheapest(shape):
    cost = torch.rand(shape)
    ((rows, columns),) = match([cost])
    assert len(rows) == min(shape)
    if shape[0] >= shape[1]:
        best = min(sum(cost[r, c] for c, r in enumerate(order)) for order in itertools.permutations(range(shape[0]), shape[1]))
    else:
        best = min(sum(cost[r, c] for r, c in enumerate(order)) for order in itertools.permutations(range(shape[1]), shape[0]))
    assert float(cost[rows, columns].sum()) == pytest.approx(float(best))


def test_costs_that_are_not_finite_are_avoided():
    ((rows, columns),) = match([torch.tensor([[float("nan"), 1.0], [2.0, float("inf")]])])
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_detr_equals_transformers():
    reference = pytest.importorskip("transformers.loss.loss_for_object_detection")
    prediction, targets = detections(classes=5)
    outputs, labels = theirs(prediction, targets)
    matcher = reference.HungarianMatcher(1, 5, 2)
    pairs = Matcher(classes=1, l1=5, giou=2)(prediction, targets)
    for (rows, columns), (a, b) in zip(pairs, matcher(outputs, labels), strict=True):
        assert rows.tolist() == a.tolist()
        assert columns.tolist() == b.tolist()
    losses = reference.ImageLoss(matcher, 4, 0.1, ["labels", "boxes"])(outputs, labels)
    ours = SoftmaxClasses(0.1)(prediction, targets, pairs) | box_losses(prediction, targets, pairs)
    for mine, other in (("class", "loss_ce"), ("box", "loss_bbox"), ("giou", "loss_giou")):
        torch.testing.assert_close(ours[mine], losses[other])


def test_deformable_detr_equals_transformers():
    reference = pytest.importorskip("transformers.loss.loss_deformable_detr")
    prediction, targets = detections(classes=5)
    outputs, labels = theirs(prediction, targets)
    matcher = reference.DeformableDetrHungarianMatcher(2, 5, 2)
    pairs = Matcher(classes=2, l1=5, giou=2, focal=True)(prediction, targets)
    assert [[side.tolist() for side in pair] for pair in pairs] == [[side.tolist() for side in pair] for pair in matcher(outputs, labels)]
    losses = reference.DeformableDetrImageLoss(matcher, 5, 0.25, ["labels"])(outputs, labels)
    torch.testing.assert_close(FocalClasses()(prediction, targets, pairs)["class"], losses["loss_ce"])


def test_masks_equal_transformers():
    reference = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    logits, truth = torch.randn(3, 20), (torch.rand(2, 20) > 0.5).float()
    torch.testing.assert_close(mask_ce_cost(logits, truth), reference.pair_wise_sigmoid_cross_entropy_loss(logits, truth))
    torch.testing.assert_close(mask_dice_cost(logits, truth), reference.pair_wise_dice_loss(logits, truth))
    prediction = {"masks": torch.randn(1, 4, 5, 4)}
    targets = [{"labels": torch.tensor([0, 1]), "masks": (torch.rand(2, 5, 4) > 0.5)}]
    found = Masks()(prediction, targets, [(torch.tensor([1, 3]), torch.tensor([0, 1]))])
    chosen, wanted = prediction["masks"][0, [1, 3]].flatten(1), targets[0]["masks"].flatten(1).float()
    torch.testing.assert_close(found["mask"], reference.sigmoid_cross_entropy_loss(chosen, wanted, 2))
    torch.testing.assert_close(found["dice"], reference.dice_loss(chosen, wanted, 2))


def test_points_lie_where_a_mask_is_least_certain():
    masks = torch.linspace(9, -9, 16).expand(1, 16, 16)  # least certain in the middle
    places = uncertain_points(masks, 200)
    assert places.shape == (1, 200, 2)
    near = ((places[0, :, 0] - 0.5).abs() < 0.2).float().mean()
    assert near > 0.7  # of three times as many the nearest quarter, and some at random


def test_masks_at_points_learn():
    masks = torch.randn(1, 2, 8, 8, requires_grad=True)
    targets = [{"labels": torch.tensor([0]), "masks": torch.rand(1, 32, 32) > 0.5}]
    pairs = Matcher(classes=0, mask=5, dice=5, points=32)({"logits": torch.randn(1, 2, 3), "masks": masks}, targets)
    found = Masks(points=64)({"masks": masks}, targets, pairs)
    (found["mask"] + found["dice"]).backward()
    assert masks.grad[places_of(pairs)].abs().sum() > 0


def test_a_criterion_adds_layers_and_weights():
    prediction, targets = detections()
    earlier = {name: value.flip(1) for name, value in prediction.items()}
    terms = [SoftmaxClasses(), box_losses]
    weights = {"class": 1.0, "box": 5.0, "giou": 2.0}
    found = SetCriterion(Matcher(l1=5, giou=2), terms, weights)({**prediction, "aux": [earlier, earlier]}, targets)
    for name in weights:  # the order of the queries does not matter
        torch.testing.assert_close(found[f"{name}_aux"], 2 * found[name])
    torch.testing.assert_close(found["loss"], 3 * sum(weight * found[name] for name, weight in weights.items()))
    once = SetCriterion(Matcher(l1=5, giou=2), terms, weights, match_once=True)({**prediction, "aux": [earlier]}, targets)
    assert once["box_aux"] > once["box"]  # by the last layer's matching, flipped queries are wrong
    assert "box_aux" not in SetCriterion(Matcher(), terms, weights, supervise_aux=False)({**prediction, "aux": [earlier]}, targets)


def test_no_targets_at_all():
    prediction, _ = detections()
    targets = [{"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4), "size": torch.tensor([4, 4])}] * 2
    pairs = Matcher(l1=5, giou=2)(prediction, targets)
    found = SoftmaxClasses()(prediction, targets, pairs) | box_losses(prediction, targets, pairs)
    assert found["box"] == found["giou"] == 0
    torch.testing.assert_close(found["class"], F.cross_entropy(prediction["logits"].flatten(0, 1), torch.full((12,), 4)))
