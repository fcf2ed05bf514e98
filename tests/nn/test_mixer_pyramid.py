"""The pyramid of SpectFormer and SVT against a literal implementation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn.mixer_pyramid import GridAttention, MixerPyramid

OPTIONS = dict(depths=(1, 2), dims=(24, 48), num_heads=(2, 4), mlp_ratios=(4, 2), mixers="AA", stem_dim=8, patch_size=2, num_classes=5)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Literal multi-head attention: (B, M, C), (B, N, C), (B, N, C) -> (B, M, C)."""
    split = lambda t: t.reshape(*t.shape[:2], heads, -1).permute(0, 2, 1, 3)
    q, k, v = split(q), split(k), split(v)
    mixed = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    return mixed.permute(0, 2, 1, 3).flatten(2)


def literal(model: MixerPyramid, x: Tensor, own_mixer: Callable[[nn.Module, Tensor, int, int], Tensor]) -> Tensor:
    """Literal implementation with the weights of the submodules: images -> logits."""
    for stage in model.stages:
        down = stage.downsample
        x = down.proj(down.conv(x))
        (_, channels, h, w) = x.shape
        x = F.layer_norm(x.flatten(2).transpose(1, 2), (channels,), down.norm.weight, down.norm.bias, 1e-5)
        for block in stage.blocks:
            y, attn = block.norm1(x), block.attn
            if isinstance(attn, GridAttention):
                q, k, v = F.linear(y, attn.qkv.weight, attn.qkv.bias).chunk(3, -1)
                x = x + F.linear(softmax_attention(q, k, v, attn.num_heads), attn.proj.weight, attn.proj.bias)
            else:
                x = x + own_mixer(attn, y, h, w)
            y = F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias)
            y = block.mlp.dwconv(y.transpose(1, 2).reshape(len(y), -1, h, w)).flatten(2).transpose(1, 2)
            x = x + F.linear(F.gelu(y), block.mlp.fc2.weight, block.mlp.fc2.bias)
        if stage.norm is not None:
            x = stage.norm(x)
            x = x.reshape(len(x), h, w, -1).permute(0, 3, 1, 2).contiguous()
    reader = model.class_reader
    x = torch.cat([x.mean(1, keepdim=True), x], 1)
    y = reader.norm1(x)
    k, v = F.linear(y, reader.key_value.weight, reader.key_value.bias).chunk(2, -1)
    q = F.linear(y[:, :1], reader.query.weight, reader.query.bias)
    token = x[:, :1] + F.linear(softmax_attention(q, k, v, reader.num_heads), reader.proj.weight, reader.proj.bias)
    y = F.gelu(F.linear(reader.norm2(token), reader.mlp.fc1.weight, reader.mlp.fc1.bias))
    token = token + F.linear(y, reader.mlp.fc2.weight, reader.mlp.fc2.bias)
    return model.head(model.head_norm(token)[:, 0])


def no_mixer(*_: object) -> Tensor:
    raise AssertionError("there is only attention here")


def test_equals_its_equations():
    model = MixerPyramid(**OPTIONS).double().eval()
    image = torch.randn(2, 3, 21, 32, dtype=torch.float64)
    expected = literal(model, image, no_mixer)
    torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model.fuse()(image), expected, rtol=0, atol=1e-12)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())


def test_token_labels():
    model = MixerPyramid(**OPTIONS, token_label=True).eval()
    image = torch.randn(2, 3, 16, 16)
    features = model.forward_features(image)
    logits, tokens = model.forward_dense(features)
    assert tokens.shape == (2, 16, 5)
    torch.testing.assert_close(model(image), logits + 0.5 * tokens.amax(1))
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    assert model.aux_head.out_features == 3
    model.reset_classifier(0)
    assert model(image).shape == (2, 48)


def test_other_poolings():
    model = MixerPyramid(**OPTIONS).eval()
    image = torch.randn(2, 3, 16, 16)
    features = model.forward_features(image)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(image), model.head_norm(features.mean((2, 3))))


def test_convolutions_begin_by_their_fan_out():
    model = MixerPyramid(**OPTIONS | dict(dims=(24, 256), num_heads=(2, 4)))
    assert model.stages[1].downsample.proj.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.05)
    assert model.stages[1].blocks[0].mlp.dwconv.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(mixers="AAA"), "one value per stage"), (dict(mixers="AX"), "letter per stage out of A"), (dict(patch_size=3), "2 or 4, got 3")],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        MixerPyramid(**OPTIONS | options)
