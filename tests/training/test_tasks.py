"""Tasks: their names, options, matching of labels, and answers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import vitarium
from tests.training.tiny import tiny_data, tiny_net
from vitarium.data.opening import KINDS_OF_LABELS, LABELS_OF_TASKS
from vitarium.errors import DataError, UsageError
from vitarium.training.tasks import find_task, list_tasks, parse_task, task_of

ANSWERS = {"classify", "multilabel", "segment", "restore", "retrieve", "encode", "autoencode", "explain", "reconstruct"}


@pytest.mark.parametrize("name", list_tasks())
def test_each_task_opens_data_of_its_kind_and_makes_itself_from_its_record(name: str):
    task = find_task(name)()
    assert task.name == name
    assert parse_task(json.loads(json.dumps(task.record()))) == task
    assert LABELS_OF_TASKS.get(name, name) == task.data_kind
    assert task.data_kind == "class" or task.data_kind in KINDS_OF_LABELS
    assert (task.result_kind is not None) == (name in ANSWERS)
    assert "{file}" in task.usage
    assert task.primary.best in ("max", "min")
    if task.result_kind is None:
        with pytest.raises(UsageError, match=f"trained to {name} has no answer for a single image; .*vitarium"):
            task.answers(torch.nn.Identity(), {})


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ("segment:kind=semantic", {"name": "segment", "kind": "semantic"}),
        ("panoptic", {"name": "segment", "kind": "panoptic"}),
        ("classification", {"name": "classify"}),
        ("restore:tile=64", {"name": "restore", "tile": 64, "overlap": 32}),
    ],
)
def test_spellings(text: str, record: dict):
    assert parse_task(text).record() == record


def test_mistakes_name_near_ones():
    with pytest.raises(UsageError, match="unknown task 'classifi'; did you mean classify"):
        parse_task("classifi")
    with pytest.raises(UsageError, match="did you mean tile"):
        parse_task("restore:tiles=3")
    with pytest.raises(UsageError, match="no data has labels of the kind 'segmen'; did you mean segment"):
        vitarium.open_data("scenes", task="segmen")


def test_classes_are_matched_by_name():
    model, data = tiny_net(), tiny_data(8, 5)
    task = find_task("classify")()
    model.labels = ["d", "x", "c", "b", "a"]
    matched = task.match(model, data)
    assert matched.classes == model.labels
    assert matched.val.targets == [model.labels.index(data.classes[t]) for t in data.val.targets]
    assert matched.val[2][1] == matched.val.targets[2]
    assert matched.val.describe(2) == data.val.describe(2)
    model.labels = ["a", "b", "c"]
    with pytest.raises(DataError, match="the model does not know 1 of the data's 4 classes, such as 'd'"):
        task.match(model, data)
    model.labels, model.num_classes = None, 3
    with pytest.raises(DataError, match="the model has 3 classes, the data has 4"):
        task.match(model, data)
    model.num_classes = 4
    assert task.match(model, data) is data


def test_labels_that_the_data_lacks_are_unknown():
    data = vitarium.open_data("scenes:task=thorax,length=20", task="multilabel", image_size=16)
    model = tiny_net()
    model.labels = [*reversed(data.classes), "something else"]
    matched = find_task("multilabel")().match(model, data)
    row = matched.val.targets[0]
    assert np.array_equal(row[:-1], np.asarray(data.val.targets[0])[::-1])
    assert np.isnan(row[-1])


def test_a_constant_answer_has_the_accuracy_of_the_largest_class():
    data = tiny_data(40, 20)
    most = max(set(data.train.targets), key=data.train.targets.count)
    assert find_task("classify")().baseline(data) == {"accuracy": data.val.targets.count(most) / 20}
    assert find_task("multilabel")().baseline(replace(data)) == {"auroc": 0.5}


def test_a_model_without_a_record_has_its_familys_task():
    assert task_of(vitarium.create_model("timm/vit_pico", num_classes=3)).name == "classify"
    assert task_of(vitarium.create_model("kmax_deeplab_pico")).record() == {"name": "segment", "kind": "panoptic"}
    assert task_of(vitarium.create_model("drct_pico")).name == "restore"
    assert task_of(vitarium.create_model("sit_flow_pico")).name == "generate"


def test_features_are_answers_of_encode():
    model = vitarium.create_model("convnext_pico", num_classes=0).eval()
    (answer,) = find_task("encode")().answers(model, {"image": torch.zeros(1, 3, 16, 16), "index": torch.tensor([0])})
    assert len(answer["features"]) == model.num_features
