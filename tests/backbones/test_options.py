"""Contract of the constructors' options beyond the variants: what the authors' code can also build is saved, compiled and exported, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vitarium
from tests.backbones.test_contract import CLASSES, image_for, largest_error, some_loss
from vitarium.nn import Backbone

OPTIONS = [
    ("swin_pico", dict(pos_embed=True, patch_norm=False, qkv_bias=False, qk_scale=0.3, stage_norms=True, window_size=(4, 2))),
    ("swin_mlp_pico", dict(pos_embed=True, patch_norm=False, window_size=(4, 2))),
    ("convit_pico", dict(qkv_bias=True, qk_scale=0.3, pos_embed=False)),
    ("t2t_vit_pico", dict(qkv_bias=True, qk_scale=0.3)),
    ("tinyvit_pico", dict(num_heads=(4, 1), expand_ratio=2.0, mlp_ratio=3.0, local_conv_size=5)),
    ("crossvit_pico", dict(depths=((1, 2, 1), (2, 1, 1)), qkv_bias=False, qk_scale=0.3, fixed_sizes=True)),
    ("cvt_pico", dict(cls_tokens=(True, False), projection=("linear", "avg"), qkv_kernel=(3, 2), kv_padding=(1, 0), qkv_bias=False)),
    ("transnext_pico", dict(num_heads=(2, 6), window_size=(5, 3), qkv_bias=False, bias_size=12)),
    ("transnext_pico", dict(fixed_pool_size=3)),
    (
        "crossformer_pico",
        dict(group_sizes=((4, 3), 4), merge_kernels=((2, 6),), mlp_ratio=(2.0, 3.0), qkv_bias=False, patch_norm=False, pos_embed=True),
    ),
    ("crossformer_pico", dict(pad_around=True, mask_padding=False, group_sizes=(3, 3))),
    ("convnext_pico", dict(layer_scale_init_value=0, stage_norms=True)),
    ("hornet_pico", dict(depths=(1, 1), layer_scale_init_value=0, stage_norms=True, scale=0.5, filters=(None, (4, 3)))),
    ("tnt_pico", dict(depth=1, qkv_bias=True, qk_scale=0.3, se=True)),
    ("tnt_pyramid_pico", dict(depths=(1, 1), qkv_bias=True, qk_scale=0.3, se=True, mlp_ratio=3.0)),
    ("uniformer_pico", dict(depths=(1, 1), qkv_bias=False, qk_scale=0.3, layer_scale=1, local_layer_scale=False)),
    ("uniformer_video_pico", dict(depths=(1, 1), qkv_bias=False, qk_scale=0.3, attention="divided")),
    (
        "uniformer_light_pico",
        dict(mlp_ratio=(2, 4), keep_ratio=(1, 0.75, 0.5), trade_off=(1, 0.3, 0.6), conv_stem=False, qkv_bias=False, layer_scale=1),
    ),
    ("maxvit_pico", dict(grid_size=2, head_dim=16, mlp_ratio=3.0, expand_ratio=2.0, se_ratio=0, kernel_size=5, pre_logits=False)),
    ("vim_pico", dict(depth=2, class_token="first", rotary="stream", average=False, layer_scale_init_value=1)),
    ("vim_pico", dict(depth=2, class_token="ends", shared=True, alternate=True, positions=False, norm="layer")),
]
"""Models with options that no variant uses."""
TRACED = [case for case in OPTIONS if case[0] != "swin_mlp_pico" and not case[1].keys() & {"fixed_pool_size", "pad_around"}]
"""Cases for the slow tests, without those that trace as a case beside them."""
PLAIN = ("convit_pico", "t2t_vit_pico", "tinyvit_pico", "crossvit_pico", "transnext_pico", "convnext_pico")
"""Models whose options change layers and numbers, and no step of the forward pass."""


def label(case: tuple[str, dict]) -> str:
    """Return the name of the model and of its first option."""
    return f"{case[0]}-{next(iter(case[1]))}"


@pytest.fixture(params=OPTIONS, ids=label)
def model(request: pytest.FixtureRequest) -> Backbone:
    """Return a model with its new options, away from its initial zeros and ones, in evaluation mode."""
    torch.manual_seed(0)
    name, options = request.param
    model = vitarium.create_model(name, num_classes=CLASSES, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def test_every_parameter_gets_a_gradient(model: Backbone):
    image = image_for(model)
    features, maps = model.train().forward_intermediates(image)
    (some_loss((model.forward_head(features), *maps)) + some_loss(model(image))).backward()  # some heads take part in training alone
    assert not [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_other_sizes(model: Backbone):
    side = model.preprocessing.image_size
    assert model(image_for(model, height=2 * side, width=3 * side)).shape == (2, CLASSES)


def test_saves_and_loads(model: Backbone, tmp_path: Path):
    vitarium.save(model, tmp_path / "model.safetensors")
    loaded = vitarium.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(image_for(model)), model(image_for(model)))


@pytest.mark.parametrize("model", [case for case in TRACED if case[0] not in PLAIN], ids=label, indirect=True)
def test_compiles_without_a_break(model: Backbone):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    image = image_for(model)
    with torch.no_grad():
        assert largest_error(compiled(image), model(image)) < 1e-4


@pytest.mark.parametrize("model", TRACED, ids=label, indirect=True)
def test_exports(model: Backbone):
    program = torch.export.export(model, (image_for(model),), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    image = image_for(model, batch=5)
    assert largest_error(program.module()(image), model(image)) < 1e-4
