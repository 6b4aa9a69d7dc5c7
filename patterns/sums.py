"""Sums in disguise, spelled as adds: ``addcmul``, ``addmm``, ``rsub``, ``lerp``, ``where``, ``index_add``,
``stack(...).sum``; ``x + x`` as a scaling."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node, map_arg

from attnres_compile.patterns.mutation import is_unwritten
from attnres_compile.patterns.operations import argument, is_call, is_float_tensor, name_of, same_shape, value_of
from attnres_compile.patterns.residual import match_sum
from attnres_compile.patterns.slices import whole_of


def spell_sums_as_adds(graph: Graph) -> int:
    """Replace the disguised sums of ``graph`` in place; returns their number."""
    changes = 0
    for node in list(graph.nodes):
        if is_call(node) and is_float_tensor(node) and "out" not in node.kwargs:
            rule = _RULES.get(name_of(node))
            changes += rule is not None and rule(graph, node)
    return changes


def spell_doubles_as_products(graph: Graph) -> int:
    """Replace every ``x + x`` of ``graph``, also those that in-place arithmetic had hidden; returns their number."""
    adds = [node for node in graph.nodes if is_call(node) and name_of(node) == "add" and is_float_tensor(node)]
    return sum(_add(graph, node) for node in adds if "out" not in node.kwargs)


def _addcmul(graph: Graph, node: Node) -> bool:
    """``addcmul(x, a, b, value=v)`` is ``x + v * a * b``, in place if it was."""
    if len(node.args) != 3 or not all(map(is_float_tensor, node.args)):
        return False
    x, a, b = node.args
    product = _insert(graph, node, torch.mul, (a, b))
    _respell(node, x, product, node.kwargs.get("value", 1), in_place=name_of(node).endswith("_"))
    return True


def _addmm(graph: Graph, node: Node) -> bool:
    """``addmm(x, a, b, alpha=v)`` is ``x + v * (a @ b)``; a bias has another shape than the result, or is a parameter."""
    x = node.args[0]
    kind = "batch" if name_of(node) == "baddbmm" else "mat"
    factors = argument(node, 1, f"{kind}1"), argument(node, 2, f"{kind}2")
    if not (isinstance(x, Node) and is_call(x) and same_shape(x, node)) or node.kwargs.get("beta", 1) != 1:
        return False
    product = _insert(graph, node, torch.matmul, factors)
    _respell(node, x, product, node.kwargs.get("alpha", 1))
    return True


def _rsub(graph: Graph, node: Node) -> bool:
    """``rsub(f, x)`` is ``x - f``."""
    subtrahend, x = node.args[0], argument(node, 1, "other")
    if not (is_float_tensor(subtrahend) and is_float_tensor(x)):
        return False
    _respell(node, x, subtrahend, -argument(node, 2, "alpha", 1))
    return True


def _lerp(graph: Graph, node: Node) -> bool:
    """``lerp(x, x + f, w)`` is ``x + w * f`` for a number w, and any other ``lerp(x, f, w)`` is ``(1 - w) * x + w * f``."""
    start, end, weight = node.args[0], argument(node, 1, "end"), argument(node, 2, "weight")
    if not (is_float_tensor(start) and is_float_tensor(end)) or not isinstance(weight, (int, float)):
        return False
    total = match_sum(end)
    if total is not None and not is_unwritten(end, node, (total.left, total.right)):
        return False
    if total is not None and total.left is start and total.left_scale == 1:
        _respell(node, start, total.right, weight * total.right_scale)
    elif total is not None and total.right is start and total.right_scale == 1:
        _respell(node, start, total.left, weight * total.left_scale)
    else:
        _respell(node, _insert(graph, node, torch.mul, (start, 1 - weight)), _insert(graph, node, torch.mul, (end, weight)), 1)
    if not end.users:
        graph.erase_node(end)
    return True


def _where(graph: Graph, node: Node) -> bool:
    """``where(m, x + f, x)`` is ``x + where(m, f, 0)``, and likewise the other way round."""
    places = (1, 0, 2) if node.op == "call_method" else (0, 1, 2)
    condition, chosen, other = (argument(node, i, name) for i, name in zip(places, ("condition", "input", "other"), strict=True))
    for i, (sum_, x) in enumerate(((chosen, other), (other, chosen))):
        total = match_sum(sum_) if is_float_tensor(sum_) and is_float_tensor(x) else None
        if total is None or x not in (total.left, total.right) or total.left_scale != 1 or not same_shape(x, node):
            continue
        if not is_unwritten(sum_, node, (total.left, total.right)):
            continue
        if total.right is x and total.right_scale != 1:
            continue
        branch, scale = (total.right, total.right_scale) if total.left is x else (total.left, 1.0)
        zeros = _insert(graph, node, torch.zeros_like, (branch,))
        kept = _insert(graph, node, torch.where, (condition, branch, zeros) if i == 0 else (condition, zeros, branch))
        _respell(node, x, kept, scale)
        if not sum_.users:
            graph.erase_node(sum_)
        return True
    return False


def _index_add(graph: Graph, node: Node) -> bool:
    """``index_add(x, d, i, f)`` and ``scatter_add(x, d, i, f)`` are ``x`` plus the same of zeros."""
    x = node.args[0]
    if not (isinstance(x, Node) and is_float_tensor(x)) or len(node.args) != 4 or _begins_at_zero(x):
        return False
    zeros = _insert(graph, node, torch.zeros_like, (x,))
    function = torch.index_add if name_of(node) == "index_add" else torch.scatter_add
    branch = _insert(graph, node, function, (zeros, *node.args[1:]))
    _respell(node, x, branch, node.kwargs.get("alpha", 1))
    return True


def _begins_at_zero(x: Node) -> bool:
    """Whether ``x`` is a buffer into which experts add what they give, token by token."""
    while name_of(x) in ("index_add", "scatter_add", "add") and isinstance(x.args[0], Node):
        x = x.args[0]
    return name_of(x) in ("zeros", "zeros_like", "new_zeros")


def _cat(graph: Graph, node: Node) -> bool:
    """``cat`` of all consecutive slices of ``x`` is ``x``; with ``f`` added to the second, ``x + cat([0, f])``."""
    parts: Any = node.args[0]
    dim = argument(node, 1, "dim", 0)
    found = whole_of(parts, dim, node) if isinstance(parts, (list, tuple)) and isinstance(dim, int) else None
    if found is None or not same_shape(found[0], node):
        return False
    whole, slices = found
    values = (whole, *(branch for _, branch in slices if branch is not None))
    if not all(is_unwritten(part, node, values) for part in parts):
        return False
    if all(branch is None for _, branch in slices):
        node.op, node.target, node.args, node.kwargs = "call_function", torch.clone, (whole,), {}
        return True
    branches = [_insert(graph, node, torch.zeros_like, (part,)) if branch is None else branch for part, branch in slices]
    joined = _insert(graph, node, torch.cat, (branches, dim))
    _respell(node, whole, joined, 1)
    for part in parts:
        if not part.users:
            graph.erase_node(part)
    return True


def _add(graph: Graph, node: Node) -> bool:
    """``x + x`` is ``2 * x``, a scaling and no residual add."""
    total = match_sum(node)
    if total is None or total.left is not total.right:
        return False
    node.op, node.target = "call_function", torch.mul
    node.args, node.kwargs = (total.left, total.left_scale + total.right_scale), {}
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


def _insert(graph: Graph, node: Node, function: Any, arguments: tuple[Any, ...]) -> Node:
    """A new operation before ``node``, made by the same line of the model."""
    with graph.inserting_before(node):
        made = graph.call_function(function, arguments)
    made.meta = {**node.meta, "example_value": function(*map_arg(arguments, value_of))}
    return made


_RULES = {
    "addcmul": _addcmul, "addcmul_": _addcmul, "addmm": _addmm, "baddbmm": _addmm, "rsub": _rsub, "lerp": _lerp,
    "sum": _sum_of_stack, "add": _add, "where": _where, "index_add": _index_add, "scatter_add": _index_add, "cat": _cat,
}  # fmt: skip
