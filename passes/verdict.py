"""Which trunks are PreNorm residual chains, and the reason for each that is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch.fx import Node

from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.passes.reads import StreamReads
from attnres_compile.passes.streams import Trunk
from attnres_compile.patterns.mutation import memory_of
from attnres_compile.patterns.norms import normalised_input
from attnres_compile.patterns.operations import module_of, name_of, reads_only_metadata, same_shape, shape_of, source_line_of
from attnres_compile.patterns.residual import match_sum
from attnres_compile.report import Refusal

# A lone decoder layer has at most three sublayers; a stream that begins at a graph input must have more to be a model's.
_MIN_SUBLAYERS_FROM_INPUT = 4
_ATTENTION = frozenset({"scaled_dot_product_attention", "flex_attention", "self_attention", "conv1d"})


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A trunk with the reads of each of its values."""

    trunk: Trunk
    reads: tuple[StreamReads, ...]

    @property
    def num_sites(self) -> int:
        return sum(any(group.is_invariant for group in reads.groups) for reads in self.reads)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """``norm_fed`` branches see the stream through a norm, ``raw_fed`` see it otherwise (or both); others see neither."""

    norm_fed: int
    raw_fed: int
    normed_branches: int
    norm_of_branch: Node | None
    raw_reader: Node | None


def judge(index: GraphIndex, candidates: Iterable[Candidate]) -> tuple[list[tuple[Candidate, str]], list[Refusal]]:
    """Split ``candidates`` into chains to rewrite, with their kind, and refusals."""
    candidates = list(candidates)
    accepted: list[tuple[Candidate, str]] = []
    refusals: list[Refusal] = []
    post_norm: list[Candidate] = []
    facts = {id(candidate): _facts(index, candidate) for candidate in candidates}
    fragments = _fragments(index, candidates)
    for candidate in candidates:
        if _is_post_norm(index, candidate):
            post_norm.append(candidate)
            continue
        reason = _reason_against(index, candidate, facts[id(candidate)], fragments)
        if reason is None:
            accepted.append((candidate, _kind(index, candidate, facts[id(candidate)])))
        elif len(candidate.trunk.adds) > 1 or candidate.num_sites:  # the rest are sums such as rotary embeddings
            place = _place(candidate, facts[id(candidate)])
            subject = "chain" if len(candidate.trunk.adds) > 1 else "add"
            refusals.append(_refusal(subject, reason, place, len(candidate.trunk.adds)))
    if post_norm:
        refusals.insert(0, _post_norm_refusal(index, post_norm))
    return accepted, refusals


def _refusal(subject: str, reason: str, place: Node, size: int) -> Refusal:
    return Refusal(subject, reason, place.name, module_of(place), source_line_of(place), size)


def _facts(index: GraphIndex, candidate: Candidate) -> _Facts:
    stream = {image for reads in candidate.reads for image in reads.images}
    groups = [group for reads in candidate.reads for group in reads.groups]
    through_norm = _reached(stream, (node for group in groups if group.is_invariant for node in group.outputs))
    raw = _reached(stream, (node for group in groups if not group.is_invariant for node in group.nodes))
    norm_fed = raw_fed = normed = 0
    norm_of_branch = raw_reader = None
    for add in candidate.trunk.adds:
        if add.branch in raw:
            raw_fed += 1
        elif add.branch in through_norm:
            norm_fed += 1
        if normalised_input(add.branch, index.position) is not None:
            normed += 1
            norm_of_branch = norm_of_branch or add.branch
    for group in groups:
        if not group.is_invariant and raw_reader is None:
            raw_reader = group.edges[0][1]
    return _Facts(norm_fed, raw_fed, normed, norm_of_branch, raw_reader)


def _reached(stream: set[Node], sources: Iterable[Node]) -> set[Node]:
    """Everything computed from ``sources`` without passing through the stream itself."""
    found = set(sources)
    pending = list(found)
    while pending:
        value = pending.pop()
        for user in value.users:
            if user not in found and user not in stream and not reads_only_metadata(user, value):
                found.add(user)
                pending.append(user)
    return found


def _reason_against(index: GraphIndex, candidate: Candidate, facts: _Facts, fragments: dict[int, int]) -> str | None:
    adds = candidate.trunk.adds
    count = len(adds)
    if count < 2:
        return "a single residual add: there is no depth to attend over"
    if candidate.num_sites == 0:
        return "nothing reads the stream through a norm"
    if facts.raw_fed and 2 * facts.normed_branches >= count and facts.raw_fed >= facts.norm_fed:
        return (
            "reordered norm: branches read the raw stream and "
            f"{_name(facts.norm_of_branch)} normalises their output before the residual add"
        )
    if facts.norm_fed == 0 or facts.norm_fed <= facts.raw_fed or 2 * (count - facts.raw_fed) < count:
        return f"{facts.raw_fed} of {count} branches read the raw stream, not through a norm"
    root = index.peel(candidate.trunk.root)[0]
    if root.op == "placeholder" and count < _MIN_SUBLAYERS_FROM_INPUT:
        return "the stream begins at a graph input and is short: a layer, not a model, was captured"
    written = _first_write(index, candidate)
    if written is not None:
        return (
            f"the stream, or a branch after its residual add, is overwritten in place by {name_of(written)!r} at {written.name!r}"
        )
    total = fragments.get(id(candidate))
    if total is not None:
        return f"the stream is fragmented: {count} of {total} residual adds lie between two changes of its width or layout"
    return None


def _first_write(index: GraphIndex, candidate: Candidate) -> Node | None:
    """The first in-place write into what a site would read: a stream value at any time, a branch once it was added."""
    trunk = candidate.trunk
    since = {memory_of(add.node): index.position[add.node] for add in trunk.adds}
    for add in trunk.adds:
        since.setdefault(memory_of(add.branch), index.position[add.node])
    since.setdefault(memory_of(trunk.root), index.position[trunk.adds[0].node])
    for node, written in index.writes:
        start = since.get(memory_of(written))
        if start is not None and index.position[node] > start:
            return node
    return None


def _fragments(index: GraphIndex, candidates: list[Candidate]) -> dict[int, int]:
    """For every candidate that is a small part of one stream, cut by operations that are no adds, the adds of all parts."""
    members = {id(c): sum(index.bit(add.node) for add in c.trunk.adds) for c in candidates}
    found = {}
    for one in candidates:
        shape = one.trunk.adds[0].node
        parts = [
            other
            for other in candidates
            if other is not one
            and other.num_sites
            and same_shape(other.trunk.adds[0].node, shape)
            and (index.ancestors[other.trunk.root] & members[id(one)] or index.ancestors[one.trunk.root] & members[id(other)])
        ]
        total = len(one.trunk.adds) + sum(len(part.trunk.adds) for part in parts)
        if len(parts) >= 2 and 2 * len(one.trunk.adds) <= total:
            found[id(one)] = total
    return found


def _is_post_norm(index: GraphIndex, candidate: Candidate) -> bool:
    """A lone add whose skip operand is a norm's output and whose sum only a norm reads."""
    return (
        len(candidate.trunk.adds) == 1
        and normalised_input(candidate.trunk.root, index.position) is not None
        and bool(candidate.reads[-1].groups)
        and all(group.is_invariant for group in candidate.reads[-1].groups)
    )


def _post_norm_refusal(index: GraphIndex, candidates: list[Candidate]) -> Refusal:
    readers = [candidate.reads[-1].groups[0].edges[0][1] for candidate in candidates]
    reason = (
        f"post-norm: {_name(readers[0])} normalises the sum right after the residual add, so no residual stream is carried on "
        f"({len(candidates)} such adds)"
    )
    return _refusal("chain" if len(candidates) > 1 else "add", reason, readers[0], len(candidates))


def _place(candidate: Candidate, facts: _Facts) -> Node:
    return facts.raw_reader or candidate.trunk.adds[0].node


def _name(node: Node | None) -> str:
    if node is None:
        return "a norm"
    return repr(module_of(node)) if module_of(node) else f"the norm at {node.name!r}"


def _kind(index: GraphIndex, candidate: Candidate, facts: _Facts) -> str:
    count = len(candidate.trunk.adds)
    if 5 * facts.normed_branches >= 2 * count:
        return "sandwich"
    read = {reads.stream for reads in candidate.reads if reads.groups}
    parallel = 0
    values = candidate.trunk.values
    for before, add in zip(values, candidate.trunk.adds, strict=False):
        is_unread = before is not candidate.trunk.root and before not in read
        parallel += is_unread or _adds_attention_to_mlp(index, add.branch, before)
    return "parallel" if 5 * parallel >= 2 * count else "prenorm"


def _adds_attention_to_mlp(index: GraphIndex, branch: Node, before: Node) -> bool:
    """Whether the branch is itself a sum with attention in one of its terms."""
    total = match_sum(index.peel(branch)[0])
    if total is None:
        return False
    for term in (total.left, total.right):
        inside = index.ancestors[term] & ~index.ancestors[before]
        for node in index.nodes[index.position[before] : index.position[term] + 1]:
            if inside & index.bit(node) and _mixes_tokens(node):
                return True
    return False


def _mixes_tokens(node: Node) -> bool:
    shape = shape_of(node)
    return name_of(node) in _ATTENTION or (
        name_of(node) in ("matmul", "einsum", "softmax") and shape is not None and len(shape) >= 4
    )
