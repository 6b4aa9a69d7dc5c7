"""What cuts a residual stream: operations other than adds between one sublayer and the next."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import networkx
import torch
from torch.fx import GraphModule, Node

from attnres_compile.chain import ResidualAdd
from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.passes.normalize import attribute
from attnres_compile.passes.streams import Trunk
from attnres_compile.patterns.degrees import FUSED_NORMS
from attnres_compile.patterns.operations import argument, is_float_tensor, name_of, shape_of, width_of
from attnres_compile.patterns.residual import is_equal_shape_sum, match_sum

MIXES = frozenset({"matmul", "bmm", "baddbmm", "einsum", "sum", "linear", "mm", "__matmul__"})
_GATES = frozenset({"mul", "div", "where", "lerp"})
_RECURRENT_CELLS = frozenset({"gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"})
_NORM_PARTS = frozenset(FUSED_NORMS) | {"rsqrt", "var", "std", "var_mean", "std_mean", "vector_norm"}
_REACH = 6


@dataclasses.dataclass(frozen=True)
class Break:
    """Why something that could have been a residual stream is none: the place, and how many sums it concerns."""

    reason: str
    node: Node
    size: int


@dataclasses.dataclass(frozen=True)
class Breaks:
    """All breaks of a graph. ``opaque`` holds the number of sums in the bodies of each operator."""

    broken: tuple[Break, ...]
    over_depth: tuple[Break, ...]
    opaque: dict[Node, int]


def broken_streams(index: GraphIndex, loose: Iterable[Node]) -> list[Break]:
    """Streams that are mixed or gated on their way, found among the sums that are no residual adds.

    Two sums belong together if an operand of the later one comes from the earlier one through mixing or gating alone, and
    if a norm lies on another way between them: recurrences over time have none.
    """
    joins = {node for node in loose if _is_join(node)}
    joins |= {node for node in index.nodes if _is_gated_join(node)}
    norms = [node for node in index.nodes if name_of(node) in _NORM_PARTS]
    together: dict[str, networkx.Graph] = defaultdict(networkx.Graph)
    cuts: dict[Node, Node] = {}
    for node in sorted(joins, key=index.position.__getitem__):
        for operand in _operands(node):
            found = _carried_from(index, operand, joins, node)
            if found is not None and _norm_between(index, norms, found[0], node):
                together[_kind(node, found[1])].add_edge(found[0], node)
                cuts[node] = found[1] or node
    breaks = []
    for reason, graph in together.items():
        for component in networkx.connected_components(graph):
            place = min((cuts[node] for node in component if node in cuts), key=index.position.__getitem__)
            breaks.append(Break(f"{reason} ({len(component)} such sums)", place, len(component)))
    return breaks


def _is_join(node: Node) -> bool:
    total = match_sum(node)
    return total is not None and is_equal_shape_sum(node, total)


def _is_gated_join(node: Node) -> bool:
    """``lerp`` under a tensor of gates, or a recurrent cell."""
    name = name_of(node)
    return name in _RECURRENT_CELLS or (name == "lerp" and isinstance(argument(node, 2, "weight"), Node))


def _operands(node: Node) -> list[Node]:
    if name_of(node) in _RECURRENT_CELLS:
        state = argument(node, 1, "hx")
        return [state] if isinstance(state, Node) else []
    if name_of(node) == "lerp":
        return [end for end in (node.args[0], argument(node, 1, "end")) if isinstance(end, Node)]
    total = match_sum(node)
    assert total is not None
    return [total.left, total.right]


def _carried_from(index: GraphIndex, operand: Node, joins: set[Node], of: Node) -> tuple[Node, Node | None] | None:
    """The earlier join that ``operand`` is carried on from, and the operation that mixes or gates it on the way."""
    pending: list[tuple[Node, Node | None]] = [(operand, None)]
    for _ in range(_REACH):
        following: list[tuple[Node, Node | None]] = []
        for value, cut in pending:
            value = index.peel(value)[0]
            if value in joins and value is not of and _same_width(value, of):
                return value, cut
            if name_of(value) in MIXES | _GATES:
                following += [(source, cut or value) for source in value.all_input_nodes if is_float_tensor(source)]
        pending = following
    return None


def _same_width(a: Node, b: Node) -> bool:
    return width_of(a) == width_of(b) != ""


def _norm_between(index: GraphIndex, norms: list[Node], first: Node, last: Node) -> bool:
    start, end = index.position[first], index.position[last]
    return any(
        start < index.position[norm] < end
        and index.ancestors[norm] & index.bit(first)
        and index.ancestors[last] & index.bit(norm)
        for norm in norms
    )


def _kind(join: Node, cut: Node | None) -> str:
    if name_of(join) in _RECURRENT_CELLS:
        return f"gated residual: a recurrent cell ({name_of(join)}) stands where the residual add would"
    if cut is not None and name_of(cut) in MIXES:
        return describe_mixing(cut)
    return "gated residual: the stream is multiplied by a factor computed from itself, so that adds alone carry nothing on"


def describe_mixing(cut: Node) -> str:
    return (
        f"hyper-connections or another multi-stream residual: {name_of(cut)!r} mixes the stream between sublayers, so that "
        "adds alone carry nothing on"
    )


def attention_over_depth(index: GraphIndex, trunks: Iterable[Trunk]) -> list[Break]:
    """One entry per width at which the model itself mixes earlier values of its stream: AttnRes, DenseFormer.

    It collects them again and again: a later collection shares values with an earlier one, and holds some that were
    computed from that. Collections of steps in time share none from layer to layer; those inside one branch don't count.
    """
    collections = [(node, terms) for node in index.nodes if len(terms := _collected(index, node)) > 1 and _is_deep(index, terms)]
    adds = [add for trunk in trunks if len(trunk.adds) > 1 for add in trunk.adds]
    widths: dict[str, list[tuple[Node, int]]] = defaultdict(list)
    for i, (node, terms) in enumerate(collections):
        for earlier, others in collections[:i]:
            holds = set(terms) & set(others) and any(index.ancestors[term] & index.bit(earlier) for term in terms)
            if holds and not _inside_one_branch(index, adds, earlier, node):
                widths[width_of(node)].append((node, len(terms)))
                break
    return [
        Break(
            f"the model attends over depth already: {name_of(found[-1][0])!r} collects {found[-1][1]} values of its stream",
            found[-1][0],
            len(found) + 1,
        )
        for found in widths.values()
    ]


def _inside_one_branch(index: GraphIndex, adds: list[ResidualAdd], first: Node, last: Node) -> bool:
    """Whether one sublayer computes ``last`` and has computed ``first`` since it read the stream."""
    start, end = index.bit(first), index.bit(last)
    return any(index.ancestors[add.branch] & end and not index.ancestors[add.skip] & start for add in adds)


def _collected(index: GraphIndex, node: Node) -> tuple[Node, ...]:
    """The values that ``node`` collects along a dimension of its own, behind the features or between them and the tokens."""
    name = name_of(node)
    if name not in ("stack", "cat", "concat", "concatenate") or not is_float_tensor(node):
        return ()
    elements = node.args[0]
    if not isinstance(elements, (list, tuple)) or not all(map(is_float_tensor, elements)):
        return ()
    terms: list[Node] = []
    for element in elements:
        assert isinstance(element, Node)
        if name == "stack" or _is_unsqueezed(index, element):
            terms.append(index.peel(element)[0])
        elif not _is_empty(element):
            nested = _collected(index, index.peel(element)[0])
            if not nested:
                return ()
            terms.extend(nested)
    return tuple(terms) if all(_same_width(term, node) for term in terms) else ()


def _is_deep(index: GraphIndex, terms: tuple[Node, ...]) -> bool:
    """Whether one of the values was computed from another."""
    bits = {term: index.bit(term) for term in terms}
    return any(index.ancestors[a] & bits[b] for a in bits for b in bits if a is not b)


def _is_empty(node: Node) -> bool:
    return any(isinstance(size, int) and size == 0 for size in shape_of(node) or ())


def _is_unsqueezed(index: GraphIndex, element: Node) -> bool:
    source = index.transparent(element)
    return source is not None and len(shape_of(element) or ()) == len(shape_of(source) or ()) + 1


def opaque_operators(graph_module: GraphModule) -> dict[Node, int]:
    """Higher-order operators whose bodies hold sums, and how many: what passes through them can't be followed."""
    found = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            count = sum(_sums_in(body) for body in _bodies_of(graph_module, node))
            if count:
                found[node] = count
    return found


def _bodies_of(root: GraphModule, node: Node) -> list[GraphModule]:
    held = [attribute(root, str(source.target)) for source in node.all_input_nodes if source.op == "get_attr"]
    return [body for body in held if isinstance(body, GraphModule)]


def _sums_in(body: GraphModule) -> int:
    count = 0
    for node in body.graph.nodes:
        shape = shape_of(node)
        count += _is_join(node) and shape is not None and len(shape) >= 3
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            count += sum(_sums_in(inner) for inner in _bodies_of(body, node))
    return count


def describe_opaque(node: Node) -> str:
    target: Any = node.target
    return f"the stream passes through the higher-order operator {target.name()!r}, whose bodies are not looked into"
