"""Every token reduction on every family of models is correct or raises an error."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image
from torch import nn

import vitarium
from tests.anatomy.models import NAMES, ROTARY, make, prefix_of, timm_model
from vitarium.efficiency.tokens.evit import EViT
from vitarium.efficiency.tokens.picture import draw_tokens, picture
from vitarium.efficiency.tokens.pitome import PiToMe, ToMe
from vitarium.efficiency.tokens.reducer import trace
from vitarium.errors import AttachError, InputError, UsageError

NEUTRAL = [EViT(keep=1, fuse=False, score="mean"), ToMe(r=0), PiToMe(keep=1)]
ACTIVE = [EViT(keep=0.5, fuse=False, score="mean"), ToMe(r=2), PiToMe(keep=0.8), PiToMe(keep=0.8, proportional=True)]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_neutral_options_are_the_identity_and_undo_is_exact(name, image):
    model = make(name)
    modules = list(model.modules())
    with torch.no_grad():
        before = model(image)
        for method in NEUTRAL:
            vitarium.apply(model, method, quiet=True)
            assert torch.equal(model(image), before), str(method)
            vitarium.undo(model)
            assert list(model.modules()) == modules
            assert model.methods == []


@pytest.mark.parametrize("name", NAMES)
def test_reductions_protect_the_prefix_and_keep_the_books(name, image):
    model, prefix = make(name), prefix_of(name)
    with torch.no_grad():
        before = model(image)
        for method in ACTIVE:
            vitarium.apply(model, method, quiet=True)
            after = model(image)
            assert after.shape == before.shape
            assert after.isfinite().all()
            assert not torch.equal(after, before)
            torch.testing.assert_close(model(image[:1]), after[:1], rtol=1e-3, atol=1e-4)  # an image's result is its own
            for state in trace(model, image):
                if state.moved:
                    assert (state.place[:, :prefix] == torch.arange(prefix)).all()
                    assert (state.source[:, :prefix] == torch.arange(prefix)).all()
                if state.size is not None:
                    assert (state.size.sum(1) == state.originals).all()
                    assert (state.size[:, :prefix] == 1).all()
            vitarium.undo(model)
            assert torch.equal(model(image), before)


@pytest.mark.parametrize("name", ["vit", "layer_scale", "qk_norm", "registers", *ROTARY])
def test_dropping_equals_hiding(name, image):
    """Gathering the kept tokens is the same as keeping all and hiding the dropped ones from every later attention."""
    method = EViT(keep=0.5, blocks=(1, 2), fuse=False, score="mean")
    model = timm_model(name, global_pool="token")
    reduced = vitarium.apply(copy.deepcopy(model), method, quiet=True)
    with torch.no_grad():
        got = reduced(image[:1])
        seen = [
            state.source[0] >= 0 if state.moved else torch.ones(state.originals, dtype=torch.bool) for state in trace(reduced, image[:1])
        ]

        def hide(block: nn.Module, index: int) -> None:
            def hook(_, args, kwargs):
                mask = seen[index - 1][None, None, None].expand(1, 1, len(seen[index]), -1)
                return args, kwargs | {"attn_mask": mask}

            block.register_forward_pre_hook(hook, with_kwargs=True)

        for i in range(1, 4):
            hide(model.blocks[i], i)
        torch.testing.assert_close(got, model(image[:1]), rtol=1e-4, atol=1e-4)


def test_a_fused_token_has_no_position(image):
    for name in ROTARY:
        with pytest.raises(AttachError, match="a fused token has no position; use fuse=False"):
            vitarium.apply(timm_model(name), EViT(), quiet=True)


@pytest.mark.parametrize("name", ["average", "attention_pool"])
def test_pooling_sees_every_patch_of_merged_tokens(name, image):
    """The head gets the full sequence again: pooling a merged token once for each patch that it stands for."""
    model = timm_model(name)
    vitarium.apply(model, ToMe(r=2), quiet=True)
    with torch.no_grad():
        features = model.forward_features(image)
    assert features.shape == (2, 16, 24)
    last = trace(model, image)[-1]
    for item in range(2):
        for token in last.source[item].unique():
            same = features[item, last.source[item] == token]
            assert torch.equal(same, same[:1].expand_as(same))


@pytest.mark.parametrize(
    ("name", "method"),
    [("timm-vit", ACTIVE[0]), ("timm-vit", ACTIVE[1]), ("timm-eva02", ACTIVE[2]), ("transformers-vit", ACTIVE[3])],
    ids=str,
)
def test_compiles_without_a_break(name, method, image):
    model = vitarium.apply(make(name), method, quiet=True)
    with torch.no_grad():
        want = model(image)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(image)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ACTIVE, ids=str)
def test_gradients_reach_every_parameter(method, image):
    model = vitarium.apply(timm_model("vit"), method, quiet=True).train()
    model(image).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("method", [EViT(keep=0.6), ToMe(r=3, inflection=-0.5), PiToMe(keep=0.8, protect="all")], ids=str)
@pytest.mark.parametrize("name", ["timm/vit_pico", "timm/deit_pico"])
def test_saved_models_remember_the_method(name, method, image, tmp_path):
    model = vitarium.apply(vitarium.create_model(name, num_classes=3).eval(), method, quiet=True)
    vitarium.save(model, tmp_path / "m.safetensors")
    again = vitarium.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
        assert [r.method for r in again.methods] == [method]
        assert torch.equal(vitarium.undo(again)(image), vitarium.undo(model)(image))


def test_knobs_are_live(image):
    model = vitarium.apply(timm_model("vit"), "evit:keep=1", quiet=True)
    (report,) = model.methods
    with torch.no_grad():
        full = model(image)
        report.tune(keep=0.5)
        assert str(report.method) == "evit:keep=0.5"
        assert trace(model, image)[-1].place.shape[1] < 17
        assert not torch.equal(model(image), full)
        with pytest.raises(UsageError, match="keep must be a number above 0 and up to 1, got 2"):
            report.tune(keep=2)
        with pytest.raises(UsageError, match="cannot change 'blocks' while attached"):
            report.tune(blocks=(0,))
        report.tune(keep=1)
        assert torch.equal(model(image), full)
        twin = copy.deepcopy(model)
        twin.methods[0].tune(keep=0.3)
        assert torch.equal(model(image), full)
        assert not torch.equal(twin(image), full)
        assert torch.equal(vitarium.undo(twin)(image), full)


def test_masks_are_refused(image):
    model = vitarium.apply(timm_model("vit"), ToMe(r=2), quiet=True)
    with pytest.raises(InputError, match="attention mask does not go together"):
        model(image, attn_mask=torch.ones(1, 1, 17, 17, dtype=torch.bool))


def test_gradient_checkpointing_gives_the_same_gradients(image):
    model = vitarium.apply(timm_model("vit"), ToMe(r=2), quiet=True).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_macs_are_counted(capsys):
    model = vitarium.create_model("timm/vit_pico")
    vitarium.apply(model, ToMe(r=4))
    (report,) = model.methods
    assert report.macs_after < 0.8 * report.macs_before
    assert report.sites == ("blocks.0", "blocks.1", "blocks.2")
    assert "tome:r=4: 3 sites, 3 modules replaced" in capsys.readouterr().out


def test_bad_options_and_models():
    for text, words in [
        ("evit:keep=0", "keep must be a number above 0 and up to 1, got 0"),
        ("evit:blocks=[9]", "numbers of these|names others"),
        ("evit:tokens=[3]", "needs blocks"),
        ("evit:score=max", "score must be"),
        ("tome:r=-1", "a whole number of at least 0 or a list with a whole number of at least 0 each, got -1"),
        ("tome:inflection=2", "inflection must be a number from -1 to 1, got 2"),
        ("pitome:keep=0.3", "keep must be a number from 0.5 to 1, got 0.3"),
        ("pitome:margin=3", "margin must be a number from -1 to 1, got 3"),
        ("pitome:protect=never", "protect must be"),
        ("tome:ratio=0.5", "tome has no option 'ratio'"),
        ("tomme", "unknown method 'tomme'; did you mean tome"),
        ("evit:0.7", "cannot read '0.7'"),
    ]:
        model = timm_model("vit")
        with pytest.raises(UsageError, match=words):
            vitarium.apply(model, text, quiet=True)
        assert type(model.blocks[0]).__name__ == "Block"
    with pytest.raises(AttachError, match="no class token"):
        vitarium.apply(timm_model("average"), "evit", quiet=True)
    with pytest.raises(UsageError, match="one token reduction, got evit and tome"):
        vitarium.apply(timm_model("vit"), "evit", "tome", quiet=True)
    with pytest.raises(UsageError, match="no token reduction is on this model"):
        trace(timm_model("vit"), torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("method", ["evit:keep=0.5", "evit:keep=0.5,fuse=false", "tome:r=3", "pitome:keep=0.8"])
def test_pictures(method):
    model = vitarium.apply(vitarium.create_model("timm/vit_pico"), method, quiet=True)
    photo = Image.fromarray(torch.randint(0, 255, (40, 60, 3), dtype=torch.uint8).numpy())
    strip = picture(model, photo, side=32)
    assert strip.mode == "RGB"
    assert strip.height == 50
    assert picture(model, photo, blocks=(2,), side=32).width == 72
    with pytest.raises(UsageError, match="7 is not among them"):
        picture(model, photo, blocks=(7,))
    plain = Image.new("RGB", (32, 32), (90, 120, 150))
    states = trace(model, model.preprocessing(photo)[None])
    panel = draw_tokens(plain, states[-1], (4, 4))
    dropped = int((states[-1].source[0, 1:] < 0).sum())
    assert (torch.tensor(list(panel.convert("L").getdata())) < 60).sum() == dropped * 64
