"""Parts of one stream that something other than an add cuts."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import networkx
from torch.fx import Node

from attnres_compile.passes.breaks import MIXES, Break, describe_mixing
from attnres_compile.passes.candidates import Candidate
from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.patterns.mutation import written_tensors
from attnres_compile.patterns.operations import module_of, name_of, reads_only_metadata, same_shape, shape_of


@dataclasses.dataclass(frozen=True)
class Fragment:
    """One part of a stream: the adds of all its parts together, and what cuts it."""

    total: int
    cut: str


def find_fragments(index: GraphIndex, candidates: list[Candidate]) -> dict[int, Fragment]:
    """Every candidate that holds at most two thirds of a stream which operations that are no adds cut more than once."""
    # What forks off a stream by an add is not cut off.
    carried = {value for candidate in candidates for value in candidate.trunk.values[1:]}
    with_sites = [c for c in candidates if c.num_sites and index.peel(c.trunk.root)[0] not in carried]
    joined = _joined_by_skips(index, with_sites)
    order = _order_of_parts(index, with_sites)
    earlier = {part: networkx.descendants(order, part) for part in order}
    found = {}
    for one in with_sites:
        alike = [o for o in with_sites if o is not one and same_shape(o.trunk.adds[0].node, one.trunk.adds[0].node)]
        before = [other for other in alike if id(other) in earlier[id(one)]]
        after = [other for other in alike if id(one) in earlier[id(other)]]
        total = sum(len(part.trunk.adds) for part in (one, *before, *after))
        if len(before) + len(after) >= 2 and 3 * len(one.trunk.adds) <= 2 * total:
            starts = order.out_edges(id(one if before else after[0]), data="start")
            found[id(one)] = Fragment(total, _cut_at(index, next(start for *_, start in starts)))
        elif id(one) in joined and before + after:
            found[id(one)] = Fragment(total, f"a U-Net skip, {name_of(joined[id(one)])!r} of earlier and later values,")
    return found


def _order_of_parts(index: GraphIndex, candidates: list[Candidate]) -> networkx.DiGraph[int]:
    """Edges from every candidate to those of whose streams it goes on: its root was made from them, or it adds the value of one,
    perhaps normed. An edge knows this root or added value. What a branch computes from another stream joins nothing.
    """
    owner = {add.node: id(candidate) for candidate in candidates for add in candidate.trunk.adds}
    order: networkx.DiGraph[int] = networkx.DiGraph()
    for candidate in candidates:
        order.add_node(id(candidate))
        added = [add.branch for add in candidate.trunk.adds if _stream_behind(index, add.branch) in owner]
        seen: set[Node] = set()
        for start in (candidate.trunk.root, *added):
            pending = [start]
            while pending:
                node = pending.pop()
                if node in seen:
                    continue
                seen.add(node)
                if node not in owner:
                    pending += [source for source in node.all_input_nodes if not reads_only_metadata(node, source)]
                elif owner[node] not in {id(candidate), *order[id(candidate)]}:
                    order.add_edge(id(candidate), owner[node], start=start)
    return order


def _stream_behind(index: GraphIndex, node: Node) -> Node:
    """What ``node`` is, up to transparent operations and a norm."""
    value = index.peel(node)[0]
    normed = index.normalised(value)
    return value if normed is None else index.peel(normed)[0]


def _joined_by_skips(index: GraphIndex, candidates: list[Candidate]) -> dict[int, Node]:
    """The candidates on either side of a ``cat`` of several values of one stream, its last among them, that starts another."""
    found: dict[int, Node] = {}
    for node in index.nodes:
        if name_of(node) not in ("cat", "concat", "concatenate") or not isinstance(node.args[0], (list, tuple)):
            continue
        joined = {index.peel(part)[0] for part in node.args[0] if isinstance(part, Node)}
        before = [candidate for candidate in candidates if joined & set(candidate.trunk.values)]
        ends = any(candidate.trunk.values[-1] in joined for candidate in before)
        if not ends or sum(len(joined & set(candidate.trunk.values)) for candidate in before) < 2:
            continue
        for candidate in candidates:
            is_alike = any(same_shape(candidate.trunk.adds[0].node, other.trunk.adds[0].node) for other in before)
            if is_alike and index.ancestors[candidate.trunk.root] & index.bit(node):
                found.update({id(part): node for part in (candidate, *before)})
    return found


def severed(index: GraphIndex, candidates: list[Candidate]) -> list[Break]:
    """Residual adds of one shape of which each begins anew what the one before it gave, by shape."""
    found: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        found[str(shape_of(candidate.trunk.adds[0].node))].append(candidate)
    breaks = []
    for lone in found.values():
        adds = sum(index.bit(candidate.trunk.adds[0].node) for candidate in lone)
        later = [candidate for candidate in lone if index.ancestors[candidate.trunk.root] & adds]
        if later:
            root = index.peel(later[0].trunk.root)[0]
            reason = f"no stream is carried on: {_cut_at(index, later[0].trunk.root)} lies between one residual add and the next"
            if name_of(root) in MIXES - {"linear"}:
                reason = f"{describe_mixing(root)} ({len(lone)} such sums)"
            breaks.append(Break(reason, later[0].trunk.adds[0].node, len(lone)))
    return breaks


def _cut_at(index: GraphIndex, start: Node) -> str:
    """What made the first value of a part, ``start``, from the stream before it."""
    root = index.peel(start)[0]
    what = "a norm" if index.normalised(root) is not None else repr(name_of(root))
    what = f"the in-place operation {what}" if written_tensors(root) else what
    return f"{what} (module {module_of(root)!r})" if module_of(root) else what
