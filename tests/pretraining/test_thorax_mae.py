"""Properties of masked autoencoders for X-rays: equality with the authors' code, and pretraining followed by fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import vitarium
from tests.golden import assert_matches_golden, fill_value, read_golden
from vitarium.data.multilabel import CHEST_FINDINGS
from vitarium.errors import CheckpointError, UsageError
from vitarium.nn.vit import sincos_table
from vitarium.ops.patches import patchify
from vitarium.pretraining.masked_autoencoder import masked_mean, patch_errors
from vitarium.pretraining.thorax_mae import ThoraxAutoencoder, ThoraxViT
from vitarium.training.optim import layer_scales


def test_autoencoder_equals_the_authors():
    tables = {"pos_embed": sincos_table(384, (14, 14)).double(), "decoder_pos_embed": sincos_table(512, (14, 14)).double()}

    def run(model: ThoraxAutoencoder, imgs: Tensor, noise: Tensor) -> dict[str, Tensor]:
        made = model(imgs, noise, mask_ratio=0.9)
        loss = masked_mean(patch_errors(made.prediction, patchify(imgs, 16)), made.hidden)
        return {"latent": made.latent, "pred": made.prediction, "mask": made.hidden, "loss": loss}

    assert_matches_golden("thorax_mae-vit_small_dec512d2", vitarium.create_model("thorax_mae_pretrain_small"), run, tables)


def test_classifier_equals_the_authors():
    def run(model: ThoraxViT, x: Tensor) -> dict[str, Tensor]:
        return {"features": model.forward_head(model.forward_features(x), pre_logits=True), "logits": model(x)}

    assert_matches_golden("thorax_mae-finetune_vit_small", vitarium.create_model("thorax_mae_small", num_classes=14), run)


@pytest.mark.parametrize(("name", "millions"), [("small", 28.66), ("small_dec128", 22.2), ("base", 111.91)])
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"thorax_mae_pretrain_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.identity
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_equals_timm(pool: str):
    from timm.models.vision_transformer import VisionTransformer

    shape = dict(patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    theirs = VisionTransformer(img_size=16, global_pool=pool, **shape).double().eval()
    theirs.load_state_dict({name: fill_value(name, tensor) for name, tensor in theirs.state_dict().items()})
    ours = ThoraxViT(image_size=16, global_pool=pool, **shape).double().eval()
    ours.load_state_dict({name.replace("fc_norm", "head_norm"): tensor for name, tensor in theirs.state_dict().items()})
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-12, atol=1e-12)


def test_layer_decay_is_the_authors():
    """The values that the card of the training base gives for depth 12 and 0.75; the head and its norm learn at the full rate."""
    with torch.device("meta"):
        model = vitarium.create_model("thorax_mae_small")
    scales = layer_scales(model, 0.75)
    assert scales["pos_embed"] == scales["patch_embed.proj.bias"] == pytest.approx(0.02376, abs=5e-6)
    assert scales["blocks.0.norm1.weight"] == pytest.approx(0.03168, abs=5e-6)
    assert scales["blocks.11.attn.qkv.weight"] == 0.75
    assert scales["head.weight"] == scales["head_norm.weight"] == 1.0


def authors_file(path: Path, *, decoder: bool) -> Path:
    """A pretrained file of the authors' names, in a container as theirs, for the pico model."""
    model = vitarium.create_model("thorax_mae_pretrain_pico")
    names = {"decoder.mask_token": "mask_token"}
    state = {
        names.get(name, name.removeprefix("encoder.").replace("decoder.", "decoder_")): fill_value(name, tensor)
        for name, tensor in model.state_dict().items()
        if decoder or name.startswith("encoder.")
    }
    torch.save({"model": state, "epoch": 800, "args": None}, path)
    return path


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"global_pool": "token"}, {"global_pool": "token", "probe_norm": True}])
def test_pretrained_files_fill_a_classifier(tmp_path: Path, decoder: bool, arguments: dict):
    path = authors_file(tmp_path / "mae.pth", decoder=decoder)
    model = vitarium.create_model("thorax_mae_pico", num_classes=14, checkpoint=path, **arguments)
    assert torch.equal(model.cls_token, fill_value("encoder.cls_token", torch.empty(1, 1, 64)))
    if not arguments:
        assert (model.head_norm.weight == 1).all()
        assert model.head_norm.bias.abs().max() == 0
    else:
        assert torch.equal(model.norm.weight, fill_value("encoder.norm.weight", torch.empty(64)))
    assert model.eval()(torch.randn(2, 3, 16, 16)).shape == (2, 14)


def test_the_authors_whole_file_fills_an_autoencoder_and_half_of_it_is_refused(tmp_path: Path):
    model = vitarium.create_model("thorax_mae_pretrain_pico", checkpoint=authors_file(tmp_path / "mae.pth", decoder=True))
    assert torch.equal(model.decoder.mask_token, fill_value("decoder.mask_token", torch.empty(1, 1, 48)))
    half = authors_file(tmp_path / "encoder.pth", decoder=False)
    with pytest.raises(CheckpointError, match=r"decoder\.mask_token"):
        vitarium.create_model("thorax_mae_pretrain_pico", checkpoint=half)


def test_our_pretraining_file_fills_a_classifier_of_another_size(tmp_path: Path):
    pretrained = vitarium.create_model("thorax_mae_pretrain_pico", image_size=32)
    vitarium.save(pretrained, tmp_path / "model.safetensors")
    model = vitarium.create_model("thorax_mae_pico", num_classes=3, checkpoint=tmp_path / "model.safetensors", image_size=16)
    assert torch.equal(model.blocks[3].mlp.fc2.weight, pretrained.encoder.blocks[3].mlp.fc2.weight)
    assert model.pos_embed.shape == (1, 17, 64)
    assert model.pos_embed.requires_grad


def test_a_finetuned_file_of_the_authors_loads(tmp_path: Path):
    model = vitarium.create_model("thorax_mae_pico", num_classes=14)
    state = {name.replace("head_norm", "fc_norm"): tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "tuned.pth")
    loaded = vitarium.create_model("thorax_mae_pico", checkpoint=tmp_path / "tuned.pth")
    assert loaded.num_classes == len(CHEST_FINDINGS) == 14
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))


def test_names_of_the_goldens_are_the_documented_ones():
    assert {"cls_token", "mask_token", "decoder_embed.weight", "decoder_blocks.1.attn.qkv.bias"} <= set(
        read_golden("thorax_mae-vit_small_dec512d2")["state"]
    )


def test_refuses():
    with pytest.raises(UsageError, match="global_pool must be 'token' or 'avg', got 'map'"):
        vitarium.create_model("thorax_mae_pico", global_pool="map")
    with pytest.raises(UsageError, match="image_size must be a multiple of patch_size, got 18 and 4"):
        vitarium.create_model("thorax_mae_pretrain_pico", image_size=18)
