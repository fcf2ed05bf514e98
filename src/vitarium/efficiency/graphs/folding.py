"""Batch norms inside convolutions, factors per channel inside linear layers, and resizing as a product with constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from vitarium.efficiency.graphs.editing import Editor, aten, is_call, layer_of, shape_of


def fold_norms(editor: Editor) -> None:
    """Fold each batch norm with fixed statistics into the convolution before it, or into those after it, if these have no padding."""
    for node in editor.calls(aten.batch_norm.default):
        affine = _affine(editor, node)
        if affine is None:
            continue
        scale, shift = affine
        before: Any = node.args[0]
        kernel = _kernel(editor, before)
        if kernel is not None and len(before.users) == 1 and kernel[0].shape[0] == len(scale):
            weight, bias = kernel
            _set(editor, before, weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift if bias is None else shift + scale * bias)
            node.replace_all_uses_with(before)
        elif all(_kernel(editor, user) is not None and _unpadded(user) for user in node.users):
            for user in list(node.users):
                weight, bias = _kernel(editor, user)  # type: ignore[misc]
                moved = torch.einsum("oihw,i->o", weight, shift)
                _set(editor, user, weight * scale[:, None, None], moved if bias is None else moved + bias)
            node.replace_all_uses_with(before)


def _affine(editor: Editor, node: Node) -> tuple[Tensor, Tensor] | None:
    """Return the factor and the summand of a batch norm with fixed statistics, (C,) each, or None."""
    weight, bias, mean, var = (editor.value(a) for a in node.args[1:5])
    if mean is None or var is None or node.args[5]:
        return None
    scale = (var + float(node.args[7])).rsqrt()  # type: ignore[arg-type]
    scale = scale if weight is None else weight * scale
    return scale, -mean * scale if bias is None else bias - mean * scale


def _kernel(editor: Editor, node: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a convolution of maps whose parameters are constant, or None."""
    if not is_call(node, aten.conv2d.default):
        return None
    weight, given = editor.value(node.args[1]), node.args[2] if len(node.args) > 2 else None
    bias = editor.value(given)
    return None if weight is None or (given is not None and bias is None) else (weight, bias)


def _unpadded(conv: Node) -> bool:
    """Return whether a convolution has neither padding, whose zeros a norm before it does not shift, nor groups."""
    padding: Any = conv.args[4] if len(conv.args) > 4 else [0]
    return not any(padding) and (len(conv.args) < 7 or bool(conv.args[6] == 1))


def _set(editor: Editor, conv: Node, weight: Tensor, bias: Tensor) -> None:
    with editor.graph.inserting_before(conv):
        conv.args = (conv.args[0], editor.constant(weight), editor.constant(bias), *conv.args[3:])


def fold_scales(editor: Editor) -> None:
    """Fold a factor per output channel into the linear layer before it: gamma (W x + b) = (gamma W) x + gamma b."""
    for node in editor.calls(aten.mul.Tensor):
        for layer, factor in (node.args, node.args[::-1]):
            gamma, parameters = editor.value(factor), layer_of(editor, layer)
            if gamma is None or parameters is None or len(layer.users) > 1 or gamma.shape != parameters[0].shape[:1]:  # type: ignore[union-attr]
                continue
            weight, bias = parameters
            with editor.graph.inserting_before(layer):  # type: ignore[arg-type]
                folded = [editor.constant(weight * gamma[:, None]), None if bias is None else editor.constant(bias * gamma)]
            layer.args = (layer.args[0], *folded)  # type: ignore[union-attr]
            node.replace_all_uses_with(layer)  # type: ignore[arg-type]
            break


def resize_by_products(editor: Editor) -> None:
    """Compute bicubic resizing between fixed sizes by two constant matrices: (B, C, H, W) -> (B, C, H', W')."""
    for node in editor.calls(aten.upsample_bicubic2d.vec):
        sizes = list(zip(shape_of(node.args[0])[2:], shape_of(node)[2:], strict=True))
        if not all(isinstance(side, int) for pair in sizes for side in pair) or any(node.args[3:4]):
            continue
        rows, columns = (resizing_matrix(old, new, bool(node.args[2])) for old, new in sizes)
        with editor.graph.inserting_before(node):
            wide = editor.call(aten.matmul.default, node.args[0], editor.constant(columns.t()))
            node.replace_all_uses_with(editor.call(aten.matmul.default, editor.constant(rows), wide))


def resizing_matrix(old: int, new: int, align_corners: bool) -> Tensor:
    """Return the matrix (new, old) of bicubic resizing along one axis."""
    each = torch.eye(old).view(1, old, old, 1)
    return F.interpolate(each, (new, 1), mode="bicubic", align_corners=align_corners)[0, :, :, 0].t()
