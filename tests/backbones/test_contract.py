"""Contract of all registered backbones, tested on the smallest variant of each. New models are included by registration."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitarium
from vitarium.catalog import families, find_model
from vitarium.errors import InputError, UsageError
from vitarium.nn import Backbone, DropPath, VideoBackbone

FAMILIES = [f for f in families() if issubclass(f.cls, Backbone)]
NAMES = [f"{f.name}_pico" for f in FAMILIES]
IMAGE_NAMES = [f"{f.name}_pico" for f in FAMILIES if not issubclass(f.cls, VideoBackbone)]
CLASSES = 5


@functools.cache
def _built(name: str) -> Backbone:
    torch.manual_seed(0)
    model = vitarium.create_model(name, num_classes=CLASSES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the initial zeros and ones, so that every parameter matters
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Backbone:
    """Return a new copy in evaluation mode."""
    return copy.deepcopy(_built(request.param))


def image_for(model: Backbone, batch: int = 2, height: int | None = None, width: int | None = None, **options) -> Tensor:
    """Return an image, or for a video model a clip, of the size that the model is made for."""
    side = model.preprocessing.image_size
    frames = [model.preprocessing.frames] if isinstance(model, VideoBackbone) else []
    shape = batch, model.in_chans, *frames, height or side, width or side
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), **options)


def some_loss(logits: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return a scalar that depends on all outputs; in training there may be a pair (with the logits of a class token)."""
    return sum(part.float().square().sum() for part in (logits if isinstance(logits, tuple) else (logits,)))


def largest_error(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def test_every_family_has_a_small_variant_that_learns_fast():
    for family in FAMILIES:
        assert "pico" in family.variants, f"{family.name} needs a pico variant"
        assert sum(p.numel() for p in _built(f"{family.name}_pico").parameters()) < 3.2e5


@pytest.mark.parametrize("name", vitarium.list_models())
def test_every_variant_builds(name: str):
    """On the meta device, without memory; the constructor accepts every key of the variants table."""
    with torch.device("meta"):
        model = vitarium.create_model(name)
    assert model.spec.name == name
    assert not isinstance(model, Backbone) or model.num_classes == 1000 or name == "thorax_mae_pico"


def test_forward(model: Backbone):
    logits = model(image_for(model))
    assert logits.shape == (2, CLASSES)
    assert torch.isfinite(logits).all()


def test_every_parameter_gets_a_gradient(model: Backbone):
    model.train()
    for part in model.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0  # the branches of both samples may be dropped
    maps = model.forward_intermediates(image_for(model), norm=True, intermediates_only=True)
    (some_loss(model(image_for(model))) + some_loss(tuple(maps))).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert not missing


def test_checkpointing_changes_nothing(model: Backbone):
    image = image_for(model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.train().zero_grad()
        torch.manual_seed(3)
        some_loss(model(image)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("size", [(2, 2), (1, 3), (1.5, 1)])
def test_other_sizes(model: Backbone, size: tuple[float, float]):
    side = model.preprocessing.image_size
    assert model(image_for(model, height=int(size[0] * side), width=int(size[1] * side))).shape == (2, CLASSES)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (17, 23), (31, 31), (33, 20), (1, 100), (50, 1)])
def test_odd_sizes_work_or_are_refused_at_the_door(model: Backbone, size: tuple[int, int]):
    image = image_for(model, height=size[0], width=size[1])
    if min(size) < model.min_size:
        with pytest.raises(InputError, match=f"at least {model.min_size}x{model.min_size} pixels, got {size[0]}x{size[1]}"):
            model(image)
    else:
        assert torch.isfinite(model(image)).all()


def test_bad_inputs_are_input_errors(model: Backbone):
    good = image_for(model)
    bad = {
        "2 axes": good.flatten(1),
        r"image\[None\]": good[0],
        "permute": good.movedim(1, -1),
        "channels": torch.cat([good, good], 1),
        "uint8": (good * 50).byte(),
        "float64": good.double(),
    }
    for words, image in bad.items():
        with pytest.raises(InputError, match=words):
            model(image)
    with pytest.raises(UsageError, match="did you mean num_classes"):
        vitarium.create_model(model.spec.name, num_clases=3)
    assert model(good[:0]).shape == (0, CLASSES)


def test_images_do_not_touch_one_another(model: Backbone):
    image = image_for(model, batch=3)
    together = model(image)
    assert largest_error(together[1:2], model(image[1:2])) < 1e-4
    assert largest_error(model(image.flip(0)).flip(0), together) < 1e-4


def test_deterministic_in_eval(model: Backbone):
    image = image_for(model)
    assert torch.equal(model(image), model(image))


def test_inference_mode_equals_training_graph(model: Backbone):
    """The fast paths of inference equal the ordinary operators."""
    image = image_for(model, batch=2)
    with torch.inference_mode():
        fast = model(image)
    assert largest_error(fast, model(image)) < 1e-4


def test_fused_for_deployment_says_the_same(model: Backbone):
    generator = torch.Generator().manual_seed(4)
    for name, buffer in model.named_buffers():  # statistics for which the norms matter
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand(buffer.shape, generator=generator))
    image = image_for(model)
    before = model(image)
    fused = copy.deepcopy(model).fuse()
    assert not any(part.training for part in fused.modules())
    assert largest_error(fused(image), before) < 1e-5 * max(1.0, before.abs().max().item())


def test_forward_intermediates(model: Backbone):
    image = image_for(model)
    features, maps = model.forward_intermediates(image)
    assert torch.equal(features, model.forward_features(image))
    assert len(maps) == len(model.feature_info)
    for info, m in zip(model.feature_info, maps, strict=True):
        assert m.shape[:2] == (2, info["num_chs"])
        assert abs(m.shape[-1] - image.shape[-1] / info["reduction"]) < 1
    (last,) = model.forward_intermediates(image, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(last, model.as_map(features, image.shape[2:]))
    (first,) = model.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, maps[0])
    with pytest.raises(InputError, match="stages"):
        model.forward_intermediates(image, indices=[99])


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_features_only_through_timm(name: str):
    import timm

    model = _built(name)
    vitarium.register_with_timm()
    backbone = timm.create_model(f"vitarium_{name}", features_only=True).eval()
    maps = backbone(image_for(model))
    assert [m.shape[1] for m in maps] == backbone.feature_info.channels() == [info["num_chs"] for info in model.feature_info]
    classifier = timm.create_model(f"vitarium_{name}", num_classes=3, in_chans=1).eval()
    assert classifier(image_for(model)[:, :1]).shape == (2, 3)


def test_reset_classifier(model: Backbone):
    image = image_for(model)
    pooled = model.forward_head(model.forward_features(image), pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(0)
    assert torch.equal(model(image), pooled)
    model.reset_classifier(7)
    assert model(image).shape == (2, 7)
    model.reset_classifier(0, "")
    assert torch.equal(model(image), model.forward_features(image))
    with pytest.raises(InputError, match="global_pool"):
        model.reset_classifier(3, "avgmax")


def test_float64(model: Backbone):
    image = image_for(model)
    single = model(image)
    assert largest_error(model.double()(image.double()), single) < 1e-3


def test_bf16_autocast(model: Backbone):
    image = image_for(model)
    full = model(image)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(image)
    assert torch.isfinite(half).all()
    assert largest_error(half, full) < 0.1 * full.abs().max().item() + 0.1
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        some_loss(model(image)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_large_weights_stays_finite(model: Backbone, dtype: torch.dtype):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("qkv.weight"):
                p.mul_(10)
    assert torch.isfinite(model.to(dtype)(image_for(model).to(dtype))).all()


def test_channels_last_input(model: Backbone):
    image = image_for(model)
    layout = torch.channels_last if image.ndim == 4 else torch.channels_last_3d
    assert largest_error(model(image.contiguous(memory_format=layout)), model(image)) < 1e-4


def test_compiles_without_a_break(model: Backbone):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    image = image_for(model)
    with torch.no_grad():
        assert largest_error(compiled(image), model(image)) < 1e-4
    model.train()
    some_loss(torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)(image)).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    some_loss(model(image)).backward()
    assert reached == {name for name, p in model.named_parameters() if p.grad is not None}


def test_exports(model: Backbone):
    image = image_for(model)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},))
    for count in (2, 5):
        other = image_for(model, batch=count)
        assert largest_error(program.module()(other), model(other)) < 1e-4


def test_onnx(model: Backbone, tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    image = image_for(model)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (image,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    assert np.abs(logits - model(image).detach().numpy()).max() < 1e-3


def test_saves_and_loads(model: Backbone, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    model.labels = [f"class {i}" for i in range(CLASSES)]
    vitarium.save(model, path)
    loaded = vitarium.load(path)
    assert torch.equal(loaded(image_for(model)), model(image_for(model)))
    assert (loaded.spec, loaded.preprocessing, loaded.labels) == (model.spec, model.preprocessing, model.labels)


def test_groups_cover_each_parameter_once(model: Backbone):
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    names = {name for name, _ in model.named_parameters()}
    for coarse in (False, True):
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(layers) == names
        assert len(set(layers.values())) > 2
    assert model.no_weight_decay() <= names
    for groups in (
        param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay()),
        param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay()),
    ):
        grouped = [id(p) for group in groups for p in group["params"]]
        assert len(grouped) == len(set(grouped)) == len(names)


def test_deepcopy_and_pickle(model: Backbone):
    image = image_for(model)
    logits = model(image)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(image), logits)
        with torch.no_grad():
            next(twin.parameters()).zero_()
    assert torch.equal(model(image), logits)


def test_default_cfg_is_timms(model: Backbone):
    from timm.data import resolve_data_config

    config = resolve_data_config({}, model=model)
    assert config["input_size"] == (model.in_chans, *2 * [model.preprocessing.image_size])
    assert config["mean"] == model.preprocessing.mean
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    if first := model.default_cfg["first_conv"]:
        assert model.get_submodule(first).in_channels == model.in_chans


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_timms_checks_of_a_registered_model(name: str):
    """The checks of timm's own test suite: configuration, pooled and unpooled features, head removal, gradients, intermediates."""
    import timm

    vitarium.register_with_timm()
    model = timm.create_model(f"vitarium_{name}", num_classes=42)
    cfg, state = model.default_cfg, model.state_dict()
    image = torch.randn(2, *cfg["input_size"])
    assert model.num_features > 0
    assert model.head_hidden_size > 0
    first = cfg["first_conv"]
    for part in (cfg["classifier"], *((first,) if isinstance(first, str) else first)):
        assert f"{part}.weight" in state
    maps = model.train().forward_intermediates(image, intermediates_only=True)
    (some_loss(model(image)) + some_loss(tuple(maps))).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]

    model.eval()
    with torch.no_grad():
        assert model(image).shape == (2, 42)
        features = model.forward_features(image)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        shapes_without_head(model, image, features.shape)
        shapes_without_head(timm.create_model(f"vitarium_{name}", num_classes=0, global_pool="").eval(), image, features.shape)

    extractor = timm.create_model(f"vitarium_{name}", features_only=True).eval()
    channels, strides = extractor.feature_info.channels(), extractor.feature_info.reduction()
    with torch.no_grad():
        maps = extractor(image)
    assert len(maps) == len(channels) >= 2
    for m, dim, stride in zip(maps, channels, strides, strict=True):
        assert m.shape[1] == dim
        assert m.shape[2] <= cfg["input_size"][1] // stride + 1


def shapes_without_head(model: nn.Module, image: Tensor, shape: torch.Size) -> None:
    """Check the outputs without classes: unpooled as `forward_features` has them, a map of timm's `pool_size` or tokens, and pooled."""
    model.reset_classifier(0, "")
    unpooled = model(image)
    assert unpooled.shape == shape
    pool_size = model.default_cfg["pool_size"]
    if pool_size is None:
        assert unpooled.ndim == 3
        assert unpooled.shape[2] == model.num_features
    else:
        assert unpooled.shape == (len(image), model.num_features, *pool_size)
    model.reset_classifier(0, model.pools[0])
    assert model(image).shape == (len(image), model.num_features)


def test_authors_names_load(model: Backbone):
    """A state with the authors' names loads completely; the goldens test both directions of the table."""
    family, _ = find_model(model.spec.name)
    assert "official" in family.dialects, f"{family.name} does not say how the authors name its tensors"
