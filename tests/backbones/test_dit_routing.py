"""Tests specific to token routing; the contract of all backbones is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vitarium
from vitarium.backbones.dit_routing import DiTRouting, FixedGate, RoutingLearner, edges
from vitarium.backbones.dit_routing.edges import ColumnEdge, RowEdge, sample_gate
from vitarium.backbones.dit_routing.model import PVT_V2, spread
from vitarium.catalog.checkpoints import load_checkpoint
from vitarium.errors import UsageError
from vitarium.training import find_learner, fit, load_recipe


@pytest.mark.parametrize(("name", "millions"), [("b0", 8.650), ("b1", 33.796), ("b2", 37.109), ("b5", 93.667)])
def test_parameter_counts(name: str, millions: float):
    with torch.device("meta"):
        model = vitarium.create_model(f"dit_routing_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def mixed(seed: int = 0, **options) -> DiTRouting:
    """Return a model in float64 and evaluation mode whose gates each select some of the tokens."""
    torch.manual_seed(seed)
    model = vitarium.create_model("dit_routing_pico", num_classes=5, **options).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn_like(p))
            if name.startswith("gates_"):
                p.copy_(torch.randn_like(p) if p.ndim > 1 else torch.zeros_like(p))
    return model


def images(batch: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def set_gates(model: DiTRouting, *, row: bool, column: bool) -> None:
    """Set all gates of a direction on or off; they remain per-token gates."""
    for name, p in model.named_parameters():
        if name.startswith("gates_"):
            nn.init.zeros_(p)
        if name.endswith("fc2.bias") and name.startswith("gates_"):
            p.data[1] = 1.0 if (row if name.startswith("gates_row") else column) else -1.0


class Literal:
    """Literal implementation of the grid from a state dict: maps (B, C, h, w), everything computed and masked."""

    def __init__(self, model: DiTRouting, heads=(1, 2, 3), ratios=(4, 2, 1), columns: int = 2, stride: int = 2, *, gated: bool = True):
        self.state, self.gated = {name: t.detach() for name, t in model.state_dict().items()}, gated
        self.heads, self.ratios, self.columns, self.stride = heads, ratios, columns, stride

    def linear(self, x: Tensor, at: str) -> Tensor:
        return F.conv2d(x, self.state[f"{at}.weight"][:, :, None, None], self.state[f"{at}.bias"])

    def conv(self, x: Tensor, at: str, **options) -> Tensor:
        return F.conv2d(x, self.state[f"{at}.weight"], self.state[f"{at}.bias"], **options)

    def ln(self, x: Tensor, at: str, eps: float) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        scale, shift = (self.state[f"{at}.{n}"][:, None, None] for n in ("weight", "bias"))
        return (x - mean) / (var + eps).sqrt() * scale + shift

    def gate(self, y: Tensor, at: str) -> Tensor:
        if not self.gated:
            return torch.ones_like(y[:, :1])
        z = self.linear(F.gelu(self.linear(y, f"{at}.fc1")), f"{at}.fc2")
        return z.argmax(1, keepdim=True).to(y.dtype)

    def attention(self, y: Tensor, at: str, heads: int, r: int) -> Tensor:
        small = y
        if r > 1:
            small = F.pad(y, (0, max(0, r - y.shape[3]), 0, max(0, r - y.shape[2])))
            small = self.ln(self.conv(small, f"{at}.sr", stride=r), f"{at}.norm", 1e-5)
        q, (k, v) = self.linear(y, f"{at}.q"), self.linear(small, f"{at}.kv").chunk(2, 1)
        out = []
        for i, j, m in zip(*(x.flatten(2).chunk(heads, 1) for x in (q, k, v)), strict=True):
            out.append(m @ (i.transpose(1, 2) @ j * i.shape[1] ** -0.5).softmax(-1).transpose(1, 2))
        return self.linear(torch.cat(out, 1).view(y.shape), f"{at}.proj")

    def block(self, x: Tensor, g: Tensor, at: str, heads: int, r: int) -> Tensor:
        x = x + g * self.attention(self.ln(x, f"{at}.norm1", 1e-6), f"{at}.attn", heads, r)
        hidden = self.linear(self.ln(x, f"{at}.norm2", 1e-6), f"{at}.mlp.fc1")
        hidden = F.gelu(self.conv(hidden, f"{at}.mlp.dwconv", padding=1, groups=hidden.shape[1]))
        return x + g * self.linear(hidden, f"{at}.mlp.fc2")

    def down(self, y: Tensor, g: Tensor, at: str) -> Tensor:
        return self.ln(self.conv(g * y, f"{at}.proj", stride=2, padding=1), f"{at}.norm", 1e-5) * F.max_pool2d(g, 3, 2, 1)

    def __call__(self, image: Tensor) -> Tensor:
        x = self.conv(image, "patch_embed.proj", stride=self.stride, padding=self.stride - 1)
        scales = len(self.heads)
        carried: list = [self.ln(x, "patch_embed.norm", 1e-5), *[0.0] * (scales - 1)]
        for j in range(self.columns + 1):
            passed: Tensor | float = 0.0
            for i in range(scales):
                node = carried[i] + passed
                y = self.ln(node, f"norms.{i}", 1e-6)
                if i + 1 < scales:
                    passed = self.down(y, self.gate(y, f"gates_col.{i}.{j}"), f"down.{i}.{j}")
                if j < self.columns:
                    g, k = self.gate(y, f"gates_row.{i}.{j}"), 0
                    while f"stages.{i}.{j}.blocks.{k}.norm1.weight" in self.state:
                        node, k = self.block(node, g, f"stages.{i}.{j}.blocks.{k}", self.heads[i], self.ratios[i]), k + 1
                    carried[i] = node
        return F.linear(y.mean((2, 3)), self.state["head.weight"], self.state["head.bias"])


def reference(model: DiTRouting) -> Callable[[Tensor], Tensor]:
    """Build the reference for benchmarks: the same function by the equations above, with the weights and gates of `model`."""
    mixers = [row[0].blocks[0].attn for row in model.stages]
    heads, ratios = tuple(mixer.num_heads for mixer in mixers), tuple(mixer.sr_ratio for mixer in mixers)
    return Literal(model, heads, ratios, model.columns, model.patch_embed.proj.stride[0])


@pytest.mark.identity
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(16, 16), (33, 21)])
def test_equals_the_equations(size: tuple[int, int], seed: int):
    model, image = mixed(seed, depths=(2, 3, 2)), images(3, *size)
    shares = [taken.mean().item() for way in (model.routes(image).row, model.routes(image).column) for taken in way.values()]
    assert any(0.1 < share < 0.9 for share in shares)
    torch.testing.assert_close(model(image), reference(model)(image), rtol=0, atol=1e-11)


@pytest.mark.identity
@pytest.mark.parametrize("seed", range(4))
def test_gathered_equals_masked(monkeypatch: pytest.MonkeyPatch, seed: int):
    model, image = mixed(seed), images(4, 24, 20)
    gathered = model.forward_intermediates(image)
    monkeypatch.setattr(edges, "gathers", lambda x, taken: False)
    for a, b in zip((gathered[0], *gathered[1]), (lambda f: (f[0], *f[1]))(model.forward_intermediates(image)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.identity
def test_edges_with_images_that_do_not_take_them():
    torch.manual_seed(0)
    block = vitarium.create_model("dit_routing_pico", depths=(2, 4, 2)).eval().double()
    row, column = block.stages[1][0], block.down[1][0]
    x = torch.randn(3, 35, 32, dtype=torch.float64)
    taken = torch.rand(3, 35, 1) < torch.tensor([0.0, 0.2, 1.0])[:, None, None]
    run = lambda blocks, x, *context: [x := part(x, *context) for part in blocks][-1]
    masked = run(row.blocks, x, (5, 7), taken.double())
    torch.testing.assert_close(row(x, (5, 7), taken, run), masked, rtol=0, atol=1e-12)
    assert torch.equal(masked[0], x[0])
    assert torch.equal(row(x, (5, 7), torch.zeros_like(taken), run), x)
    cells = F.max_pool2d(taken.double().view(3, 1, 5, 7), 3, 2, 1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(column(x, (5, 7), taken), column.dense(x * taken, (5, 7)) * cells, rtol=0, atol=1e-12)
    assert not column(x, (5, 7), torch.zeros_like(taken)).any()


@pytest.mark.identity
def test_all_gates_on_is_the_dense_grid():
    model, image = mixed(), images()
    set_gates(model, row=True, column=True)
    torch.testing.assert_close(model(image), Literal(model, gated=False)(image), rtol=0, atol=1e-11)
    assert model.share(model.routes(image)).tolist() == [1.0, 1.0]


@pytest.mark.identity
def test_with_rows_off_only_patches_remain():
    model, image = mixed(), images()
    set_gates(model, row=False, column=True)
    x = model.patch_embed(image).flatten(1, 2)
    nodes: list = [x] * 3
    for i, (side, dim) in enumerate(((8, 16), (4, 32)), start=1):
        down = lambda y, j, i=i, side=side, dim=dim: model.down[i - 1][j].dense(model.norms[i - 1](y), (side, side))
        grown, total = [], 0.0
        for j in range(3):
            total = total + down(nodes[j], j)
            grown.append(total)
        nodes = grown
    expected = model.head(model.norms[2](nodes[2]).mean(1))
    torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [64, 100])
def test_the_diagonal_is_timms_pvt_v2(size: int, tmp_path: Path):
    import timm

    sizes = dict(depths=(1, 2, 1, 3), num_heads=(1, 2, 4, 8), mlp_ratios=(8, 8, 4, 4), sr_ratios=(8, 4, 2, 1))
    theirs = timm.create_model("pvt_v2_b0", embed_dims=(16, 32, 32, 64), num_classes=5, **sizes).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    depths = [[depth if i == j else 1 for j in range(4)] for i, depth in enumerate(sizes["depths"])]
    ours = vitarium.create_model("dit_routing_b0", dims=(16, 32, 32, 64), num_classes=5, **(sizes | {"depths": depths})).double().eval()
    torch.save(theirs.state_dict(), tmp_path / "pvt.pth")
    report = load_checkpoint(ours, tmp_path / "pvt.pth", strict=False)
    assert report.dialect == "pvt_v2"
    assert not report.unexpected
    assert not report.mismatched
    assert set(PVT_V2(theirs.state_dict())) <= set(ours.state_dict())
    ours.fix_diagonal()
    image = images(2, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-10)


@pytest.mark.identity
@pytest.mark.parametrize("seed", range(4))
def test_the_budget_counts_what_is_computed(seed: int):
    model = mixed(seed, depths=(2, 3, 2)).float()
    for image in images(3, 24, 16).float().split(1):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image)
        assert counter.get_total_flops() / 2 == model.macs(image).item()


@pytest.mark.identity
def test_the_share_falls_with_each_gate():
    model, image = mixed(), images()
    routes = model.routes(image)
    assert (model.share(routes) > 0).all()
    assert (model.share(routes) < 1).all()
    for way in (routes.row, routes.column):
        for taken in way.values():
            taken.zero_()
    assert model.share(routes).tolist() == [0.0, 0.0]


@pytest.mark.identity
def test_at_the_target_the_budget_has_no_gradient():
    torch.manual_seed(0)
    model = vitarium.create_model("dit_routing_pico", num_classes=5, budget=0.5).train()
    learner = RoutingLearner(model)
    with model.watch() as routes:
        model(images().float())
    share = model.share(routes).mean()
    for target, moved in ((share.item(), False), (0.2, True)):
        learner.target = target
        gradients = torch.autograd.grad(learner.over_budget(share), list(model.gates_row.parameters()), retain_graph=True)
        assert any(g.abs().sum() > 0 for g in gradients) == moved
    hinged = RoutingLearner(model, RoutingLearner.Settings(hinge=True))
    hinged.target = 1.0
    assert hinged.over_budget(share) == 0


@pytest.mark.identity
def test_sampled_gates_are_hard_and_follow_their_numbers():
    torch.manual_seed(0)
    logits = torch.tensor([0.3, 1.0]).expand(1, 20_000, 2).clone().requires_grad_()
    for temperature in (0.5, 5.0):
        taken = sample_gate(logits, torch.tensor(temperature))
        assert set(taken.unique().tolist()) == {0.0, 1.0}
        assert taken.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(0.7)).item(), abs=0.015)
    (gradient,) = torch.autograd.grad(taken.sum(), logits)
    assert (gradient[..., 1] > 0).all()
    assert (gradient[..., 0] < 0).all()


def test_a_budget_is_kept():
    """Twenty steps dominated by the budget term close many gates; target and temperature follow their schedules."""
    torch.manual_seed(0)
    model = vitarium.create_model("dit_routing_pico", num_classes=5, budget=0.3)
    learner = RoutingLearner(model, RoutingLearner.Settings(weight=100.0)).train()
    optimizer, batch = torch.optim.AdamW(model.parameters(), 1e-2), {"image": images(8).float(), "target": torch.arange(8) % 5}
    costs, temperatures, targets = [], [], []
    for step in range(20):
        learner.before_step(step, 20)
        temperatures.append(model.temperature.item())
        targets.append(learner.target)
        losses = learner.loss(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        costs.append(losses["cost"].item())
    assert (temperatures[0], temperatures[-1]) == (5.0, pytest.approx(0.5))
    assert (targets[0], targets[-1]) == (1.0, pytest.approx(0.3))
    assert costs[-1] < costs[0] - 0.15


def test_trains_and_reports_its_cost(tmp_path: Path):
    recipe = load_recipe("dit_routing_pico", ["budget.steps=3", "eval_every=1.0"])
    data = vitarium.open_data("digits")
    learner = find_learner("dit_routing").create("dit_routing_pico", data, recipe)
    metrics = fit(learner, data, recipe, tmp_path / "run").metrics
    assert 0 < metrics["cost"] <= 1
    assert 0 <= metrics["accuracy"] <= 1
    assert list((tmp_path / "run" / "pictures").glob("depth-*.png"))
    with pytest.raises(UsageError, match="models with routes"):
        RoutingLearner(vitarium.create_model("van_pico"))


def test_fixed_routes_leave_edges_out():
    model, image = mixed(), images()
    fixed = model.fix_routes(image)
    assert set(fixed.values()) == {True, False}
    parts = dict(model.named_modules())
    assert all(isinstance(parts[name], FixedGate) and parts[name].on == on for name, on in fixed.items())
    ran: list[str] = []
    for name, part in parts.items():
        if isinstance(part, RowEdge):
            for block in part.blocks:
                block.register_forward_hook(lambda *call, name=name: ran.append(name.replace("stages", "gates_row")))
        elif isinstance(part, ColumnEdge):
            part.proj.register_forward_hook(lambda *call, name=name: ran.append(name.replace("down", "gates_col")))
    model(image)
    assert set(ran) == {name for name, on in fixed.items() if on}
    assert model.macs(image).unique().numel() == 1
    program = torch.export.export(model, (image,))
    torch.testing.assert_close(program.module()(image), model(image), rtol=0, atol=1e-10)


def test_depth_map():
    model, image = mixed(depths=(2, 4, 2)), images(2, 17, 24)
    depth = model.depth_map(image)
    assert depth.shape == (2, 17, 24)
    set_gates(model, row=True, column=True)
    assert (model.depth_map(image) == 8).all()


def test_blocks_are_spread_over_the_columns():
    assert [spread(depth, 4) for depth in (1, 3, 6, 40)] == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 2, 1, 2], [10, 10, 10, 10]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(dims=(16, 32)), "one value per scale"),
        (dict(columns=0), "at least 1"),
        (dict(depths=((1, 0), 2, 2)), "at least one block in each of the 2 columns"),
        (dict(num_heads=(1, 5, 3)), "divisible by num_heads"),
        (dict(budget=1.5), r"in \(0, 1\]; got 1.5"),
    ],
)
def test_refuses(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        vitarium.create_model("dit_routing_pico", **options)


def test_only_a_square_grid_has_a_diagonal():
    with pytest.raises(UsageError, match="2 columns and 3 scales"):
        vitarium.create_model("dit_routing_pico").fix_diagonal()


def test_gathered_edges_follow_their_weights():
    """Also if an optimizer changes them without a version bump."""
    model, image = mixed(), images()
    model(image)
    for column in model.modules():
        if isinstance(column, ColumnEdge):
            column.proj.weight.data.numpy()[:] *= 2
    torch.testing.assert_close(model(image), Literal(model)(image), rtol=0, atol=1e-11)
