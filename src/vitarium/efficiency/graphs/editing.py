"""Reading and editing of a traced graph (torch.fx), with the shapes of new nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
CHECKS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default}
"""Checks of the tracer; they hold for every input of the graph, whose sizes are fixed or symbols."""


class Editor:
    """Editor of a graph module.

    Args:
        module: unlifted graph, in which parameters and buffers are attributes; changed in place.
    """

    def __init__(self, module: GraphModule):
        self.module, self.graph, self.added = module, module.graph, 0
        values = (node.meta.get("val") for node in self.graph.nodes if node.op == "placeholder")
        self.mode = next(value.fake_mode for value in values if isinstance(value, Tensor))

    def calls(self, *targets: Any) -> list[Node]:
        """Return the calls of operators, in order."""
        return [node for node in self.graph.nodes if is_call(node, *targets)]

    def call(self, target: Callable[..., Any], *args: Any, **options: Any) -> Node:
        """Add a call at the insertion point."""
        node = self.graph.call_function(target, args, options)
        given, named = map_arg((args, options), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*given, **named)
        return node

    def constant(self, value: Tensor) -> Node:
        """Add a buffer and, at the insertion point, a node that reads it."""
        name = f"folded_{self.added}"
        self.added += 1
        self.module.register_buffer(name, value.detach().contiguous())
        node = self.graph.get_attr(name)
        node.meta["val"] = self.mode.from_tensor(getattr(self.module, name))
        return node

    def value(self, node: Any) -> Tensor | None:
        """Return the parameter or buffer that a node reads, or None."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        found: Any = self.module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found.detach() if isinstance(found, Tensor) else None

    def clean(self) -> None:
        """Remove what has no effect: checks, dropout in evaluation mode, slices of everything, and unused nodes."""
        for node in list(self.graph.nodes):
            if (node.op == "call_module" and node.target == "_guards_fn") or is_call(node, *CHECKS):
                self.graph.erase_node(node)
            elif is_idle(node):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        self.graph.eliminate_dead_code(has_effect)


def is_call(node: Any, *targets: Any) -> bool:
    """Return whether a value is a call of one of these operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def has_effect(node: Node) -> bool:
    """Return whether a node matters although its result is not used. Dropout and attention count as random elsewhere, and would be kept."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output", "call_module") or (schema is not None and schema.is_mutable)


def is_idle(node: Node) -> bool:
    """Return whether a node returns its first argument."""
    if is_call(node, aten.dropout.default):
        return not node.args[2]
    return is_call(node, aten.slice.Tensor) and shape_of(node) == shape_of(node.args[0])


def shape_of(node: Any) -> tuple[Any, ...]:
    """Return the shape of a node's tensor, with symbols in place of sizes that vary; () if it has none."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def layer_of(editor: Editor, node: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a linear layer whose parameters are constant, or None."""
    if not is_call(node, aten.linear.default):
        return None
    weight = editor.value(node.args[1])
    given = node.args[2] if len(node.args) > 2 else None
    bias = editor.value(given)
    return None if weight is None or (given is not None and bias is None) else (weight, bias)
