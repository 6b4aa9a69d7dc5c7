"""What a value normalises: used to say that a branch, or a root, ends in a norm."""

from __future__ import annotations

from torch.fx import Node

from attnres_compile.patterns.degrees import FUSED_NORMS, KEEPS, ONE, Degree, degree_of
from attnres_compile.patterns.operations import is_call, is_float_tensor, name_of, reads_only_metadata, same_shape

# A norm with its affine part takes at most a dozen operations in any spelling.
_REACH = 24
_POINTWISE = KEEPS | frozenset(FUSED_NORMS) | frozenset({
    "mul", "add", "sub", "div", "pow", "square", "sqrt", "rsqrt", "reciprocal", "clamp", "clamp_min", "var", "var_mean",
    "std_mean", "einsum", "vecdot", "linalg_vecdot",
})  # fmt: skip


def normalised_input(node: Node, position: dict[Node, int]) -> Node | None:
    """The tensor of which ``node`` is the norm, affine part included, or None where ``node`` is no norm's output.

    ``position`` numbers the nodes of the graph in order.
    """
    if not is_float_tensor(node):
        return None
    cone: set[Node] = set()
    candidates: set[Node] = set()
    pending = [node]
    while pending and len(cone) < _REACH:
        current = pending.pop(0)
        if current in cone:
            continue
        if not is_call(current) or name_of(current) not in _POINTWISE:
            continue
        cone.add(current)
        for source in current.all_input_nodes:
            if is_float_tensor(source) and source.op not in ("placeholder", "get_attr"):
                candidates.add(source)
            pending.append(source)
    order = sorted(cone, key=position.__getitem__)
    for candidate in sorted(candidates, key=position.__getitem__, reverse=True):
        if same_shape(candidate, node) and _is_invariant(node, candidate, order):
            return candidate
    return None


def _is_invariant(node: Node, candidate: Node, order: list[Node]) -> bool:
    known: dict[Node, Degree] = {candidate: ONE}
    for current in order:
        sources = [source for source in current.all_input_nodes if not reads_only_metadata(current, source)]
        if current is candidate or not any(source in known for source in sources):
            continue
        scaling = degree_of(current, known)
        if scaling is None:
            return False
        known[current] = scaling.degree
    return known.get(node) == 0
