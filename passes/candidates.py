"""Streams that may be residual chains, and what their branches read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property

from torch.fx import Node

from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.passes.reads import Readers, StreamReads, reads_of
from attnres_compile.passes.streams import Trunk
from attnres_compile.patterns.operations import name_of


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A trunk with the reads of each of its values."""

    trunk: Trunk
    reads: tuple[StreamReads, ...]

    @cached_property
    def num_sites(self) -> int:
        return sum(map(has_site, self.reads))


def has_site(reads: StreamReads) -> bool:
    return any(group.is_invariant for group in reads.groups)


@dataclasses.dataclass(frozen=True)
class Facts:
    """``norm_fed`` branches see the stream through a norm, and besides at most what gates or routes it; ``raw_fed`` do not."""

    norm_fed: int
    raw_fed: int
    normed_branches: int
    norm_of_branch: Node | None
    raw: Readers | None


def facts_of(index: GraphIndex, candidate: Candidate, others: Iterable[Candidate]) -> Facts:
    """How the branches of ``candidate`` see its stream, on ways that pass through no longer stream of the ``others``."""
    stream = {image for reads in candidate.reads for image in reads.images}
    for other in others:
        if len(other.trunk.adds) > len(candidate.trunk.adds):
            stream.update(add.node for add in other.trunk.adds)
    groups = [group for reads in candidate.reads for group in reads.groups]
    raw_groups = [group for group in groups if not group.is_invariant]
    normed_groups = [group for group in (*groups, *_reads_behind_the_root(index, candidate)) if group.is_invariant]
    through_norm = _reached(index, stream, (node for group in normed_groups for node in group.outputs))
    raw = _reached(index, stream, (node for group in raw_groups for node in group.nodes))
    mixed = _reached(index, stream, (node for group in raw_groups if _mixes_vectors(group) for node in group.nodes))
    norm_fed = raw_fed = normed = 0
    norm_of_branch = None
    for add in candidate.trunk.adds:
        if add.branch in through_norm and add.branch not in mixed:
            norm_fed += 1
        elif add.branch in raw:
            raw_fed += 1
        source = index.normalised(add.branch)
        if source is not None and source not in stream:
            normed += 1
            norm_of_branch = norm_of_branch or add.branch
    return Facts(norm_fed, raw_fed, normed, norm_of_branch, raw_groups[0] if raw_groups else None)


def _reads_behind_the_root(index: GraphIndex, candidate: Candidate) -> tuple[Readers, ...]:
    """The first norms may read what the first add scales: x in ``x / 2 + f(norm(x))``."""
    source = index.peel(candidate.trunk.root)[0]
    return () if source is candidate.trunk.root else reads_of(index, source, None, candidate.trunk.adds[0]).groups


def _mixes_vectors(raw: Readers) -> bool:
    """Whether a raw group reads a mixture of several vectors of the stream, and not only how to weigh or route others."""
    return raw.is_elsewhere or any(name_of(node) in ("matmul", "bmm", "einsum") for node in raw.obstacles)


def _reached(index: GraphIndex, stream: set[Node], sources: Iterable[Node]) -> set[Node]:
    """Everything computed from ``sources`` without passing through the stream itself."""
    found = set(sources)
    pending = list(found)
    while pending:
        for user in index.readers[pending.pop()]:
            if user not in found and user not in stream:
                found.add(user)
                pending.append(user)
    return found
