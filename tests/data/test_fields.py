"""Collation by field: stacked, padded, packed, listed; markers of missing values; unchanged behaviour for pairs."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import default_collate

from vitarium.data.fields import PAIRS, Collate, Field, FieldTransform, Sample, lengths_of, listed, packed, padded, stacked, unpacked
from vitarium.data.image_set import View
from vitarium.data.loader import Loader, stack
from vitarium.errors import DataError, UsageError


def test_pairs_are_stacked_as_before():
    pairs = [(torch.randn(3, 4, 4), {"label": i, "box": torch.ones(4) * i}) for i in range(3)]
    for made in (stack(pairs), Collate(PAIRS)([Sample(image=a, target=b) for a, b in pairs])):
        assert torch.equal(made["image"], torch.stack([a for a, _ in pairs]))
        wanted = default_collate([b for _, b in pairs])
        assert all(torch.equal(made["target"][name], wanted[name]) for name in wanted)
    assert {name: (tuple(v.shape), v.dtype) for name, v in stack([]).items()} == {
        "image": ((0,), torch.float32),
        "target": ((0,), torch.int64),
    }


def test_every_kind_of_field_with_missing_values():
    fields = {
        "views": stacked(2, 3, optional=True),
        "image": padded(1, None, None, multiple=4, value=-1, optional=True),
        "text": packed(dtype=torch.int64, optional=True),
        "pose": listed(optional=True),
    }
    a = Sample(views=torch.ones(2, 3), image=torch.zeros(1, 3, 5), text=[1, 2, 3])
    b = Sample(image=torch.zeros(1, 6, 2), pose={"angle": 1})
    batch = Collate(fields)([a, b, Sample(text=[4])])
    assert batch["views"].sum((1, 2)).tolist() == [6, 0, 0]
    assert batch["image"].shape == (3, 1, 8, 8)
    assert batch["image_mask"].sum((1, 2)).tolist() == [15, 12, 0]
    assert (batch["image"].eq(-1).flatten(1).sum(1) + batch["image_mask"].flatten(1).sum(1)).tolist() == [64] * 3
    assert batch["text"].tolist() == [1, 2, 3, 4]
    assert batch["text_lengths"].tolist() == [3, 0, 1]
    assert batch["text_cu_seqlens"].tolist() == [0, 3, 3, 4]
    assert batch["text_cu_seqlens"].dtype == torch.int32
    assert batch["pose"] == [None, {"angle": 1}, None]
    present = {name: batch[f"{name}_present"].tolist() for name in fields}
    assert present == {
        "views": [True, False, False],
        "image": [True, True, False],
        "text": [True, False, True],
        "pose": [False, True, False],
    }
    rows, mask = unpacked(batch, "text", value=9)
    assert rows.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert mask.sum(1).tolist() == [3, 0, 1]


@pytest.mark.parametrize("samples", [[], [Sample(target=1)]])
def test_batches_without_any_value_keep_their_shapes(samples):
    fields = {
        "target": stacked(dtype=torch.int64),
        "a": stacked(3, optional=True),
        "b": padded(2, None, optional=True),
        "c": packed(None, 5, optional=True),
    }
    batch = Collate(fields)(samples)
    n = len(samples)
    assert batch["a"].shape == (n, 3)
    assert batch["b"].shape == (n, 2, 0)
    assert batch["b_mask"].shape == (n, 0)
    assert batch["c"].shape == (0, 5)
    assert batch["c_cu_seqlens"].tolist() == [0] * (n + 1)
    assert batch["target"].dtype == torch.int64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Field("stackd"), "did you mean stacked"),
        (lambda: padded(3, 4), "None on each padded axis"),
        (lambda: Field("stacked", (3, None)), "padded or packed where sizes differ"),
        (lambda: packed(3, None), "first axis alone"),
        (lambda: Field("stacked", optional=True), "declares its shape"),
        (lambda: Field("default", optional=True), "cannot be optional"),
        (lambda: padded(None, multiple=0), "at least 1"),
        (lambda: Collate({"index": stacked()}), "the loader adds it"),
        (lambda: Collate({"text": packed(), "text_lengths": stacked()}), "the field 'text' adds it"),
    ],
)
def test_declarations_that_cannot_be_collated(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_values_that_do_not_go_together():
    with pytest.raises(DataError, match="which is no tensor; transform it, or declare the field listed"):
        Collate({"text": stacked()})([Sample(text="words")])
    with pytest.raises(DataError, match=r"declared \(\*, 4\), got a value of shape \(3, 5\)"):
        Collate({"text": packed(None, 4)})([Sample(text=torch.zeros(3, 5))])
    assert Collate({"a": stacked()}, ignore=["note"])([Sample(a=1, note="x")])["a"].tolist() == [1]


def test_a_packed_field_needs_its_lengths():
    batch = Collate({"text": packed()})([Sample(text=[1.0, 2.0]), Sample(text=[3.0])])
    assert lengths_of({"text": batch["text"], "text_cu_seqlens": batch["text_cu_seqlens"]}, "text").tolist() == [2, 1]
    with pytest.raises(DataError, match=r"came without text_lengths \(B,\) or text_cu_seqlens"):
        lengths_of({"text": batch["text"]}, "text")
    with pytest.raises(DataError, match="add up to 1, and it has 3 rows"):
        unpacked(batch | {"text_lengths": torch.tensor([1])}, "text")
    with pytest.raises(DataError, match="no field 'txt'; did you mean text"):
        lengths_of(batch, "txt")


class Scenes:
    def __init__(self):
        self.targets = [0, 1]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Sample(image=torch.full((1, 2, 2), float(index)), target=index, text=[index])

    def describe(self, index):
        return str(index)


class Joint:
    joint = True

    def __call__(self, image, target):
        return image + 1, target + 10


def test_transforms_of_pairs_work_on_samples_and_views_keep_their_fields():
    fields = Collate({**PAIRS, "text": packed()})
    plain = next(iter(Loader(Scenes(), lambda image: image * 2, collate=fields, batch_size=2).epoch(0)))
    assert plain["image"].flatten().tolist() == [0] * 4 + [2] * 4
    assert plain["text"].tolist() == [0, 1]
    joint = next(iter(Loader(Scenes(), Joint(), collate=fields, batch_size=2).epoch(0)))
    assert joint["target"].tolist() == [10, 11]
    named = next(iter(Loader(Scenes(), FieldTransform(text=lambda t: t * 2), collate=fields, batch_size=2).epoch(0)))
    assert named["text"].tolist() == [0, 0, 1, 1]
    view = View(Scenes(), [1, 0], targets=[7, 8])
    assert [item["target"] for item in (view[0], view[1])] == [7, 8]
    assert view[0]["text"] == [1]
    assert View(Scenes(), [1], transform_target=lambda t: -t)[0]["target"] == -1
    assert list(View(Scenes(), [1])[0]) == ["image", "target", "text"]
    assert pickle.loads(pickle.dumps(fields))([Scenes()[0]])["text"].tolist() == [0]
