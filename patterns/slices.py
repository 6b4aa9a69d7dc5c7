"""Slices of one tensor that lie side by side: what ``cat`` of them gives back, also where something was added to some."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from attnres_compile.patterns.operations import argument, is_float_tensor, name_of, same_shape, shape_of, value_of
from attnres_compile.patterns.residual import is_equal_shape_sum, match_sum

# Sizes and bounds may be symbolic, and are compared as text: symbols have no hash, and comparing them would add guards.
_SPLITS = frozenset({"split", "chunk", "split_with_sizes", "tensor_split"})


def whole_of(parts: Sequence[Any], dim: int, joined: Node) -> tuple[Node, list[tuple[Node, Node | None]]] | None:
    """The tensor of which ``parts`` are all consecutive slices along ``dim``, up to a branch that was added to a slice.

    Returns:
        The tensor, and of every part its plain slice and the branch, or None for the branch if there is none.
    """
    rank = len(shape_of(joined) or ())
    if len(parts) < 2 or not rank:
        return None
    options = [_readings(part, dim % rank, rank) for part in parts]
    for whole in {found.source: None for found in options[0]}:
        if not same_shape(whole, joined):
            continue
        chosen = [next((found for found in option if found.source is whole), None) for option in options]
        position = "0"
        for found in chosen:
            position = found.stop if found is not None and found.start == position else ""
        if position == str((shape_of(whole) or ())[dim % rank]):
            return whole, [(found.part, found.branch) for found in chosen if found is not None]
    return None


@dataclasses.dataclass(frozen=True)
class _Slice:
    """``part`` is ``source`` from ``start`` to ``stop``; ``branch`` was added to it."""

    source: Node
    start: str
    stop: str
    part: Node
    branch: Node | None = None


def _readings(part: Any, dim: int, rank: int) -> list[_Slice]:
    """``part`` as a slice, or as a slice plus a branch, which may be read in two ways."""
    plain = _slice(part, dim, rank)
    if plain is not None:
        return [_Slice(*plain, part)]
    total = match_sum(part) if isinstance(part, Node) else None
    if total is None or total.left_scale != 1 or total.right_scale != 1 or not is_equal_shape_sum(part, total):
        return []
    pairs = ((total.left, total.right), (total.right, total.left))
    return [_Slice(*found, operand, branch) for operand, branch in pairs if (found := _slice(operand, dim, rank))]


def _slice(part: Any, dim: int, rank: int) -> tuple[Node, str, str] | None:
    """(tensor, start, stop) of a plain slice along ``dim``."""
    if not is_float_tensor(part) or not part.args or not isinstance(part.args[0], Node):
        return None
    source, name = part.args[0], name_of(part)
    if name == "unsqueeze" and is_float_tensor(source) and argument(part, 1, "dim") in (dim, dim - rank):
        return _selected(source, dim)
    if name == "getitem" and name_of(source) in _SPLITS:
        return _part_of_split(source, part.args[1], dim, rank)
    if name not in ("getitem", "narrow") or not is_float_tensor(source):
        return None
    bounds = _narrowed(part, dim, rank) if name == "narrow" else _indexed(part, dim, rank)
    return None if bounds is None else _bounded(source, bounds, dim)


def _bounded(source: Node, bounds: slice, dim: int) -> tuple[Node, str, str] | None:
    """(tensor, start, stop) as text, of numbers where all are known."""
    shape = shape_of(source) or ()
    if dim >= len(shape):
        return None
    start, stop, size = value_of(bounds.start), value_of(bounds.stop), shape[dim]
    if not all(bound is None or isinstance(bound, (int, torch.SymInt)) for bound in (start, stop)):
        return None
    if all(bound is None or isinstance(bound, int) for bound in (start, stop, size)):
        start, stop, _ = slice(start, stop).indices(size)
    return source, str(0 if start is None else start), str(size if stop is None else stop)


def _selected(part: Node, dim: int) -> tuple[Node, str, str] | None:
    """(tensor, i, i + 1) of ``x[:, i, :]``, which an ``unsqueeze`` makes a slice again."""
    source = part.args[0] if part.args else None
    if not is_float_tensor(source):
        return None
    if name_of(part) == "select":
        index = argument(part, 2, "index") if argument(part, 1, "dim") == dim else None
    else:
        index = _index_at(part, dim) if name_of(part) == "getitem" else None
    return _bounded(source, slice(index, None if index == -1 else index + 1), dim) if isinstance(index, int) else None


def _narrowed(part: Node, dim: int, rank: int) -> slice | None:
    along, start, length = (argument(part, i, name) for i, name in enumerate(("dim", "start", "length"), start=1))
    start, length = value_of(start), value_of(length)
    if not isinstance(along, int) or along % rank != dim or not all(isinstance(n, (int, torch.SymInt)) for n in (start, length)):
        return None
    return slice(start, start + length)


def _indexed(part: Node, dim: int, rank: int) -> slice | None:
    if len(part.args) != 2:  # aten.slice(x, dim, start, end, step)
        along, start, stop, step = (argument(part, i, n) for i, n in enumerate(("dim", "start", "end", "step"), start=1))
        index: Any = slice(start, stop, step) if along in (dim, dim - rank) else None
    else:
        index = _index_at(part, dim)
    return index if isinstance(index, slice) and index.step in (None, 1) else None


def _index_at(part: Node, dim: int) -> Any:
    """What ``part`` selects along ``dim``, if it takes all the rest; None otherwise."""
    indices: Any = part.args[1] if isinstance(part.args[1], tuple) else (part.args[1],)
    if Ellipsis in indices or len(indices) <= dim:
        return None
    return indices[dim] if all(other == slice(None) for i, other in enumerate(indices) if i != dim) else None


def _part_of_split(split: Node, index: Any, dim: int, rank: int) -> tuple[Node, str, str] | None:
    """One result of a split, by the shapes of the example value."""
    source, along, pieces = split.args[0], argument(split, 2, "dim", 0), value_of(split)
    if not is_float_tensor(source) or not isinstance(along, int) or along % rank != dim or not isinstance(index, int):
        return None
    sizes: list[Any] = [piece.shape[dim] for piece in pieces] if isinstance(pieces, (list, tuple)) else []
    if not -len(sizes) <= index < len(sizes):
        return None
    start = sum(sizes[: index % len(sizes)])
    return source, str(start), str(start + sizes[index % len(sizes)])
