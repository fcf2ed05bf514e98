"""Stored probabilities of a teacher, and training on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.training.tiny import tiny_data, tiny_net, tiny_recipe, weights
from vitarium.data.loader import Loader
from vitarium.errors import DataError, UsageError
from vitarium.training import Recipe, find_learner, fit
from vitarium.training.distillation import DistillationLearner, LogitStore, check_store, record_type, save_logits, spread

PLAIN = ("mixing.mixup=0", "mixing.cutmix=0")


def recipe(*assignments: str) -> Recipe:
    """96 pictures in batches of 8, two a step: six steps an epoch."""
    return tiny_recipe(*PLAIN, "augment.erase=0.3", *assignments)


def teacher() -> nn.Module:
    torch.manual_seed(5)
    made = tiny_net(dropout=0.0)
    nn.init.normal_(made.head.weight)
    return made.eval()


def learner_on(folder: Path) -> DistillationLearner:
    return DistillationLearner(tiny_net(), DistillationLearner.Settings(store=str(folder)))


def test_is_found_by_its_name():
    assert find_learner("distillation") is DistillationLearner


@pytest.mark.identity
@pytest.mark.parametrize("k", [1, 3, 100])
def test_bytes_of_a_record(k: int):
    assert record_type(k, "float16").itemsize == 4 + 4 * k


@pytest.mark.identity
def test_shares_sum_to_one_and_keep_what_is_stored():
    shares = torch.randn(5, 10).softmax(1)
    values, classes = shares.topk(3, 1)
    target = spread(classes, values, 10)
    torch.testing.assert_close(target.sum(1), torch.ones(5))
    assert torch.equal(target.gather(1, classes), values)
    others = target.scatter(1, classes, -1.0)
    assert all(len(row[row >= 0].unique()) == 1 for row in others)
    whole = spread(*shares.topk(10, 1)[::-1], 10)
    assert torch.equal(whole, shares)


@pytest.mark.identity
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_finds_its_answers_and_its_pixels(tmp_path: Path, workers: int):
    """The loss on stored answers is that with the teacher in memory: exactly with all classes in float32, else to float16's rounding."""
    data, made, master = tiny_data(), recipe(), teacher()
    exact = save_logits(master, tiny_net(), data, made, tmp_path / "exact", epochs=2, values="float32")
    rounded = save_logits(master, tiny_net(), data, made, tmp_path / "rounded", epochs=2)
    student = learner_on(tmp_path / "exact")
    options = dict(batch_size=8, collate=student.collate, seed=made.seed, shuffle=True, drop_last=True, num_workers=workers)
    loader = Loader(data.train, student.transform(made.augment), **options)
    for epoch in (0, 1):
        for batch in loader.epoch(epoch):
            with torch.no_grad():
                online = master(batch["image"]).softmax(1)
                logits = student.model(batch["image"])
            torch.testing.assert_close(exact.targets(batch["index"], batch["seed"]), online, rtol=0, atol=1e-6)
            losses = [F.cross_entropy(logits, s.targets(batch["index"], batch["seed"])) for s in (exact, rounded)]
            expected = F.cross_entropy(logits, online)
            assert losses[0] == pytest.approx(expected.item(), abs=1e-6)
            assert losses[1] == pytest.approx(expected.item(), abs=1e-3)
    loader.close()


@pytest.mark.identity
def test_a_seed_gives_the_same_pixels_again():
    data, made = tiny_data(), recipe()
    transform = DistillationLearner(tiny_net()).transform(made.augment)
    for index in range(8):
        picture, target = data.train[index]
        image, (same, seed) = transform(picture, target)
        assert same == target
        assert torch.equal(transform.again(picture, seed), image)
    assert not torch.equal(transform.again(picture, seed + 1), image)


def test_trains_without_the_teacher(tmp_path: Path):
    """Four epochs, twice: the ends are the same bit for bit."""
    data, made = tiny_data(), recipe()
    save_logits(teacher(), tiny_net(), data, made, tmp_path / "store", k=2)
    assert LogitStore(tmp_path / "store").header["epochs"] == 4
    ends = []
    for name in ("a", "b"):
        student = learner_on(tmp_path / "store")
        before = weights(student.model)
        result = fit(student, data, made, tmp_path / name)
        assert np.isfinite(result.metrics["accuracy"])
        ends.append(weights(student.model))
        assert any(not torch.equal(before[key], value) for key, value in ends[-1].items())
    assert all(torch.equal(ends[0][key], value) for key, value in ends[1].items())


def test_more_epochs_than_stored_are_refused(tmp_path: Path):
    data, made = tiny_data(), recipe()
    save_logits(teacher(), tiny_net(), data, made, tmp_path / "store", epochs=1)
    with pytest.raises(UsageError, match="train at most 1 epochs"):
        fit(learner_on(tmp_path / "store"), data, made, tmp_path / "run")
    save_logits(teacher(), tiny_net(), data, made, tmp_path / "store", epochs=4)  # goes on
    fit(learner_on(tmp_path / "store"), data, made, tmp_path / "other")


def test_other_conditions_are_refused(tmp_path: Path):
    data, made, student = tiny_data(), recipe(), tiny_net()
    save_logits(teacher(), student, data, made, tmp_path / "store", epochs=1)
    for other, word in ((recipe("seed=3"), "seed"), (recipe("augment.flip=0.1"), "augment")):
        with pytest.raises(UsageError, match=f"another {word}"):
            learner_on(tmp_path / "store").prepare(data, other)
        with pytest.raises(UsageError, match=f"another {word}"):
            save_logits(teacher(), student, data, other, tmp_path / "store", epochs=1)
    with pytest.raises(UsageError, match="another data"):
        learner_on(tmp_path / "store").prepare(tiny_data(train=95), made)
    learner_on(tmp_path / "store").prepare(data, made)


def test_the_check_asks_the_teacher_again(tmp_path: Path):
    data, made, student = tiny_data(), recipe(), tiny_net()
    store = save_logits(teacher(), student, data, made, tmp_path / "store", k=3, epochs=1)
    found = check_store(store, teacher(), student, data, made)
    assert found["value_error"] < 1e-3
    assert found["class_mismatch"] == 0
    other = teacher()
    nn.init.normal_(other.head.weight)
    found = check_store(store, other, student, data, made)
    assert found["value_error"] > 1e-2
    assert found["class_mismatch"] > 0


def test_a_teacher_with_its_own_normalisation(tmp_path: Path):
    """It sees the student's pixels in the range it knows."""
    data, made, student, plain, master = tiny_data(), recipe(), tiny_net(), teacher(), teacher()
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    master.preprocessing = replace(master.preprocessing, mean=mean, std=std)
    own = torch.tensor(student.preprocessing.std)[:, None, None] / 0.5
    shift = (torch.tensor(student.preprocessing.mean)[:, None, None] - 0.5) / 0.5
    inner = teacher()
    plain.forward = lambda image: inner(image * own + shift)
    stores = [save_logits(m, student, data, made, tmp_path / str(i), epochs=1) for i, m in enumerate((plain, master))]
    a, b = (store.records(0)["values"].astype(np.float32) for store in stores)
    np.testing.assert_allclose(a, b, atol=2e-3)


def test_made_by_training_itself(tmp_path: Path):
    """`objective.teacher` names a saved model; the store is made once."""
    import vitarium
    from vitarium.data import open_data
    from vitarium.training import load_recipe

    data = open_data("digits")
    vitarium.save(vitarium.create_model("tinyvit_pico", num_classes=10), tmp_path / "teacher.safetensors")
    given = [f"objective.teacher={tmp_path / 'teacher.safetensors'}", f"objective.store={tmp_path / 'store'}", "budget.steps=10"]
    made = load_recipe("distillation_pico", given)
    student = find_learner("distillation").create("tinyvit_pico", data, made)
    assert student.store.header["k"] == 3
    assert student.store.header["epochs"] == 1


def test_refusals(tmp_path: Path):
    data = tiny_data()
    with pytest.raises(UsageError, match="mixup=0"):
        save_logits(teacher(), tiny_net(), data, tiny_recipe(), tmp_path)
    with pytest.raises(UsageError, match="the teacher has 4 classes, the data has 2"):
        save_logits(teacher(), tiny_net(), replace(data, classes=["a", "b"]), recipe(), tmp_path)
    with pytest.raises(UsageError, match="budget in minutes"):
        save_logits(teacher(), tiny_net(), data, recipe("budget={minutes: 1}"), tmp_path)
    with pytest.raises(UsageError, match=r"set objective\.store"):
        DistillationLearner(tiny_net()).prepare(data, recipe())
    with pytest.raises(DataError, match="holds no stored answers"):
        learner_on(tmp_path / "nothing").prepare(data, recipe())
    save_logits(teacher(), tiny_net(), data, recipe(), tmp_path / "store", epochs=1)
    (tmp_path / "store" / "epoch-0000.npy").write_bytes(b"not an array")
    with pytest.raises(DataError, match="cannot be read"):
        LogitStore(tmp_path / "store").find(torch.tensor([0]), torch.tensor([1]))
