"""Properties of kMaX-DeepLab."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import vitarium
from tests import golden
from tests.golden import assert_matches_golden
from vitarium.catalog import families
from vitarium.data import open_data
from vitarium.data.transforms import Augment
from vitarium.errors import InputError, UsageError
from vitarium.perception.kmax_deeplab import KMaXDeepLab, assign, cluster_sums, losses
from vitarium.perception.kmax_deeplab.parts import resize
from vitarium.perception.pyramid import feature_maps
from vitarium.training import fit, load_recipe
from vitarium.training.learners import find_learner
from vitarium.training.optim import layer_scales


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


def test_equals_the_authors_model():
    """In float64 alone (measured: 4e-11), as the card asks: an assignment that flips by rounding changes all that follows."""
    model = vitarium.create_model("kmax_deeplab_convnext_tiny", drop_path_rate=0.0)
    assert_matches_golden("kmax_deeplab-convnext_tiny", model, everything, dtypes=(torch.float64,))


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


def pico(**options) -> KMaXDeepLab:
    torch.manual_seed(0)
    return vitarium.create_model("kmax_deeplab_pico", **options)


def restless(model: torch.nn.Module) -> torch.nn.Module:
    """Branches that begin as nothing get weights, so that they count."""
    for part in model.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.normal_(part.weight, 1.0, 0.1)
            torch.nn.init.normal_(part.bias, 0.0, 0.1)
    return model


@pytest.mark.identity
def test_every_pixel_belongs_to_one_cluster_and_sums_are_those_of_its_pixels():
    masks, values = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    clusters = assign(masks)
    assert torch.equal(F.one_hot(clusters, 5).sum(-1), torch.ones(2, 3, 4, dtype=torch.int64))
    sums = cluster_sums(clusters, values, 5)
    for i in range(5):
        expected = torch.stack([v[:, c == i].sum(1) for v, c in zip(values, clusters, strict=True)])
        torch.testing.assert_close(sums[..., i], expected)


@pytest.mark.identity
def test_no_gradient_passes_the_assignment():
    """A layer's masks get no gradient through the update, only through its own prediction."""
    layer = restless(pico().layers[0]).double()
    queries, x = torch.randn(2, 32, 16, dtype=torch.float64), torch.randn(2, 64, 4, 4, dtype=torch.float64)
    updated, _ = layer(queries, x)
    updated.square().sum().backward()
    assert all(p.grad is None for p in layer.predictor.parameters())
    assert layer.value.conv.weight.grad.abs().sum() > 0


@pytest.mark.identity
def test_permuted_queries_give_permuted_answers():
    model = restless(pico()).double().eval()
    image, order = torch.randn(1, 3, 64, 64, dtype=torch.float64), torch.randperm(16)
    with torch.no_grad():
        before = model(image)
        model.queries.copy_(model.queries[:, order])
        after = model(image)
    torch.testing.assert_close(after["masks"], before["masks"][:, order])
    torch.testing.assert_close(after["logits"], before["logits"][:, order])


@pytest.mark.identity
def test_a_perfect_prediction_is_matched_to_itself():
    labels, segments = torch.tensor([2, 0, 1]), torch.arange(64).view(8, 8) // 22
    masks = segments == torch.arange(3)[:, None, None]
    logits = F.one_hot(torch.tensor([2, 0, 1, 3, 3]), 4)[None] * 30.0
    sure = torch.cat([masks, torch.zeros(2, 8, 8)])[None] * 60.0
    matched = losses.match_and_prepare({"logits": logits, "masks": sure}, [{"labels": labels, "masks": masks}])
    assert [pair.tolist() for pair in matched.pairs[0]] == [[0, 1, 2], [0, 1, 2]]
    torch.testing.assert_close(matched.dice[0], torch.ones(3))
    segment_map, segments_info = pico(num_classes=3, things=[0]).panoptic(logits[0].softmax(-1)[:, :-1], sure[0].softmax(0))
    assert torch.equal(segment_map.sort().values.unique_consecutive().long(), torch.tensor([1, 2, 3]))
    assert [s["category_id"] for s in segments_info] == labels.tolist()


def test_the_authors_thresholds_of_each_data_set(tmp_path):
    """A thing of 60 % and stuff of 45 %: neither counts by the thresholds of COCO, both by those of ADE20K; a saved file keeps them."""
    classes = torch.tensor([[0.6, 0.1, 0.1], [0.1, 0.45, 0.1]])
    masks = torch.zeros(2, 4, 4)
    masks[0, :2], masks[1, 2:] = 0.9, 0.9
    coco, ade = (pico(num_classes=3, things=[0], **options) for options in ({}, dict(thing_threshold=0.4, stuff_threshold=0.4)))
    assert coco.panoptic(classes, masks)[1] == []
    vitarium.save(ade, tmp_path / "m.safetensors")
    for model in (ade, vitarium.load(tmp_path / "m.safetensors")):
        assert [segment["category_id"] for segment in model.panoptic(classes, masks)[1]] == [0, 1]
    with pytest.raises(UsageError, match="stuff_threshold must be a probability"):
        pico(stuff_threshold=1.5)


@pytest.mark.identity
def test_a_picture_alone_and_in_a_batch_is_the_same():
    model = restless(pico()).double().eval()
    image = torch.randn(3, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(image)["masks"][1:2], model(image[1:2])["masks"])


@pytest.mark.parametrize(("variant", "millions"), [("resnet50", 57), ("convnext_large", 232)])
def test_released_variants(variant: str, millions: float):
    """Sizes of the paper's table, which leaves the auxiliary head out (with it, ConvNeXt-T's 67.27 M stand in the golden)."""
    with torch.device("meta"):
        model = vitarium.create_model(f"kmax_deeplab_{variant}")
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("semantic_head.")) / 1e6
    assert count == pytest.approx(millions, rel=0.01)
    assert len(model.things) == 80
    assert model.queries.shape == (256, 128)


def test_pico_is_small():
    assert sum(p.numel() for p in pico().parameters()) < 300_000


def test_sizes_of_maps_are_those_of_the_authors():
    """129 pixels give 33, 17, 9 and 5 cells, with ConvNeXt and with ResNet."""
    for variant in ("convnext_tiny", "resnet50"):
        with torch.device("meta"):
            model = vitarium.create_model(f"kmax_deeplab_{variant}").eval()
            assert [x.shape[-1] for x in feature_maps(model.backbone, torch.empty(1, 3, 129, 129))] == [33, 17, 9, 5]


def test_reads_resnet_checkpoints_by_detectron2s_names():
    """The authors' ResNet-50 files have detectron2's names below `backbone.`; everything else is as with ConvNeXt."""
    with torch.device("meta"):
        ours = vitarium.create_model("kmax_deeplab_resnet50")
        state = {name.removeprefix("backbone."): x for name, x in ours.state_dict().items() if name.startswith("backbone.")}
    parts = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm", "bn1": "conv1.norm", "bn2": "conv2.norm", "bn3": "conv3.norm"}
    theirs = {}
    for name, tensor in state.items():
        for mine, other in parts.items():
            name = name.replace(f"{mine}.", f"{other}.")
        name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
        theirs[f"backbone.{name if name.startswith('res') else 'stem.' + name}"] = tensor
    assert "backbone.stem.conv1.norm.weight" in theirs
    assert "backbone.res5.0.shortcut.norm.running_mean" in theirs
    renamed = families("kmax_deeplab")[0].dialects["official"](theirs)
    assert set(renamed) == {f"backbone.{name}" for name in state}


def test_a_checkpoint_of_other_classes_keeps_all_but_the_class_layers(tmp_path):
    path = tmp_path / "model.safetensors"
    vitarium.save(pico(), path)
    other = vitarium.create_model("kmax_deeplab_pico", num_classes=5, things=[0, 1], checkpoint=path)
    assert torch.equal(other.layers[1].predictor.head.void.weight, pico().layers[1].predictor.head.void.weight)
    assert other.predictor.head.classes.out_channels == 5


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = restless(pico(num_classes=6, things=[1, 4])).eval()
    vitarium.save(model, tmp_path / "model.safetensors")
    again = vitarium.load(tmp_path / "model.safetensors")
    image = torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        assert torch.equal(model(image)["masks"], again(image)["masks"])
    assert again.things == (1, 4)


def test_fused_for_deployment_it_says_the_same():
    model, image = restless(pico()).double().eval(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = model(image)
        after = model.fuse()(image)
    assert not [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d) and part.num_features == 48]
    torch.testing.assert_close(after["masks"], before["masks"])


def test_compiles_without_breaks():
    model = pico(layers=[1, 0, 0], dec_depths=[1, 1, 1, 1]).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image)["masks"], model(image)["masks"])


@pytest.mark.parametrize("size", [(16, 16), (17, 63), (65, 65), (100, 20)])
def test_takes_any_size_from_the_least_on(size: tuple[int, int]):
    with torch.no_grad():
        found = pico().eval()(torch.randn(1, 3, *size))
    assert found["masks"].isfinite().all()
    assert found["masks"].shape[1] == 16


@pytest.mark.parametrize(("image", "words"), [((1, 3, 8, 64), "at least"), ((3, 64, 64), "batch axis"), ((1, 64, 64, 3), "channels")])
def test_refuses_what_it_cannot_take(image: tuple[int, ...], words: str):
    with pytest.raises(InputError, match=words):
        pico()(torch.zeros(image))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cross_attention": "sharp"}, "kmeans, softmax"),
        ({"things": [20]}, "14 classes"),
        ({"backbone": "timm/vit_pico", "backbone_arguments": {}}, "maps of strides"),
    ],
)
def test_refuses_what_it_cannot_be(options: dict, words: str):
    with pytest.raises(UsageError, match=words):
        pico(**options)


def test_softmax_in_place_of_k_means_trains_too():
    model = pico(cross_attention="softmax")
    model(torch.randn(2, 3, 32, 32))["masks"].square().mean().backward()
    assert model.layers[0].update.key.conv.weight.grad is not None


def test_predicts_at_the_size_of_the_picture():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    model = pico()
    segment_map, segments = model.predict_panoptic(picture)
    assert segment_map.shape == model.predict_semantic(picture).shape == (50, 90)
    assert set(segment_map.unique().tolist()) - {0} == {s["id"] for s in segments}
    assert model.predict_instances(picture)["masks"].shape[1:] == (50, 90)
    assert model.training  # looking leaves it as it was


def test_learns_from_pictures_with_segments(tmp_path):
    """Everything that `vitarium train` does, for four steps; and the answers that it draws."""
    recipe = load_recipe("kmax_deeplab_pico", ["budget.steps=4", "batch_size=4", "image_size=32", "objective.samples=32"])
    data = open_data("scenes:length=24", task="panoptic", image_size=32)
    learner = find_learner("kmax_deeplab").create("kmax_deeplab_pico", data, recipe)
    result = fit(learner, data, recipe, tmp_path)
    assert {"pq", "pq_things", "pq_stuff", "miou", "pixel_accuracy"} <= result.metrics.keys()
    assert {path.name.split("-")[0] for path in (tmp_path / "pictures").iterdir()} == {"clusters", "segments"}
    batch = learner.collate([learner.transform(None)(data.val[0][0], 0)])
    with torch.no_grad():
        (answer,) = learner.task.answers(learner.eval_model().eval(), batch)
    assert answer["_map"].shape == (32, 32)
    assert learner.task.draw(data.val[0][0], answer).width >= 240


def test_every_parameter_learns():
    model = pico()
    learner = find_learner("kmax_deeplab")(model)
    data = open_data("scenes:length=8", task="panoptic", image_size=32)
    transform = learner.transform(Augment(flip=0.5))
    found = learner(learner.collate([transform(*data.train[i]) for i in range(4)]))
    found["loss"].backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert not idle
    assert found["loss"].isfinite()


def test_pictures_without_segments_and_void_make_no_nan():
    model = pico()
    learner = find_learner("kmax_deeplab")(model)
    empty = {"masks": torch.zeros(0, 32, 32, dtype=torch.bool), "labels": torch.zeros(0, dtype=torch.int64), "size": torch.tensor([32, 32])}
    part = {"masks": torch.zeros(1, 32, 32, dtype=torch.bool), "labels": torch.tensor([3]), "size": torch.tensor([32, 32])}
    part["masks"][0, :9, :9] = True
    found = learner({"image": torch.randn(2, 3, 32, 32), "target": [empty, part]})
    found["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_layer_decay_slows_the_backbone_alone():
    scales = layer_scales(pico(), 0.1)
    assert {scale for name, scale in scales.items() if name.startswith("backbone.")} == {0.1}
    assert {scale for name, scale in scales.items() if not name.startswith("backbone.")} == {1.0}
