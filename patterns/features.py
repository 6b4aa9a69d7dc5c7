"""Which dimension a norm normalises. Depth attention scores feature vectors, so it must be the stream's last dimension."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch.fx import Node

from attnres_compile.patterns.operations import PERMUTES, argument, is_float_tensor, name_of, shape_of

_REDUCTIONS = frozenset({
    "mean", "nanmean", "sum", "var", "std", "var_mean", "std_mean", "vector_norm", "amax", "amin", "max", "min", "normalize",
    "vecdot", "linalg_vecdot", "einsum",
})  # fmt: skip
_OVER_LENGTH = frozenset({"adaptive_avg_pool1d", "avg_pool1d"})
_POOLS = frozenset({"mean", "sum", "amax", "max"}) | _OVER_LENGTH
_DIMENSION_POSITION = {"vector_norm": 2, "normalize": 2, "vecdot": 2, "linalg_vecdot": 2}
_DEFAULT_DIMENSION = {"normalize": 1, "vecdot": -1, "linalg_vecdot": -1}
# Channels (in groups) together with space, which then must not be where the features are; or space alone.
_OVER_SPACE = frozenset({"instance_norm"})
_OVER_CHANNELS = frozenset({"group_norm", "native_group_norm"})
_OVER_LAST = frozenset({"layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"})
Images = Mapping[Node, Node | None]


def reductions_elsewhere(edges: Collection[tuple[Node, Node]], images: Images, component: Collection[Node]) -> tuple[Node, ...]:
    """The operations of a reading ``component`` that normalise something else than the stream's feature vectors.

    ``edges`` are the component's reads of the stream's ``images``, each of which maps to the image that it was made from.
    """
    features = {_feature_dimension(value, images) for value, _ in edges}
    # A value divided by the size of a part of it is normalised by the features of others.
    sizes = {str(math.prod(shape_of(value) or ())) for value, _ in edges}  # as text, since symbolic sizes have no hash
    if len(features) != 1 or None in features or len(sizes) != 1:
        return tuple(user for _, user in edges)
    feature = features.pop()
    assert feature is not None
    sources = {node: source for node in component if is_float_tensor(source := _first_operand(node))}
    places = dict.fromkeys((len(shape_of(value) or ()) for value, _ in edges), feature)  # where the features are, by rank
    pools = {node for node, source in sources.items() if source in images and _pools(node, component, images)}
    found = []
    for node in pools:
        rank = len(shape_of(sources[node]) or ())
        pooled = _reduced(node, rank)
        if not pooled or feature in pooled:
            found.append(node)
        elif len(shape_of(node) or ()) == rank - len(pooled):
            places.setdefault(rank - len(pooled), feature + sum(dim > feature for dim in pooled))
    for node in sources.keys() - pools:
        name, rank = name_of(node), len(shape_of(sources[node]) or ())
        place = places.get(rank, feature)
        if (
            (name in _OVER_CHANNELS and place % rank != 1)
            or (name in _OVER_SPACE and place % rank < 2)
            or (name in _OVER_LAST and (place != -1 or _normalises_several(node)))
            or (name in _REDUCTIONS and rank in places and place not in _reduced(node, rank))
        ):
            found.append(node)
    return tuple(found)


def _first_operand(node: Node) -> Any:
    """What ``node`` works on; an equation leads the operands of an einsum."""
    return next(iter(node.all_input_nodes), None) if name_of(node) == "einsum" else node.args[0] if node.args else None


def _normalises_several(node: Node) -> bool:
    """Whether a fused norm goes over more dimensions than the last."""
    shape = argument(node, 1, "normalized_shape")
    return isinstance(shape, (tuple, list)) and len(shape) > 1


def _pools(node: Node, component: Collection[Node], images: Images) -> bool:
    """Whether ``node`` averages feature vectors, whose average is then normalised: nothing of it meets what it was made from."""
    if name_of(node) not in _POOLS:
        return False
    behind = {node}
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user in component and user not in behind:
                behind.add(user)
                pending.append(user)
    sources = {source for user in behind - {node} for source in user.all_input_nodes}
    return len(behind) > 1 and not any(source in component or source in images for source in sources - behind)


def _reduced(node: Node, rank: int) -> set[int]:
    """The dimensions that ``node`` reduces, counted from the end."""
    if name_of(node) == "einsum":
        return _summed(str(node.args[0]), rank)
    if name_of(node) in _OVER_LENGTH:
        return {-1}
    default = _DEFAULT_DIMENSION.get(name_of(node))
    dims = argument(node, _DIMENSION_POSITION.get(name_of(node), 1), "dim", node.kwargs.get("axis", default))
    if dims is None or isinstance(dims, bool):  # all of them; var(x, unbiased) has its flag where others have dim
        return set(range(-rank, 0)) if rank == 1 else set()
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return {dim % rank - rank for dim in listed if isinstance(dim, int)}


def _summed(equation: str, rank: int) -> set[int]:
    """The dimensions of the first operand that an einsum sums over, counted from the end."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    before, dots, behind = inputs.split(",")[0].partition("...")
    if not dots:
        before, behind = "", before
    named = {i - rank: label for i, label in enumerate(before)} | {i - len(behind): label for i, label in enumerate(behind)}
    return {dim for dim, label in named.items() if label not in output}


def _feature_dimension(value: Node, images: Images) -> int | None:
    """Where the stream's last dimension stands in ``value``, counted from the end; None if that can't be told."""
    source = images[value]
    if source is None:
        return -1
    position = _feature_dimension(source, images)
    if position is None:
        return None
    if name_of(value) in PERMUTES:
        return _moved(value, position)
    keeps_rank = len(shape_of(value) or ()) == len(shape_of(source) or ())
    return position if position == -1 or keeps_rank else None


def _moved(node: Node, position: int) -> int | None:
    """Where a transposition or permutation takes the dimension at ``position``."""
    rank, name = len(shape_of(node) or ()), name_of(node)
    arguments = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    dims = [dim % rank - rank for dim in arguments if isinstance(dim, int)] if name != "t" else [-1, -2]
    if name in ("transpose", "swapaxes", "swapdims", "t") and len(dims) == 2:
        return dims[1 - dims.index(position)] if position in dims else position
    if name == "permute" and len(dims) == rank:
        return dims.index(position) - rank
    return None
