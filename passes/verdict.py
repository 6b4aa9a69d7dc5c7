"""Which trunks are PreNorm residual chains, and the reason for each that is none."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from torch.fx import Node

from attnres_compile.passes.breaks import Breaks, describe_opaque
from attnres_compile.passes.candidates import Candidate, Facts, facts_of, has_site
from attnres_compile.passes.fragments import Fragment, find_fragments, severed
from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.passes.kinds import kind_of, writes_several_streams
from attnres_compile.passes.reads import name_obstacles
from attnres_compile.patterns.mutation import memory_of
from attnres_compile.patterns.operations import module_of, name_of, source_line_of, width_of
from attnres_compile.report import Refusal

# A lone decoder layer has at most three sublayers; a stream that begins at a graph input must have more to be a model's.
_MIN_SUBLAYERS_FROM_INPUT = 4
_LONE_ADD = "a single residual add: there is no depth to attend over"


def judge(
    index: GraphIndex, candidates: Iterable[Candidate], breaks: Breaks
) -> tuple[list[tuple[Candidate, str]], list[Refusal]]:
    """Split ``candidates`` into chains to rewrite, with their kind, and refusals."""
    accepted: list[tuple[Candidate, str]] = []
    refusals: list[Refusal] = [
        _refusal("chain", cut.reason, cut.node, cut.size) for cut in (*breaks.over_depth, *breaks.broken) if cut.size > 1
    ]
    post_norm: list[Candidate] = []
    every = list(candidates)
    # The rest are sums such as rotary embeddings.
    candidates = [candidate for candidate in every if len(candidate.trunk.adds) > 1 or candidate.num_sites]
    fragments = find_fragments(index, candidates)
    opaque: set[Node] = set()
    for candidate in candidates:
        if _is_post_norm(index, candidate):
            post_norm.append(candidate)
            continue
        through = _opaque_operator(index, candidate, breaks)
        if through is not None:
            opaque.add(through)
            continue
        facts = facts_of(index, candidate, candidates)
        reason = _reason_against(index, candidate, facts, fragments, breaks)
        if reason is None:
            accepted.append((candidate, kind_of(index, candidate, facts)))
        else:
            subject = "chain" if len(candidate.trunk.adds) > 1 else "add"
            refusals.append(_refusal(subject, reason, _place(candidate, facts), len(candidate.trunk.adds)))
    for node, size in breaks.opaque.items():
        if node in opaque or sum(breaks.opaque.values()) > 1:
            refusals.append(_refusal("chain", describe_opaque(node), node, size))
    if post_norm:
        refusals.insert(0, _post_norm_refusal(index, post_norm))
    if not accepted and not any(refusal.subject == "chain" for refusal in refusals):
        refusals.extend(_refusal("chain", cut.reason, cut.node, cut.size) for cut in severed(index, every))
    if not accepted and not refusals:
        refusals.extend(_refusal("add", _LONE_ADD, candidate.trunk.adds[0].node, 1) for candidate in every)
    return accepted, refusals


def _refusal(subject: str, reason: str, place: Node, size: int) -> Refusal:
    return Refusal(subject, reason, place.name, module_of(place), source_line_of(place), size)


def _opaque_operator(index: GraphIndex, candidate: Candidate, breaks: Breaks) -> Node | None:
    """The first operator whose bodies can't be followed that reads the stream, or that the stream comes from."""
    source = index.peel(candidate.trunk.root)[0]
    origin = source.args[0] if name_of(source) == "getitem" else source
    images = {image for reads in candidate.reads for image in reads.images}
    return next((node for node in breaks.opaque if node is origin or images & set(node.all_input_nodes)), None)


def _reason_against(
    index: GraphIndex, candidate: Candidate, facts: Facts, fragments: dict[int, Fragment], breaks: Breaks
) -> str | None:
    adds = candidate.trunk.adds
    count = len(adds)
    if count < 2:
        return _LONE_ADD
    if facts.raw_fed and 2 * facts.normed_branches >= count and facts.raw_fed >= facts.norm_fed:
        return (
            "reordered norm: branches read the raw stream and "
            f"{_name(facts.norm_of_branch)} normalises their output before the residual add"
        )
    if facts.norm_fed <= facts.raw_fed and all(writes_several_streams(index, add.branch) for add in adds):
        return "hyper-connections or another multi-stream residual: every sublayer adds to several streams at once"
    if candidate.num_sites == 0:
        return "nothing reads the stream through a norm" + (f": the reader {name_obstacles(facts.raw)}" if facts.raw else "")
    if facts.norm_fed == 0 or facts.norm_fed <= facts.raw_fed or 2 * (count - facts.raw_fed) < count:
        if facts.norm_fed == facts.raw_fed == 0:
            return "no sublayer is computed from what the norms on this stream give"
        why = f": the reader {name_obstacles(facts.raw)}" if facts.raw else ""
        return f"{facts.raw_fed} of {count} branches read the raw stream, not through a norm{why}"
    if candidate.num_sites == sum(reads.stream is candidate.trunk.root for reads in candidate.reads if has_site(reads)):
        return "a norm reads the root of the stream alone: there is no depth to attend over"
    widths = sorted({width_of(reads.base) for reads in candidate.reads if has_site(reads)})
    if len(widths) > 1:
        return f"norms read the stream in layouts of different widths: {', '.join(widths)}"
    root = index.peel(candidate.trunk.root)[0]
    if root.op == "placeholder" and count < _MIN_SUBLAYERS_FROM_INPUT:
        return "the stream begins at a graph input and is short: a layer, not a model, was captured"
    written = _first_write(index, candidate)
    if written is not None:
        return (
            f"the stream, or a branch after its residual add, is overwritten in place by {name_of(written)!r} at {written.name!r}"
        )
    fragment = fragments.get(id(candidate))
    if fragment is not None:
        return f"the stream is fragmented: {fragment.cut} lies on it, with {count} of {fragment.total} residual adds on one side"
    over_depth = next((cut.reason for cut in breaks.over_depth if width_of(cut.node) == width_of(adds[0].node)), None)
    if over_depth is not None:
        return over_depth
    stopped = _first_without_gradients(index, candidate)
    if stopped is not None:
        return (
            f"gradients are switched off in mid-stream, at {stopped.name!r}: sources from before would pass gradients on that "
            "the model stops there"
        )
    return None


def _first_without_gradients(index: GraphIndex, candidate: Candidate) -> Node | None:
    """The first add under ``torch.no_grad()`` behind a source that was made outside of it."""
    some_have = not index.modes.is_without_gradients(candidate.trunk.root)
    for add in candidate.trunk.adds:
        if some_have and index.modes.is_without_gradients(add.node):
            return add.node
        some_have |= not index.modes.is_without_gradients(add.node)
    return None


def _first_write(index: GraphIndex, candidate: Candidate) -> Node | None:
    """The first in-place write into what a site reads or is made of: a stream value or an image of it, a branch once added."""
    trunk = candidate.trunk
    since: dict[Hashable, int] = {}
    for add in trunk.adds:
        since.setdefault(memory_of(add.branch), index.position[add.node])
    for reads in candidate.reads:
        for image in reads.images:
            start = index.position[trunk.adds[0].node if reads.stream is trunk.root else image]
            since[memory_of(image)] = min(start, since.get(memory_of(image), start))
    written = (node for node, value in index.writes if index.position[node] > since.get(memory_of(value), len(index.nodes)))
    return next(written, None)


def _is_post_norm(index: GraphIndex, candidate: Candidate) -> bool:
    """A lone add whose skip operand is a norm's output and whose sum only a norm reads."""
    return (
        len(candidate.trunk.adds) == 1
        and index.normalised(candidate.trunk.root) is not None
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


def _place(candidate: Candidate, facts: Facts) -> Node:
    return facts.raw.edges[0][1] if facts.raw else candidate.trunk.adds[0].node


def _name(node: Node | None) -> str:
    if node is None:
        return "a norm"
    return repr(module_of(node)) if module_of(node) else f"the norm at {node.name!r}"
