"""Tests specific to UniFormer; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import assert_matches_golden, fill_value
from vitarium.backbones.uniformer import UniFormer, UniFormerDense, UniFormerLight, UniFormerVideo
from vitarium.backbones.uniformer.blocks import DividedBlock, GlobalBlock
from vitarium.backbones.uniformer.light import EvolvingBlock
from vitarium.efficiency.profiler import count_macs
from vitarium.nn import inflate

PLAIN = dict(mlp_ratio=2.0, layer_scale=0.0, drop=0.0, drop_path=0.0)


def stages_and_logits(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    _, maps = model.forward_intermediates(image)
    return {f"stage{i + 1}": m for i, m in enumerate(maps)} | {"logits": model(image)}


def filled(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: fill_value(name, tensor) for name, tensor in model.state_dict().items()})
    return model.double().eval()


def test_equals_the_authors_model():
    assert_matches_golden("uniformer-small", vitarium.create_model("uniformer_small"), stages_and_logits)


def test_light_equals_the_authors_model():
    def run(model: UniFormerLight, image: Tensor) -> dict[str, Tensor]:
        *_, (x, cls) = model.forward_tokens(image)
        return {"features": model.norm(x), "cls_token": cls, "logits": model(image)}

    assert_matches_golden("uniformer-xxs-128", vitarium.create_model("uniformer_light_xxs"), run)


def test_video_equals_the_authors_model():
    def run(model: UniFormerVideo, video: Tensor) -> dict[str, Tensor]:
        return {"features": model.forward_features(video), "logits": model(video)}

    assert_matches_golden("uniformer-video-small-8x96", vitarium.create_model("uniformer_video_small", num_classes=400), run)


def test_dense_equals_the_authors_model():
    def run(model: UniFormerDense, image: Tensor) -> dict[str, Tensor]:
        maps = model.forward_intermediates(image, intermediates_only=True)
        return {f"stage{i + 1}": m for i, m in enumerate(maps)}

    model = vitarium.create_model("uniformer_dense_small_h14", depths=(1, 1, 4, 1), window_size=7, num_classes=0)
    assert_matches_golden("uniformer-dense-hybrid-160x192", model, run)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("small", 21.545),
        ("small_plus", 24.03),
        ("base", 49.8),
        ("light_xxs", 10.215),
        ("light_xs", 16.5),
        ("tl_large", 100),
        ("video_small", 21.4),
    ],
)
def test_parameter_counts(name: str, millions: float):
    classes = 400 if name.startswith("video") else 1000
    with torch.device("meta"):
        model = vitarium.create_model(f"uniformer_{name}", num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(("name", "size", "macs"), [("small", 224, 3.6e9), ("light_xxs", 224, 1.3e9), ("video_small", 224, 41.8e9)])
def test_macs(name: str, size: int, macs: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"uniformer_{name}").eval()
        assert count_macs(model, size) == pytest.approx(macs, rel=0.06)


def reference(model: UniFormer) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights of `model`."""

    def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, 1, layer.groups)

    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)

    def across(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)

    def batch_norm(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)

    def layer_norm(x: Tensor, layer: nn.Module) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)

    def patches(x: Tensor, part: nn.Module) -> Tensor:
        x = conv(x, part.proj)
        return layer_norm(x.permute(0, 2, 3, 1), part.norm).permute(0, 3, 1, 2)

    def by_place(x: Tensor, block: nn.Module) -> Tensor:
        x = x + across(conv(across(batch_norm(x, block.norm1), block.conv1), block.attn), block.conv2)
        return x + across(F.gelu(across(batch_norm(x, block.norm2), block.mlp.fc1)), block.mlp.fc2)

    def by_content(x: Tensor, block: nn.Module) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        qkv = linear(layer_norm(rows, block.norm1), block.attn.qkv)
        q, k, v = qkv.reshape(*rows.shape[:2], 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        seen = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        rows = rows + linear(seen.transpose(1, 2).reshape(rows.shape), block.attn.proj)
        rows = rows + linear(F.gelu(linear(layer_norm(rows, block.norm2), block.mlp.fc1)), block.mlp.fc2)
        return rows.transpose(1, 2).reshape(x.shape)

    def literal(image: Tensor) -> Tensor:
        x = patches(image, model.stem)
        for k, stage in enumerate(model.stages):
            x = patches(x, stage.downsample) if k else x
            for block in stage.blocks:
                x = x + conv(x, block.pos_embed)
                x = by_content(x, block) if isinstance(block, GlobalBlock) else by_place(x, block)
        return linear(batch_norm(x, model.norm).mean((2, 3)), model.head)

    return literal


@pytest.mark.identity
def test_equals_the_equations():
    """For the plain image models."""
    model = filled(vitarium.create_model("uniformer_pico", num_classes=7))
    image = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(model(image), reference(model)(image), rtol=1e-9, atol=1e-11)


@pytest.mark.identity
def test_light_without_pruning_is_plain_attention_with_a_class_token():
    model: UniFormerLight = filled(vitarium.create_model("uniformer_light_pico", keep_ratio=1.0, num_classes=4))
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    local, last = model.stages
    x = last.downsample(local(model.stem(image), model.run_blocks))
    cls = model.cls_token.expand(2, -1, -1)
    for block in last.blocks:
        x = x + block.pos_embed(x)
        y = torch.cat((cls, x.flatten(2).transpose(1, 2)), 1)
        y = y + block.attn(block.norm1(y))[0]
        y = y + block.mlp(block.norm2(y))
        cls, x = y[:, :1], y[:, 1:].transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(model(image), model.head(model.norm(x).mean((2, 3))))


@pytest.mark.identity
@pytest.mark.parametrize("layer_scale", [0.0, 0.5])
def test_a_pruned_block_token_by_token(layer_scale: float):
    options = PLAIN | {"layer_scale": layer_scale}
    block: EvolvingBlock = filled(EvolvingBlock(8, 2, 4, keep_ratio=0.5, **options))
    x, cls = torch.randn(1, 8, 3, 3, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)
    score = torch.rand(1, 9, dtype=torch.float64)
    one, two, three = (getattr(block, f"gamma_{i}") if layer_scale else torch.ones(8) for i in (1, 2, 3))

    tokens = (x + block.pos_embed(x)).flatten(2)[0].T
    kept = score[0].argsort(descending=True)[:4].tolist()
    rest = [i for i in range(9) if i not in kept]
    shares = score[0, rest] / score[0, rest].sum()
    stands_for_rest = (shares[:, None] * tokens[rest]).sum(0, keepdim=True)
    y = torch.cat((cls[0], tokens[kept], stands_for_rest))[None]
    a, seen = block.attn(block.norm1(y))
    y = y + one * a
    m = block.mlp(block.norm2(y))
    y = y + two * m
    expected, new_score = tokens.clone(), score.clone()
    expected[kept] = y[0, 1:5]
    expected[rest] = tokens[rest] + three * (a + m)[0, -1]
    new_score[0, kept] = 0.5 * score[0, kept] + 0.5 * seen[0, :4]

    after, cls_after, score_after = block((x, cls, score))
    torch.testing.assert_close(after.flatten(2)[0].T, expected)
    torch.testing.assert_close(cls_after, y[:, :1])
    torch.testing.assert_close(score_after, new_score)


def test_keep_ratio_is_live_and_checked():
    model = vitarium.create_model("uniformer_light_pico").eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        half = model(image)
        model.set_keep_ratio(1.0)
        assert not torch.allclose(model(image), half)
    full = count_macs(model, 32)
    model.set_keep_ratio(0.25)
    assert count_macs(model, 32) < 0.8 * full
    with pytest.raises(ValueError, match="keep_ratio"):
        model.set_keep_ratio(0.0)


def test_nothing_that_the_class_token_does_not_see_breaks_a_light_model():
    """If attention is so sharp that all other scores vanish, the remaining tokens still have a representative token."""
    model = vitarium.create_model("uniformer_light_pico", num_classes=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.weight"):
                parameter.mul_(1e5)
        assert torch.isfinite(model(torch.randn(2, 3, 16, 16))).all()


def test_light_learns_from_both_heads():
    model = vitarium.create_model("uniformer_light_pico", num_classes=3).train()
    logits, of_token = model(torch.randn(2, 3, 16, 16))
    assert logits.shape == of_token.shape == (2, 3)
    model.reset_classifier(5)
    assert [part.shape for part in model(torch.randn(2, 3, 16, 16))] == [(2, 5), (2, 5)]


@pytest.mark.identity
def test_centred_image_weights_see_each_frame_as_an_image():
    image = filled(vitarium.create_model("uniformer_pico", mixers="LL", num_classes=0))
    video = vitarium.create_model("uniformer_video_pico", mixers="LL", num_classes=0).double().eval()
    assert inflate(image, video, "centre") == []
    clip = torch.randn(1, 3, 6, 16, 16, dtype=torch.float64)
    maps = video.forward_features(clip)
    for t in range(3):  # the stem takes every second frame
        torch.testing.assert_close(maps[:, :, t], image.forward_features(clip[:, :, 2 * t]))


@pytest.mark.identity
def test_averaged_image_weights_on_a_still_clip_give_the_image_away_from_its_ends():
    image = filled(vitarium.create_model("uniformer_pico", mixers="LL", depths=(1, 1), num_classes=0))
    video = vitarium.create_model("uniformer_video_pico", mixers="LL", depths=(1, 1), num_classes=0).double().eval()
    inflate(image, video)
    still = torch.randn(1, 3, 1, 16, 16, dtype=torch.float64)
    maps = video.forward_features(still.expand(-1, -1, 40, -1, -1))
    expected = image.forward_features(still[:, :, 0])
    torch.testing.assert_close(maps[:, :, 8:12], expected[:, :, None].expand(-1, -1, 4, -1, -1))  # 7 frames at each end are affected
    assert not torch.allclose(maps[:, :, 0], expected)


@pytest.mark.identity
def test_divided_attention_frame_by_frame():
    block: DividedBlock = filled(DividedBlock(8, 3, 4, **PLAIN))
    x = torch.randn(2, 8, 3, 2, 2, dtype=torch.float64)
    moved = x + block.pos_embed(x)
    in_time = moved.clone()
    for row in range(2):
        for column in range(2):
            y = moved[:, :, :, row, column].transpose(1, 2)
            in_time[:, :, :, row, column] = (y + block.t_attn(block.t_norm(y))).transpose(1, 2)
    for t in range(3):
        y = in_time[:, :, t].flatten(2).transpose(1, 2)
        out = moved[:, :, t].flatten(2).transpose(1, 2) + block.attn(block.norm1(y))  # the residual starts before the temporal attention
        out = out + block.mlp(block.norm2(out))
        torch.testing.assert_close(block(x)[:, :, t].flatten(2).transpose(1, 2), out)


def test_divided_attention_begins_without_time():
    model = vitarium.create_model("uniformer_video_pico", attention="divided", num_classes=3).eval()
    block = model.stages[1].blocks[0]
    y = torch.randn(4, 5, 64)
    assert torch.equal(block.t_attn(block.t_norm(y)), torch.zeros(4, 5, 64))
    assert block.t_attn.proj.weight.eq(1).all()


@pytest.mark.identity
def test_a_window_over_the_whole_map_is_global_attention():
    whole, windowed = (filled(GlobalBlock(8, 2, 4, window_size=size, **PLAIN)) for size in (None, 6))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(windowed(x), whole(x))


def test_hybrid_attends_globally_in_every_fourth_block():
    model = vitarium.create_model("uniformer_dense_small_h14")
    assert [block.window_size for block in model.stages[2].blocks] == [14, 14, 14, None] * 2
    assert all(block.window_size is None for block in model.stages[3].blocks)


@pytest.mark.identity
def test_token_labels_add_half_of_the_strongest_token():
    model = filled(vitarium.create_model("uniformer_tl_pico", num_classes=4))
    features = model.forward_features(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    tokens = torch.stack([model.aux_head(features[:, :, i, j]) for i in range(4) for j in range(4)], 1)
    expected = model.head(features.mean((2, 3))) + 0.5 * tokens.max(1).values
    torch.testing.assert_close(model.forward_head(features), expected)
    logits, dense = model.forward_dense(features)
    assert (logits.shape, dense.shape) == ((2, 4), (2, 4, 4, 4))


def authors_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of an image model with the authors' names."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^stem\.", "patch_embed1.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"patch_embed{int(m[1]) + 1}.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"blocks{int(m[1]) + 1}.", name)
        linear = re.search(r"^blocks1\.\d+\.(conv\d|mlp\.fc\d)\.weight", name)
        state[name] = tensor[..., None, None] if linear else tensor
    return state


def test_an_image_checkpoint_of_the_authors_loads_into_a_video_model(tmp_path: Path):
    image = vitarium.create_model("uniformer_pico", num_classes=7)
    path = tmp_path / "uniformer.pth"
    torch.save({"model": authors_state(image)}, path)
    assert torch.equal(vitarium.create_model("uniformer_pico", checkpoint=path).stem.proj.weight, image.stem.proj.weight)
    video = vitarium.create_model("uniformer_video_pico", checkpoint=path, num_classes=3)
    assert torch.allclose(video.stem.proj.weight.sum(2), image.stem.proj.weight)
    assert torch.equal(video.stages[1].blocks[1].mlp.fc1.weight, image.stages[1].blocks[1].mlp.fc1.weight)


def test_clips_are_described_by_the_variant_and_may_be_longer():
    pre = vitarium.create_model("uniformer_video_pico", frames=4, stride=3).preprocessing
    assert (pre.frames, pre.stride) == (4, 3)
    with pytest.raises(ValueError, match="no argument 'frames'"):
        vitarium.create_model("uniformer_pico", frames=4)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("uniformer_pico", {"depths": (1, 1, 1)}, "one value|need one value"),
        ("uniformer_pico", {"mixers": "LX"}, "mixers"),
        ("uniformer_pico", {"head_dim": 48}, "head_dim"),
        ("uniformer_pico", {"attention": "linear"}, "attention"),
        ("uniformer_light_pico", {"mixers": "GL"}, "local stages first"),
        ("uniformer_light_pico", {"keep_ratio": 2.0}, "keep_ratio"),
        ("uniformer_video_pico", {"attention": "window"}, "joint"),
    ],
)
def test_refuses(name: str, options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model(name, **options)


def test_layer_scales_of_the_authors_classifiers_are_in_global_blocks_only():
    """In the authors' code, local blocks have layer scales in the models for token labelling alone."""
    names = [name for name, _ in vitarium.create_model("uniformer_pico", layer_scale=1, local_layer_scale=False).named_parameters()]
    assert {name.split(".blocks")[0] for name in names if "gamma" in name} == {"stages.1"}
    with torch.device("meta"):
        base, large = (dict(vitarium.create_model(name).named_parameters()) for name in ("uniformer_base_ls", "uniformer_tl_large"))
    assert {name.split(".blocks")[0] for name in base if "gamma" in name} == {"stages.2", "stages.3"}
    assert {name.split(".blocks")[0] for name in large if "gamma" in name} == {f"stages.{k}" for k in range(4)}


@pytest.mark.parametrize(
    ("name", "options"), [("uniformer_pico", {}), ("uniformer_video_pico", dict(attention="divided")), ("uniformer_light_pico", {})]
)
def test_bias_and_scale_of_the_attention(name: str, options: dict):
    """Without a bias the model equals one whose bias is zero; a scale s equals queries that are multiplied by s sqrt(d)."""
    one = filled(vitarium.create_model(name, num_classes=3, **options))
    other = filled(vitarium.create_model(name, num_classes=3, qkv_bias=False, qk_scale=0.5, **options))
    state = {key: tensor.clone() for key, tensor in one.state_dict().items()}
    for key, tensor in state.items():
        if key.endswith("attn.qkv.bias"):
            tensor.zero_()
    other.load_state_dict({key: tensor for key, tensor in state.items() if not key.endswith("attn.qkv.bias")})
    for key, tensor in state.items():
        if key.endswith("attn.qkv.weight"):
            tensor[: len(tensor) // 3] *= 0.5 * 16**0.5  # 16 channels per head
    one.load_state_dict(state)
    shape = (2, 3, 8, 16, 16) if "video" in name else (2, 3, 16, 16)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(other(x), one(x), rtol=1e-10, atol=1e-10)


def test_light_takes_the_authors_lists():
    """One MLP ratio per stage, one keep ratio and one trade-off per global block, patches as a stem."""
    model = vitarium.create_model(
        "uniformer_light_pico", mlp_ratio=(2, 4), keep_ratio=(1, 0.75, 0.5), trade_off=(1, 0.3, 0.6), conv_stem=False, num_classes=3
    )
    blocks = [part for part in model.modules() if isinstance(part, EvolvingBlock)]
    assert [(b.keep_ratio, b.trade_off) for b in blocks] == [(1, 1), (0.75, 0.3), (0.5, 0.6)]
    assert blocks[0].mlp.fc1.out_features == 4 * 64
    assert type(model.stem).__name__ == "Patches"
    same = vitarium.create_model("uniformer_light_pico", keep_ratio=(1, 0.5, 0.5), trade_off=(0.1, 0.5, 0.5), num_classes=3)
    usual = vitarium.create_model("uniformer_light_pico", num_classes=3)
    same.load_state_dict(usual.state_dict())
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(same.eval()(image), usual.eval()(image))
    for wrong in ((0.5, 0.5, 0.5), (1, 0.5), (1, 0, 0.5)):
        with pytest.raises(vitarium.errors.UsageError, match="one per global block"):
            vitarium.create_model("uniformer_light_pico", keep_ratio=wrong)


@pytest.mark.identity
def test_light_video_model_is_the_image_model_on_one_frame():
    """With kernels that are zero beside the middle of the time axis, a clip of one frame gives the logits of its image."""
    image_model = filled(vitarium.create_model("uniformer_light_pico", num_classes=3, mlp_ratio=(2, 3), layer_scale=1))
    video_model = vitarium.create_model("uniformer_video_light_pico", num_classes=3, mlp_ratio=(2, 3), layer_scale=1, overlap=True).double()
    state = dict(image_model.state_dict())
    for name, tensor in video_model.state_dict().items():
        if tensor.ndim == 5:
            kernel = torch.zeros_like(tensor)
            kernel[:, :, tensor.shape[2] // 2] = state[name]
            state[name] = kernel
    video_model.load_state_dict(state)
    image = torch.randn(2, 3, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(video_model.eval()(image[:, :, None]), image_model(image), rtol=1e-10, atol=1e-10)


def test_scores_of_a_clip_compare_all_frames_and_keep_their_sum():
    model = vitarium.create_model("uniformer_video_light_pico", depths=(1, 2, 2), dims=(32, 64, 64), mixers="LGG", num_classes=3).eval()
    taken: list[tuple[Tensor, ...]] = []
    for block in (model.stages[1].blocks[-1], model.stages[2].blocks[0]):
        block.register_forward_hook(lambda _, given, made: taken.append((*given[0], *made)))
    clip = torch.randn(2, 3, 8, 16, 16)
    model(clip)
    (*_, before), (_, _, after, *_) = taken
    assert (before.shape, after.shape) == ((2, 4 * 4 * 4), (2, 4 * 2 * 2))
    torch.testing.assert_close(before.sum(1), after.sum(1))
    pooled = before.view(2, 4, 2, 2, 2, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(after, pooled * (before.sum(1) / pooled.sum(1))[:, None])


def test_light_video_models_have_the_authors_sizes():
    with torch.device("meta"):
        small, large = (vitarium.create_model(f"uniformer_video_light_{name}", num_classes=400) for name in ("xxs16_128", "xs32_192"))
        images = [vitarium.create_model(f"uniformer_light_{name}", num_classes=400) for name in ("xxs", "xs")]
    for clips, still in zip((small, large), images, strict=True):
        flat = {name: (*p.shape[:2], *p.shape[3:]) if p.ndim == 5 else tuple(p.shape) for name, p in clips.named_parameters()}
        assert flat == {name: tuple(p.shape) for name, p in still.named_parameters()}
    assert small.stem.proj[3].stride == (2, 2, 2)
    assert vitarium.create_model("uniformer_video_light_xxs4_160").preprocessing.frames == 4
