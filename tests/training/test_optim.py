"""Groups, clipping and averages against their formulas, the authors' numbers and timm's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import vitarium
from tests.golden import FOLDER, fill_value, make_input, read_golden
from tests.training.tiny import tiny_net
from vitarium.errors import UsageError
from vitarium.training.optim import Average, clip_gradients, create_optimizer, layer_scales, parameter_groups
from vitarium.training.recipe import Clip, Ema, Optimizer

GOLDENS = ("training_base-schedules", "training_base-schedules_b")
each_golden = pytest.mark.parametrize("name", GOLDENS)


def golden(name: str, key: str) -> torch.Tensor:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return torch.from_numpy(arrays[key])


def inputs(name: str, key: str) -> torch.Tensor:
    return make_input(key, read_golden(name)["inputs"][key])


def close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(a.reshape(-1), b, rtol=rtol, atol=1e-15)


def lars_steps(name: str, optimizer_name: str, decay: float | None = None) -> nn.Module:
    """Return the golden's two tensors after its steps by an optimizer."""
    c = read_golden(name)["config"]
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(*c["shape"], dtype=torch.float64))
    module.b = nn.Parameter(torch.zeros(c["shape"][0], dtype=torch.float64))
    for key, parameter in module.named_parameters():
        parameter.data = fill_value(key, parameter.data)
    decay = c["wd"] if decay is None else decay
    optimizer = create_optimizer(module, Optimizer(name=optimizer_name, lr=0.3, momentum=0.9, weight_decay=decay))
    for step in range(c["steps"]):
        module.w.grad, module.b.grad = inputs(name, f"gw{step}"), inputs(name, f"gb{step}")
        optimizer.step()
    return module


@each_golden
def test_lars_equals_the_authors(name: str):
    module = lars_steps(name, "lars_mae")
    close(module.w.data, golden(name, "lars_w"))
    close(module.b.data, golden(name, "lars_b"))


def test_lars_of_timm_stays_timms():
    """It divides by |g| + decay |w|, and does not scale at all where the decay is 0; MAE's scales there too."""
    apart = (lars_steps(GOLDENS[1], "lars").w - lars_steps(GOLDENS[1], "lars_mae").w).abs().max()
    assert 1e-6 < apart.item() < 1e-2
    start = fill_value("w", torch.zeros(5, 9, dtype=torch.float64))
    moved = {name: (lars_steps(GOLDENS[1], name, decay=0.0).w - start).norm().item() for name in ("lars", "lars_mae")}
    assert moved["lars"] > 100 * moved["lars_mae"] > 0


def test_settings_that_lars_does_not_have_are_refused():
    with pytest.raises(UsageError, match="lars_mae"):
        create_optimizer(nn.Linear(2, 2), Optimizer(name="lars_mae", lr=0.1, betas=(0.9, 0.99)))


@each_golden
def test_clipping_each_tensor_equals_dinos(name: str):
    rows, columns = read_golden(name)["config"]["shape"]
    w, b = nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64)), nn.Parameter(torch.zeros(rows, dtype=torch.float64))
    w.grad, b.grad = 50 * inputs(name, "gw0"), inputs(name, "gb0")
    total = clip_gradients([w, b], Clip(tensor_norm=3))
    close(w.grad, golden(name, "clip_w"))
    close(b.grad, golden(name, "clip_b"))
    assert total.item() == pytest.approx(math.hypot((50 * inputs(name, "gw0")).norm().item(), inputs(name, "gb0").norm().item()))


@pytest.mark.parametrize("clip", [Clip(), Clip(norm=0.5), Clip(value=0.1)])
def test_clipping_equals_torchs(clip):
    ours, theirs = tiny_net(), tiny_net()
    for net in (ours, theirs):
        for k, p in enumerate(net.parameters()):
            p.grad = torch.linspace(-1, k + 1, p.numel()).reshape(p.shape)
    clip_gradients(ours.parameters(), clip)
    if clip.norm:
        nn.utils.clip_grad_norm_(theirs.parameters(), clip.norm)
    if clip.value:
        nn.utils.clip_grad_value_(theirs.parameters(), clip.value)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    net = tiny_net()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net.head.bias.grad[0] = math.nan
    assert not math.isfinite(clip_gradients(net.parameters(), Clip(norm=1)).item())


def test_layer_decay_has_the_published_scales_on_a_plain_vit():
    vit = vitarium.create_model("timm/vit_pico", num_classes=4, depth=12)
    scales = layer_scales(vit, 0.75)
    assert scales["pos_embed"] == pytest.approx(0.02376, abs=5e-6)
    expected = [0.75 ** (13 - layer) for layer in range(1, 13)]
    assert [scales[f"blocks.{i}.mlp.fc1.weight"] for i in range(12)] == pytest.approx(expected, rel=1e-12)
    assert (scales["head.weight"], scales["norm.weight"]) == (1.0, 0.75)


def test_layer_decay_takes_a_models_own_numbers_even_with_gaps():
    scales = layer_scales(vitarium.create_model("convnext_pico", num_classes=4), 0.8)
    assert max(scales.values()) == scales["head.weight"] == 1.0
    assert min(scales.values()) == pytest.approx(0.8**13)


def test_layer_decay_needs_layers():
    with pytest.raises(UsageError, match="has no group_matcher"):
        layer_scales(tiny_net(), 0.5)


def test_groups_hold_each_parameter_once_and_spare_what_takes_no_decay():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = vitarium.create_model("timm/vit_pico", num_classes=4)
            self.projector = nn.Linear(4, 4)

    learner = Both()
    groups = parameter_groups(learner, Optimizer(lr=1, weight_decay=0.1, layer_decay=0.5))
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len(set(map(id, members))) == len(list(learner.parameters()))
    where = {id(p): group for group in groups for p in group["params"]}
    group = {name: where[id(p)] for name, p in learner.named_parameters()}
    assert (
        group["model.pos_embed"]["weight_decay"]
        == group["model.norm.weight"]["weight_decay"]
        == group["projector.bias"]["weight_decay"]
        == 0
    )
    assert group["model.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.1
    assert group["projector.weight"]["lr_scale"] == 1.0 > group["model.blocks.0.attn.qkv.weight"]["lr_scale"]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "muon", "adan"])
def test_optimizers_by_name_take_a_step(name):
    net = tiny_net()
    optimizer = create_optimizer(net, Optimizer(name=name, lr=1e-2))
    before = net.head.weight.detach().clone()
    net(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, net.head.weight)


@pytest.mark.parametrize("name", ["sgd", "sgdw", "sgdp", "nesterov", "nesterovw", "momentum"])
def test_sgd_without_momentum_is_plain_sgd(name):
    net = tiny_net(dropout=0.0)
    optimizer = create_optimizer(net, Optimizer(name=name, lr=0.1, momentum=0, weight_decay=0.0))
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 8, 8)).square().sum().backward()
        expected = [(p - 0.1 * p.grad).detach() for p in net.parameters()]
        optimizer.step()
        for ours, theirs in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.detach(), theirs)


def test_every_optimizer_that_takes_a_momentum_takes_0():
    """Nesterov's, which torch refuses without momentum, becomes plain; others may lack the key, or need a GPU."""
    from timm.optim import list_optimizers

    refused = {}
    for name in [*list_optimizers(), "lars_mae"]:
        try:
            create_optimizer(tiny_net(), Optimizer(name=name, lr=0.1, momentum=0))
        except UsageError as error:
            refused[name] = str(error)
    assert not [name for name, message in refused.items() if "Nesterov" in message]


def test_an_optimizer_that_lacks_an_option_says_so():
    with pytest.raises(UsageError, match="'adan' refuses its settings"):
        create_optimizer(tiny_net(), Optimizer(name="adan", lr=1, betas=(0.9, 0.9)))  # it has three


@pytest.mark.parametrize(("warmup", "norm"), [(False, False), (True, True)])
def test_the_average_equals_timms(warmup, norm):
    from timm.utils import ModelEmaV3

    net = tiny_net(norm=norm)
    ours, theirs = Average(net, Ema(decay=0.9, warmup=warmup)), ModelEmaV3(net, decay=0.9, use_warmup=warmup)
    for step in range(1, 6):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        net(torch.randn(4, 3, 8, 8))
        ours.update(step)
        theirs.update(net, step + 1)  # timm counts from one step earlier, and copies at its first
    for a, b in zip(ours.module.state_dict().values(), theirs.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
