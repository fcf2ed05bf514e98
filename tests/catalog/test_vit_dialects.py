"""Checkpoints of plain vision transformers with the authors', timm's and transformers' names load into timm's models and ours.

Each file has the true names and shapes of its kind; what the loaded model computes is what the source library's own model computes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.anatomy.models import fill
from vitarium.catalog.checkpoints import load_checkpoint
from vitarium.catalog.create import ModelSpec
from vitarium.catalog.heads import fresh_names
from vitarium.errors import CheckpointError

transformers = pytest.importorskip("transformers")

State = dict[str, Tensor]
SMALL: dict[str, Any] = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=16, patch_size=4, layer_norm_eps=1e-6
)
TIMM: dict[str, Any] = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2)
OURS: dict[str, Any] = dict(image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2)


def library(cls: str, config: str, **values: Any) -> Any:
    made = getattr(transformers, config)(**{**SMALL, **values})
    return fill(getattr(transformers, cls)(made)).eval()


def files_of(model: Any, folder: Path) -> list[Path]:
    """A file in the names of transformers before 5, as its `save_pretrained` writes, and one in those of 5."""
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "new.pth")
    return [folder / "model.safetensors", folder / "new.pth"]


def images(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def run(method: Any, *args: Any, **options: Any) -> Any:
    """A method of a model in float64."""
    method.__self__.double()
    return method(*args, **options)


def close(found: Tensor, want: Tensor, within: float = 1e-9) -> None:
    torch.testing.assert_close(found, want, rtol=within, atol=within * float(want.abs().max()))


SUMMED = 1e-7
"""timm's models with registers hold the sum of class token and its position, rounded to float32."""


def timm_model(name: str, file: Path, **options: Any) -> Any:
    return vitarium.create_model(f"timm/{name}", checkpoint=file, **{**TIMM, **options}).eval()


# ---- transformers


def test_vit_of_transformers(tmp_path):
    theirs = library("ViTForImageClassification", "ViTConfig", num_labels=5)
    want = run(theirs.double().forward, images()).logits
    for file in files_of(theirs.float(), tmp_path):
        for model in (
            timm_model("vit_tiny_patch16_224", file),
            vitarium.create_model("thorax_mae_pico", checkpoint=file, global_pool="token", **OURS).eval(),
        ):
            assert model.num_classes == 5
            close(run(model.forward, images()), want)


def test_the_body_of_a_vit_of_transformers(tmp_path):
    theirs = library("ViTModel", "ViTConfig")
    want = run(theirs.double().forward, images()).last_hidden_state
    for file in files_of(theirs.float(), tmp_path):
        model = timm_model("vit_tiny_patch16_224", file)
        assert model.num_classes == 0
        close(run(model.forward_features, images()), want)


@pytest.mark.parametrize(("cls", "name"), [("DeiTForImageClassificationWithTeacher", "distilled"), ("DeiTForImageClassification", "head")])
def test_deit_of_transformers(cls, name, tmp_path):
    theirs = library(cls, "DeiTConfig", num_labels=5)
    out = run(theirs.double().forward, images(), output_hidden_states=True)
    for file in files_of(theirs.float(), tmp_path):
        if name == "distilled":
            close(run(timm_model("deit_tiny_distilled_patch16_224", file).forward, images()), out.logits)
            continue
        with pytest.raises(CheckpointError, match="unexpected"):  # a class that reads the class token alone has one head of two
            timm_model("deit_tiny_patch16_224", file)
        model = timm_model("deit_tiny_distilled_patch16_224", file, num_classes=5)
        close(run(model.double().head.forward, run(model.forward_features, images())[:, 0]), out.logits)
        assert fresh_names(model) == ["head_dist.bias", "head_dist.weight"]


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_of_transformers(swiglu, tmp_path):
    theirs = library("Dinov2Model", "Dinov2Config", use_swiglu_ffn=swiglu)
    want = run(theirs.double().forward, images()).last_hidden_state
    options = dict(mlp_layer=__import__("timm").layers.SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=128 / 24) if swiglu else {}
    for file in files_of(theirs.float(), tmp_path):
        model = timm_model("vit_small_patch14_dinov2", file, **options)
        close(run(model.forward_features, images()), want)


def test_dinov2_with_registers_of_transformers(tmp_path):
    theirs = library("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig")
    want = run(theirs.double().forward, images()).last_hidden_state
    for file in files_of(theirs.float(), tmp_path):
        close(run(timm_model("vit_small_patch14_reg4_dinov2", file).forward_features, images()), want, SUMMED)


def test_a_head_that_reads_something_else_is_left_out(tmp_path):
    theirs = library("Dinov2ForImageClassification", "Dinov2Config", num_labels=5)
    file = files_of(theirs, tmp_path)[0]
    assert timm_model("vit_small_patch14_dinov2", file).num_classes == 0
    assert fresh_names(timm_model("vit_small_patch14_dinov2", file, num_classes=5))


@pytest.mark.parametrize("cls", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"])
def test_clip_of_transformers(cls, tmp_path):
    values: dict[str, Any] = {**SMALL, "hidden_act": "gelu", "projection_dim": 8}
    if cls == "CLIPModel":
        text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
        theirs = fill(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=values, projection_dim=8)))
        vision = theirs.double().vision_model
    else:
        theirs = fill(getattr(transformers, cls)(transformers.CLIPVisionConfig(**values)))
        vision = theirs.double() if cls == "CLIPVisionModel" else theirs.double().vision_model
    pooled = run(vision.forward, images()).pooler_output
    for file in files_of(theirs.float(), tmp_path):
        model = timm_model("vit_base_patch16_clip_224", file, norm_layer=lambda *a, **k: nn.LayerNorm(*a, **{**k, "eps": 1e-6}))
        features = run(model.forward_features, images())
        close(run(model.forward_head, features, pre_logits=True), pooled)
        if cls != "CLIPVisionModel":
            close(model(images()), run(theirs.double().visual_projection.forward, pooled))


def test_siglip_of_transformers(tmp_path):
    theirs = library("SiglipVisionModel", "SiglipVisionConfig", hidden_act="gelu")
    want = run(theirs.double().forward, images()).pooler_output
    for file in files_of(theirs.float(), tmp_path):
        close(run(timm_model("vit_base_patch16_siglip_224", file, act_layer="gelu").forward, images()), want)


def test_mae_of_transformers(tmp_path):
    theirs = library("ViTMAEForPreTraining", "ViTMAEConfig", **dict(zip(DECODER, (16, 1, 2, 64), strict=True)))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want = run(theirs.double().forward, images(), noise=noise)
    tower = transformers.ViTModel(transformers.ViTConfig(**SMALL), add_pooling_layer=False).double().eval()
    tower.load_state_dict(theirs.vit.state_dict())
    tokens = run(tower.forward, images()).last_hidden_state
    whole = dict(OURS, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    for file in files_of(theirs.float(), tmp_path):
        ours = vitarium.create_model("thorax_mae_pretrain_pico", checkpoint=file, **whole).eval()
        found = run(ours.forward, images(), noise)
        close(found.prediction, want.logits)
        assert torch.equal(found.hidden, want.mask.to(found.hidden.dtype))
        close(run(timm_model("vit_tiny_patch16_224", file).forward_features, images()), tokens)
        encoder = vitarium.create_model("thorax_mae_pico", checkpoint=file, num_classes=3, **OURS).eval()
        fine = nn.functional.layer_norm(run(encoder.forward_features, images())[:, 1:].mean(1), (24,), eps=1e-6)
        close(run(encoder.forward_head, encoder.forward_features(images()), pre_logits=True), fine)
        assert torch.equal(encoder.blocks[1].mlp.fc2.weight, theirs.vit.layers[1].mlp.fc2.weight.double())


DECODER = ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads", "decoder_intermediate_size")


# ---- the authors' own files


def timm_source(name: str, **options: Any) -> Any:
    import timm

    return fill(timm.create_model(name, **{**TIMM, **options})).eval()


def saved(state: dict[str, Any], path: Path) -> Path:
    torch.save(state, path)
    return path


def test_deit_of_its_authors(tmp_path):
    """They use timm's names, inside "model"."""
    source = timm_source("deit_tiny_distilled_patch16_224", num_classes=5)
    model = timm_model("deit_tiny_distilled_patch16_224", saved({"model": source.state_dict()}, tmp_path / "deit.pth"))
    close(run(model.forward, images()), run(source.forward, images()))


def test_deit3_of_its_authors(tmp_path):
    source = timm_source("deit3_small_patch16_224", num_classes=5)
    state = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): t for name, t in source.state_dict().items()}
    model = timm_model("deit3_small_patch16_224", saved({"model": state}, tmp_path / "deit3.pth"))
    close(run(model.forward, images()), run(source.forward, images()))


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_of_its_authors(registers, tmp_path):
    theirs = library("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig") if registers else library("Dinov2Model", "Dinov2Config")
    state = authors_dinov2(theirs.state_dict())
    want = run(theirs.double().forward, images()).last_hidden_state
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    for wrapped in (state, {"teacher": {f"backbone.{n}": t for n, t in state.items()}}):
        model = timm_model(name, saved(wrapped, tmp_path / "dinov2.pth"))
        close(run(model.forward_features, images()), want, SUMMED if registers else 1e-9)


def authors_dinov2(theirs: State) -> State:
    """transformers' tensors under the names of facebookresearch/dinov2."""
    state: State = {}
    for name, tensor in theirs.items():
        name = name.removeprefix("embeddings.").replace("encoder.layer.", "blocks.").replace("layernorm.", "norm.")
        name = name.replace("position_embeddings", "pos_embed").replace("patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("attention.o_proj", "attn.proj").replace("layer_scale", "ls").replace("lambda1", "gamma")
        state[name] = tensor
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{i}.attention.{p}_proj.{kind}") for p in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    assert "mask_token" in state
    return state


def test_clip_of_its_authors(tmp_path):
    """OpenAI's names: the vision tower under "visual", beside a text tower."""
    values: dict[str, Any] = {**SMALL, "hidden_act": "quick_gelu", "projection_dim": 8, "layer_norm_eps": 1e-5}
    theirs = fill(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**values)))
    names = [
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.patch_embedding", "visual.conv1"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("self_attn.out_proj", "attn.out_proj"),
        ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ]
    state: State = {"positional_embedding": torch.zeros(8, 16), "transformer.resblocks.0.ln_1.weight": torch.ones(16)}
    for name, tensor in theirs.state_dict().items():
        for old, new in names:
            name = name.replace(old, new)
        state[name] = tensor
    state["visual.proj"] = state.pop("visual_projection.weight").T
    for i in range(2):
        start = f"visual.transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            state[f"{start}.attn.in_proj_{kind}"] = torch.cat([state.pop(f"{start}.self_attn.{p}_proj.{kind}") for p in "qkv"])
    model = timm_model("vit_base_patch16_clip_quickgelu_224", saved(state, tmp_path / "clip.pth"))
    close(run(model.forward, images()), run(theirs.double().forward, images()).image_embeds)


def test_mae_of_its_authors(tmp_path):
    """The file with the decoder, into timm's model."""
    source = timm_source("vit_tiny_patch16_224", num_classes=0)
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_embed.weight": torch.zeros(8, 24),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
    }
    model = timm_model("vit_tiny_patch16_224", saved({"model": {**source.state_dict(), **decoder}}, tmp_path / "mae.pth"))
    close(run(model.forward_features, images()), run(source.forward_features, images()))


@pytest.mark.parametrize("release", ["vision_transformer", "big_vision"])
def test_vit_of_its_authors(release, tmp_path):
    """Google's JAX arrays, in an .npz; timm's own reader says what comes out."""
    source = timm_source("vit_tiny_patch16_224", num_classes=5)
    arrays = google_arrays(source.state_dict(), release)
    np.savez(tmp_path / "vit.npz", **arrays)
    want = run(source.forward, images())
    twin = timm_source("vit_tiny_patch16_224", num_classes=5)
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_pretrained(str(tmp_path / "vit.npz"))
    close(run(twin.forward, images()), want)
    close(run(timm_model("vit_tiny_patch16_224", tmp_path / "vit.npz").forward, images()), want)
    ours = vitarium.create_model("thorax_mae_pico", checkpoint=tmp_path / "vit.npz", global_pool="token", **OURS).eval()
    close(run(ours.forward, images()), want)
    pruned = vitarium.create_model("sparse_prune_pico", checkpoint=tmp_path / "vit.npz", mlp_ratio=4.0, **OURS, num_classes=5).eval()
    for norm in (m for m in pruned.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = 1e-6  # Google's; the authors of sparse_prune use 1e-5
    close(run(pruned.forward, images()), want)
    larger = vitarium.create_model(
        "sparse_prune_pico", checkpoint=tmp_path / "vit.npz", mlp_ratio=4.0, **{**OURS, "image_size": 64}, num_classes=5
    )
    assert larger.pos_embed.shape[1] == 257  # the authors start from 224 pixels and train at 384


def test_mixer_of_its_authors(tmp_path):
    """Google's JAX arrays of MLP-Mixer, in an .npz."""
    mixer = pytest.importorskip("timm.models.mlp_mixer").MlpMixer
    sizes = dict(img_size=16, patch_size=4, embed_dim=16, num_blocks=2, mlp_ratio=(0.5, 1.5), num_classes=5)
    source = mixer(**sizes)
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.2)
    np.savez(tmp_path / "mixer.npz", **google_mixer_arrays(source.state_dict()))
    twin = mixer(**sizes)
    twin.spec = ModelSpec("timm/mixer_b16_224", {})
    assert load_checkpoint(twin, tmp_path / "mixer.npz").complete
    close(run(twin.eval().forward, images()), run(source.eval().forward, images()))


def google_mixer_arrays(state: State) -> dict[str, np.ndarray]:
    arrays = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        part = layer.split(".")
        place = {"stem": "stem", "norm": "pre_head_layer_norm", "head": "head"}.get(
            part[0], f"MixerBlock_{part[1] if len(part) > 1 else ''}"
        )
        inner = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1", "mlp_tokens": "token_mixing", "mlp_channels": "channel_mixing"}
        if part[0] == "blocks":
            place += "/" + inner[part[2]] + (f"/Dense_{int(part[3][-1]) - 1}" if len(part) > 3 else "")
        if kind == "bias":
            arrays[f"{place}/bias"] = tensor
        elif tensor.ndim == 1:
            arrays[f"{place}/scale"] = tensor
        else:
            arrays[f"{place}/kernel"] = tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    return {name: tensor.contiguous().numpy() for name, tensor in arrays.items()}


def google_arrays(state: State, release: str) -> dict[str, np.ndarray]:
    old = release == "vision_transformer"
    arrays: dict[str, np.ndarray] = {"pre_logits/bias": np.zeros(3, np.float32)} if old else {}
    start = "" if old else "params/"
    attention, norm2, mlp = ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3") if old else (
        "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"
    )  # fmt: skip
    top = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding" if old else "pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for i in range(2):
        block, place = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", norm2)):
            top |= {f"{place}/{theirs}/scale": state[f"{block}.{ours}.weight"], f"{place}/{theirs}/bias": state[f"{block}.{ours}.bias"]}
        for j, name in enumerate(("query", "key", "value")):
            weight, bias = (state[f"{block}.attn.qkv.{kind}"][24 * j : 24 * (j + 1)] for kind in ("weight", "bias"))
            top |= {
                f"{place}/{attention}/{name}/kernel": weight.T.reshape(24, 2, 12),
                f"{place}/{attention}/{name}/bias": bias.reshape(2, 12),
            }
        top[f"{place}/{attention}/out/kernel"] = state[f"{block}.attn.proj.weight"].T.reshape(2, 12, 24)
        top[f"{place}/{attention}/out/bias"] = state[f"{block}.attn.proj.bias"]
        for j in (0, 1):
            top[f"{place}/{mlp}/Dense_{j}/kernel"] = state[f"{block}.mlp.fc{j + 1}.weight"].T
            top[f"{place}/{mlp}/Dense_{j}/bias"] = state[f"{block}.mlp.fc{j + 1}.bias"]
    return arrays | {f"{start}{name}": tensor.contiguous().numpy() for name, tensor in top.items()}


def test_damaged_archives_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match="no whole archive of arrays"):
        load_checkpoint(nn.Linear(2, 2), tmp_path / "w.npz")
    whole = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "w.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="no whole archive of arrays"):
        load_checkpoint(nn.Linear(2, 2), tmp_path / "w.npz")


# ---- position tables of another size


@pytest.mark.parametrize(
    ("cls", "config", "name"),
    [
        ("ViTModel", "ViTConfig", "vit_tiny_patch16_224"),
        ("DeiTModel", "DeiTConfig", "deit_tiny_distilled_patch16_224"),
        ("Dinov2Model", "Dinov2Config", "vit_small_patch14_dinov2"),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "vit_small_patch14_reg4_dinov2"),
        ("CLIPVisionModel", "CLIPVisionConfig", "vit_base_patch16_clip_224"),
        ("SiglipVisionModel", "SiglipVisionConfig", "vit_base_patch16_siglip_224"),
    ],
)
def test_position_tables_are_resized_as_timm_resizes_its_own(cls, config, name, tmp_path):
    file = files_of(library(cls, config), tmp_path)[0]
    same = timm_model(name, file)
    want = timm_model(name, saved(same.state_dict(), tmp_path / "timm.pth"), img_size=24)
    found = timm_model(name, file, img_size=24)
    assert found.pos_embed.shape[1] in (36, 37, 38)
    assert not torch.equal(found.pos_embed[:, -1], same.pos_embed[:, -1]) or found.pos_embed.shape != same.pos_embed.shape
    for (n, a), b in zip(found.state_dict().items(), want.state_dict().values(), strict=True):
        assert torch.equal(a, b), n


def test_our_position_tables_are_resized(tmp_path):
    theirs = library("ViTForImageClassification", "ViTConfig", num_labels=5)
    for file in files_of(theirs, tmp_path):
        model = vitarium.create_model("thorax_mae_pico", checkpoint=file, global_pool="token", **{**OURS, "image_size": 24}).eval()
        same = vitarium.create_model("thorax_mae_pico", checkpoint=file, global_pool="token", **OURS).eval()
        assert model.pos_embed.shape == (1, 37, 24)
        assert torch.equal(model.pos_embed[:, :1], same.pos_embed[:, :1])
        torch.testing.assert_close(run(model.forward, images(24)), run(same.forward, images(24)), rtol=1e-6, atol=1e-6)
