"""Rows that are not used are not computed."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from vitarium.efficiency.graphs.editing import Editor, aten, is_call, shape_of

Range = tuple[int, int]
POINTWISE = {aten.gelu.default, aten.relu.default, aten.silu.default, aten.sigmoid.default, aten.add.Tensor, aten.mul.Tensor}
ROWWISE = POINTWISE | {aten.layer_norm.default, aten.linear.default}
"""Operators whose row depends on the same row of their inputs; see `is_rowwise`."""


def is_rowwise(node: Any) -> bool:
    """Return whether each row (the last axis) of a node's output depends on that row of its inputs, and on constants."""
    if not is_call(node, *ROWWISE) or len(shape_of(node)) < 3:
        return False
    return node.target is not aten.layer_norm.default or len(node.args[1]) == 1


def read_less(editor: Editor) -> None:
    """Move each slice of rows (axis 1) towards the input, past operators all of whose readers take the same rows."""
    pending = True
    while pending:
        pending = False
        for node in reversed(list(editor.graph.nodes)):
            rows = rows_read(node)
            if rows is None:
                continue
            with editor.graph.inserting_before(node):
                less = _narrowed(editor, node, rows)
            if less is None:
                continue
            for user in list(node.users):
                if is_call(user, aten.select.int):
                    user.args = (less, 1, 0)
                else:
                    user.replace_all_uses_with(less)
            pending = True
        editor.clean()


def rows_read(node: Node) -> Range | None:
    """Return the rows of axis 1 that all readers of a node take, or None if they differ, or take all."""
    shape = shape_of(node)
    if len(shape) < 3 or not isinstance(shape[1], int) or not node.users:
        return None
    found = {_range(user, shape[1]) for user in node.users if user.args[0] is node}
    if len(found) != 1 or any(user.args[0] is not node for user in node.users):
        return None
    (rows,) = found
    return rows if rows is not None and rows != (0, shape[1]) else None


def _range(node: Node, length: int) -> Range | None:
    if is_call(node, aten.select.int) and node.args[1] == 1 and isinstance(node.args[2], int):
        index = int(node.args[2]) % length
        return index, index + 1
    if is_call(node, aten.slice.Tensor) and len(node.args) == 4 and node.args[1] == 1 and all(isinstance(a, int) for a in node.args[2:]):
        first, last, _ = slice(*node.args[2:4]).indices(length)  # type: ignore[misc]
        return first, last
    return None


def _narrowed(editor: Editor, node: Node, rows: Range) -> Node | None:
    """Compute only some rows of a node, from rows of its inputs; None if the operator is not known."""
    length = shape_of(node)[1]

    def cut(value: Any) -> Any:
        shape = shape_of(value)
        if len(shape) < len(shape_of(node)) or shape[1] != length:
            return value  # a scalar, a constant of each channel, or one row for all
        return editor.call(aten.slice.Tensor, value, 1, *rows)

    if is_rowwise(node):
        if is_call(node, *POINTWISE) and any(len(shape_of(a)) == len(shape_of(node)) - 1 for a in node.all_input_nodes):
            return None  # an operand whose first axis is the rows
        return editor.call(node.target, *[cut(a) for a in node.args], **node.kwargs)  # type: ignore[arg-type]
    if is_call(node, aten.cat.default):
        return _part(editor, node, rows, cut)
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.split_with_sizes.default) and node.args[0].args[2:] == (-1,):  # type: ignore[union-attr]
        source, sizes = node.args[0].args[:2]  # type: ignore[union-attr]
        start = sum(sizes[: node.args[1]])  # type: ignore[misc,index,arg-type]
        return editor.call(aten.slice.Tensor, cut(source), len(shape_of(node)) - 1, start, start + shape_of(node)[-1])
    return None


def _part(editor: Editor, node: Node, rows: Range, cut: Any) -> Node | None:
    """Compute rows of a concatenation: of the part that holds them, or of each part if other axes are joined."""
    axis = (node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node))  # type: ignore[operator]
    if axis > 1:
        return editor.call(aten.cat.default, [cut(part) for part in node.args[0]], axis)  # type: ignore[union-attr]
    start = 0
    for part in node.args[0] if axis == 1 else ():  # type: ignore[union-attr]
        length = shape_of(part)[1]
        if not isinstance(length, int):
            return None
        if start <= rows[0] and rows[1] <= start + length:
            return editor.call(aten.slice.Tensor, part, 1, rows[0] - start, rows[1] - start)
        start += length
    return None
