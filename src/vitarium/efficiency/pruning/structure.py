"""Structured pruning: removal of attention heads and of hidden channels of MLPs, which makes the layers smaller and faster.

A unit is a set of output rows of the layers that produce it (queries, keys and values of a head; a hidden channel's weights) and of input
columns of the layer that reads it. Zeros in those columns mask the unit; removing its rows and columns computes the same function. `shrink`
replaces linear layers by smaller ones of the same class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitarium import anatomy
from vitarium.anatomy import AttentionView, Site, install
from vitarium.catalog.calling import Inputs, call, example_inputs
from vitarium.efficiency.pruning.masks import set_zeros
from vitarium.errors import AttachError, UnsupportedModel, UsageError
from vitarium.nn.modes import evaluating

Kind = Literal["heads", "channels"]

MLPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fc1",), "fc2"),  # timm, transformers, ours; in GLU variants value and gate are one layer
    (("fc1_g", "fc1_x"), "fc2"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("weights_in",), "weights_out"),
    (("c_fc",), "c_proj"),
    (("linear1",), "linear2"),
)
"""Names inside an MLP: the layers that produce the hidden channels, and the layer that reads them."""


FIXED_WIDTH = ("EvaAttention", "AttentionRope")
"""Attention classes that assume equal input and output widths; with fewer heads, anatomy's blocks run their parts."""


@dataclass(frozen=True)
class Group:
    """The removable units of one module.

    Args:
        kind: "heads" or "channels".
        name: of the attention or the MLP in the model.
        units: number of units.
        width: rows per unit in each part: channels of a head, 1 for a hidden channel.
        into: names of the linear layers whose outputs are the units; each holds `parts` blocks of them, one after the other.
        vectors: names of parameters and buffers with one entry per row (separate biases).
        out: name of the linear layer whose inputs are the units.
        sizes: attributes of the module that count units or rows and are updated.
    """

    kind: Kind
    name: str
    units: int
    width: int
    into: Mapping[str, int]
    out: str
    vectors: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()

    def rows(self, kept: Tensor) -> Tensor:
        """Return the indices of the kept units' rows in one part."""
        return (kept[:, None] * self.width + torch.arange(self.width, device=kept.device)).flatten()


def find_groups(model: nn.Module, kinds: Iterable[Kind]) -> list[Group]:
    """Find the units of a model: channels of every MLP of a known form, heads of every attention that `anatomy` supports.

    Raises:
        UnsupportedModel: heads cannot be removed from the model or one of its attentions; the message says why.
    """
    groups: list[Group] = []
    if "heads" in kinds:
        groups += [_heads(f"{block.name}.{block.layout.attention}", block.attention) for block in anatomy.of(model).blocks]
    if "channels" in kinds:
        groups += [g for name, module in model.named_modules() if name and (g := _channels(name, module)) is not None]
    return groups


def _heads(name: str, view: AttentionView) -> Group:
    layout, module = view.layout, view.module
    joint = view.part(layout.qkv[0])
    layers = layout.qkv[:1] if joint is not None else layout.qkv[1:]
    gate = (layout.gate,) if view.part(layout.gate) is not None else ()
    if not all(isinstance(view.part(n), nn.Linear) for n in (*layers, *gate, layout.proj)):
        raise UnsupportedModel(f"{name} ({type(module).__name__}) has projections that are not linear layers; structure=channels works")
    if _learns(view.part(layout.norm)):
        raise UnsupportedModel(f"{name} normalises all heads together, so none can be removed alone; structure=channels may work")
    if layout.kv_groups and getattr(module, layout.kv_groups, 1) != 1:
        raise UnsupportedModel(f"{name} shares keys among heads, so none can be removed alone; structure=channels works")
    rows = view.num_heads * view.head_dim
    if _learns(norm := view.part(layout.q_norm)) and getattr(norm, "normalized_shape", None) != (view.head_dim,):
        raise UnsupportedModel(f"{name} normalises queries over all heads, so none can be removed alone; structure=channels works")
    into = {f"{name}.{n}": 3 if joint is not None else 1 for n in layers} | {f"{name}.{n}": 1 for n in gate}
    vectors = tuple(f"{name}.{n}" for n in layout.biases if view.part(n) is not None)
    sizes = tuple(n for n in (layout.heads, "attn_dim", "kv_dim") if getattr(module, n, None) in (view.num_heads, rows))
    return Group("heads", name, view.num_heads, view.head_dim, into, f"{name}.{layout.proj}", vectors, sizes)


def _channels(name: str, module: nn.Module) -> Group | None:
    for first, last in MLPS:
        layers: list[Any] = [module._modules.get(n) for n in (*first, last)]
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            continue
        others = [child for n, child in module._modules.items() if n not in (*first, last)]
        if any(_learns(other) for other in others) or module._parameters or module._buffers:
            return None  # a norm or a convolution over the hidden channels mixes them
        hidden = layers[-1].in_features
        parts = {layer.out_features / hidden for layer in layers[:-1]}
        if parts not in ({1.0}, {2.0}):
            return None
        return Group("channels", name, hidden, 1, {f"{name}.{n}": int(max(parts)) for n in first}, f"{name}.{last}")
    return None


def _learns(module: nn.Module | None) -> bool:
    return module is not None and (any(True for _ in module.parameters()) or any(True for _ in module.buffers()))


# ---- selection


def unit_scores(model: nn.Module, group: Group, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the importance of each unit, (units,): the norm of the weights that read it, times that of the weights that produce it.

    Args:
        model: holds the group.
        inputs: root mean square of each input of the layers, by name; replaces the weights that produce the unit.
    """
    reads = _weight(model, group.out)
    if inputs is not None:
        return (reads * inputs[group.out].to(reads)).square().view(len(reads), group.units, -1).sum((0, 2)).sqrt()
    shape = (-1, group.units, group.width)
    made = sum(_weight(model, name).unflatten(0, shape).square().sum((0, 2, 3)) for name in group.into)
    return (reads.square().view(len(reads), group.units, -1).sum((0, 2)) * made).sqrt()


def _weight(model: nn.Module, name: str) -> Tensor:
    layer: Any = model.get_submodule(name)
    return layer.weight.detach().float()


def units_kept(scores: Mapping[str, Tensor], amount: float, *, together: bool, step: int = 1) -> dict[str, Tensor]:
    """Return the ascending indices of the kept units for each group of one kind, at least `step` of each.

    Args:
        scores: group -> (units,).
        amount: share to remove.
        together: whether to rank the units of all groups together, each score over its group's mean; else the same share of each group.
        step: the number of kept units is a multiple of this if the group is that large, for efficient kernels.
    """
    counts = {name: (1 - amount) * len(score) for name, score in scores.items()}
    if together and scores:
        relative = torch.cat([score / score.mean().clamp(min=1e-30) for score in scores.values()])
        order = relative.argsort(descending=True, stable=True)[: round((1 - amount) * len(relative))]
        chosen = torch.zeros_like(relative, dtype=torch.bool).scatter_(0, order, True)
        parts = chosen.split([len(score) for score in scores.values()])
        counts = {name: float(part.sum()) for name, part in zip(scores, parts, strict=True)}
    kept = {}
    for name, score in scores.items():
        unit = min(step, len(score))
        count = len(score) if counts[name] >= len(score) else max(unit, int(counts[name] / unit + 0.5) * unit)
        kept[name] = score.argsort(descending=True, stable=True)[: min(count, len(score))].sort().values
    return kept


# ---- removal

PROOF = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted difference, in standard deviations of the output, between masked and removed units."""


def taken_out(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Remove units, and check on a probe that the model computes the same as with these units at zero.

    Returns the replaced modules by name. Raises AttachError, with the model unchanged, if the outputs differ or cannot be compared.
    """
    changed = [group for group in groups if len(kept[group.name]) < group.units]
    if not changed:
        return {}
    try:
        inputs = example_inputs(model, 2)
    except UsageError as error:
        raise AttachError(f"the smaller layers cannot be checked: {error}") from error
    own = dict(model.named_parameters(remove_duplicate=False))
    masks = dict(columns_of(model, group, kept[group.name]) for group in changed)
    saved = {name: own[name].detach().clone() for name in masks}
    set_zeros(own, masks)
    try:
        want = None if next(iter(inputs.values())).is_meta else _outputs(model, inputs)
    finally:
        with torch.no_grad():
            for name, values in saved.items():
                own[name].copy_(values)
    replaced: dict[str, nn.Module] = {}
    try:
        replaced |= widened(model, changed)
        for group in changed:
            replaced |= shrink(model, group, kept[group.name])
        if want is not None:
            _prove(want, _outputs(model, inputs))
    except BaseException as error:
        for name, original in replaced.items():
            model.set_submodule(name, original)
        if isinstance(error, RuntimeError):  # a shape error, deep inside
            message = f"this {type(model).__name__} does not run with smaller layers ({error}); the model is unchanged"
            raise AttachError(f"{message}; structure=weights works on any, structure=channels on most") from error
        raise
    return replaced


def widened(model: nn.Module, groups: Sequence[Group]) -> dict[str, nn.Module]:
    """Replace blocks whose attention supports one width only by anatomy's blocks. Returns the replaced blocks by name; none if not
    needed."""
    heads = [model.get_submodule(group.name) for group in groups if group.kind == "heads"]
    if not any(type(module).__name__ in FIXED_WIDTH for module in heads):
        return {}
    return install(model, lambda view: [Site()] * view.depth)[0]


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with evaluating(model):
        return [leaf for leaf in tree_leaves(call(model, inputs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _prove(want: list[Tensor], got: list[Tensor]) -> None:
    for a, b in zip(want, got, strict=True):
        spread = (float(a.std()) if a.numel() > 1 else 0.0) or float(a.abs().max()) or 1.0
        error = float((a - b).abs().max()) / spread if a.shape == b.shape else float("inf")
        if not error <= PROOF.get(a.dtype, 1e-4):
            raise AttachError(
                f"the smaller model differs from the masked one by {error:.2g} standard deviations; the model is unchanged. "
                "Please report the model; structure=weights works on any"
            )


def columns_of(model: nn.Module, group: Group, kept: Tensor) -> tuple[str, Tensor]:
    """Return the name of the weight that reads the units, and its mask: True in the columns of kept units."""
    weight: Any = model.get_submodule(group.out).weight
    mask = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    mask[group.rows(kept.to(weight.device))] = True
    return f"{group.out}.weight", mask.expand_as(weight)


def shrink(model: nn.Module, group: Group, kept: Tensor) -> dict[str, nn.Module]:
    """Remove the units that are not kept. Returns the replaced modules by name, for `undo`."""
    per_part = group.rows(kept)
    owner = model.get_submodule(group.name)
    smaller = _twin(owner)
    for size in group.sizes:
        setattr(smaller, size, len(kept) if getattr(owner, size) == group.units else len(per_part))
    place = len(group.name) + 1
    for name, parts in group.into.items():
        layer: Any = model.get_submodule(name)
        rows = torch.cat([per_part + i * group.units * group.width for i in range(parts)])
        smaller.set_submodule(name[place:], _sliced(layer, rows, None))
    smaller.set_submodule(group.out[place:], _sliced(model.get_submodule(group.out), None, per_part))
    for name in group.vectors:
        short = name[place:]
        table = smaller._parameters if short in smaller._parameters else smaller._buffers
        table[short] = _taken(table[short], per_part)
    model.set_submodule(group.name, smaller)
    return {group.name: owner}


def _twin(module: nn.Module) -> Any:
    """Return a module of the same class with the same parts, which can be replaced in it without changing the original."""
    twin = object.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[table] = dict(module.__dict__[table])
    return twin


def _sliced(layer: Any, rows: Tensor | None, columns: Tensor | None) -> nn.Module:
    twin = _twin(layer)
    if rows is not None:
        twin._parameters["weight"] = _taken(layer.weight, rows)
        twin._parameters["bias"] = None if layer.bias is None else _taken(layer.bias, rows)
        twin.out_features = len(rows)
    if columns is not None:
        twin._parameters["weight"] = _taken(layer.weight, columns, 1)
        twin.in_features = len(columns)
    return twin


def _taken(tensor: Any, index: Tensor, dim: int = 0) -> Any:
    part = tensor.detach().index_select(dim, index.to(tensor.device)).contiguous()
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
