"""Passes on traced graphs keep the outputs, at any batch, and do what they are for; what they do not recognise is left as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from vitarium.efficiency import graphs
from vitarium.efficiency.graphs import attention, folding, lighten, pieces, reading
from vitarium.efficiency.graphs.editing import Editor, aten, is_call, shape_of


def scattered(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic another value than its first one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    return model.eval()


def traced(model: nn.Module, image: Tensor) -> torch.fx.GraphModule:
    batch = torch.export.Dim("batch")
    return torch.export.export(model, (image,), dynamic_shapes=({0: batch},)).module()


def changed(model: nn.Module, image: Tensor, *passes) -> Editor:
    """Apply passes to a model's graph, check that the outputs of several batches stay, and return the graph."""
    module = traced(model, image)
    editor = Editor(module)
    editor.clean()
    for run in passes:
        run(editor)
        editor.clean()
    module.recompile()
    for batch in (1, 3):
        other = torch.randn(batch, *image.shape[1:])
        wanted = model(other)
        assert (module(other) - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())
    return editor


def timm_model(name: str, **options) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=5, **options)


MODELS = {
    "swin_pico": lambda: vitarium.create_model("swin_pico", num_classes=5),
    "crossvit_pico": lambda: vitarium.create_model("crossvit_pico", num_classes=5),
    "tinyvit_pico": lambda: vitarium.create_model("tinyvit_pico", num_classes=5),
    "convnext_pico": lambda: vitarium.create_model("convnext_pico", num_classes=5),
    "cvt_pico": lambda: vitarium.create_model("cvt_pico", num_classes=5),
    "timm vit": lambda: timm_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, init_values=0.1
    ),
    "timm swin": lambda: timm_model(
        "swin_tiny_patch4_window7_224", img_size=16, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_all_passes_keep_the_outputs(name, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2**13)
    editor = changed(scattered(MODELS[name]()), torch.randn(2, 3, 16, 16), *graphs.PASSES)
    assert not editor.calls(aten.batch_norm.default, aten.upsample_bicubic2d.vec, aten.scaled_dot_product_attention.default)
    assert len(editor.calls(aten.cat.default)) > 0  # pieces


def test_the_traced_model_stays_as_it_is():
    model = scattered(vitarium.create_model("swin_pico", num_classes=5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lighten(traced(model, torch.randn(2, 3, 16, 16)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_norms_go_into_the_convolutions_before_or_after_them():
    around = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.ReLU())
    assert not changed(scattered(around), torch.randn(2, 3, 8, 8), folding.fold_norms).calls(aten.batch_norm.default)
    padded = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, padding=1))  # the zeros around the map are not shifted
    assert len(changed(scattered(padded), torch.randn(2, 3, 8, 8), folding.fold_norms).calls(aten.batch_norm.default)) == 1


class Scaled(nn.Module):
    def __init__(self, bias: bool, shared: bool):
        super().__init__()
        self.layer, self.gamma, self.shared = nn.Linear(4, 3, bias=bias), nn.Parameter(torch.rand(3)), shared

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.gamma * y if self.shared else self.gamma * y


@pytest.mark.parametrize("bias", [True, False])
def test_a_factor_goes_into_a_layer_that_nothing_else_reads(bias):
    assert not changed(Scaled(bias, False), torch.randn(2, 5, 4), folding.fold_scales).calls(aten.mul.Tensor)
    assert changed(Scaled(bias, True), torch.randn(2, 5, 4), folding.fold_scales).calls(aten.mul.Tensor)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("size", [(7, 12), (20, 5)])
def test_resizing_equals_the_products(corners, size):
    class Resized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(x, size, mode="bicubic", align_corners=corners)

    editor = changed(Resized(), torch.randn(2, 3, 9, 11), folding.resize_by_products)
    assert len(editor.calls(aten.matmul.default)) == 2


def test_only_the_class_token_of_the_last_block_is_computed():
    editor = changed(
        scattered(MODELS["timm vit"]()), torch.randn(2, 3, 16, 16), reading.read_less, attention.split_projections, reading.read_less
    )
    rows = [shape_of(node)[1] for node in editor.calls(aten.linear.default) if len(shape_of(node)) == 3]
    assert rows == [17] * 6 + [1, 17, 17] + [1] * 3  # q, k, v, projection, MLP; in the last block k and v alone see all tokens


class Joined(nn.Module):
    """Reads rows of a concatenation, across the parts or inside one."""

    def __init__(self, first: int, last: int):
        super().__init__()
        self.layer, self.rows = nn.Linear(4, 4), slice(first, last)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(torch.cat([self.layer(x), x], 1))[:, self.rows]


@pytest.mark.parametrize(("first", "last", "layers"), [(5, 7, 0), (0, 2, 1), (2, 7, 1)])
def test_a_part_that_nobody_reads_is_not_computed(first, last, layers):
    editor = changed(Joined(first, last), torch.randn(2, 5, 4), reading.read_less)
    assert len(editor.calls(aten.linear.default)) == layers


def test_projections_lose_what_softmax_ignores():
    model = scattered(vitarium.create_model("swin_pico", num_classes=5))
    editor = changed(model, torch.randn(2, 3, 32, 32), attention.split_projections)
    (first, *_) = editor.calls(aten.softmax.int)
    biases = [len(node.args) > 2 and node.args[2] is not None for node in editor.calls(aten.linear.default)[:3]]
    assert biases == [True, False, False]  # q, k, v
    assert not editor.calls(aten.unbind.int)
    assert all(not is_call(node, aten.expand.default) for node in editor.graph.nodes)  # biases of windows are broadcast
    assert first.args[1] == -1


@pytest.mark.parametrize("mask", [None, "bool"])
def test_attention_that_is_not_understood_is_left(mask):
    class Normed(nn.Module):
        """Queries are normed, or a mask is given: the layers cannot be changed, or the mask cannot be added."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            if mask is None:
                q = F.normalize(q, dim=-1)
            keep = torch.ones(5, 5, dtype=torch.bool).tril() if mask else None
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)

    editor = changed(Normed(), torch.randn(2, 5, 8), attention.split_projections)
    assert len(editor.calls(aten.scaled_dot_product_attention.default)) == 1


def test_channels_of_heads_in_another_order_are_found():
    class PerHead(nn.Module):
        """[q | k | v] of each head, as in TinyViT's checkpoints; values are wider; no layer follows."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 2 * 14)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(2, (2, 14)).split([4, 4, 6], -1)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=0.3)
            return out.transpose(1, 2).sum(2)

    editor = changed(PerHead(), torch.randn(2, 5, 8), attention.split_projections)
    assert [shape_of(node)[-1] for node in editor.calls(aten.linear.default)] == [8, 8, 12]
    assert not editor.calls(aten.scaled_dot_product_attention.default)


def test_an_mlp_takes_tokens_in_pieces_if_its_hidden_tensor_is_large(monkeypatch):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 16), nn.Linear(16, 4)
            self.places = nn.Parameter(torch.randn(1, 7, 5, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.places  # not the same for all rows
            return x + self.down(F.gelu(self.up(self.norm(x))))

    one = 7 * 5 * 16 * 4 * pieces.PIECE_BATCH
    for most, count in ((one, 1), (one // 3, 4)):  # 35 tokens in pieces of 9
        monkeypatch.setattr(pieces, "PIECE_BYTES", most)
        editor = changed(Block(), torch.randn(2, 7, 5, 4), pieces.work_in_pieces)
        assert len(editor.calls(aten.gelu.default)) == len(editor.calls(aten.layer_norm.default)) == count
