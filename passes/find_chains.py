"""Find the residual chains of a graph, and say of every other stream why it is none."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from attnres_compile.chain import Read, ResidualChain
from attnres_compile.passes.base import Program
from attnres_compile.passes.breaks import Breaks, attention_over_depth, broken_streams, opaque_operators
from attnres_compile.passes.candidates import Candidate
from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.passes.reads import StreamReads, describe_obstacles, reads_of
from attnres_compile.passes.streams import Trunk, find_trunks
from attnres_compile.passes.verdict import judge
from attnres_compile.patterns.operations import module_of, shape_of, source_line_of
from attnres_compile.report import Refusal


@dataclasses.dataclass(frozen=True)
class FindChains:
    """Adds ``chains`` and ``refusals`` to the program; the graph stays as it is."""

    name: str = "find_chains"

    def run(self, program: Program) -> tuple[Program, int]:
        index = GraphIndex(program.graph_module.graph, program.parameters)
        trunks, loose = find_trunks(index)
        breaks = Breaks(
            tuple(broken_streams(index, loose)),
            tuple(attention_over_depth(index, trunks)),
            opaque_operators(program.graph_module),
        )
        accepted, refusals = judge(index, [_candidate(index, trunk) for trunk in trunks], breaks)
        chains = []
        for candidate, kind in accepted:
            chains.append(_chain(candidate, kind))
            refusals.extend(_raw_reads(candidate))
        found = dataclasses.replace(program, chains=tuple(chains), refusals=(*program.refusals, *refusals))
        return found, len(chains)


def _candidate(index: GraphIndex, trunk: Trunk) -> Candidate:
    around = zip(trunk.values, (None, *trunk.adds), (*trunk.adds, None), strict=True)
    return Candidate(trunk, tuple(reads_of(index, stream, before, after) for stream, before, after in around))


def _chain(candidate: Candidate, kind: str) -> ResidualChain:
    """Group the adds of an accepted trunk into sublayers: one ends wherever anything but the next add reads the stream.

    Parallel branches, shared experts and injections add to the stream several times between two reads; they are one
    increment, since no reader can tell them apart.
    """
    sublayers, pending, reads = [], [], []
    for i, stream_reads in enumerate(candidate.reads):
        if i > 0:
            pending.append(candidate.trunk.adds[i - 1])
        last = i == len(candidate.reads) - 1
        if pending and (stream_reads.groups or last):
            sublayers.append(tuple(pending))
            pending = []
        read = _read(stream_reads)
        if read is not None:
            reads.append((read, len(sublayers)))
    shape = shape_of(reads[0][0].stream)
    assert shape is not None
    return ResidualChain(candidate.trunk.root, tuple(sublayers), tuple(reads), kind, int(shape[-1]))


def _read(reads: StreamReads) -> Read | None:
    """All invariant readers of one stream value as one site: parallel branches and shared norms see the same value."""
    groups = [group for group in reads.groups if group.is_invariant]
    if not groups:
        return None
    edges = tuple(edge for group in groups for edge in group.edges)
    readers = [group.edges[0][1] for group in groups]
    eps = next((group.eps.of_mean_square for group in groups if group.eps is not None), None)
    modules = tuple(dict.fromkeys(module_of(reader) for reader in readers))
    path: list[Node] = []
    value = reads.base
    while (source := reads.images[value]) is not None:
        path.insert(0, value)
        value = source
    return Read(reads.base, edges, modules, source_line_of(readers[0]), eps, tuple(path))


def _raw_reads(candidate: Candidate) -> list[Refusal]:
    refusals = []
    for reads in candidate.reads:
        for group in reads.groups:
            if not group.is_invariant:
                reader = group.obstacles[0]
                refusals.append(
                    Refusal("read", describe_obstacles(group), reader.name, module_of(reader), source_line_of(reader))
                )
    return refusals
