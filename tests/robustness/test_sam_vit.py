"""SAM against its formulas and the authors' code, alone and in the training loop."""

from __future__ import annotations

import signal
import sys

import numpy as np
import pytest
import torch
from torch import nn

from tests import golden
from tests.training.test_fit import Breaks, timeless
from tests.training.test_fit import train as train_everything
from tests.training.tiny import assert_same_weights, tiny_data, tiny_net, tiny_recipe, weights
from vitarium.errors import InputError, UsageError
from vitarium.robustness.sam_vit import RHO, SAM, active_neurons, frozen_statistics, noise_sharpness
from vitarium.training import ClassificationLearner, fit
from vitarium.training.optim import move_back, move_uphill
from vitarium.training.recipe import Sam

GOLDEN = "sam_vit-sgd"
PLAIN = ("accumulate=1", "mixing={}", "augment={}", "ema=null")
ON = "optimizer.sam={rho: 0.05}"


def random_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def problem(seed=0):
    net = random_net(seed)
    x, y = torch.randn(9, 5).double(), torch.randn(9, 3).double()
    return net, lambda: (net(x) - y).square().mean()


def length(before):
    return torch.stack([(p.detach() - old).square().sum() for p, old in before]).sum().sqrt().item()


# ---- the optimizer


def test_golden_five_steps_of_the_authors_code():
    doc = golden.read_golden(GOLDEN)
    c = doc["config"]
    net = nn.ModuleDict({"a": nn.Linear(c["i"], c["h"]), "b": nn.Linear(c["h"], c["o"])}).double()
    net.load_state_dict(golden.fill_state(doc["state"], doc["overrides"]))
    x, y = (golden.make_input(key, spec) for key, spec in doc["inputs"].items())
    base = torch.optim.SGD(net.parameters(), lr=c["lr"], momentum=c["momentum"], weight_decay=c["weight_decay"])
    sam = SAM(base, c["rho"], c["adaptive"])
    found: dict[str, torch.Tensor] = {}
    losses, norms = [], []
    for step in range(c["steps"]):
        for uphill in (False, True):
            loss = (net["b"](net["a"](x).tanh()) - y).square().mean()
            loss.backward()
            if not uphill:
                losses.append(loss.detach())
                norms.append(torch.stack([p.grad.norm() for p in net.parameters()]).norm())
                sam.first_step()
                if step == 0:
                    found |= {f"perturbed_{name}": value for name, value in weights(net).items()}
        sam.second_step()
    found |= {f"final_{name}": value for name, value in weights(net).items()}
    found |= {"losses": torch.stack(losses), "grad_norms": torch.stack(norms)}
    error = golden.compare(GOLDEN, found)
    assert error < 1e-12
    golden.RESULTS.append((GOLDEN, error))


@pytest.mark.identity
def test_a_step_on_a_quadratic_has_its_closed_form():
    """0.5 w'Hw: the gradient uphill is H (w + rho Hw / |Hw|)."""
    torch.manual_seed(0)
    root = torch.randn(6, 6).double()
    h, rho, lr = root @ root.T, 0.3, 0.01
    w = nn.Parameter(torch.randn(6).double())
    start = w.detach().clone()
    loss = SAM(torch.optim.SGD([w], lr=lr), rho).step(lambda: 0.5 * w @ h @ w)
    g = h @ start
    torch.testing.assert_close(w.detach(), start - lr * h @ (start + rho * g / g.norm()), rtol=1e-12, atol=1e-14)
    assert float(loss) == pytest.approx(float(0.5 * start @ h @ start))


@pytest.mark.identity
@pytest.mark.parametrize("adaptive", [False, True])
def test_rho_zero_is_the_base_optimizer_bit_for_bit(adaptive):
    (one, loss_one), (two, loss_two) = problem(), problem()
    sam = SAM(torch.optim.AdamW(one.parameters(), lr=0.01), rho=0.0, adaptive=adaptive)
    plain = torch.optim.AdamW(two.parameters(), lr=0.01)
    for _ in range(5):
        sam.step(loss_one)
        plain.zero_grad()
        loss_two().backward()
        plain.step()
    assert_same_weights(weights(one), weights(two))


@pytest.mark.identity
def test_the_move_has_length_rho_and_is_taken_back_bit_for_bit():
    net, loss = problem()
    before = weights(net)
    loss().backward()
    moved = move_uphill(net.parameters(), Sam(rho=0.2))
    assert length(moved) == pytest.approx(0.2, rel=1e-9)
    move_back(moved)
    assert_same_weights(weights(net), before)
    moved = move_uphill(net.parameters(), Sam(rho=0.2, adaptive=True))  # ASAM: |e / w| = rho
    relative = torch.stack([((p.detach() - old) / old).square().sum() for p, old in moved]).sum().sqrt().item()
    assert relative == pytest.approx(0.2, rel=1e-9)


@pytest.mark.identity
def test_the_adaptive_move_follows_a_rescaling_of_weights():
    """w -> c w with g -> g / c, as between layers of a ReLU network: the move is c e."""
    torch.manual_seed(0)
    values, slopes, c = torch.randn(20).double(), torch.randn(20).double(), 7.0
    moves = []
    for scale in (1.0, c):
        w = nn.Parameter(values * scale)
        w.grad = slopes / scale
        ((_, old),) = move_uphill([w], Sam(rho=0.5, adaptive=True))
        moves.append(w.detach() - old)
    torch.testing.assert_close(moves[1], c * moves[0], rtol=1e-12, atol=1e-14)


def test_parameters_without_gradient_stay_and_zero_gradients_do_no_harm():
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    a.grad = torch.zeros(3)
    c.requires_grad_(False)
    assert [p is a for p, _ in move_uphill([a, b, c], Sam(rho=1.0))] == [True]
    assert torch.equal(a, torch.ones(3))


def test_steps_out_of_order_and_bad_numbers_are_told():
    net, loss = problem()
    sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="comes after first_step"):
        sam.second_step()
    loss().backward()
    sam.first_step()
    with pytest.raises(UsageError, match="called twice"):
        sam.first_step()
    with pytest.raises(UsageError, match=r"rho.*-1"):
        SAM(sam.optimizer, rho=-1)
    with pytest.raises(UsageError, match=r"optimizer.sam.roh is not a setting; did you mean rho"):
        tiny_recipe("optimizer.sam={roh: 0.1}")


def test_frozen_statistics():
    net = tiny_net(norm=True)
    kept = weights(net)
    with frozen_statistics(net):
        net(torch.randn(4, 3, 8, 8))
    assert_same_weights(weights(net), kept)


# ---- in the loop, for every learner


def final(folder, *assignments, norm=True, devices=1, dropout=0.1):
    recipe = tiny_recipe("budget.steps=8", *assignments)
    learner = ClassificationLearner.create(tiny_net(norm=norm, dropout=dropout), tiny_data(), recipe)
    return fit(learner, tiny_data(), recipe, folder, devices=devices, accelerator="cpu"), weights(learner.model)


@pytest.mark.identity
def test_rho_zero_in_the_loop_is_the_plain_loop_bit_for_bit(tmp_path):
    """With dropout, mixing, augmentation, accumulation, batch norm, clipping and a moving average."""
    result, plain = final(tmp_path / "plain")
    also, sam = final(tmp_path / "sam", "optimizer.sam={rho: 0}")
    assert_same_weights(sam, plain)
    assert timeless(also.history) == timeless(result.history)
    _, other = final(tmp_path / "other", ON)
    assert any(not torch.equal(other[name], plain[name]) for name in plain)


@pytest.mark.identity
def test_accumulated_batches_are_one_batch(tmp_path):
    """Both passes go over all batches of a step."""
    still = ("mixing={}", "augment={}", "precision=64-true", ON)
    _, whole = final(tmp_path / "whole", *still, "accumulate=1", "batch_size=16", norm=False, dropout=0.0)
    _, parts = final(tmp_path / "parts", *still, "accumulate=2", "batch_size=8", norm=False, dropout=0.0)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-10, atol=1e-12)


def test_the_loop_takes_the_steps_of_the_class(tmp_path):
    seen = []

    class Watches(ClassificationLearner):
        def loss(self, batch):
            seen.append((batch["image"], batch["target"]))
            return super().loss(batch)

    still = (*PLAIN, "clip={}", "precision=64-true", "schedule={name: constant, warmup: 0}", "optimizer.name=sgd", "optimizer.momentum=0.9")
    recipe = tiny_recipe("budget.steps=4", *still, ON)
    learner = Watches.create(tiny_net(dropout=0.0, norm=True), tiny_data(), recipe)
    net = tiny_net(dropout=0.0, norm=True).double()
    fit(learner, tiny_data(), recipe, tmp_path)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    groups = [{"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]
    sam = SAM(torch.optim.SGD(groups, lr=recipe.optimizer.lr, momentum=0.9, nesterov=True), 0.05)  # timm's "sgd" is Nesterov's
    assert len(seen) == 8
    for (image, target), (again, _) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(again, image)
        nn.functional.cross_entropy(net(image), target).backward()
        sam.first_step()
        with frozen_statistics(net):
            nn.functional.cross_entropy(net(image), target).backward()
        sam.second_step()
    for name, tensor in weights(learner.model).items():
        torch.testing.assert_close(tensor, weights(net)[name], rtol=1e-9, atol=1e-12)


def test_resumed_equals_unbroken(tmp_path):
    result, unbroken = train_everything(tmp_path / "whole", "budget.steps=12", ON)

    def interrupt(learner, losses):
        signal.raise_signal(signal.SIGTERM)
        return losses

    for stop in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            train_everything(tmp_path / "parts", "budget.steps=12", ON, at=[stop], fault=interrupt)
    again, resumed = train_everything(tmp_path / "parts", "budget.steps=12", ON)
    assert_same_weights(resumed, unbroken)
    assert timeless(again.history) == timeless(result.history)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    """In the second pass only: the weights come back from uphill, and the step counts as skipped."""
    count = {"passes": 0}

    def not_finite_uphill(learner, losses):
        count["passes"] += 1
        return {"loss": losses["loss"] * (np.nan if count["passes"] % 2 == 0 else 1.0)}

    start = tiny_net(norm=True, dropout=0.0)
    recipe = tiny_recipe("budget.steps=2", *PLAIN, ON)
    learner = Breaks.create(tiny_net(norm=True, dropout=0.0), tiny_data(), recipe)
    learner.at, learner.fault = (0, 1), not_finite_uphill
    result = fit(learner, tiny_data(), recipe, tmp_path)
    assert result.skipped == 2
    assert_same_weights(weights(learner.model), weights(start))


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's processes are tested on POSIX")
@pytest.mark.identity
def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    """The move uphill is that of the whole batch."""
    still = (*PLAIN, "budget.steps=4", "num_workers=0", ON)
    _, expected = final(tmp_path / "one", *still, "batch_size=16", norm=False, dropout=0.0)
    _, found = final(tmp_path / "two", *still, "batch_size=8", norm=False, dropout=0.0, devices=2)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


# ---- measures


def test_noise_sharpness_of_a_quadratic_is_half_the_trace_and_weights_come_back():
    w = nn.Parameter(torch.randn(4).double())
    curvature = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    kept = w.detach().clone()
    holder = nn.ParameterList([w])
    found = noise_sharpness(holder, lambda: 0.5 * (curvature * (w - kept) ** 2).sum(), sigma=0.1, draws=4000)
    assert found == pytest.approx(0.5 * 0.1**2 * 10, rel=0.05)
    assert torch.equal(w.detach(), kept)


def test_active_neurons_counts_positive_inputs():
    net = nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 1))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    assert active_neurons(net, torch.randn(3, 2)) == {"1": 0.75}
    assert net.training
    with pytest.raises(InputError, match="no activations"):
        active_neurons(nn.Linear(2, 2), torch.randn(1, 2))


def test_the_models_of_the_table_exist():
    from timm import list_models

    known = {f"timm/{name}" for name in list_models()}
    assert set(RHO) <= known
