"""Residual streams: which sums are residual adds, and how they hang together as trunks."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from torch.fx import Node

from attnres_compile.chain import ResidualAdd
from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.passes.reads import reads_of
from attnres_compile.patterns.operations import same_shape, shape_of
from attnres_compile.patterns.residual import Sum, is_equal_shape_sum, match_sum


@dataclasses.dataclass(frozen=True)
class Trunk:
    """The longest path of residual adds from one root. ``root`` is the first add's skip operand."""

    root: Node
    adds: tuple[ResidualAdd, ...]

    @property
    def values(self) -> tuple[Node, ...]:
        """The successive values of the stream, the root first."""
        return (self.root, *(add.node for add in self.adds))


def find_trunks(index: GraphIndex) -> tuple[list[Trunk], list[Node]]:
    """All trunks of the graph, in the order of their roots, and the sums that are no residual adds.

    Side branches of a tree are trunks of their own.
    """
    adds, others = _residual_adds(index)
    _adopt_injections(index, adds, others)
    parent: dict[Node, Node] = {}
    complete: dict[Node, ResidualAdd] = {}
    children: dict[Node, list[Node]] = defaultdict(list)
    for node in index.nodes:
        if node in adds:
            source, path = index.peel(adds[node].skip)
            parent[node] = source
            complete[node] = dataclasses.replace(adds[node], path=path)
            children[source].append(node)
    height: dict[Node, int] = {}
    for node in reversed(index.nodes):
        height[node] = 1 + max((height[child] for child in children.get(node, ())), default=0)
    trunks = []
    for node in index.nodes:
        for child in _trunk_starts(index, node, parent, children, height):
            # The root is what the first add reads, whatever transparent operations lie before it.
            steps = [dataclasses.replace(complete[child], path=())]
            while children.get(steps[-1].node):
                steps.append(complete[_tallest(index, children[steps[-1].node], height)])
            trunks.append(_without_embedding(index, steps))
    return trunks, [node for node in others if node not in adds]


def _tallest(index: GraphIndex, adds: list[Node], height: dict[Node, int]) -> Node:
    """Where the stream goes on at a fork: of equal ones at the last, which may be computed from the others."""
    return max(adds, key=lambda add: (height[add], index.position[add]))


def _without_embedding(index: GraphIndex, steps: list[ResidualAdd]) -> Trunk:
    """The trunk of ``steps`` without the adds at its beginning that belong to the embedding."""
    rest = steps
    while len(rest) > 1 and (
        _is_free_of_parameters(index, rest[0]) or (rest is not steps and _is_from_outside(index, rest[0]))
    ):
        rest = [dataclasses.replace(rest[1], path=()), *rest[2:]]
    return Trunk(rest[0].skip, tuple(rest))


def _is_from_outside(index: GraphIndex, add: ResidualAdd) -> bool:
    """Whether the branch has nothing to do with the stream that it is added to."""
    return not index.ancestors[add.branch] & index.bit(index.peel(add.skip)[0])


def _is_free_of_parameters(index: GraphIndex, add: ResidualAdd) -> bool:
    """Whether the branch is computed from the skip operand by fixed operations alone: shifts, roundings, straight-through.

    At the beginning of a stream such an add is a part of the embedding.
    """
    source = index.behind(add.skip)
    inside = index.ancestors[add.branch] & ~index.ancestors[source]
    nodes = index.nodes[: index.position[add.branch] + 1]
    return not any(inside & index.bit(node) and any(map(index.is_parameter, node.all_input_nodes)) for node in nodes)


def _trunk_starts(
    index: GraphIndex, node: Node, parent: dict[Node, Node], children: dict[Node, list[Node]], height: dict[Node, int]
) -> list[Node]:
    """The children of ``node`` at which a trunk begins: the tallest at a root, the others wherever a tree forks."""
    found = children.get(node, [])
    if not found:
        return []
    tallest = _tallest(index, found, height)
    return [child for child in found if child is not tallest or node not in parent]


def _residual_adds(index: GraphIndex) -> tuple[dict[Node, ResidualAdd], dict[Node, Sum]]:
    """Sums split into residual adds and others.

    The skip operand is the one on whose linear past the other operand depends. Where each depends on the other's past
    (parallel branches, long skips) the operand that already is on a stream, or whose past holds the other, is the skip.
    """
    adds: dict[Node, ResidualAdd] = {}
    others: dict[Node, Sum] = {}
    past, ancestors = index.linear_past, index.ancestors
    for node in index.nodes:
        total = match_sum(node)
        if total is None or not index.live & index.bit(node):
            continue
        if not is_equal_shape_sum(node, total):
            others[node] = total
            continue
        left, right = total.left, total.right
        if index.behind(left) is index.behind(right):
            others[node] = total  # one value scaled twice, as in x * a + x.detach() * (1 - a)
            continue
        if _is_difference(index, left, right, total.right_scale) or _is_difference(index, right, left, total.left_scale):
            others[node] = total
            continue
        left_is_skip = bool(ancestors[right] & past[left])
        right_is_skip = bool(ancestors[left] & past[right])
        if left_is_skip and right_is_skip:
            left_is_skip, right_is_skip = _resolve(index, adds, left, right)
        elif left_is_skip != right_is_skip:
            skip, other = (left, right) if left_is_skip else (right, left)
            if _is_injection(index, adds, others, other, skip):
                left_is_skip, right_is_skip = right_is_skip, left_is_skip
        # A stream that is itself scaled by the sum (x - alpha f has a scaled branch, alpha x does not occur) stays out.
        if left_is_skip and not right_is_skip and total.left_scale == 1.0:
            adds[node] = ResidualAdd(node, left, right, total.right_scale)
        elif right_is_skip and not left_is_skip and total.right_scale == 1.0:
            adds[node] = ResidualAdd(node, right, left, total.left_scale)
        else:
            others[node] = total
    return adds, others


def _is_difference(index: GraphIndex, left: Node, right: Node, right_scale: float) -> bool:
    """Whether an earlier value of the stream is taken from a later one: what lies between them, and no stream."""
    return right_scale < 0 and bool(index.linear_past[left] & index.bit(index.peel(right)[0]))


def _resolve(index: GraphIndex, adds: dict[Node, ResidualAdd], left: Node, right: Node) -> tuple[bool, bool]:
    left_source, right_source = index.peel(left)[0], index.peel(right)[0]
    left_on_stream, right_on_stream = left_source in adds, right_source in adds
    if left_on_stream != right_on_stream:
        return left_on_stream, right_on_stream
    right_inside_left = bool(index.linear_past[left] & index.bit(right_source))
    left_inside_right = bool(index.linear_past[right] & index.bit(left_source))
    if right_inside_left != left_inside_right:
        return right_inside_left, left_inside_right
    return False, False


def _is_injection(
    index: GraphIndex, adds: dict[Node, ResidualAdd], others: dict[Node, Sum], stream: Node, value: Node
) -> bool:
    """Whether ``stream + value`` adds something from outside to a stream, some branch of which has read ``value`` before.

    The other reading of that sum is a branch of ``value`` that holds a stream of its own. Such a stream begins with what is
    computed from ``value``, and where nothing but ``value`` came before, with its norm.
    """
    end = index.peel(stream)[0]
    root = end
    while (earlier := _earlier(index, adds, others, root)) is not None:
        root = earlier
    if root is end:
        return False
    if not index.ancestors[root] & index.linear_past[value]:
        return True
    source = index.peel(value)[0]
    groups = reads_of(index, source, None, None).groups if source not in adds else ()
    before = index.ancestors[end]
    return any(not group.is_invariant and any(before & index.bit(node) for node in group.nodes) for group in groups)


def _earlier(index: GraphIndex, adds: dict[Node, ResidualAdd], others: dict[Node, Sum], node: Node) -> Node | None:
    """The value of the stream to which ``node`` adds a branch, or something else that has nothing to do with it."""
    if node in adds:
        return index.peel(adds[node].skip)[0]
    if node not in others:
        return None
    left, right = others[node].left, others[node].right
    before = [(index.peel(stream)[0], added) for stream, added in ((left, right), (right, left))]
    found = [stream for stream, added in before if stream in adds and not index.ancestors[added] & index.bit(stream)]
    return found[0] if len(found) == 1 else None


def _adopt_injections(index: GraphIndex, adds: dict[Node, ResidualAdd], others: dict[Node, Sum]) -> None:
    """Make residual adds of sums ``stream + v`` with v independent of the stream (conditioning, late embeddings).

    Only a sum that carries on a stream and is itself carried on counts: one operand is a residual add, and a later
    residual add has the sum as its skip operand, or nothing but the sum reads that residual add. Sums before the first
    residual add make up the embedding.
    """
    carried_on = {index.peel(add.skip)[0] for add in adds.values()}
    adopted: dict[Node, ResidualAdd] = {}
    for node in sorted(others, key=index.position.__getitem__, reverse=True):
        if node not in carried_on and not _ends_stream(index, adds, node):
            continue
        total = others[node]
        options = []
        for skip, branch, skip_scale, branch_scale in (
            (total.left, total.right, total.left_scale, total.right_scale),
            (total.right, total.left, total.right_scale, total.left_scale),
        ):
            source, _ = index.peel(skip)
            independent = not index.ancestors[branch] & index.bit(source)
            fits = same_shape(skip, node) and (same_shape(branch, node) or same_shape(source, node))
            if skip_scale == 1.0 and independent and fits and (source in adds or source in others):
                options.append(ResidualAdd(node, skip, branch, branch_scale))
        if len(options) == 1:
            adopted[node] = options[0]
            carried_on.add(index.peel(options[0].skip)[0])
    for node in sorted(adopted, key=index.position.__getitem__):
        if index.peel(adopted[node].skip)[0] in adds:
            adds[node] = adopted[node]


def _ends_stream(index: GraphIndex, adds: dict[Node, ResidualAdd], node: Node) -> bool:
    """Whether ``node`` alone reads the last value of a stream, and adds more to it than a bias."""
    biases = [source for source in node.all_input_nodes if index.is_parameter(index.peel(source)[0])]
    if any(len([size for size in shape_of(bias) or () if size != 1]) < 2 for bias in biases):
        return False
    return any(index.peel(s)[0] in adds and index.readers[s] == [node] for s in node.all_input_nodes)
