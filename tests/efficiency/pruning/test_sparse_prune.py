"""Sparse then Prune: equality with the authors' code, exact properties of pruning, and combinations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import vitarium
from tests.anatomy.models import NAMES, make, timm_model, transformers_model
from tests.golden import assert_matches_golden
from vitarium.catalog.create import ModelSpec
from vitarium.catalog.methods import parse_method
from vitarium.catalog.probe import macs_of
from vitarium.efficiency.pruning.masks import prunable, sparsity
from vitarium.efficiency.pruning.penalty import AttentionPenalty
from vitarium.efficiency.pruning.sparse_prune import SparsePrune, SparseViT, make_permanent, pruning_curve
from vitarium.errors import AttachError, UnsupportedModel, UsageError

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TIED = "timm-qk_norm"
"""Its norms tie all heads, and all channels, together."""


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGE)


# ---- the authors' model


def test_equals_the_authors_model():
    penalty = AttentionPenalty(weight=1.0)

    def run(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
        with penalty.watch(model) as term:
            return {"logits": model(image), "sparse": term()[None]}

    shape = dict(embed_dim=96, depth=3, num_heads=4, patch_size=16, image_size=64, mlp_ratio=2.0)
    assert_matches_golden("sparse_prune-tiny", SparseViT(**shape, num_classes=10), run)


def test_the_released_model():
    with torch.device("meta"):
        model = vitarium.create_model("sparse_prune_base", num_classes=100)
    assert 86.1e6 < sum(p.numel() for p in model.parameters()) < 86.3e6
    rates = {block.attn.proj_drop for block in model.blocks} | {block.mlp.drop_rate for block in model.blocks} | {model.dropout}
    assert rates == {0.1}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    with pytest.raises(ValueError, match="dropout must lie"):
        vitarium.create_model("sparse_prune_pico", dropout=1.0)


# ---- single weights


@pytest.mark.identity
@pytest.mark.parametrize("structure", ["weights", "heads", "channels", "both"])
def test_nothing_pruned_is_the_model_bit_for_bit(structure: str):
    model = timm_model("vit")
    before = logits(model)
    vitarium.apply(model, SparsePrune(amount=0, structure=structure), quiet=True)
    assert torch.equal(logits(model), before)
    assert not model.methods[0].replaced


@pytest.mark.identity
@pytest.mark.parametrize("structure", ["weights", "2:4", "both"])
def test_undo_restores_every_bit(structure: str):
    model = timm_model("distilled")
    before, state = logits(model), copy.deepcopy(model.state_dict())
    vitarium.apply(model, f"sparse_prune:structure={structure}", quiet=True)
    assert not torch.equal(logits(model), before)
    vitarium.undo(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.identity
def test_global_pruning_is_that_of_torch_over_the_papers_weights():
    model = filled(SparseViT(embed_dim=16, depth=2, num_heads=2, patch_size=4, image_size=16, num_classes=5))
    twin: Any = copy.deepcopy(model)
    parts = [twin.patch_embed.proj, twin.head]
    for block in twin.blocks:
        parts += [block.norm1, block.attn.qkv, block.attn.proj, block.norm2, block.mlp.fc1, block.mlp.fc2]
    prune.global_unstructured([(part, "weight") for part in parts], pruning_method=prune.L1Unstructured, amount=0.37)
    vitarium.apply(model, SparsePrune(amount=0.37), quiet=True)
    found = sparsity(model)
    assert len(found.tensors) == len(parts)
    assert found.zeros == round(0.37 * found.total)
    for part in parts:
        prune.remove(part, "weight")
    theirs = dict(twin.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())


@pytest.mark.identity
def test_the_pattern_is_exact_and_keeps_the_largest():
    model = timm_model("vit")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    vitarium.apply(model, "sparse_prune:structure=2:4", quiet=True)
    weight, old = model.blocks[1].mlp.fc1.weight.unflatten(1, (-1, 4)), before["blocks.1.mlp.fc1.weight"].unflatten(1, (-1, 4))
    assert ((weight != 0).sum(2) == 2).all()
    assert torch.equal(weight.abs().sum(2), old.abs().topk(2, dim=2).values.sum(2))
    assert torch.equal(model.patch_embed.proj.weight, before["patch_embed.proj.weight"])
    assert model.methods[0].method.amount == 0.5
    assert str(model.methods[0].method) == "sparse_prune:structure=2:4"
    assert parse_method("sparse_prune:structure=1:4").amount == 0.75


def test_layers_alone_and_chosen_layers():
    model = timm_model("vit")
    vitarium.apply(model, "sparse_prune:amount=0.25,scope=layer,include=[blocks.*],exclude=norm", quiet=True)
    shares = sparsity(model).tensors
    assert {share for name, share in shares.items() if "blocks" in name and "norm" not in name} == {0.25}
    assert shares["head.weight"] == shares["blocks.0.norm1.weight"] == 0


def test_a_hierarchical_model_too():
    model = filled(vitarium.create_model("swin_pico", num_classes=5))
    before = logits(model)
    names = set(prunable(model))
    assert "stages.0.blocks.0.norm1.weight" in names
    assert "norm.weight" not in names
    vitarium.apply(model, "sparse_prune:structure=channels", quiet=True)
    report = model.methods[0]
    assert report.macs_after < 0.8 * report.macs_before
    vitarium.undo(model)
    assert torch.equal(logits(model), before)
    with pytest.raises(UnsupportedModel, match="no plain vision transformer"):
        vitarium.apply(model, "sparse_prune:structure=heads", quiet=True)


# ---- whole units


@pytest.mark.identity
@pytest.mark.parametrize("name", [name for name in NAMES if name != TIED])
def test_smaller_layers_compute_what_zeros_would(name: str):
    structure = "channels" if name == "timm-rope_mixed" else "both"  # each head has angles of its own
    masked, small = make(name).double(), make(name).double()
    vitarium.apply(masked, SparsePrune(structure=structure, shrink=False), quiet=True)
    vitarium.apply(small, SparsePrune(structure=structure), quiet=True)
    a, b = logits_double(masked), logits_double(small)
    assert float((a - b).abs().max()) <= 1e-6 * float(a.std())
    make_permanent(masked)
    torch.testing.assert_close(logits_double(masked), a, rtol=0, atol=1e-6 * float(a.std()))
    shapes = {name: p.shape for name, p in small.named_parameters()}
    assert {name: p.shape for name, p in masked.named_parameters()} == shapes
    with pytest.raises(UsageError, match="cannot be undone"):
        vitarium.undo(masked)
    vitarium.undo(small)
    assert torch.equal(logits_double(small), logits_double(make(name).double()))


def logits_double(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGE.double())


def test_the_report_holds_the_true_cost():
    model = timm_model("vit")
    vitarium.apply(model, "sparse_prune:structure=both", quiet=True)
    report = model.methods[0]
    assert report.macs_after == macs_of(model, IMAGE[:1])
    assert report.bytes_after == sum(p.nbytes for p in model.parameters())
    assert model.blocks[0].attn.num_heads == 1
    assert model.blocks[0].mlp.fc1.out_features == model.blocks[0].mlp.fc2.in_features == 48
    assert "8 -> 4 heads; 384 -> 192 channels" in str(report)
    masked = timm_model("vit")
    vitarium.apply(masked, "sparse_prune", quiet=True)
    report = masked.methods[0]
    assert (report.macs_after, report.bytes_after) == (report.macs_before, report.bytes_before)
    assert "50.0% of" in str(report)
    assert "saves no time" in str(report)


def test_units_of_all_layers_together():
    model = timm_model("vit")
    with torch.no_grad():
        for layer in (model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2):
            layer.weight[..., :24] *= 0.01  # most of this MLP says little
            layer.weight[:24] *= 0.01
    vitarium.apply(model, "sparse_prune:structure=channels,scope=global", quiet=True)
    widths = [block.mlp.fc1.out_features for block in model.blocks]
    assert sum(widths) == pytest.approx(192, abs=32)
    assert all(width % 8 == 0 for width in widths)


def test_pictures_decide_where_inputs_differ():
    model = timm_model("vit")
    silent = torch.zeros(96, dtype=torch.bool)
    silent[::2] = True
    with torch.no_grad():
        for layer, value in ((model.blocks[2].mlp.fc1.weight, 0.0), (model.blocks[2].mlp.fc1.bias, -30.0)):
            layer[silent] = value  # GELU gives nothing
        model.blocks[2].mlp.fc2.weight[:, silent] *= 100
    before = logits(model)
    vitarium.apply(model, SparsePrune(structure="channels", score="activation", include="blocks.2.mlp", calibration=IMAGE), quiet=True)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)
    vitarium.undo(model)
    vitarium.apply(model, SparsePrune(score="activation", calibration=[IMAGE]), quiet=True)
    assert sparsity(model, include=["blocks.1.attn.qkv.weight"]).share == 0.5


# ---- saved, and in combination


@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize(
    "methods",
    [
        ("sparse_prune",),
        ("sparse_prune:structure=2:4", "evit"),
        ("sparse_prune:structure=both", "tome:r=2", "int4w"),
        ("sparse_prune:structure=channels", "pitome", "int8"),
    ],
    ids="+".join,
)
def test_saves_loads_and_predicts_the_same(library: str, methods: tuple[str, ...], tmp_path: Path):
    if library == "timm":
        model = filled(vitarium.create_model("timm/vit_pico", num_classes=5, image_size=16, patch_size=4))
    else:
        model = transformers_model("vit")
        model.spec = ModelSpec("hf/tiny/vit", {})  # type: ignore[assignment]
    vitarium.apply(model, *methods, quiet=True)
    vitarium.save(model, tmp_path / "model.safetensors")
    loaded = vitarium.load(tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded), logits(model))
    assert [str(report.method) for report in loaded.methods] == [str(report.method) for report in model.methods]
    if len(methods) < 3:  # quantized layers keep their weights elsewhere
        assert sparsity(loaded) == sparsity(model)


def test_smaller_heads_of_a_rotary_model_are_saved(tmp_path: Path):
    model = vitarium.create_model("timm/vit_small_patch16_dinov3", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=5)
    vitarium.apply(filled(model), "sparse_prune:structure=both", quiet=True)
    vitarium.save(model, tmp_path / "model.safetensors")
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(vitarium.load(tmp_path / "model.safetensors")(image), model(image))


def test_a_file_of_smaller_layers_is_smaller(tmp_path: Path):
    model = filled(vitarium.create_model("sparse_prune_pico", num_classes=5))
    vitarium.save(model, tmp_path / "whole.safetensors")
    vitarium.apply(model, "sparse_prune:structure=both,amount=0.75", quiet=True)
    vitarium.save(model, tmp_path / "small.safetensors")
    whole, small = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "small"))
    assert small < 0.45 * whole
    assert torch.equal(logits(vitarium.load(tmp_path / "small.safetensors")), logits(model))


def test_masked_units_made_permanent_are_saved(tmp_path: Path):
    model = filled(vitarium.create_model("sparse_prune_pico", num_classes=5))
    vitarium.apply(model, SparsePrune(structure="both", shrink=False), quiet=True)
    before = logits(model)
    make_permanent(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    vitarium.save(model, tmp_path / "model.safetensors")
    assert torch.equal(logits(vitarium.load(tmp_path / "model.safetensors")), logits(model))


def test_a_curve_leaves_the_model_alone():
    model = timm_model("vit")
    before = logits(model)
    curve = pruning_curve(model, lambda m: sparsity(m).share, (0.2, 0.6))
    assert curve == pytest.approx({0.2: 0.2, 0.6: 0.6}, abs=1e-4)
    assert torch.equal(logits(model), before)
    assert model.methods == []


# ---- mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparse_prune:amount=50", "amount must be a number from 0 to below 1, got 50"),
        ("sparse_prune:amount=1", "from 0 to below 1, got 1"),
        ("sparse_prune:structure=rows", "weights, heads, channels, both or a pattern"),
        ("sparse_prune:structure=4:2", "a pattern such as 2:4"),
        ("sparse_prune:structure=2:4,amount=0.3", "removes 0.5 of the weights"),
        ("sparse_prune:scope=all", "scope must be 'auto', 'global' or 'layer', got 'all'"),
        ("sparse_prune:score=taylor", "'magnitude' or 'activation'"),
        ("sparse_prune:score=activation", "needs images"),
        ("sparse_prune:include=[block.*]", "nothing to prune is called 'block\\.\\*' \\(such as patch"),
        ("sparse_prune:structure=both,exclude=[atn]", "nothing to prune is called 'atn'"),
    ],
)
def test_mistakes_are_refused_with_a_reason(text: str, message: str):
    model = timm_model("vit")
    before = logits(model)
    with pytest.raises(UsageError, match=message):
        vitarium.apply(model, text, quiet=True)
    assert torch.equal(logits(model), before)


def test_what_cannot_be_smaller_is_refused_unchanged():
    model = timm_model("qk_norm")
    with pytest.raises(UnsupportedModel, match="normalises all heads together"):
        vitarium.apply(model, "sparse_prune:structure=heads", quiet=True)
    with pytest.raises(AttachError, match="found no module to change"):
        vitarium.apply(model, "sparse_prune:structure=channels", quiet=True)
    model = timm_model("rope_mixed")
    before = logits(model)
    with pytest.raises(AttachError, match="does not run with smaller layers"):
        vitarium.apply(model, "sparse_prune:structure=heads", quiet=True)
    assert torch.equal(logits(model), before)
    with pytest.raises(AttachError, match=r"the input of a .* is not known"):
        vitarium.apply(nn.Sequential(vitarium.nn.Mlp(8, 32)), "sparse_prune:structure=channels", quiet=True)
    with pytest.raises(UsageError, match="no sparse_prune is on this model"):
        make_permanent(model)
