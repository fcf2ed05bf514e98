"""From queries to maps: merging, instances, boxes, metrics, overlays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vitarium.errors import UsageError
from vitarium.perception.masks import best_instances, boxes_of, merge_by_argmax, merge_by_probability, restore_masks, semantic_map
from vitarium.perception.overlay import grid, overlay, segment_map_of
from vitarium.perception.segmentation import SegmentationLearner


def halves(*labels: int, classes: int = 3, sure: float = 0.9) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries with vertical stripes of a 6 x 12 image, of given classes."""
    width = 12 // len(labels)
    masks = torch.full((len(labels), 6, 12), 0.05)
    for i in range(len(labels)):
        masks[i, :, i * width : (i + 1) * width] = 0.9
    table = torch.full((len(labels), classes), (1 - sure) / classes)
    table[range(len(labels)), labels] = sure
    return table, masks


def test_stuff_of_one_class_merges_and_things_do_not():
    classes, masks = halves(0, 2, 0, 2)
    segment_map, segments = merge_by_probability(classes, masks, things=[0])
    assert [(s["category_id"], s["isthing"]) for s in segments] == [(0, True), (2, False), (0, True)]
    assert torch.equal(segment_map[0, ::3], torch.tensor([1, 2, 3, 2], dtype=torch.int32))


def test_a_query_that_finds_its_pixels_taken_is_dropped():
    classes, masks = halves(0, 1)
    classes, masks = torch.cat([classes, classes[:1]]), torch.cat([masks, masks[:1] * 0.8])
    segment_map, segments = merge_by_probability(classes, masks, things=[0, 1])
    assert len(segments) == 2
    assert segment_map.unique().tolist() == [1, 2]


@pytest.mark.parametrize(("sure", "things", "count"), [(0.6, [0, 1], 0), (0.6, [], 2), (0.45, [], 0), (0.75, [0, 1], 2)])
def test_thresholds_of_things_and_stuff(sure: float, things: list[int], count: int):
    assert len(merge_by_probability(*halves(0, 1, sure=sure), things)[1]) == count


def test_argmax_merging_equals_transformers():
    processing = pytest.importorskip("transformers.models.mask2former.image_processing_mask2former")
    from types import SimpleNamespace

    torch.manual_seed(0)
    logits = torch.randn(1, 8, 4) * 0.3
    logits[0, range(8), [0, 1, 2, 3, 0, 1, 2, 2]] += 9
    coarse = torch.randn(1, 8, 6, 6) * 6
    masks = torch.nn.functional.interpolate(coarse, size=(384, 384), mode="bilinear")
    outputs = SimpleNamespace(class_queries_logits=logits, masks_queries_logits=coarse)
    try:
        processor = processing.Mask2FormerImageProcessor()
    except (ImportError, AttributeError) as error:  # its own optional parts
        pytest.skip(str(error))
    (expected,) = processor.post_process_panoptic_segmentation(
        outputs, threshold=0.8, label_ids_to_fuse={2}, overlap_mask_area_threshold=0.6
    )
    segment_map, segments = merge_by_argmax(logits[0].softmax(-1), masks[0].sigmoid(), things=[0, 1], share=0.6)
    assert [s["category_id"] for s in segments] == [s["label_id"] for s in expected["segments_info"]]
    theirs = expected["segmentation"].clamp(min=0)
    assert ((segment_map > 0) == (theirs > 0)).float().mean() > 0.98


def test_semantic_maps_and_instances():
    classes, masks = halves(1, 0, 2)
    assert torch.equal(semantic_map(classes, masks).argmax(0)[0, ::4], torch.tensor([1, 0, 2]))
    found = best_instances(classes, masks, things=[0, 1], top=2)
    assert sorted(found["labels"].tolist()) == [0, 1]
    assert found["masks"].sum((1, 2)).tolist() == [24, 24]
    assert found["boxes"].tolist() == [[0, 0, 4, 6], [4, 0, 8, 6]]
    assert best_instances(classes, masks, things=[])["labels"].shape == (0,)


def test_boxes():
    masks = torch.zeros(3, 5, 7, dtype=torch.bool)
    masks[0, 1:3, 2:6], masks[1, 4, 0] = True, True
    assert boxes_of(masks).tolist() == [[2, 1, 6, 3], [0, 4, 1, 5], [0, 0, 0, 0]]
    assert boxes_of(masks[:0]).shape == (0, 4)


def test_masks_come_back_to_the_picture():
    ramp = torch.linspace(0, 1, 9).expand(1, 9, 9).contiguous()
    found = restore_masks(ramp, (33, 33), (17, 33), (34, 66))
    assert found.shape == (1, 34, 66)
    assert float(found.min()) == 0
    assert float(found.max()) == 1


def truth_and_answer():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :4], masks[1, 4:, :4], masks[2, 4:, 4:] = True, True, True
    target = {"masks": masks, "labels": torch.tensor([2, 0, 0]), "iscrowd": torch.zeros(3, dtype=torch.bool)}
    segment_map = torch.from_numpy(segment_map_of(masks.numpy()))
    segments = [dict(id=i + 1, category_id=int(c), isthing=int(c) < 2, score=1.0) for i, c in enumerate(target["labels"])]
    semantic = torch.where(masks[0], 2, 0)
    instances = {"masks": masks[1:], "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 0])}
    return target, segment_map, segments, semantic, instances


def test_the_truth_is_perfect_and_one_lost_thing_is_counted():
    from vitarium.perception.metrics import SegmentationMetrics

    metrics = SegmentationMetrics(3, [0, 1])
    target, *answer = truth_and_answer()
    metrics.update(target, *answer)
    found = metrics.compute()
    assert found["pq"] == found["sq"] == found["rq"] == found["pq_things"] == found["pq_stuff"] == found["miou"] == 1
    assert found["pq_of_class"] == {"0": 1.0, "2": 1.0}
    if "ap" in found:  # without pycocotools there is none
        assert found["ap"] == pytest.approx(1)
    segment_map, segments, semantic, instances = answer
    metrics.update(target, torch.where(segment_map == 3, 0, segment_map), segments[:2], semantic, instances)
    assert metrics.compute()["pq_of_class"]["0"] == pytest.approx(3 / 3.5)  # three found, one missed


def test_void_and_crowds_do_not_count():
    from vitarium.perception.metrics import SegmentationMetrics

    target, segment_map, segments, semantic, instances = truth_and_answer()
    target["iscrowd"][2] = True
    metrics = SegmentationMetrics(3, [0, 1])
    metrics.update(target, segment_map, segments, semantic, instances)
    found = metrics.compute()
    assert found["pq"] == 1
    assert found["miou"] == 1


def test_overlays_and_sheets():
    picture = Image.new("L", (16, 10), 128)
    segment_map = np.zeros((10, 16), np.int32)
    segment_map[2:8, 3:9] = 4
    plain = overlay(picture, segment_map)
    assert plain.size == (16, 10)
    assert plain.getpixel((15, 9)) == (128, 128, 128)
    assert plain.getpixel((5, 5)) != (128, 128, 128)
    assert overlay(picture, segment_map, {4: "thing 97"}).size == (240, 150)
    assert grid([[plain, plain], [plain]]).size[0] > 300


def test_a_learner_wants_a_segmenter_and_augmentations_that_keep_segments():
    import vitarium
    from vitarium.data.transforms import Augment

    with pytest.raises(UsageError, match="no segmenter"):
        SegmentationLearner(torch.nn.Linear(2, 2))
    learner = SegmentationLearner(vitarium.create_model("kmax_deeplab_pico"))
    with pytest.raises(UsageError, match=r"objective\.jitter"):
        learner.transform(Augment(scale=(0.5, 1.0)))
