"""Sums in disguise, spelled as adds: ``addcmul``, ``lerp`` back onto its start, ``stack(...).sum``."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from attnres_compile.patterns.operations import argument, is_call, is_float_tensor, name_of, value_of
from attnres_compile.patterns.residual import match_sum


def spell_sums_as_adds(graph: Graph) -> int:
    """Replace the disguised sums of ``graph`` in place; returns their number."""
    changes = 0
    for node in list(graph.nodes):
        if is_call(node) and is_float_tensor(node):
            rule = _RULES.get(name_of(node))
            changes += rule is not None and rule(graph, node)
    return changes


def _addcmul(graph: Graph, node: Node) -> bool:
    """``addcmul(x, a, b, value=v)`` is ``x + v * a * b``, in place if it was."""
    if len(node.args) != 3 or not all(map(is_float_tensor, node.args)):
        return False
    x, a, b = node.args
    product = _insert(graph, node, torch.mul, (a, b))
    _respell(node, x, product, node.kwargs.get("value", 1), in_place=name_of(node).endswith("_"))
    return True


def _lerp(graph: Graph, node: Node) -> bool:
    """``lerp(x, x + f, w)`` is ``x + w * f`` for a number w."""
    start, end, weight = node.args[0], argument(node, 1, "end"), argument(node, 2, "weight")
    total = match_sum(end) if isinstance(end, Node) else None
    if total is None or not isinstance(weight, (int, float)):
        return False
    if total.left is start and total.left_scale == 1:
        branch, scale = total.right, total.right_scale
    elif total.right is start and total.right_scale == 1:
        branch, scale = total.left, total.left_scale
    else:
        return False
    _respell(node, start, branch, weight * scale)
    if not end.users:
        graph.erase_node(end)
    return True


def _sum_of_stack(graph: Graph, node: Node) -> bool:
    """``stack([a, b, ...], d).sum(d)`` is ``a + b + ...``."""
    stack = node.args[0]
    if not isinstance(stack, Node) or name_of(stack) != "stack" or len(stack.users) != 1:
        return False
    terms: Any = stack.args[0]
    dims = argument(node, 1, "dim")
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    rank = value_of(stack).dim()
    if not all(isinstance(dim, int) for dim in dims) or [dim % rank for dim in dims] != [argument(stack, 1, "dim", 0) % rank]:
        return False
    if len(node.args) > 2 or set(node.kwargs) - {"dim"} or len(terms) < 2 or not all(map(is_float_tensor, terms)):
        return False
    total = terms[0]
    for term in terms[1:-1]:
        total = _insert(graph, node, torch.add, (total, term))
    _respell(node, total, terms[-1], 1)
    graph.erase_node(stack)
    return True


def _respell(node: Node, left: Any, right: Any, alpha: Any, in_place: bool = False) -> None:
    node.op, node.target = ("call_method", "add_") if in_place else ("call_function", torch.add)
    node.args, node.kwargs = (left, right), {} if alpha == 1 else {"alpha": alpha}


def _insert(graph: Graph, node: Node, function: Any, arguments: tuple[Any, Any]) -> Node:
    """A new operation before ``node``, made by the same line of the model."""
    with graph.inserting_before(node):
        made = graph.call_function(function, arguments)
    made.meta = {**node.meta, "example_value": function(*map(value_of, arguments))}
    return made


_RULES = {"addcmul": _addcmul, "addcmul_": _addcmul, "lerp": _lerp, "sum": _sum_of_stack}
