"""Tests specific to Vim; the contract of all backbones is in test_contract.py, the scan in tests/ops."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vitarium
from tests.golden import RESULTS, assert_matches_golden, compare, make_input, read_golden
from vitarium.backbones.vim import OFFICIAL, Vim, VimMixer, resize_positions
from vitarium.errors import InputError, UsageError
from vitarium.nn import TokenPyramid
from vitarium.ops.scan import selective_scan


def outputs(model: Vim, image: Tensor) -> dict[str, Tensor]:
    features = model.forward_features(image)
    return {"features": model.forward_head(features, pre_logits=True), "logits": model(image)}


def test_equals_the_authors_model():
    first = torch.arange(1.0, 17).log().double().repeat(384, 1)  # the golden keeps A_log as it is initialised
    kept = {f"layers.{i}.mixer.{name}": first for i in range(24) for name in ("A_log", "A_b_log")}
    assert_matches_golden("vim-tiny", vitarium.create_model("vim_tiny"), outputs, kept)


@pytest.mark.parametrize("implementation", ["loop", "auto"])
def test_scan_equals_the_authors_reference(implementation: str):
    given = {name: make_input(name, spec) for name, spec in read_golden("vim-selective-scan")["inputs"].items()}
    x, delta, b, c, z = (given[name].transpose(1, 2) for name in ("u", "delta", "B", "C", "z"))
    options = dict(bias=given["bias"], softplus=True, implementation=implementation)
    y, state = selective_scan(x, delta, -torch.exp(given["A"]), b, c, given["D"], **options)
    error = compare("vim-selective-scan", {"y": (y * F.silu(z)).transpose(1, 2), "last_state": state})
    assert error < 1e-12
    RESULTS.append(("vim-selective-scan", error))


@pytest.mark.parametrize(("name", "millions"), [("tiny", 7.148008), ("small", 25.796584), ("base", 97.59844), ("tiny_plus", 7.250344)])
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"vim_{name}")
    assert sum(p.numel() for p in model.parameters()) == round(1e6 * millions)


def mixer() -> VimMixer:
    torch.manual_seed(0)
    return VimMixer(12, d_state=4).double()


@pytest.mark.identity
def test_reversed_tokens_and_swapped_directions_reverse_the_output():
    one, other = mixer(), mixer()
    forward, backward = one.directions[0].state_dict(), one.directions[1].state_dict()
    other.directions[0].load_state_dict(backward)
    other.directions[1].load_state_dict(forward)
    x = torch.randn(2, 21, 12, dtype=torch.float64)
    torch.testing.assert_close(other(x.flip(1)).flip(1), one(x), rtol=1e-12, atol=1e-12)


@pytest.mark.identity
def test_each_direction_sees_one_side():
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    changed = x.clone()
    changed[:, 10] += 1
    forward, backward = (scan(changed) - scan(x) for scan in mixer().directions)
    assert (forward[:, :10] == 0).all()
    assert (forward[:, 10:] != 0).all()
    assert (backward[:, 11:] == 0).all()
    assert (backward[:, :11] != 0).all()


@pytest.mark.identity
def test_every_implementation_gives_one_model():
    torch.manual_seed(0)
    auto = vitarium.create_model("vim_pico", num_classes=4).double().eval()
    loop = vitarium.create_model("vim_pico", num_classes=4, scan="loop").double().eval()
    loop.load_state_dict(auto.state_dict())
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(auto(image), loop(image), rtol=1e-12, atol=1e-12)


def literal(m: VimMixer, x: Tensor) -> Tensor:
    """Literal form of the authors' code: [u | z] is flipped for the backward direction with its own gate, outputs are flipped back."""
    total = 0.0
    for scan, flip in zip(m.directions, (False, True), strict=True):
        xz = m.in_proj(x).flip(1) if flip else m.in_proj(x)
        u, z = xz.chunk(2, -1)
        v = F.pad(u.transpose(1, 2), (3, 0))
        v = F.silu(F.conv1d(v, scan.conv1d.weight, scan.conv1d.bias, groups=u.shape[2])).transpose(1, 2)
        dt, b, c = scan.x_proj(v).split(scan.sizes, -1)
        y, _ = selective_scan(v, F.softplus(scan.dt_proj(dt)), -scan.A_log.exp(), b, c, scan.D, implementation="loop")
        y = y * F.silu(z)
        total = total + (y.flip(1) if flip else y)
    return m.out_proj(total / 2)


def reference(model: Vim) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same model with mixers by the equations above and the scan as a loop."""
    for part in model.modules():
        if isinstance(part, VimMixer):
            part.forward = functools.partial(literal, part)
    return model


@pytest.mark.identity
def test_mixer_equals_the_formula_with_flips_and_two_gates():
    m = mixer()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(m(x), literal(m, x), rtol=1e-12, atol=1e-12)


def test_class_token_stands_before_the_middle_patch_and_is_read_there():
    model = vitarium.create_model("vim_pico", patch_size=2, num_classes=3).double().eval()
    with torch.no_grad():
        model.cls_token.fill_(7.0)
        model.pos_embed.zero_()
    tokens = next(iter(model.forward_stages(torch.zeros(1, 3, 8, 10, dtype=torch.float64))))
    assert tokens.shape[1] == 21
    assert model.class_places(20) == [10]
    cls, patches = model.split_tokens(torch.arange(21.0)[None, :, None])
    assert cls.flatten().tolist() == [10.0]
    assert patches.flatten().tolist() == [*range(10), *range(11, 21)]
    marked = torch.zeros(1, 21, 48, dtype=torch.float64).index_fill(1, torch.tensor([10]), 1.0)
    assert (model.pool(marked) == 1).all()


@pytest.mark.parametrize("class_token", ["first", "none"])
def test_other_places_of_the_class_token(class_token: str):
    model = vitarium.create_model("vim_pico", patch_size=2, num_classes=3, class_token=class_token).eval()
    image = torch.randn(2, 3, 16, 20)
    assert model(image).shape == (2, 3)
    assert model.forward_intermediates(image, indices=2, intermediates_only=True)[0].shape == (2, 48, 8, 10)
    model.reset_classifier(0, "max")
    assert model(image).shape == (2, 48)


def test_resizing_keeps_the_class_row_in_the_middle():
    grid = torch.arange(16.0)[None, :, None].expand(1, 16, 2)
    table = torch.cat([grid[:, :8], torch.full((1, 1, 2), -50.0), grid[:, 8:]], 1)
    assert torch.equal(resize_positions(table, (4, 4), (4, 4), "middle"), table)
    larger = resize_positions(table, (4, 4), (6, 6), "middle")[0, :, 0]
    assert larger[18] == -50
    assert (torch.cat([larger[:18], larger[19:]]).view(6, 6).diff(dim=0) > 0).all()
    theirs = resize_positions(table, (4, 4), (6, 6), "middle", as_authors=True)[0, :, 0]
    assert theirs[0] == 0  # the row of a patch at the position of the class token
    assert theirs.min() < -20  # and that of the class token among the patches


def test_the_plus_variant_takes_the_plain_checkpoint(tmp_path):
    plain = vitarium.create_model("vim_pico", patch_size=2)
    vitarium.save(plain, tmp_path / "plain.safetensors")
    fine = vitarium.create_model("vim_pico", patch_size=2, stride=1, checkpoint=tmp_path / "plain.safetensors")
    assert fine.pos_embed.shape == (1, 15 * 15 + 1, 48)
    torch.testing.assert_close(fine.pos_embed[:, 112], plain.pos_embed[:, 32])
    assert fine.eval()(torch.randn(1, 3, 16, 16)).shape == (1, 1000)


def test_authors_names_cover_the_model():
    names = set(read_golden("vim-tiny")["state"])
    with torch.device("meta"):
        model = vitarium.create_model("vim_tiny")
    assert set(OFFICIAL({name: torch.empty(0) for name in names})) == set(model.state_dict())


def test_initial_steps_are_between_a_thousandth_and_a_tenth():
    model = vitarium.create_model("vim_pico")
    for block in model.blocks:
        for scan in block.mixer.directions:
            steps = F.softplus(scan.dt_proj.bias)
            assert 0.9e-3 < steps.min() < steps.max() < 0.11


def test_residual_stays_float32_in_half_precision():
    model = vitarium.create_model("vim_pico").eval().bfloat16()
    tokens = list(model.forward_stages(torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)))
    assert {t.dtype for t in tokens} == {torch.float32}


def test_macs_grow_linearly_with_tokens():
    from vitarium.efficiency.profiler import count_macs

    with torch.device("meta"):
        model = vitarium.create_model("vim_tiny").eval()
    small, large = (count_macs(model, side) for side in (224, 448))
    assert small == pytest.approx(1.5e9, rel=0.2)
    assert large / small == pytest.approx(785 / 197, rel=0.01)


def test_refuses():
    with pytest.raises(UsageError, match="class_token must be one of middle, first, ends, none"):
        vitarium.create_model("vim_pico", class_token="last")
    with pytest.raises(UsageError, match="each of directions must be one of forward, backward"):
        vitarium.create_model("vim_pico", directions=("sideways",))


@pytest.mark.parametrize("place", ["middle", "none"])
def test_hidden_attention_is_a_map_of_the_patches(place: str):
    model = vitarium.create_model("vim_pico", class_token=place).eval()
    image = torch.randn(2, 3, 16, 24)
    taken = model.hidden_attention(image, block=1)
    assert taken.shape == (2, 4, 6)
    assert (taken >= 0).all()
    assert taken.std() > 0
    assert not model.blocks[1].mixer._forward_pre_hooks
    with pytest.raises(InputError, match="3"):
        model.hidden_attention(image, block=7)


def test_hidden_attention_shows_where_the_gradient_comes_from():
    """With one direction, a patch after the class token does not affect it."""
    model = vitarium.create_model("vim_pico", directions=("forward",)).eval()
    taken = model.hidden_attention(torch.randn(1, 3, 16, 16), block=0).flatten()
    assert (taken[:8] > 0).all()
    assert not taken[8:].any()


def test_a_pyramid_of_maps_for_segmenters():
    model = TokenPyramid(vitarium.create_model("vim_pico"), blocks=(0, 1, 1, 2))
    maps = model(torch.randn(2, 3, 32, 48))
    assert [tuple(m.shape) for m in maps] == [(2, 48, 32, 48), (2, 48, 16, 24), (2, 48, 8, 12), (2, 48, 4, 6)]
    sum(m.sum() for m in maps).backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None}
    assert silent == {"backbone.norm.weight"}
    even = TokenPyramid(vitarium.create_model("vim_pico", depth=8, class_token="none"))
    assert even.blocks == [1, 3, 5, 7]
    with pytest.raises(ValueError, match="must be four"):
        TokenPyramid(vitarium.create_model("vim_pico"), blocks=(0, 1))
    with pytest.raises(InputError, match="9"):
        TokenPyramid(vitarium.create_model("vim_pico"), blocks=(0, 1, 2, 9))
