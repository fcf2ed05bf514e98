"""Explainers: the common interface, and properties of each."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import vitarium
from tests.explanation.known import SIZE, Patch, Pooled, evidence, images
from vitarium.errors import InputError, MissingExtra, UnsupportedModel, UsageError
from vitarium.explanation.explainers import create_explainer, list_explainers, scaled
from vitarium.explanation.faithfulness import pointing
from vitarium.explanation.reading import as_map, find_taps, read_maps, to_pixels

SMALL = {"rise": "rise:masks=40", "integrated_gradients": "integrated_gradients:steps=4", "smooth_grad": "smooth_grad:samples=2"}
ALONE = [name for name in list_explainers() if name != "t_tame"]


def vit(name: str = "timm/vit_pico", **options) -> nn.Module:
    torch.manual_seed(0)
    model = vitarium.create_model(name, num_classes=5, **options).eval()
    model.labels = list("abcde")
    return model


@pytest.mark.parametrize("name", ALONE)
def test_maps_lie_over_the_image_and_nothing_is_changed(name: str):
    model, image = vit(), images()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    maps = create_explainer(SMALL.get(name, name), model)(image, "c")
    assert maps.shape == (2, SIZE, SIZE)
    assert maps.dtype == image.dtype
    assert 0 <= maps.min() <= maps.max() <= 1
    assert not maps.requires_grad
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not image.requires_grad


@pytest.mark.parametrize("name", [n for n in ALONE if n not in ("random", "smooth_grad", "gradient_shap")])
def test_each_image_alone_and_the_prediction_by_default(name: str):
    model, image = vit().double(), images().double()
    explain = create_explainer(SMALL.get(name, name), model)
    maps = explain(image)
    predicted = model(image).argmax(1)
    torch.testing.assert_close(explain(image, predicted), maps, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cat([explain(i[None]) for i in image]), maps, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["gradient_input", "integrated_gradients", "occlusion", "rise:masks=600", "smooth_grad", "gradient_shap"])
def test_known_evidence_is_found(name: str):
    maps = create_explainer(name, Patch())(images(), "patch")
    assert pointing(maps, evidence()).tolist() == [1, 1]


def test_gradients_of_a_linear_model_are_its_terms():
    model, image = Patch(), images()
    want = scaled((model.weight[1] * image).sum(1).relu().detach())
    for name in ("gradient_input", "integrated_gradients"):
        torch.testing.assert_close(create_explainer(name, model)(image, 1), want, rtol=1e-4, atol=1e-5)


def test_grad_cam_of_a_pooled_convolution_is_cam():
    model, image = Pooled(), torch.randn(2, 3, 16, 16)
    cam = torch.einsum("c,bchw->bhw", model.head.weight[2], model.conv(image)).relu().detach()
    torch.testing.assert_close(
        create_explainer("grad_cam:tap=conv", model)(image, 2), scaled(to_pixels(cam, (16, 16))), rtol=1e-4, atol=1e-5
    )


def test_rollout_of_even_attention_is_even():
    model = vit()
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
    from vitarium.explanation.simple import Rollout

    explain = Rollout(model)
    with torch.no_grad():
        row = explain.relevance(images(), None)
    assert row.shape == (2, 4, 4)
    torch.testing.assert_close(row, row[:, :1, :1].expand_as(row), rtol=1e-5, atol=1e-7)
    assert create_explainer("rollout", model)(images()).max() < 1e-3 or row.std() < 1e-7


@pytest.mark.parametrize("name", ["timm/vit_pico", "timm/resnet_pico", "swin_pico", "convnext_pico", "convnext_iso_pico", "vim_pico"])
def test_grad_cam_works_on_every_kind_of_map(name: str):
    maps = create_explainer("grad_cam", vit(name))(images(), 1)
    assert maps.shape == (2, SIZE, SIZE)
    assert maps.isfinite().all()


@pytest.mark.parametrize(
    "make", ["swin_tiny_patch4_window7_224", "convnext_atto", "efficientnet_b0", "levit_128s", "vit_tiny_patch16_224", "vgg11"]
)
def test_taps_of_timms_models_lie_over_the_image(make: str):
    with torch.device("meta"):
        model = vitarium.create_model(f"timm/{make}", num_classes=3).eval()
        taps = find_taps(model)
        logits, maps = read_maps(model, torch.empty(2, 3, 224, 224), taps)
    assert logits.shape == (2, 3)
    assert len(maps) == 3
    assert all(m.shape[2] == m.shape[3] >= 3 and m.shape[1] >= 16 for m in maps), [m.shape for m in maps]


def test_taps_of_torchvisions_models_are_found_by_a_pass():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        for name in ("resnet18", "swin_t", "vit_b_16"):
            model = torchvision.models.get_model(name).eval()
            model.preprocessing = vitarium.catalog.Preprocessing(224)
            taps = find_taps(model)
            _, maps = read_maps(model, torch.empty(2, 3, 224, 224), taps)
            assert all(m.shape[2] == m.shape[3] and m.shape[1] > 16 for m in maps), (name, taps, [m.shape for m in maps])


def test_maps_of_images_that_are_not_square():
    assert as_map(torch.empty(1, 5, 12, 8), (96, 64)).shape == (1, 5, 12, 8)
    assert as_map(torch.empty(1, 12, 8, 5), (96, 64)).shape == (1, 5, 12, 8)
    tokens = torch.arange(97.0).view(1, 97, 1).expand(1, 97, 3)
    assert as_map(tokens, (96, 64))[0, 0, 0, :3].tolist() == [1, 2, 3]  # the class token is gone, row by row
    assert as_map(tokens, (96, 64)).shape == (1, 3, 12, 8)
    with pytest.raises(InputError, match="do not form a grid"):
        as_map(torch.empty(1, 50, 3), (96, 64))


def test_a_padded_map_is_cut_and_a_short_one_extended():
    ramp = torch.arange(4.0).expand(1, 4, 4)
    cut = to_pixels(ramp, (14, 14), (16, 16))
    assert torch.equal(cut, to_pixels(ramp, (16, 16))[:, :14, :14])
    extended = to_pixels(ramp, (18, 18), (16, 16))
    assert torch.equal(extended[:, :16, :16], to_pixels(ramp, (16, 16)))
    assert (extended[:, :, 16:] == 3).all()


def test_a_constant_map_says_nothing():
    assert scaled(torch.full((1, 4, 4), 7.0)).eq(0).all()


# ---- mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gradcam", "did you mean grad_cam"),
        ("nothing", "methods: grad_cam"),
        ("rise:mask=3", "did you mean masks"),
        ("rise:masks=0", "at least 1"),
        ("rise:masks=many", "whole number"),
        ("occlusion:window=2", "up to 1"),
        ("rise:masks", "NAME=VALUE"),
        ("grad_cam:tap=blocks.7", "no module"),
        ("t_tame", "vitarium train t_tame"),
    ],
)
def test_wrong_names_and_options(text: str, message: str):
    with pytest.raises(UsageError, match=message):
        create_explainer(text, vit())(images())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("f", "classes: a, b, c, d, e"),
        (5, "classes 0 to 4"),
        (-1, "classes 0 to 4"),
        ("7", "classes 0 to 4"),
        (torch.tensor([1]), "one for each of 2"),
    ],
)
def test_wrong_targets(target, message: str):
    with pytest.raises(UsageError, match=message):
        create_explainer("grad_cam", vit())(images(), target)


def test_wrong_images_and_models():
    with pytest.raises(InputError, match="batch axis"):
        create_explainer("grad_cam", vit())(images()[0])
    with pytest.raises(UsageError, match="a classifier"):
        create_explainer("gradient_input", nn.Conv2d(3, 4, 3))(images())
    with pytest.raises(UnsupportedModel):
        create_explainer("rollout", vit("swin_pico"))
    model = vit(depth=4)
    vitarium.apply(model, "evit:keep=0.5,blocks=[1]", quiet=True)
    with pytest.raises(InputError, match="token reduction"):
        create_explainer("rollout", model)(images())


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(MissingExtra, match=r"vitarium\[explain\]"):
        create_explainer("occlusion", Patch())
