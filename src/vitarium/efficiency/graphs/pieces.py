"""Layers that work on each token alone take the tokens in pieces, so that a wide hidden tensor stays in the cache."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from vitarium.efficiency.graphs.editing import Editor, aten, is_call, layer_of, shape_of
from vitarium.efficiency.graphs.reading import POINTWISE, is_rowwise

PIECE_BYTES, PIECE_BATCH = 2**22, 8
"""Size of a hidden tensor that is computed at once, bytes, and the batch for which it is reckoned. On a core with a second-level cache of
2 MB, pieces of 4.6 MB took 16 % off the time of an MLP (96 channels, 8 x 3136 tokens) in ONNX Runtime, and pieces of 1.2 MB 19 %."""
WEIGHT_BYTES, MOST = 2**20, 16
"""Largest weight of a layer that is computed in pieces, bytes (a runtime keeps a copy for each piece), and most pieces."""


def work_in_pieces(editor: Editor) -> None:
    """Split the tokens of each MLP, with the norm before it and the sums around it, if its hidden tensor is larger than a cache.

    The tokens of a map, (B, H, W, C), are lined up, (B, H W, C): OpenVINO has one kernel for the norm of these, and several for a map's.
    """
    done: set[Node] = set()
    for layer in editor.calls(aten.linear.default):
        inner = _mlp(editor, layer)
        if inner is None or inner & done:
            continue
        region, last = _grown(inner, layer)
        count = _pieces(editor, region)
        if count > 1 or (count and len(shape_of(last)) > 3):
            _split(editor, region, last, count)
            done |= region


def _mlp(editor: Editor, layer: Node) -> set[Node] | None:
    """Return the nodes of an MLP that ends in a linear layer: from the layer that widens its tokens to this one; None if it is none."""
    found, pending = {layer}, [layer.args[0]]
    if layer_of(editor, layer) is None or not is_rowwise(layer):
        return None
    while pending:
        node = pending.pop()
        if node in found:
            continue
        first = layer_of(editor, node)
        if (
            not isinstance(node, Node)
            or not is_rowwise(node)
            or not _aligned(node, layer)
            or len(found) > 8
            or is_call(node, aten.layer_norm.default)
        ):
            return None
        found.add(node)  # type: ignore[arg-type]
        if first is None:
            pending += [a for a in node.args if isinstance(a, Node) and a.op != "get_attr"]  # type: ignore[union-attr]
        elif first[0].shape[0] < 2 * first[0].shape[1]:
            return None
    return found if len(found) > 2 and all(user in found for node in found - {layer} for user in node.users) else None


def _grown(region: set[Node], last: Node) -> tuple[set[Node], Node]:
    """Return the region with the operators on rows around it, and its last node."""
    while len(last.users) == 1 and is_rowwise(user := next(iter(last.users))) and is_call(user, *POINTWISE) and _aligned(user, last):
        region.add(user)
        last = user
    growing = True
    while growing:
        growing = False
        for node in [a for n in region for a in n.all_input_nodes if a not in region]:
            if is_rowwise(node) and _aligned(node, last) and all(user in region for user in node.users):
                region.add(node)
                growing = True
    return region, last


def _aligned(node: Node, other: Node) -> bool:
    """Return whether all operands have the rows of another node, or are parameters that are the same for all rows."""
    if shape_of(node)[:-1] != shape_of(other)[:-1]:
        return False
    for operand in node.all_input_nodes:
        same = operand.op == "get_attr" and (not is_call(node, *POINTWISE) or len(shape_of(operand)) < 2)
        if not same and shape_of(operand)[:-1] != shape_of(other)[:-1]:
            return False
    return True


def _pieces(editor: Editor, region: set[Node]) -> int:
    """Return the number of pieces, 1 if the hidden tensor is small or a layer's weight is large; 0 if the number of tokens varies."""
    layers = [found for node in region if (found := layer_of(editor, node))]
    tokens = shape_of(next(iter(region)))[1:-1]
    if not all(isinstance(side, int) for side in tokens):
        return 0
    if max(w.numel() * w.element_size() for w, _ in layers) > WEIGHT_BYTES:
        return 1
    width = max(w.shape[0] for w, _ in layers)
    return min(MOST, math.ceil(math.prod(tokens) * width * layers[0][0].element_size() * PIECE_BATCH / PIECE_BYTES))


def _split(editor: Editor, region: set[Node], last: Node, count: int) -> None:
    order = [node for node in editor.graph.nodes if node in region]
    outside = list(dict.fromkeys(a for node in order for a in node.all_input_nodes if a not in region))
    tokens = shape_of(last)[1:-1]
    sizes = [len(part) for part in torch.arange(math.prod(tokens)).chunk(count)]
    with editor.graph.inserting_before(last):
        cut: dict[Node, Any] = {}
        for node in outside:
            if node.op != "get_attr":
                flat = node if len(tokens) == 1 else editor.call(aten.flatten.using_ints, node, 1, len(tokens))
                cut[node] = editor.call(aten.split_with_sizes.default, flat, sizes, 1) if count > 1 else [flat]
        parts = []
        for i in range(len(sizes)):
            made = {node: editor.call(operator.getitem, pieces, i) if count > 1 else pieces[i] for node, pieces in cut.items()}
            for node in order:
                args, options = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: made.get(n, n))  # noqa: B023  # called at once
                made[node] = editor.call(node.target, *args, **options)  # type: ignore[arg-type]
            parts.append(made[last])
        whole = editor.call(aten.cat.default, parts, 1) if count > 1 else parts[0]
        if len(tokens) > 1:
            whole = editor.call(aten.unflatten.int, whole, 1, list(tokens))
    last.replace_all_uses_with(whole)
