"""Every option of Vim against an independent reference of the authors' model, which keeps the two streams of its blocks apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vitarium
from vitarium.backbones.vim import OFFICIAL

State = dict[str, Tensor]
DIM, STATES, SIDE, DEPTH, CLASSES = 16, 4, 4, 4, 5
PLAIN: dict[str, Any] = dict(
    token="middle",
    positions=True,
    rotary="none",
    norm="rms",
    kind="v2",
    average=True,
    alternate=False,
    pool="avg",
    gamma=0,
    conv=4,
    expand=2,
)
CASES: list[dict[str, Any]] = [
    {},
    dict(token="first"),
    dict(token="ends"),
    dict(token="none"),
    dict(token="none", pool="last"),
    dict(token="none", pool="max_logits"),
    dict(positions=False),
    dict(rotary="stream", token="first", average=False),  # the first release
    dict(rotary="branches", token="first"),
    dict(rotary="stream", token="middle"),
    dict(rotary="stream", token="none"),
    dict(rotary="branches", token="first", alternate=True),
    dict(norm="layer"),
    dict(kind="v1"),
    dict(kind="none"),
    dict(kind="none", alternate=True),
    dict(gamma=1),
    dict(conv=3, expand=1),
]


def scanned(p: State, suffix: str, x: Tensor, z: Tensor, *, rates: str | None = None, backward: bool = False) -> Tensor:
    """One direction with its gate, token by token; `rates` names other decay rates, `backward` runs after the convolution in reverse."""
    kernel = p[f"conv1d{suffix}.weight"]
    v = F.conv1d(x.transpose(1, 2), kernel, p[f"conv1d{suffix}.bias"], padding=kernel.shape[2] - 1, groups=len(kernel))
    v = F.silu(v[..., : x.shape[1]]).transpose(1, 2)
    rank = p[f"dt_proj{suffix}.weight"].shape[1]
    step, b, c = (v @ p[f"x_proj{suffix}.weight"].T).split([rank, STATES, STATES], -1)
    step = F.softplus(step @ p[f"dt_proj{suffix}.weight"].T + p[f"dt_proj{suffix}.bias"])
    rate = -p[rates or f"A{suffix}_log"].exp()
    if backward:
        v, step, b, c, z = (t.flip(1) for t in (v, step, b, c, z))
    state, out = torch.zeros(len(v), *rate.shape, dtype=v.dtype), []
    for t in range(v.shape[1]):
        state = torch.exp(step[:, t, :, None] * rate) * state + step[:, t, :, None] * b[:, t, None] * v[:, t, :, None]
        out.append((state * c[:, t, None]).sum(-1) + p[f"D{suffix}"] * v[:, t])
    y = torch.stack(out, 1) * F.silu(z)
    return y.flip(1) if backward else y


def mixed(p: State, x: Tensor, case: dict[str, Any]) -> Tensor:
    x, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
    y = scanned(p, "", x, z)
    if case["kind"] == "v2":
        y = y + scanned(p, "_b", x.flip(1), z.flip(1)).flip(1)
        y = y / 2 if case["average"] else y
    elif case["kind"] == "v1":
        y = y + scanned(p, "", x, z, rates="A_b_log", backward=True)
    y = y @ p["out_proj.weight"].T
    return y * p["gamma"] if case["gamma"] else y


def normed(p: State, x: Tensor) -> Tensor:
    if "bias" in p:
        return F.layer_norm(x, x.shape[-1:], p["weight"], p["bias"], 1e-5)
    return F.rms_norm(x, x.shape[-1:], p["weight"], 1e-5)


def below(p: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in p.items() if name.startswith(prefix)}


def rotated(p: State, x: Tensor) -> Tensor:
    start = x.shape[1] % 2  # the authors leave the first of an odd number of tokens
    y = x[:, start:]
    pairs = y.unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    return torch.cat((x[:, :start], y * p["rope.freqs_cos"] + turned * p["rope.freqs_sin"]), 1)


def embedded(p: State, image: Tensor, token: str) -> tuple[Tensor, list[int]]:
    """The first tokens, and the positions of class tokens."""
    x = F.conv2d(image, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=4).flatten(2).transpose(1, 2)
    count = x.shape[1]
    places = {"middle": [count // 2], "first": [0], "ends": [0, count + 1], "none": []}[token]
    own = [p[name].expand(len(x), -1, -1) for name in ("cls_token", "cls_token_head", "cls_token_tail") if name in p]
    if token == "ends":
        x = torch.cat((own[0], x, own[1]), 1)
    elif own:
        x = torch.cat((x[:, : places[0]], own[0], x[:, places[0] :]), 1)
    return (x + p["pos_embed"] if "pos_embed" in p else x), places


def reference(p: State, image: Tensor, case: dict[str, Any]) -> Tensor:
    hidden, places = embedded(p, image, case["token"])
    stream: Tensor | None = None

    def layer(i: int, hidden: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        stream = hidden if stream is None else stream + hidden
        return mixed(below(p, f"layers.{i}.mixer."), normed(below(p, f"layers.{i}.norm."), stream), case), stream

    for i in range(0, DEPTH, 2 if case["alternate"] else 1):
        if case["rotary"] != "none":
            hidden = rotated(p, hidden)
            stream = rotated(p, stream) if stream is not None and case["rotary"] == "stream" else stream
        if case["alternate"]:
            back = layer(i + 1, hidden.flip(1), None if stream is None else stream.flip(1))
            hidden, stream = ((a + b.flip(1)) / 2 for a, b in zip(layer(i, hidden, stream), back, strict=True))
        else:
            hidden, stream = layer(i, hidden, stream)
    x = normed(below(p, "norm_f."), stream + hidden)
    if not places and case["pool"] == "max_logits":
        return F.linear(x, p["head.weight"], p["head.bias"]).amax(1)
    feature = x[:, places].mean(1) if places else {"avg": x.mean(1), "last": x[:, -1]}[case["pool"]]
    return F.linear(feature, p["head.weight"], p["head.bias"])


def official_state(case: dict[str, Any]) -> State:
    """Random tensors with the authors' names and shapes."""
    inner, own = DIM * case["expand"], {"none": 0, "ends": 2}.get(case["token"], 1)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (DIM, 3, 4, 4),
        "patch_embed.proj.bias": (DIM,),
        "head.weight": (CLASSES, DIM),
        "head.bias": (CLASSES,),
    }
    shapes |= {name: (1, 1, DIM) for name in [["cls_token"], ["cls_token_head", "cls_token_tail"]][own - 1] if own}
    shapes |= {"pos_embed": (1, SIDE**2 + own, DIM)} if case["positions"] else {}
    shapes |= {f"rope.freqs_{part}": (SIDE**2, DIM) for part in ("cos", "sin") if case["rotary"] != "none"}
    norms = ["norm_f.", *(f"layers.{i}.norm." for i in range(DEPTH))]
    shapes |= {norm + name: (DIM,) for norm in norms for name in (["weight", "bias"] if case["norm"] == "layer" else ["weight"])}
    for i in range(DEPTH):
        parts: dict[str, tuple[int, ...]] = {"in_proj.weight": (2 * inner, DIM), "out_proj.weight": (DIM, inner)}
        parts |= {"gamma": (DIM,)} if case["gamma"] else {}
        parts |= {"A_b_log": (inner, STATES)} if case["kind"] == "v1" else {}
        for b in ("", "_b") if case["kind"] == "v2" else ("",):
            parts |= {f"conv1d{b}.weight": (inner, 1, case["conv"]), f"conv1d{b}.bias": (inner,), f"dt_proj{b}.weight": (inner, 1)}
            parts |= {
                f"dt_proj{b}.bias": (inner,),
                f"x_proj{b}.weight": (1 + 2 * STATES, inner),
                f"A{b}_log": (inner, STATES),
                f"D{b}": (inner,),
            }
        shapes |= {f"layers.{i}.mixer.{name}": shape for name, shape in parts.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Our arguments of a case."""
    return dict(
        embed_dim=DIM,
        depth=DEPTH,
        d_state=STATES,
        d_conv=case["conv"],
        expand=case["expand"],
        directions=("forward",) if case["kind"] == "none" else ("forward", "backward"),
        shared=case["kind"] == "v1",
        average=case["average"],
        alternate=case["alternate"],
        class_token=case["token"],
        global_pool=case["pool"] if case["token"] == "none" else None,
        positions=case["positions"],
        rotary=case["rotary"],
        norm=case["norm"],
        layer_scale_init_value=case["gamma"],
        num_classes=CLASSES,
    )


@pytest.mark.identity
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()) or "released")
def test_equals_the_authors_formulas(case: dict[str, Any]):
    case = PLAIN | case
    model = vitarium.create_model("vim_pico", **arguments(case)).double().eval()
    state = official_state(case)
    model.load_state_dict(OFFICIAL(state))  # strict: every tensor of the authors has its place
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(image), reference(state, image, case), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [dict(rotary="branches", alternate=True, token="first"), dict(kind="v1", token="none", pool="max_logits")])
def test_options_are_saved_and_take_other_sizes(case: dict[str, Any], tmp_path):
    model = vitarium.create_model("vim_pico", **arguments(PLAIN | case)).eval()
    image = torch.randn(2, 3, 16, 24)
    vitarium.save(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(vitarium.load(tmp_path / "model.safetensors")(image), model(image))
    assert [m.shape[2:] for m in model.forward_intermediates(image, intermediates_only=True)] == [(4, 6)] * DEPTH


def test_rotary_table_of_the_first_release():
    """Positions are scaled to 14 rows and columns, whatever the grid; the row comes first."""
    model = vitarium.create_model("vim_pico", **arguments(PLAIN | dict(rotary="stream", token="first")))
    rates = 10000.0 ** (-torch.arange(0, DIM // 2, 2) / (DIM // 2))
    line = torch.arange(SIDE) / SIDE * 14
    angle = (line[:, None] * rates).repeat_interleave(2, 1)
    angle = torch.cat((angle[:, None].expand(-1, SIDE, -1), angle[None].expand(SIDE, -1, -1)), -1).flatten(0, 1)
    torch.testing.assert_close(model.rotary, torch.stack((angle.cos(), angle.sin())), rtol=0, atol=1e-5)


def test_refuses():
    for options, message in ((dict(rotary="both"), "rotary"), (dict(norm="batch"), "norm"), (dict(depth=3, alternate=True), "even depth")):
        with pytest.raises(vitarium.errors.UsageError, match=message):
            vitarium.create_model("vim_pico", **options)
    with pytest.raises(vitarium.errors.UsageError, match="global_pool"):
        vitarium.create_model("vim_pico", class_token="none", global_pool="token")
