"""Our models as timm's: created by timm's factory, with its arguments, its feature extraction and its configurations."""

import pytest
import torch

import vitarium
from tests.catalog.toys import assert_unchanged, officially_named
from vitarium.catalog import families
from vitarium.nn import Backbone, VideoBackbone

timm = pytest.importorskip("timm")


@pytest.fixture
def registered(toy):
    """The toys under timm's roof, and out of it again."""
    names = vitarium.register_with_timm()
    yield names
    from timm.models import _registry

    from vitarium.catalog import timm_registry

    for name in (n for n in names if n.startswith("vitarium_toy")):
        _registry._clear_model_entries(name)
        del _registry._model_entrypoints[name], timm_registry.default_cfgs[name]


def test_registers_every_model_and_may_be_called_again(registered, recwarn):
    classifiers = [f for f in families() if issubclass(f.cls, Backbone) and not issubclass(f.cls, VideoBackbone)]
    assert {f"vitarium_{name}" for f in classifiers for name in f.model_names()} == set(registered)
    assert not {"vitarium_dit_pico", "vitarium_var_pico", "vitarium_kmax_deeplab_pico", "vitarium_uniformer_video_pico"} & set(registered)
    assert len(registered) == len(set(registered))
    assert vitarium.register_with_timm() == registered
    assert not [w for w in recwarn if "Overwriting" in str(w.message)]
    assert set(registered) <= set(timm.list_models("vitarium_*"))
    assert "vitarium_toy_small.in22k" in timm.list_models("vitarium_*", pretrained=True)


def test_takes_timms_arguments(registered):
    model = timm.create_model("vitarium_toy_small", num_classes=7, in_chans=1, drop_rate=0.3, img_size=32)
    assert (model.num_classes, model.in_chans, model.drop_rate) == (7, 1, 0.3)
    assert model.spec == vitarium.create_model("toy_small", num_classes=7, in_chans=1, drop_rate=0.3, image_size=32).spec
    assert model.preprocessing.image_size == 32
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 7)
    with pytest.raises(ValueError, match="takes no argument 'width'"):
        timm.create_model("vitarium_toy_small", width=3)


def test_pooling_off(registered):
    model = timm.create_model("vitarium_toy_small", num_classes=0, global_pool="")
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 8, 4, 4)


@pytest.mark.parametrize(("indices", "stages"), [(None, [0, 1]), ((0, 1), [0, 1]), ([-1], [1]), ((0,), [0])])
@pytest.mark.parametrize("name", ["swin_pico", "convnext_pico"])
def test_features_only(registered, name, indices, stages):
    channels = [vitarium.create_model(name).feature_info[i]["num_chs"] for i in stages]
    options = {} if indices is None else {"out_indices": indices}
    model = timm.create_model(f"vitarium_{name}", features_only=True, **options).eval()
    assert model.feature_info.channels() == channels
    image = torch.randn(1, 3, 16, 16)
    maps = model(image)
    assert [m.shape[1] for m in maps] == channels
    assert [16 // m.shape[-1] for m in maps] == model.feature_info.reduction()
    assert not any(name.startswith("model.head.") for name in model.state_dict())


def test_describes_itself_and_takes_an_overlay(registered):
    cfg = timm.create_model("vitarium_toy_fine").pretrained_cfg
    assert (cfg["input_size"], cfg["num_classes"], cfg["classifier"]) == ((3, 32, 32), 1000, "head")
    model = timm.create_model("vitarium_toy_fine", pretrained_cfg_overlay=dict(mean=(0.5, 0.5, 0.5), num_classes=5))
    assert model.num_classes == 5
    assert timm.data.resolve_data_config({}, model=model)["mean"] == (0.5, 0.5, 0.5)


def test_pretrained_reads_the_file_that_the_overlay_names(registered, tmp_path):
    source = vitarium.create_model("toy_small")
    torch.save(officially_named(source), tmp_path / "w.pth")
    model = timm.create_model("vitarium_toy_small", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")))
    assert_unchanged(model, source.state_dict())
    features = timm.create_model("vitarium_toy_small", True, features_only=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "w.pth")))
    assert torch.equal(features.model.stem.weight, source.stem.weight)


@pytest.mark.parametrize(("name", "tag"), [("vitarium_toy_small", None), ("vitarium_toy_small.in22k", "in22k")])
def test_pretrained_asks_our_table_by_tag(registered, tmp_path, monkeypatch, name, tag):
    source = vitarium.create_model("toy_small", num_classes=50)
    torch.save(officially_named(source), tmp_path / "w.pth")
    asked = []
    monkeypatch.setattr("vitarium.catalog.weights.fetch_pretrained", lambda *args: asked.append(args) or tmp_path / "w.pth")
    assert_unchanged(timm.create_model(name, pretrained=True), source.state_dict())
    assert asked == [("toy_small", tag)]


def test_a_model_that_timm_made_can_be_saved(registered, tmp_path):
    model = timm.create_model("vitarium_toy_small", num_classes=3)
    vitarium.save(model, tmp_path / "m.safetensors")
    assert_unchanged(vitarium.load(tmp_path / "m.safetensors"), model.state_dict())
