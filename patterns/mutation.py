"""Which tensors an operation writes to: no residual stream may be followed across such a write."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch.fx import Node

from attnres_compile.patterns.operations import is_call, value_of
from attnres_compile.patterns.placements import local_of

_OPERATORS = frozenset({
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor,
})  # fmt: skip


def written_tensors(node: Node) -> tuple[Node, ...]:
    """The tensor operands that ``node`` writes to in place."""
    if not is_call(node):
        return ()
    target: Any = node.target
    written: list[Any] = []
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema.arguments
        written = [
            node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            for i, argument in enumerate(schema)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    elif target in _OPERATORS or _is_named_in_place(node) or _is_told_in_place(node):
        written = list(node.args[:1])
    if "out" in node.kwargs:
        written.append(node.kwargs["out"])
    return tuple(value for value in written if isinstance(value, Node))


# Named so because the plain names are Python's own.
_KEYWORDS = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})


def _is_named_in_place(node: Node) -> bool:
    if node.target in _KEYWORDS:
        return False
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def _is_told_in_place(node: Node) -> bool:
    """Whether a function such as ``relu(x, inplace=True)`` got its flag, by name or by position."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    position = _position_of_flag(node.target) if node.op == "call_function" else None
    return position is not None and position < len(node.args) and bool(node.args[position])


@functools.cache
def _position_of_flag(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of torch's own C functions none has such a flag
        return None
    return names.index("inplace") if "inplace" in names else None


def memory_of(value: Node) -> Hashable:
    """What two values have in common when they share memory: views, ``.data``, casts to their own dtype.

    Example values are computed by the operations themselves, so that their storages alias as the real ones will.
    """
    example = value_of(value)
    if not isinstance(example, torch.Tensor):
        return value
    try:
        return int(local_of(example).untyped_storage()._cdata)
    except NotImplementedError:  # tensors inside vmap have no storage, and no in-place arithmetic that leaves it
        return value


def is_unwritten(since: Node, until: Node, values: Iterable[Node]) -> bool:
    """Whether nothing between two nodes of a graph writes into the memory of ``values``."""
    memories = {memory_of(value) for value in values}
    node = since.next
    while node is not until:
        if any(memory_of(written) in memories for written in written_tensors(node)):
            return False
        node = node.next
    return True
