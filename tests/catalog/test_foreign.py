"""Models of transformers: features, pooling and maps are the library's own numbers; folders open with and without a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.anatomy.models import fill
from vitarium.catalog.features import pooled_features
from vitarium.catalog.heads import fresh_names, has_trained_head, require_head
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.catalog.transformers_models import TransformersBackbone, TransformersClassifier, VisionTower, wrap
from vitarium.errors import CheckpointError, InputError, UsageError
from vitarium.training.optim import layer_scales

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4, hidden_act="gelu"
)
BIASED = dict(use_relative_position_bias=True, use_shared_relative_position_bias=False)
SWIN = dict(embed_dim=12, depths=[2, 1], num_heads=[2, 2], window_size=2, image_size=16, patch_size=2)
# name -> (class, configuration, its values, tokens before the patches; None for a pyramid)
MODELS: dict[str, tuple[str, str, dict[str, Any], int | None]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", SIZES, 1),
    "deit": ("DeiTForImageClassification", "DeiTConfig", SIZES, 2),
    "deit_teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", SIZES, 2),
    "beit": ("BeitForImageClassification", "BeitConfig", SIZES | BIASED, 1),
    "beit_token": ("BeitForImageClassification", "BeitConfig", SIZES | dict(use_mean_pooling=False), 1),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", SIZES | dict(use_swiglu_ffn=True), 1),
    "dinov2_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", SIZES, 5),
    "clip": ("CLIPForImageClassification", "CLIPConfig", SIZES, 1),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", SIZES, 0),
    "clip_tower": ("CLIPVisionModel", "CLIPVisionConfig", SIZES, 1),
    "siglip_tower": ("SiglipVisionModel", "SiglipVisionConfig", SIZES, 0),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN, None),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", dict(num_stages=2, depths=[1, 2], hidden_sizes=[8, 16]), None),
}
TOWERS = [name for name in MODELS if name.endswith("_tower")]
PLAIN = [name for name, row in MODELS.items() if row[3] is not None]


def library_model(name: str, num_labels: int = 5) -> Any:
    """transformers' own module, in float64, filled so that no part is neutral."""
    cls, config, values, _ = MODELS[name]
    pair = "vision_config" if name in ("clip", "siglip") else None
    made = getattr(transformers, config)(**({pair: values} if pair else values), **({} if name in TOWERS else dict(num_labels=num_labels)))
    torch.manual_seed(0)
    return fill(getattr(transformers, cls)(made)).double()


def make(name: str, num_labels: int = 5) -> tuple[Any, TransformersBackbone]:
    theirs = library_model(name, num_labels)
    module = VisionTower(theirs, num_labels).double().eval() if name in TOWERS else theirs
    model = wrap(module, Preprocessing(16))
    assert isinstance(model, TransformersBackbone)
    return theirs, model.eval()


def images(size: int = 16, width: int | None = None) -> Tensor:
    return torch.randn(2, 3, size, width or size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10 * float(want.abs().max()))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_features_and_pooling_are_the_librarys(name):
    theirs, model = make(name)
    image, prefix = images(), MODELS[name][3]
    out = theirs(pixel_values=image, output_hidden_states=True)
    if name in TOWERS:
        want = model.model.classifier(out.pooler_output)
        close(model.forward_head(model.forward_features(image), pre_logits=True), out.pooler_output)
    else:
        want = out.logits
        seen: list[Tensor] = []
        head = model.get_classifier()
        hook = (head[0] if isinstance(head, tuple) else head).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        theirs(pixel_values=image)
        hook.remove()
        if not isinstance(head, tuple):
            close(pooled_features(model, image), seen[0])
    close(model(image), want)
    features = model.forward_features(image)
    close(model.forward_head(features), want)
    last = model.tower(pixel_values=image).last_hidden_state
    if prefix is None and features.shape != last.shape:
        last = last.transpose(1, 2).unflatten(2, tuple(features.shape[2:]))
    close(features, last)
    assert features.shape[1 if prefix is None else 2] == model.num_features
    assert pooled_features(model, image).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_intermediates_are_the_librarys_hidden_states(name):
    _, model = make(name)
    image, prefix = images(), MODELS[name][3]
    features, maps = model.forward_intermediates(image)
    close(features, model.forward_features(image))
    assert len(maps) == len(model.feature_info)
    for i, (found, info) in enumerate(zip(maps, model.feature_info, strict=True)):
        side = 16 // info["reduction"]
        assert found.shape == (2, info["num_chs"], side, side)
        assert isinstance(model.get_submodule(info["module"]), nn.Module)
        if prefix is None:
            continue
        want = model.tower(pixel_values=image, output_hidden_states=True).hidden_states[i + 1]
        if i < len(maps) - 1:  # some towers list the last one after their norm
            close(found, want[:, prefix:].transpose(1, 2).unflatten(2, (side, side)))
    (only,) = model.forward_intermediates(image, [-2], intermediates_only=True)
    close(only, maps[-2])
    assert len(model.forward_intermediates(image, 1, intermediates_only=True)) == 1
    with pytest.raises(InputError, match="is not among them"):
        model.forward_intermediates(image, [len(maps)])
    with pytest.raises(InputError, match="gives NCHW"):
        model.forward_intermediates(image, output_fmt="NHWC")


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_normed_maps_and_prefix_tokens(name):
    _, model = make(name)
    image, prefix = images(), MODELS[name][3]
    ((patches, before),) = model.forward_intermediates(
        image, 1, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    want = model.forward_features(image)
    want = model.tower.post_layernorm(want) if name.startswith("clip") else want  # transformers leaves CLIP's tokens without it
    close(torch.cat([before, patches], 1), want)
    assert (model.num_prefix_tokens, before.shape[1], patches.shape[1]) == (prefix, prefix, 16)


@pytest.mark.parametrize("name", ["swin", "convnext"])
@torch.no_grad()
def test_maps_of_pyramids(name):
    """transformers' own backbone classes give the same maps, behind a norm of their own (fresh here: plain standardisation)."""
    _, model = make(name)
    image = images()
    backbone = getattr(transformers, {"swin": "SwinBackbone", "convnext": "ConvNextBackbone"}[name])
    config = type(model.model.config)(**MODELS[name][2], out_indices=[1, 2])
    body = backbone(config).double().eval()
    getattr(body, "swin", body).load_state_dict(model.tower.state_dict(), strict=name == "swin")
    want = [layer_norm(m) for m in model.forward_intermediates(image, intermediates_only=True)]
    for found, theirs_map in zip(want, body(pixel_values=image).feature_maps, strict=True):
        torch.testing.assert_close(found, theirs_map, rtol=1e-4, atol=1e-4)


def layer_norm(x: Tensor) -> Tensor:
    """What transformers' backbones do to each map, with fresh norms."""
    return nn.functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_other_image_sizes_are_interpolated_as_transformers_does(name):
    theirs, model = make(name)
    image = images(24)
    asks = name not in ("dinov2", "dinov2_registers", "convnext")
    out = theirs(pixel_values=image, **({"interpolate_pos_encoding": True} if asks else {}))
    close(model(image), model.model.classifier(out.pooler_output) if name in TOWERS else out.logits)
    (found,) = model.forward_intermediates(image, 1, intermediates_only=True)
    assert found.shape[-2:] == (24 // model.feature_info[-1]["reduction"],) * 2


@torch.no_grad()
def test_maps_of_oblong_images():
    for name in ("vit", "swin", "convnext"):
        _, model = make(name)
        maps = model.forward_intermediates(images(16, 24), intermediates_only=True)
        assert maps[-1].shape[-2:] == (16 // model.feature_info[-1]["reduction"], 24 // model.feature_info[-1]["reduction"])


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_exchanged(name):
    _, model = make(name)
    image = images()
    model.reset_classifier(7)
    assert model(image).shape == (2, 7)
    assert model.num_classes == 7
    model.reset_classifier(0)
    close(model(image), pooled_features(model, image))
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    with pytest.raises(UsageError, match="one pooling, its own"):
        model.reset_classifier(3, "max")


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_weight_decay(name):
    _, model = make(name)
    scales = layer_scales(model, 0.5)
    first, last = model.feature_info[0]["module"], model.feature_info[-1]["module"]
    embedding = next(n for n in scales if "patch_embedding" in n)
    of = lambda start: {scale for n, scale in scales.items() if n.startswith(f"{start}.")}
    assert scales[embedding] < min(of(first)) < max(of(last)) < 1
    assert max(scales.values()) == 1
    free = model.no_weight_decay()
    assert not [n for n in free if "patch_embed" in n or (".layer" in n.replace("layers.", "") and "relative_position" not in n)]
    assert any("position" in n for n in free) == any("position" in n for n, _ in model.named_parameters())


def test_gradient_checkpointing_that_transformers_lacks_is_refused():
    _, model = make("convnext")
    model.set_grad_checkpointing(False)
    with pytest.raises(UsageError, match="ConvNextForImageClassification does not support gradient checkpointing"):
        model.set_grad_checkpointing()


@pytest.mark.parametrize("name", ["vit", "beit", "dinov2", "swin", "clip_tower"])
def test_gradient_checkpointing_changes_nothing(name):
    _, model = make(name)
    image = images()
    want = torch.autograd.grad(model.train()(image).sum(), list(model.parameters())[-1])[0]
    model.set_grad_checkpointing()
    close(torch.autograd.grad(model.train()(image).sum(), list(model.parameters())[-1])[0], want)
    model.set_grad_checkpointing(False)


def test_an_unknown_architecture_still_gives_what_its_classifier_reads():
    config = transformers.PvtConfig(
        num_labels=3, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], image_size=32
    )
    model = wrap(transformers.PvtForImageClassification(config), Preprocessing(32)).eval()
    assert type(model) is TransformersClassifier
    assert not hasattr(model, "forward_features")
    assert pooled_features(model, images(32).float()).shape == (2, 16)
    assert model(images(32).float()).shape == (2, 3)


# ---- folders


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "model"


def bare(name: str) -> Any:
    """The tower alone, as most self-supervised models are published."""
    theirs = library_model(name).float()
    return theirs if name in TOWERS else getattr(theirs, theirs.base_model_prefix, None) or theirs.vision_model


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2_registers", "beit", "swin", "convnext", "clip_tower", "siglip_tower"])
@torch.no_grad()
def test_a_folder_without_a_head_gives_features_and_no_answers(name, folder):
    tower = bare(name)
    tower.save_pretrained(folder)
    model = vitarium.create_model(f"hf/{folder}", pretrained=True).eval()
    image = images().float()
    assert model.num_classes == 0
    found = model.tower(pixel_values=image).last_hidden_state
    torch.testing.assert_close(found, tower.eval()(pixel_values=image).last_hidden_state)
    torch.testing.assert_close(model(image), pooled_features(model, image))
    with pytest.raises(UsageError, match=r"has no classifier: its weights hold none; train one .*probe or index"):
        require_head(model)


@torch.no_grad()
def test_a_head_that_was_drawn_is_marked_until_it_is_trained(folder, tmp_path):
    bare("dinov2").save_pretrained(folder)
    model = vitarium.create_model(f"hf/{folder}", pretrained=True, num_classes=4)
    assert sorted(fresh_names(model)) == ["model.classifier.bias", "model.classifier.weight"]
    with pytest.raises(UsageError, match=r"classifier of hf/.* is untrained \(model.classifier.*hold no head of 4 classes\); train one"):
        require_head(model)
    vitarium.save(model, tmp_path / "untrained.safetensors")
    with pytest.raises(UsageError, match=r"is untrained .* untrained.safetensors was saved before it was trained\)"):
        require_head(vitarium.load(tmp_path / "untrained.safetensors"))
    model.half()
    assert fresh_names(model)
    model.float().get_classifier().weight.add_(0.1)
    assert not fresh_names(model)
    require_head(model)
    vitarium.save(model, tmp_path / "trained.safetensors")
    assert has_trained_head(vitarium.load(tmp_path / "trained.safetensors"))


def test_a_pair_of_towers_gives_its_vision_tower(folder):
    config = transformers.CLIPConfig(
        text_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20),
        vision_config=SIZES,
    )
    pair = fill(transformers.CLIPModel(config))
    pair.save_pretrained(folder)
    model = vitarium.create_model(f"hf/{folder}", pretrained=True).eval()
    image = images().float()
    torch.testing.assert_close(model(image), pair.vision_model(pixel_values=image).pooler_output)
    assert vitarium.create_model(f"hf/{folder}", num_classes=3)(image).shape == (2, 3)


@pytest.mark.parametrize("name", ["vit", "beit", "dinov2_registers", "clip", "siglip_tower", "swin", "convnext"])
def test_saved_models_come_back(name, folder, tmp_path):
    bare(name).save_pretrained(folder)
    model = vitarium.create_model(f"hf/{folder}", pretrained=True, num_classes=3).eval()
    vitarium.save(model, tmp_path / "w.safetensors")
    again = vitarium.load(tmp_path / "w.safetensors")
    image = images().float()
    assert torch.equal(again(image), model(image))
    assert type(again) is type(model)


def test_weights_of_something_else_are_refused(folder):
    bare("vit").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match=r"not those of a ViTForImageClassification: vit\.layers\.3\..* missing"):
        vitarium.create_model(f"hf/{folder}", pretrained=True)


def test_pretrained_tables_keep_their_values_at_another_size(folder):
    tower = bare("vit")
    tower.save_pretrained(folder)
    model = vitarium.create_model(f"hf/{folder}", pretrained=True, image_size=24).eval()
    assert model.preprocessing.image_size == 24
    assert torch.equal(model.tower.embeddings.position_embeddings, tower.embeddings.position_embeddings)
    assert vitarium.create_model(f"hf/{folder}", image_size=24).tower.embeddings.position_embeddings.shape[1] == 37


def test_half_precision_files_are_opened_in_float32(folder):
    bare("vit").half().save_pretrained(folder)
    assert {p.dtype for p in vitarium.create_model(f"hf/{folder}", pretrained=True).parameters()} == {torch.float32}


def test_the_image_processor_says_size_and_crop(folder):
    bare("dinov2").save_pretrained(folder)
    values = dict(
        image_processor_type="BitImageProcessor",
        do_center_crop=True,
        crop_size={"height": 28, "width": 28},
        size={"shortest_edge": 32},
        resample=2,
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    pre = vitarium.create_model(f"hf/{folder}", pretrained=True).preprocessing
    assert (pre.image_size, pre.crop_pct, pre.interpolation) == (28, 28 / 32, "bilinear")


def test_nothing_is_printed(folder, capfd):
    bare("dinov2").save_pretrained(folder)
    capfd.readouterr()
    vitarium.create_model(f"hf/{folder}", pretrained=True, num_classes=3)
    assert capfd.readouterr() == ("", "")


# ---- weights of another origin


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip_tower", "swin"])
def test_files_of_any_release_load_into_the_model(name, folder):
    """A folder's file has the names of releases before 5, a state dict those of release 5."""
    tower = bare(name)
    tower.save_pretrained(folder)
    source = vitarium.create_model(f"hf/{folder}", pretrained=True).eval()
    for file in (folder / "model.safetensors", folder / "new.pth"):
        torch.save(tower.state_dict(), folder / "new.pth")
        model = vitarium.create_model(f"hf/{folder}", checkpoint=file).eval()
        assert model.num_classes == 0
        assert torch.equal(model(images().float()), source(images().float()))
    marked = vitarium.create_model(f"hf/{folder}", checkpoint=folder / "model.safetensors", num_classes=3)
    assert fresh_names(marked)
    assert not fresh_names(vitarium.create_model(f"hf/{folder}"))  # all of it is untrained, and its user knows


def test_heads_of_other_models_are_marked(tmp_path):
    source = vitarium.create_model("swin_pico", num_classes=0)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = vitarium.create_model("swin_pico", checkpoint=tmp_path / "w.pth", num_classes=3)
    with pytest.raises(UsageError, match=r"classifier of swin_pico is untrained \(head.bias, head.weight: .*w.pth holds none\)"):
        require_head(model)
    require_head(vitarium.create_model("swin_pico"))
    require_head(nn.Linear(2, 2))
