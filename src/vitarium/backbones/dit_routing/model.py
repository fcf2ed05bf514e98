"""The grid of nodes of the routing backbone.

Legend: as in the package.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.backbones.dit_routing.edges import (
    ColumnEdge,
    FixedGate,
    Gate,
    Grid,
    RoutedBlock,
    RowEdge,
    Taken,
    sample_gate,
    spread_over,
)
from vitarium.catalog import family, rename
from vitarium.errors import UsageError
from vitarium.nn import Backbone, Stage, drop_path_rates, init_convs_by_fan_out, init_weights
from vitarium.nn.pvt import OverlapPatchEmbed
from vitarium.ops.maps import as_map

Node = tuple[int, int]
"""Scale and column."""


@dataclass(frozen=True)
class Routes:
    """Gates of a forward pass, (B, h, w) of 0 and 1 each, with a gradient in training.

    Attributes:
        row: (scale, column) -> tokens that are transformed there.
        column: (scale, column) -> tokens that are passed on to the next scale.
    """

    row: dict[Node, Tensor] = field(default_factory=dict)
    column: dict[Node, Tensor] = field(default_factory=dict)


OFFICIAL = rename((r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."))
PVT_V2 = rename(
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1.\1.blocks."),
    (r"^stages\.(\d+)\.norm\.", r"norms.\1."),
    *((rf"^stages\.{i}\.downsample\.", f"down.{i - 1}.{i}.") for i in (1, 2, 3)),
)
"""Renamer from timm's PVTv2 to the diagonal path; the rest of the grid stays unchanged (`load_checkpoint(..., strict=False)`)."""


def spread(depth: int | Sequence[int], columns: int) -> list[int]:
    """Split the blocks of a scale evenly over the columns, at least one in each. A list is returned unchanged."""
    if not isinstance(depth, int):
        return list(depth)
    return [max(1, (j + 1) * depth // columns - j * depth // columns) for j in range(columns)]


_WIDE = dict(dims=(64, 128, 320, 512))


@family(
    "dit_routing",
    variants={
        "pico": dict(
            dims=(16, 32, 48),
            depths=(2, 2, 2),
            num_heads=(1, 2, 3),
            sr_ratios=(4, 2, 1),
            mlp_ratios=(4, 4, 4),
            columns=2,
            patch_size=2,
            image_size=16,
        ),
        # widths and depths are those of PVTv2, split by this library; the paper describes only B5
        "b0": dict(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), drop_path_rate=0.1),
        "b1": dict(**_WIDE, depths=(2, 2, 2, 2), drop_path_rate=0.1),
        "b2": dict(**_WIDE, depths=(3, 4, 6, 3), drop_path_rate=0.1),
        "b3": dict(**_WIDE, depths=(3, 4, 18, 3), drop_path_rate=0.3),
        "b4": dict(**_WIDE, depths=(3, 8, 27, 3), drop_path_rate=0.3),
        "b5": dict(**_WIDE, depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4), drop_path_rate=0.3),  # 84.8 % top-1 in the paper
    },
    official=OFFICIAL,  # no weights were released; the names are this library's and PVTv2's
    dialects={"pvt_v2": PVT_V2},
)
class DiTRouting(Backbone):
    """DiT classifier with token routing: images (B, in_chans, H, W), any H and W, -> logits (B, num_classes).

    The feature maps are those of the last column, normed.

    Args:
        dims, num_heads, sr_ratios, mlp_ratios: channels, heads, reduction R of attention and MLP ratio per scale.
        depths: blocks per scale, split over the columns with at least one in each; or a list of blocks per column.
        columns: number of columns K.
        budget: target of the learner `dit_routing`, relative to the cost with all gates on, (0, 1].
        patch_size: stride of the patches, pixels.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate of the last column; the rates rise linearly from 0.

    Raises:
        ValueError: lists of different lengths, a scale without a block in a column, dims that are not divisible by their heads, or a budget
            outside (0, 1].
    """

    temperature: Tensor

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int | Sequence[int]],
        num_heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        columns: int = 4,
        budget: float = 1.0,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if len({len(row) for row in (dims, depths, num_heads, sr_ratios, mlp_ratios)}) > 1:
            given = f"{dims}, {depths}, {num_heads}, {sr_ratios} and {mlp_ratios}"
            raise ValueError(f"dims, depths, num_heads, sr_ratios and mlp_ratios need one value per scale, got {given}")
        if columns < 1:
            raise ValueError(f"columns must be at least 1, got {columns}")
        table = [spread(depth, columns) for depth in depths]
        if any(len(row) != columns or min(row) < 1 for row in table):
            raise ValueError(f"depths need at least one block in each of the {columns} columns, got {depths}")
        if wrong := [(dim, heads) for dim, heads in zip(dims, num_heads, strict=True) if dim % heads]:
            raise ValueError(f"dims must be divisible by num_heads, got {wrong[0][0]} and {wrong[0][1]}")
        if not 0 < budget <= 1:
            raise ValueError(f"budget, relative to the cost with all gates on, must lie in (0, 1]; got {budget}")
        stages = [Stage(dim, patch_size * 2**i) for i, dim in enumerate(dims)]
        super().__init__(stages=stages, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.columns, self.budget = columns, budget
        self.register_buffer("temperature", torch.ones(()), persistent=False)
        rates = drop_path_rates(drop_path_rate, [columns])[0]
        block = lambda i, j: RoutedBlock(dims[i], num_heads[i], mlp_ratios[i], sr_ratios[i], rates[j])
        scales, gates = range(len(dims)), lambda i, count: nn.ModuleList(Gate(dims[i]) for _ in range(count))
        self.patch_embed = OverlapPatchEmbed(in_chans, dims[0], patch_size)
        self.stages = nn.ModuleList(
            nn.ModuleList(RowEdge([block(i, j) for _ in range(table[i][j])]) for j in range(columns)) for i in scales
        )
        self.down = nn.ModuleList(nn.ModuleList(ColumnEdge(dims[i], dims[i + 1]) for _ in range(columns + 1)) for i in scales[:-1])
        self.gates_row = nn.ModuleList(gates(i, columns) for i in scales)
        self.gates_col = nn.ModuleList(gates(i, columns + 1) for i in scales[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)
        self._seen: Routes | None = None
        init_weights(self, conv=False)
        init_convs_by_fan_out(self)
        for gate in self.modules():
            if isinstance(gate, Gate):
                with torch.no_grad():
                    gate.fc2.bias[1] = 2.0

    # ---- the grid

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        """Yield the normed map of each scale in the last column."""
        x = self.patch_embed(image.contiguous(memory_format=torch.channels_last))
        rows: list[Any] = list(self.stages)
        grids = [(x.shape[1], x.shape[2])]
        x = x.flatten(1, 2)
        for _ in rows[1:]:
            grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))
        carried: list[Tensor | None] = [x, *[None] * (len(rows) - 1)]
        outputs = []
        for j in range(self.columns + 1):
            passed: Tensor | None = None
            for i, grid in enumerate(grids):
                node = self._merged(carried[i], passed, x, i, grid)
                y = self.norms[i](node)
                passed = None
                if i + 1 < len(rows):
                    taken = self._decide(self.gates_col[i][j], y, grid, "column", (i, j))  # type: ignore[index]
                    passed = self.down[i][j](y, grid, taken)  # type: ignore[index]
                if j < self.columns:
                    taken = self._decide(self.gates_row[i][j], y, grid, "row", (i, j))  # type: ignore[index]
                    carried[i] = rows[i][j](node, grid, taken, self.run_blocks)
                else:
                    outputs.append(as_map(y, grid))
        yield from outputs

    def _merged(self, carried: Tensor | None, passed: Tensor | None, like: Tensor, scale: int, grid: Grid) -> Tensor:
        """Return F = H + D, where one or both may be absent."""
        if carried is None and passed is None:
            return like.new_zeros(like.shape[0], grid[0] * grid[1], int(self.feature_info[scale]["num_chs"]))  # type: ignore[call-overload]
        if carried is None or passed is None:
            return passed if carried is None else carried  # type: ignore[return-value]
        return carried + passed

    def _decide(self, gate: nn.Module, y: Tensor, grid: Grid, way: str, node: Node) -> Taken:
        """Return which of the normed tokens (B, N, C) take an edge."""
        taken: Taken
        if isinstance(gate, FixedGate):
            taken = gate.on
        elif self.training:
            taken = sample_gate(gate(y), self.temperature)
        else:
            logits = gate(y)
            taken = logits[..., 1:] > logits[..., :1]
        if self._seen is not None:
            full = (
                y.new_full((y.shape[0], *grid), float(taken)) if isinstance(taken, bool) else taken[..., 0].unflatten(1, grid).to(y.dtype)
            )
            getattr(self._seen, way)[node] = full
        return taken

    # ---- routes and their cost

    @contextlib.contextmanager
    def watch(self) -> Iterator[Routes]:
        """Record the routes of the forward pass inside the context."""
        self._seen = routes = Routes()
        try:
            yield routes
        finally:
            self._seen = None

    @torch.no_grad()
    def routes(self, image: Tensor) -> Routes:
        """Return the routes of images (B, in_chans, H, W)."""
        with self.watch() as routes:
            self.forward_features(image)
        return routes

    def cost(self, routes: Routes) -> Tensor:
        """Return the multiply-accumulates of the edges of each image, (B,) float; differentiable in training."""
        total: Any = 0.0
        for (i, j), taken in routes.row.items():
            per_token, per_near, once = self.stages[i][j].macs((taken.shape[1], taken.shape[2]))  # type: ignore[index,union-attr]
            near = spread_over(taken, 1).sum((1, 2))
            total = total + per_token * taken.float().sum((1, 2)) + per_near * near + once * taken.float().amax((1, 2))
        for (i, j), taken in routes.column.items():
            total = total + self.down[i][j].macs() * spread_over(taken, 2).sum((1, 2))  # type: ignore[index,union-attr]
        return total

    def share(self, routes: Routes) -> Tensor:
        """Return `cost` relative to the cost with all gates on, (B,) in [0, 1]."""
        all_on = Routes(*({node: torch.ones_like(taken[:1]) for node, taken in way.items()} for way in (routes.row, routes.column)))
        return self.cost(routes) / self.cost(all_on)

    def macs(self, image: Tensor) -> Tensor:
        """Return the multiply-accumulates of each image in inference, including gates, patches and head, (B,) float64."""
        routes = self.routes(image)
        fixed = self.num_features * self.num_classes
        fixed += self.patch_embed.proj.weight.numel() * routes.row[0, 0][0].numel()
        for gates, way in ((self.gates_row, routes.row), (self.gates_col, routes.column)):
            for (i, j), taken in way.items():
                if isinstance(gate := gates[i][j], Gate):  # type: ignore[index]
                    fixed += (gate.fc1.weight.numel() + gate.fc2.weight.numel()) * taken[0].numel()
        return self.cost(Routes(*({node: taken.double() for node, taken in way.items()} for way in (routes.row, routes.column)))) + fixed

    def depth_map(self, image: Tensor) -> Tensor:
        """Return the number of blocks applied to the tokens of each pixel, over all scales: (B, in_chans, H, W) -> (B, H, W) float."""
        height, width = image.shape[-2:]
        depth = image.new_zeros(image.shape[0], height, width)
        for (i, j), taken in self.routes(image).row.items():
            stride = int(self.feature_info[i]["reduction"])  # type: ignore[call-overload]
            pixels = taken.repeat_interleave(stride, 1).repeat_interleave(stride, 2)[:, :height, :width]
            depth = depth + pixels * len(self.stages[i][j].blocks)  # type: ignore[index,union-attr,arg-type]
        return depth

    def fix_routes(self, image: Tensor) -> dict[str, bool]:
        """Fix each gate to the majority of the tokens of images (B, in_chans, H, W), for static shapes, in place; this cannot be undone.

        Edges that are off are not computed in any graph. The model is left in evaluation mode and can only be saved as a state_dict().

        Returns:
            name of each gate -> whether it is on.
        """
        self.eval()
        routes, fixed = self.routes(image), {}
        for name, gates, way in (("gates_row", self.gates_row, routes.row), ("gates_col", self.gates_col, routes.column)):
            for (i, j), taken in way.items():
                on = bool(taken.mean() >= 0.5)
                gates[i][j] = FixedGate(on)  # type: ignore[index,operator]
                fixed[f"{name}.{i}.{j}"] = on
        return fixed

    def fix_diagonal(self) -> None:
        """Fix the gates to the plain pyramid, one column per scale, in place; this cannot be undone. The model then equals PVTv2.

        Raises:
            UsageError: the numbers of columns and scales differ.
        """
        if self.columns != len(self.stages):
            raise UsageError(f"the diagonal needs as many columns as scales, got {self.columns} columns and {len(self.stages)} scales")
        for gates, offset in ((self.gates_row, 0), (self.gates_col, 1)):
            for i, row in enumerate(gates):
                for j in range(len(row)):  # type: ignore[arg-type]
                    row[j] = FixedGate(j == i + offset)  # type: ignore[operator]

    # ---- training

    def no_weight_decay(self) -> set[str]:
        """Return the weights of the gates: weight decay would pull them to the undecided state."""
        return {name for name, p in self.named_parameters() if name.startswith("gates_") and p.ndim > 1}

    def group_matcher(self, coarse: bool = False) -> Any:
        """Return the layer index for layer-wise decay as a function of a parameter's name: patches, nodes by scale + column, the rest."""
        last = len(self.stages) + self.columns + 1

        def layer(name: str) -> int:
            if name.startswith("patch_embed."):
                return 0
            found = re.match(r"(?:stages|down|gates_row|gates_col)\.(\d+)\.(\d+)\.", name)
            return 1 + int(found[1]) + int(found[2]) if found else last

        return layer
