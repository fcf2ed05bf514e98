"""Attention in the form that costs a runtime least.

    q = scale (W_q x + b_q),  k = W_k x,  v = W_v x;  softmax(q k^T + bias) v;  the bias b_v goes into the layer that follows

The bias of k adds the same number to all logits of a query, which softmax ignores, and the rows of softmax sum to 1, so that
softmax(.) (v + b_v) = softmax(.) v + b_v. Each projection ends in the layout of its product, without a copy that parts q, k and v. Which
channel of a layer becomes which channel of which head is found by sending numbers through the views between them, so that any order of
the channels is understood.

Notation: B batch, N queries, M keys, h heads, d channels of a head.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from vitarium.efficiency.graphs.editing import Editor, aten, is_call, layer_of, shape_of

VIEWS = {
    aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.unbind.int, aten.select.int, aten.slice.Tensor, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.contiguous.default, aten.clone.default, aten.squeeze.dim, aten.unsqueeze.default, operator.getitem,
}  # fmt: skip
"""Operators that only move values."""


@dataclass(frozen=True)
class Projection:
    """Linear layer that makes queries, keys or values.

    Attributes:
        layer: the layer, on (B, N, C).
        rows: (h, d) int64, the row of the layer's weight behind each channel of each head.
    """

    layer: Node
    rows: Tensor


def split_projections(editor: Editor) -> None:
    """Rewrite each attention whose queries, keys and values come from linear layers."""
    for node in editor.calls(aten.scaled_dot_product_attention.default):
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if len(node.args) > 4 or set(node.kwargs) - {"attn_mask", "scale"} or len(shape_of(node)) != 4:
            continue  # dropout, causal or grouped
        if mask is not None and not (isinstance(mask, Node) and mask.meta["val"].is_floating_point()):
            continue
        found = [projection(editor, made) for made in node.args[:3]]
        if all(found):
            _rewrite(editor, node, *cast("list[Any]", found), mask=mask)


def projection(editor: Editor, made: Any) -> Projection | None:
    """Return the layer behind queries, keys or values (B, h, N, d), if only views lie between them and each token keeps its place."""
    node = made
    while is_call(node, *VIEWS):
        node = node.args[0]
    if layer_of(editor, node) is None or len(shape_of(node)) != 3:
        return None
    sizes = _sizes(node)
    codes = torch.arange(sizes.numel()).view(sizes)
    seen = _through(node, codes, made)  # (B, h, N, d)
    row, channel = seen // sizes[-1], seen % sizes[-1]
    if seen.ndim != 4 or (seen.shape[0], seen.shape[2]) != tuple(sizes[:2]):
        return None
    places = torch.arange(sizes[0] * sizes[1]).view(sizes[0], 1, sizes[1], 1)
    if not ((row == places).all() and (channel == channel[:1, :, :1]).all()):
        return None
    return Projection(node, channel[0, :, 0])


def _sizes(node: Node) -> torch.Size:
    """Return the sizes of a node for the example that was traced."""
    return torch.Size(_hint(side) for side in shape_of(node))


def _hint(value: Any) -> int:
    return int(value) if isinstance(value, int) else int(value.node.hint)


def _through(source: Node, value: Tensor, target: Node) -> Any:
    """Return the value of a node behind views, given that of the node before them."""
    known: dict[Node, Any] = {source: value}

    def of(node: Node) -> Any:
        if node not in known:
            tensor = isinstance(node.meta.get("val"), (Tensor, list, tuple))
            known[node] = node.target(*torch.fx.node.map_arg(node.args, of), **node.kwargs) if tensor else _hint(node.meta["val"])  # type: ignore[operator]
        return known[node]

    return of(target)


@dataclass(frozen=True)
class Consumer:
    """The linear layer after the attention.

    Attributes:
        layer: the layer.
        rows: first and last + 1 of the queries that it reads.
    """

    layer: Node
    rows: tuple[int, int]


def _consumer(editor: Editor, node: Node) -> Consumer | None:
    """Return the layer that reads the concatenated heads of a range of the queries, if nothing else does."""
    end = node
    while len(end.users) == 1 and is_call(user := next(iter(end.users)), *VIEWS) and user.args[0] is end:
        end = user
    layer = next(iter(end.users)) if len(end.users) == 1 else None
    if layer_of(editor, layer) is None or layer.args[0] is not end or len(shape_of(end)) != 3:  # type: ignore[union-attr]
        return None
    sizes = _sizes(node)
    seen = _through(node, torch.arange(sizes.numel()).view(sizes), end)
    if seen.shape[0] != sizes[0] or seen.shape[2] != sizes[1] * sizes[3]:
        return None
    whole = torch.arange(sizes.numel()).view(sizes).transpose(1, 2).flatten(2)  # (B, N, h d)
    first = int(seen[0, 0, 0]) // sizes[3] % sizes[2]
    rows = (first, first + seen.shape[1])
    return Consumer(layer, rows) if torch.equal(seen, whole[:, slice(*rows)]) else None  # type: ignore[arg-type]


def _rewrite(editor: Editor, node: Node, q: Projection, k: Projection, v: Projection, *, mask: Node | None) -> None:
    scale = node.kwargs.get("scale")
    factor = float(scale) if scale is not None else q.rows.shape[1] ** -0.5  # type: ignore[arg-type]
    after = _consumer(editor, node)
    queries, rows = shape_of(node)[2], None
    if after is not None and isinstance(queries, int) and after.rows != (0, queries):
        rows = after.rows
    _, value_bias = layer_of(editor, v.layer)  # type: ignore[misc]
    with editor.graph.inserting_before(node):
        query = _projected(editor, q, (0, 2, 1, 3), factor=factor, rows=rows)
        keys = _projected(editor, k, (0, 2, 3, 1), bias=False)
        values = _projected(editor, v, (0, 2, 1, 3), bias=after is None)
        logits = editor.call(aten.matmul.default, query, keys)
        if mask is not None:
            logits = _biased(editor, logits, mask, rows)
        out = editor.call(aten.matmul.default, editor.call(aten.softmax.int, logits, -1), values)
        if after is None:
            node.replace_all_uses_with(out)
            return
        merged = editor.call(aten.permute.default, out, [0, 2, 1, 3])
        merged = editor.call(aten.flatten.using_ints, merged, 2)
    _feed(editor, after.layer, merged, None if value_bias is None else value_bias[v.rows.flatten()])


def _projected(
    editor: Editor, made: Projection, order: tuple[int, ...], *, factor: float = 1.0, bias: bool = True, rows: tuple[int, int] | None = None
) -> Node:
    """Compute queries, keys or values, (B, N, C) -> (B, N, h, d) in another order of the axes."""
    weight, given = layer_of(editor, made.layer)  # type: ignore[misc]
    places = made.rows.flatten()
    x: Any = made.layer.args[0]
    if rows is not None:
        x = editor.call(aten.slice.Tensor, x, 1, *rows)
    new_bias = editor.constant(given[places] * factor) if bias and given is not None else None
    y = editor.call(aten.linear.default, x, editor.constant(weight[places] * factor), new_bias)
    y = editor.call(aten.unflatten.int, y, 2, list(made.rows.shape))
    return editor.call(aten.permute.default, y, list(order))


def _biased(editor: Editor, logits: Node, mask: Node, rows: tuple[int, int] | None) -> Node:
    """Add a bias to logits (B, h, N, M); one that is the same for each image is broadcast."""
    if rows is not None and shape_of(mask)[-2] != 1:
        mask = editor.call(aten.slice.Tensor, mask, len(shape_of(mask)) - 2, *rows)
    each = mask
    while is_call(each, aten.view.default, aten.reshape.default, aten.contiguous.default, aten.clone.default):
        each = each.args[0]  # type: ignore[assignment]
    source = each.args[0] if is_call(each, aten.expand.default) else None
    if shape_of(each)[1:] != shape_of(source) or len(shape_of(source)) != 4 or shape_of(source)[1:] != shape_of(logits)[1:]:
        return editor.call(aten.add.Tensor, logits, mask)
    apart = editor.call(aten.unflatten.int, logits, 0, [-1, shape_of(source)[0]])
    return editor.call(aten.flatten.using_ints, editor.call(aten.add.Tensor, apart, source), 0, 1)


def _feed(editor: Editor, layer: Node, x: Node, value_bias: Tensor | None) -> None:
    """Replace a linear layer's input, and add to its bias what the values' bias contributes."""
    weight, bias = layer_of(editor, layer)  # type: ignore[misc]
    added = list(layer.args[1:])
    if value_bias is not None:
        with editor.graph.inserting_before(layer):
            moved = weight @ value_bias
            added = [layer.args[1], editor.constant(moved if bias is None else bias + moved)]
    layer.args = (x, *added)
