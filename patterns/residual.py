"""Forms of the residual add, and the operations that a residual stream passes through unchanged in meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from attnres_compile.patterns.operations import (
    CASTS,
    MOVES,
    PERMUTES,
    RESHAPES,
    SLICES,
    argument,
    constant,
    dtype_of,
    is_call,
    is_float_tensor,
    is_idle_dropout,
    name_of,
    same_shape,
    shape_of,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sum:
    """``left_scale * left + right_scale * right``, float tensors of which at least one has the sum's own shape."""

    left: Node
    right: Node
    left_scale: float = 1.0
    right_scale: float = 1.0


def match_sum(node: Node) -> Sum | None:
    """``node`` as a sum of two float tensors: operator, function or method, either operand order, with ``alpha``."""
    if not is_call(node) or "out" in node.kwargs or not is_float_tensor(node):
        return None
    name = name_of(node)
    if name not in ("add", "sub"):
        return None
    left, right = node.args[0], argument(node, 1, "other")
    alpha = argument(node, 2, "alpha", 1)
    if not (is_float_tensor(left) and is_float_tensor(right) and isinstance(alpha, (int, float))):
        return None
    shape = shape_of(node)
    if shape is None or len(shape) < 2 or not (same_shape(left, node) or same_shape(right, node)):
        return None
    return Sum(left, right, 1.0, -float(alpha) if name == "sub" else float(alpha))


def is_equal_shape_sum(node: Node, total: Sum) -> bool:
    """Broadcast sums are never residual adds: they are ``x - mean``, position embeddings and conditioning."""
    return _is_not_broadcast(total.left, node) and _is_not_broadcast(total.right, node)


def _is_not_broadcast(operand: Node, node: Node) -> bool:
    """Whether ``operand`` of the sum ``node`` has the sum's shape, though another expression may spell a symbolic size.

    An operand's size is one or the sum's, and the sum itself made torch guard on which: a size that is not one in the
    example is the sum's.
    """
    sizes, expected = shape_of(operand), shape_of(node)
    if sizes is None or expected is None or len(sizes) != len(expected):
        return False
    return all(str(x) == str(y) or constant(x) not in (None, 1.0) for x, y in zip(sizes, expected, strict=True))


def transparent_source(node: Node, depends_on_stream: Callable[[Node, Node], bool]) -> Node | None:
    """The one tensor that ``node`` passes through, if ``node`` is linear in it and acts on each feature vector alone.

    Transparent are casts, relayouts, slices, moves between ranks, idle dropout, and scaling or masking by a factor that has
    nothing to do with the stream (``depends_on_stream(factor, value)`` is False).
    """
    if not is_call(node) or "out" in node.kwargs or not is_float_tensor(node) or not node.args:
        return None
    first = node.args[0]
    name = name_of(node)
    if name in CASTS or name in RESHAPES or name in PERMUTES or name in MOVES or is_idle_dropout(node):
        return first if is_float_tensor(first) else None
    if name == "add" and 0 in node.args[:2]:  # how Python's sum() begins
        return next((value for value in node.args[:2] if is_float_tensor(value)), None)
    if name in SLICES and is_float_tensor(first) and _is_basic_index(node):
        return first
    if name in ("mul", "div") and node.kwargs.get("rounding_mode") is None:
        second = argument(node, 1, "other")
        if is_float_tensor(first) and _is_scaled_by(node, first, second, depends_on_stream):
            return first
        if name == "mul" and is_float_tensor(second) and _is_scaled_by(node, second, first, depends_on_stream):
            return second
    if name == "masked_fill" and argument(node, 2, "value") == 0 and is_float_tensor(first):
        return first if _is_scaled_by(node, first, argument(node, 1, "mask"), depends_on_stream) else None
    return None


def keeps_elements(node: Node, source: Node) -> bool:
    """Whether the transparent ``node`` leaves dtype and order of the elements alone, so that only the shape may differ."""
    if is_idle_dropout(node) or name_of(node) == "add":
        return dtype_of(node) == dtype_of(source)
    return (name_of(node) in RESHAPES or name_of(node) in CASTS) and dtype_of(node) == dtype_of(source)


def _is_basic_index(node: Node) -> bool:
    if name_of(node) != "getitem" or (node.op == "call_function" and "aten" in str(node.target)):
        return True
    index = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, (slice, int)) for part in parts)


def _is_scaled_by(node: Node, value: Node, factor: Any, depends_on_stream: Callable[[Node, Node], bool]) -> bool:
    return same_shape(value, node) and (not isinstance(factor, Node) or not depends_on_stream(factor, value))
