"""Tests of create_model for our, timm's and transformers' models, and of its error messages."""

import pytest
import torch
from torch import nn

import vitarium
from vitarium.catalog import ModelSpec, Preprocessing, preprocessing_of
from vitarium.errors import CheckpointError, MissingExtra, UsageError
from vitarium.files import write_json


def test_a_model_carries_what_it_was_made_of(toy):
    model = vitarium.create_model("toy_small", num_classes=5, drop_rate=0.2, image_size=48)
    assert isinstance(model, toy)
    assert model.spec == ModelSpec("toy_small", {"drop_rate": 0.2, "num_classes": 5, "image_size": 48})
    assert model.preprocessing == Preprocessing(48, crop_pct=1.0)
    assert model.labels is None
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_defaults_are_the_variants(toy):
    assert vitarium.create_model("toy_fine").preprocessing.image_size == 32
    assert vitarium.create_model("toy_fine").num_classes == 1000
    assert isinstance(vitarium.create_model("toy_small", num_classes=0).head, nn.Identity)
    assert vitarium.create_model("toy_small", in_chans=1).preprocessing.channels == 1


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("toy_smal", {}, "unknown model 'toy_smal'; did you mean toy_small"),
        ("", {}, "unknown model ''"),
        ("timm/vit_tiny_patch16_225", {}, "timm has no model .* did you mean vit_tiny_patch16_224"),
        ("toy_small", {"num_clases": 3}, "takes no argument 'num_clases'; did you mean num_classes"),
        ("toy_small", {"num_classes": -1}, "num_classes must be a whole number of at least 0, got -1"),
        ("toy_small", {"num_classes": "10"}, "num_classes must be a whole number of at least 0, got '10'"),
        ("toy_small", {"image_size": 0}, "image_size must be a whole number of at least 1, got 0"),
        ("toy_small", {"embed_dim": -3}, "toy_small cannot be built with"),
        ("toy_small", {"embed_dim": "wide"}, "toy_small cannot be built with"),
        ("swin_pico", {"depths": (2, 2, 2)}, "swin_pico cannot be built with .*depths and num_heads"),
        ("swin_pico", {"num_heads": (0, 0)}, "swin_pico cannot be built with"),
        ("vim_pico", {"depth": 0}, "vim_pico cannot be built with"),
        ("timm/vit_pico", {"num_heads": 0}, "timm refuses 'vit_pico'"),
        ("timm/vit_pico", {"wings": 2}, "timm refuses 'vit_pico' .*wings"),
        ("timm/vit_pico", {"pretrained": True}, "has no pretrained weights; timm/vit_tiny_patch16_224 has"),
        ("timm/vit_tiny_patch16_224.no_such_tag", {}, "Invalid pretrained tag"),
    ],
)
def test_what_cannot_be_made(toy, name, options, words):
    with pytest.raises(UsageError, match=words):
        vitarium.create_model(name, **options)


@pytest.mark.parametrize("name", ["timm/vit_pico", "timm/deit_pico", "timm/resnet_pico"])
def test_timms_small_forms_take_small_images(name):
    model = vitarium.create_model(name, num_classes=10).eval()
    assert model.preprocessing.image_size == 16
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) < 500_000


def test_timms_models_carry_timms_preprocessing():
    model = vitarium.create_model("timm/vit_tiny_patch16_224", num_classes=2, image_size=64, depth=1)
    assert model.preprocessing == Preprocessing(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2)
    assert vitarium.create_model("timm/resnet_pico", image_size=64, in_chans=1).preprocessing.channels == 1


def test_timms_weights_without_a_network_are_missed_in_plain_words(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot fetch timm's weights of 'vit_tiny_patch16_224'.*checkpoint=PATH"):
        vitarium.create_model("timm/vit_tiny_patch16_224", pretrained=True)


def test_authors_names_load_into_timms_models(tmp_path):
    """timm knows the authors' names of its models; a file in them fits, and position tables are resized."""
    import timm

    small = dict(embed_dim=16, depth=1, num_heads=2)
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, **small)
    torch.save({"model": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    model = vitarium.create_model("timm/vit_tiny_patch16_224", image_size=32, checkpoint=tmp_path / "w.pth", **small)
    assert model.num_classes == 5
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert model.pos_embed.shape == (1, 5, 16)


@pytest.fixture
def vit_folder(tmp_path):
    """A small ViT in transformers' layout, with weights and an image processor."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8, num_labels=2
    )
    config.id2label = {0: "cat", 1: "dog"}
    torch.manual_seed(1)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "vit")
    processor = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size={"height": 16, "width": 16})
    write_json(tmp_path / "vit/preprocessor_config.json", {"image_processor_type": "ViTImageProcessor", **processor})
    return tmp_path / "vit", model.eval()


def test_transformers_models_from_a_folder(vit_folder):
    folder, theirs = vit_folder
    model = vitarium.create_model(f"hf/{folder}", pretrained=True).eval()
    assert model.labels == ["cat", "dog"]
    assert model.preprocessing.image_size == 16
    assert (model.preprocessing.mean, model.preprocessing.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(image), theirs(pixel_values=image).logits)
    fresh = vitarium.create_model(f"hf/{folder}", pretrained=True, num_classes=7)
    assert (fresh.num_classes, fresh.labels) == (7, None)
    assert fresh(image).shape == (2, 7)


def test_transformers_models_that_are_not_there(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match=r"cannot open 'hf/\./nowhere'.*pass a folder"):
        vitarium.create_model("hf/./nowhere")


def test_without_transformers_the_message_has_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'vitarium\[transformers\]'"):
        vitarium.create_model("hf/some/model")


def test_preprocessing_of_any_module():
    assert preprocessing_of(nn.Linear(1, 1)) == Preprocessing()
    assert preprocessing_of(vitarium.create_model("swin_pico")).image_size == 16
