"""Properties of DRCT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vitarium
from tests.generation.drct_literal import literal
from tests.golden import assert_matches_golden, fill_state, read_golden
from vitarium.errors import InputError, UsageError
from vitarium.generation.drct import DRCT, window_grids
from vitarium.generation.restoration.restorer import reflect_to_multiple
from vitarium.generation.restoration.tiling import strips
from vitarium.ops.bicubic import resize_bicubic


def outputs(model: DRCT, lq: Tensor) -> dict[str, Tensor]:
    first = model.conv_first(lq - model.mean)
    tokens, inverse = next(iter(model._through_groups(first)))
    group0 = tokens.index_select(0, inverse).view(len(lq), -1, tokens.shape[1])
    return {"group0": group0, "features": model.deep_features(first), "sr": model(lq)}


@pytest.mark.parametrize(
    ("golden", "arguments"),
    [("drct-tiny_x2", dict(scale=2, embed_dim=48, growth=16, depths=(6, 6), num_heads=4, window_size=8)), ("drct-x4", dict(scale=4))],
)
def test_equals_the_authors_model(golden: str, arguments: dict):
    assert_matches_golden(golden, DRCT(**arguments), outputs)


@pytest.mark.parametrize(("name", "parameters"), [("x4", 14139579), ("large_x3", 27.62e6), ("pico", 239591)])
def test_parameter_counts(name: str, parameters: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"drct_{name}")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)


@pytest.fixture
def small() -> DRCT:
    torch.manual_seed(0)
    model = DRCT(scale=2, embed_dim=16, growth=8, depths=(2, 2), num_heads=2, window_size=4, num_feat=8, drop_path_rate=0.0).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("table"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.identity
@pytest.mark.parametrize("size", [(8, 12), (4, 4), (4, 16)])
def test_grids_of_smaller_windows_equal_rolling_and_masking(small: DRCT, size: tuple[int, int]):
    small.double()
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(small(image), literal(small, image), rtol=0, atol=1e-12)
    small.train()  # without the folded matrices
    torch.testing.assert_close(small(image), literal(small, image), rtol=0, atol=1e-12)


@pytest.mark.identity
def test_in_inference_the_folded_matrices_and_pieces_change_nothing(small: DRCT, monkeypatch: pytest.MonkeyPatch):
    small.double()
    image = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    expected = small(image).detach()
    monkeypatch.setattr("vitarium.generation.drct.PIECE_TOKENS", 32)
    with torch.no_grad():
        torch.testing.assert_close(small(image), expected, rtol=0, atol=1e-12)


def test_the_folded_matrices_follow_every_weight_that_they_are_made_of(small: DRCT):
    image = torch.rand(1, 3, 8, 8)
    block = small.groups[0].blocks[0]
    with torch.no_grad():
        for parameter in (block.adjust.weight, block.adjust.bias, block.mlp.fc2.weight, block.mlp.fc2.bias):
            before = small(image)
            parameter.add_(torch.randn_like(parameter))
            after = small(image)
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, literal(small, image), rtol=1e-4, atol=1e-5)


def test_a_hook_on_a_folded_layer_is_called(small: DRCT):
    seen = []
    handle = small.groups[1].blocks[2].mlp.fc2.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        hooked = small(torch.ones(1, 3, 8, 8) / 2)
        handle.remove()
        torch.testing.assert_close(small(torch.ones(1, 3, 8, 8) / 2), hooked)
    assert seen


@pytest.mark.identity
def test_without_the_last_convolution_of_a_group_it_is_the_identity(small: DRCT):
    for group in small.groups:
        torch.nn.init.zeros_(group.blocks[4].adjust.weight)
        torch.nn.init.zeros_(group.blocks[4].adjust.bias)
    first = torch.randn(1, 16, 8, 12)
    expected = small.norm(small.norm_first(first.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    torch.testing.assert_close(small.deep_features(first), expected)


@pytest.mark.identity
@pytest.mark.parametrize("size", [(5, 7), (1, 9), (3, 1)])
def test_any_size_is_the_reflected_image_cropped(small: DRCT, size: tuple[int, int]):
    image = torch.rand(1, 3, *size)
    height, width = size
    with torch.no_grad():
        restored = small(image)
        whole = small(reflect_to_multiple(image, 4))
    assert restored.shape == (1, 3, 2 * height, 2 * width)
    torch.testing.assert_close(restored, whole[..., : 2 * height, : 2 * width])


def test_reflection_is_torchs_where_torch_can():
    image = torch.rand(1, 2, 6, 5)
    torch.testing.assert_close(reflect_to_multiple(image, 8), torch.nn.functional.pad(image, (0, 3, 0, 2), mode="reflect"))
    assert reflect_to_multiple(torch.arange(3.0).view(1, 1, 1, 3), 8)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]


@pytest.mark.identity
def test_tiles_with_enough_overlap_equal_the_whole(small: DRCT):
    small.double()
    image = torch.rand(3, 150, 161, dtype=torch.float64)
    overlap = 2 * small.reach + 16
    with torch.no_grad():
        whole = small(image[None])[0].float()
        tiled = torch.cat(list(strips(small, image, tile=2 * overlap + 4, overlap=overlap)), 1)
    assert small.reach == 25
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)


@pytest.mark.identity
def test_reach_is_how_far_a_pixel_is_seen(small: DRCT):
    small.double()
    for parameter in small.parameters():  # or what comes from afar would be lost in rounding
        torch.nn.init.normal_(parameter, std=0.5)
    image = torch.rand(1, 3, 96, 96, dtype=torch.float64)
    changed = image.clone()
    changed[..., 48:, 48:] = torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        difference = (small(image) - small(changed)).abs().amax((0, 1))
    seen = 2 * (48 - small.reach)
    assert not difference[:seen].any()
    assert difference[: seen + 2 * 6].any()


def test_grids_hold_every_token_once_in_windows_that_lie_together():
    order, rest, moved = window_grids(2, 8, 12, 4, torch.device("cpu"))
    assert rest.shapes == ((4, 4, 0, 192),)
    assert sorted(order.tolist()) == sorted(moved.order.tolist()) == list(range(192))
    tokens = order[moved.order]
    for height, width, first, last in moved.shapes:
        rows, columns = tokens[first:last] % 96 // 12, tokens[first:last] % 12
        for axis, side in ((rows, height), (columns, width)):
            windows = axis.view(-1, height * width)
            assert (windows.amax(1) - windows.amin(1) + 1 == side).all()


def test_the_authors_file_loads(tmp_path):
    doc = read_golden("drct-tiny_x2")
    torch.save({"params_ema": fill_state(doc["state"])}, tmp_path / "DRCT.pth")
    arguments = dict(embed_dim=48, growth=16, depths=(6, 6), num_heads=4, window_size=8, num_feat=64)
    model = vitarium.create_model("drct_x2", checkpoint=tmp_path / "DRCT.pth", **arguments)
    vitarium.save(model, tmp_path / "model.safetensors")
    image = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(vitarium.load(tmp_path / "model.safetensors")(image), model.eval()(image))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_start_as_interpolation_is_one(scale: int):
    model = DRCT(scale=scale, embed_dim=16, growth=8, depths=(2,), num_heads=2, window_size=4, num_feat=8)
    model.start_as_interpolation()
    x = torch.linspace(0.2, 0.8, 16, dtype=torch.float64)
    ramp = (x[:, None] * x + x).expand(1, 3, 16, 16)
    with torch.no_grad():
        restored = model.double()(ramp)
    inside = (..., slice(3 * scale, -3 * scale), slice(3 * scale, -3 * scale))
    torch.testing.assert_close(restored[inside], resize_bicubic(ramp, scale)[inside], rtol=0, atol=1e-3)


def test_every_weight_learns_also_from_that_start(small: DRCT):
    small.start_as_interpolation()
    small.train()
    for _ in range(2):  # what only zero weights read learns from the second step on
        (small(torch.rand(2, 3, 8, 8)) - 0.5).square().mean().backward()
        with torch.no_grad():
            for parameter in small.parameters():
                parameter -= 0.1 * parameter.grad
    assert not [name for name, p in small.named_parameters() if not p.grad.any()]


def test_checkpointing_gives_the_same_gradients(small: DRCT):
    image = torch.rand(1, 3, 8, 8)
    gradients = []
    for enable in (False, True):
        small.set_grad_checkpointing(enable)
        small.zero_grad()
        small(image).mean().backward()
        gradients.append(small.conv_first.weight.grad.clone())
    assert torch.equal(*gradients)


def test_compiles_in_one_graph(small: DRCT):
    image = torch.rand(1, 3, 8, 12)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small, fullgraph=True, backend="eager")(image), small(image))


def test_group_maps_are_those_of_the_forward_pass(small: DRCT):
    image = torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        maps = small.group_maps(image)
    assert [tuple(m.shape) for m in maps] == [(1, 16, 8, 12)] * 2


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (torch.rand(3, 8, 8), "add a batch axis"),
        (torch.rand(1, 8, 8, 3), "channels seem to come last"),
        (torch.rand(1, 4, 8, 8), "in_chans=4"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "divide by 255"),
        (torch.rand(1, 3, 0, 8), "at least 1x1"),
        (torch.rand(1, 3, 8, 8).double(), "float32 weights"),
    ],
)
def test_refuses_what_it_cannot_take(small: DRCT, image: Tensor, told: str):
    with pytest.raises(InputError, match=told):
        small(image)


def test_refuses_arguments_that_do_not_fit():
    with pytest.raises(UsageError, match="scale must be 3 or a power of 2"):
        vitarium.create_model("drct_pico", scale=6)
    with pytest.raises(UsageError, match="dim must be divisible by num_heads"):
        vitarium.create_model("drct_pico", num_heads=11)
