"""The classification learner: losses, mixing and metrics against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vitarium
from tests.training.test_loader import Faulty
from tests.training.tiny import tiny_data, tiny_net
from vitarium.data import BadFiles
from vitarium.data.loader import seed_generators
from vitarium.errors import UsageError
from vitarium.training import ClassificationLearner, evaluate, predict_logits
from vitarium.training.classification import Loss, Mixing

IMAGE, TARGET = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1, 2])


def learner(**settings) -> ClassificationLearner:
    return ClassificationLearner(tiny_net(dropout=0.0), ClassificationLearner.Settings(**settings))


def test_cross_entropy_with_smoothing_and_soft_targets():
    ours = learner(loss=Loss(label_smoothing=0.1))
    logits = ours.model(IMAGE)
    batch = {"image": IMAGE, "target": TARGET}
    torch.testing.assert_close(ours.loss(batch)["loss"], F.cross_entropy(logits, TARGET, label_smoothing=0.1))
    soft = torch.softmax(torch.randn(7, 4), 1)
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ours.loss({"image": IMAGE, "target": soft})["loss"], expected)


def test_binary_cross_entropy_equals_timms():
    from timm.loss import BinaryCrossEntropy

    ours = learner(loss=Loss(name="binary", label_smoothing=0.1))
    expected = BinaryCrossEntropy(smoothing=0.1)(ours.model(IMAGE), TARGET)
    torch.testing.assert_close(ours.loss({"image": IMAGE, "target": TARGET})["loss"], expected)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("count", [1, 6, 7])
def test_mixed_targets_sum_to_one_and_images_in_equals_out(mode, count):
    ours = learner(loss=Loss(label_smoothing=0.1), mixing=Mixing(mixup=0.8, cutmix=1.0, mode=mode))
    seed_generators(1)
    before = IMAGE[:count].clone()
    image, shares = ours.mixed(IMAGE[:count], TARGET[:count])
    assert torch.equal(IMAGE[:count], before)
    assert image.shape == before.shape
    assert shares.shape == (count, 4)
    torch.testing.assert_close(shares.sum(1), torch.ones(count))
    if count % 2:
        assert torch.equal(image[-1], before[-1])
    else:
        assert not torch.equal(image, before)


def test_mixing_is_a_function_of_the_generators():
    ours = learner(mixing=Mixing(mixup=0.8, cutmix=1.0))
    results = []
    for _ in range(2):
        seed_generators(3, 4, 0)
        results.append(ours.mixed(IMAGE, TARGET))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_under_the_binary_loss_each_mixed_class_is_a_yes():
    ours = learner(loss=Loss(name="binary"), mixing=Mixing(mixup=0.8))
    seed_generators(1)
    _, shares = ours.mixed(IMAGE, TARGET)
    assert set(shares.unique().tolist()) <= {0.0, 1.0}
    assert shares[:6].sum(1).max() == 2


def test_a_model_with_two_heads_is_trained_on_both():
    model = vitarium.create_model("timm/deit_pico", num_classes=4)
    model.train()
    model.set_distilled_training(True)
    ours = ClassificationLearner(model)
    image = torch.randn(2, 3, 16, 16)
    first, second = model(image)
    expected = (F.cross_entropy(first, TARGET[:2]) + F.cross_entropy(second, TARGET[:2])) / 2
    torch.testing.assert_close(ours.loss({"image": image, "target": TARGET[:2]})["loss"], expected)


def test_a_model_without_classes_is_refused():
    with pytest.raises(UsageError, match="no classes to learn"):
        ClassificationLearner(nn.Identity())


def test_metrics_equal_their_definitions():
    data, net = tiny_data(), tiny_net()
    logits, targets, indices = predict_logits(net, data.val, batch_size=7)
    assert indices.tolist() == list(range(33))
    assert targets.tolist() == data.val.targets
    found = evaluate(net, data.val, batch_size=10)
    predicted, confidence = logits.argmax(1), logits.softmax(1).amax(1)
    assert found["accuracy"] == pytest.approx((predicted == targets).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    matrix = np.zeros((4, 4), int)
    np.add.at(matrix, (targets.numpy(), predicted.numpy()), 1)
    assert found["confusion_matrix"] == matrix.tolist()
    bins = (confidence * 15).long()
    gaps = [abs((predicted == targets)[bins == b].float().sum() - confidence[bins == b].sum()).item() for b in range(15)]
    assert found["calibration_error"] == pytest.approx(sum(gaps) / 33, abs=1e-5)
    assert "top5" not in found


def test_evaluation_leaves_modes_and_gradients_as_they_were():
    net = tiny_net()
    net.train()
    net.conv.eval()
    logits, _, _ = predict_logits(net, tiny_data().val)
    assert net.training
    assert net.drop.training
    assert not net.conv.training
    assert not logits.is_inference()
    net(IMAGE).sum().backward()
    assert net.head.weight.grad is not None


def test_images_that_cannot_be_read_do_not_count():
    bad = BadFiles(limit=0.2)
    logits, _, indices = predict_logits(tiny_net(), Faulty(12, _3="broken"), batch_size=5, bad_files=bad)
    assert len(logits) == 11
    assert 3 not in indices.tolist()
    assert len(bad) == 1


def test_mixing_ends_at_its_share_of_the_training():
    half = learner(mixing=Mixing(mixup=0.8, until=0.5))
    plain, found = half.criterion(half.model(IMAGE), TARGET), []
    for step in (0, 4, 5, 9):
        seed_generators(0)
        half.before_step(step, 10)
        found.append(torch.equal(half.loss({"image": IMAGE, "target": TARGET})["loss"], plain))
    assert found == [False, False, True, True]
