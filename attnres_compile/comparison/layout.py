"""Where a residual stream's sources, sums, reads and sublayers stand when it is drawn downwards, one row per sublayer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import networkx

from attnres_compile.comparison.streams import Stream, StreamRead
from attnres_compile.plan import plan_site

ROW = 34  # height of a row; all lengths are in pixels
_READ, _WRITE = 10, 27  # where in its row a sublayer reads, and where it adds
_STEP, _LANES = 14, 400  # between two lanes, unless many lanes must share the room
_BOX, _MARGIN = 292, 14

Node = tuple[str, int]
"""``("source", n)``: the root for n = 0, else block n. ``("sum", k)``: a sum up to sublayer k, and ``("sublayer", k)``: that
sublayer, from 1 on. ``("read", r)``: the read in row r."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the drawing: a read, the sublayer (from 1 on) that it feeds, or both; neither in the row of the root."""

    read: StreamRead | None
    sublayer: int | None


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two drawings. ``graph`` holds the edges, and every node's position as ``x`` and ``y``.

    ``lanes`` are the positions of the sources that stay, ``step`` apart; ``run`` is that of the running sum, ``site`` and
    ``box`` are those of what is drawn beside it; ``right`` is where the drawing ends. ``blocks`` are half-open ranges of
    sublayers. The standard residual stream has neither blocks nor lanes.
    """

    graph: networkx.DiGraph
    blocks: tuple[tuple[int, int], ...]
    lanes: tuple[float, ...]
    step: float
    run: float
    site: float
    box: float
    right: float


def rows_of(stream: Stream) -> tuple[Row, ...]:
    """The row of the root, and then one for every read and sublayer. Of several reads before a sublayer the last feeds it."""
    rows = [Row(None, None)]
    for before in range(len(stream.sublayers) + 1):
        sublayer = before + 1 if before < len(stream.sublayers) else None
        reads = [read for read in stream.reads if read.before == before]
        rows += [Row(read, None) for read in reads[:-1]]
        if reads or sublayer:
            rows.append(Row(reads[-1] if reads else None, sublayer))
    return tuple(rows)


def lay_out(stream: Stream, block_sizes: Sequence[int] | None, left: float) -> Side:
    """Place a stream to the right of ``left``: the standard residual stream, or with blocks of the given sizes."""
    stops = list(itertools.accumulate(block_sizes or ()))
    blocks = tuple(zip([0, *stops], stops, strict=False))
    count = 1 + len(blocks) if blocks else 0
    step = min(_STEP, _LANES / max(count, 1))
    lanes = tuple(left + _MARGIN + i * step for i in range(count))
    run = left + _MARGIN + count * step + (_MARGIN if blocks else 0)
    site = run + 22
    box = site + 18
    graph = networkx.DiGraph()
    graph.add_node(("source", 0), x=lanes[0] if blocks else run, y=ROW * 0.7)
    _add_sublayers(graph, stream, run, box)
    _add_blocks(graph, blocks, lanes)
    _add_reads(graph, stream, blocks, site)
    return Side(graph, blocks, lanes, step, run, site, box, box + _BOX)


def _add_sublayers(graph: networkx.DiGraph, stream: Stream, run: float, box: float) -> None:
    for i, row in enumerate(rows_of(stream)):
        if row.sublayer is not None:
            graph.add_node(("sublayer", row.sublayer), x=box, y=i * ROW + ROW / 2)
            graph.add_node(("sum", row.sublayer), x=run, y=i * ROW + _WRITE)
            graph.add_edge(("sublayer", row.sublayer), ("sum", row.sublayer))


def _add_blocks(graph: networkx.DiGraph, blocks: tuple[tuple[int, int], ...], lanes: tuple[float, ...]) -> None:
    """Join the sums of every block; without blocks, those of the whole stream from its root on."""
    sums = sorted(node for node in graph if node[0] == "sum")
    starts = {start for start, _ in blocks}
    if not blocks:
        graph.add_edge(("source", 0), sums[0])
    graph.add_edges_from((a, b) for a, b in itertools.pairwise(sums) if a[1] not in starts)
    for n, (_, stop) in enumerate(blocks, start=1):
        graph.add_node(("source", n), x=lanes[n], y=graph.nodes["sum", stop]["y"] + ROW - _WRITE)
        graph.add_edge(("sum", stop), ("source", n))


def _add_reads(graph: networkx.DiGraph, stream: Stream, blocks: tuple[tuple[int, int], ...], site: float) -> None:
    for i, row in enumerate(rows_of(stream)):
        if row.read is None:
            continue
        graph.add_node(("read", i), x=site, y=i * ROW + _READ)
        graph.add_edges_from((source, ("read", i)) for source in _sources(row.read.before, len(stream.sublayers), blocks))
        if row.sublayer is not None:
            graph.add_edge(("read", i), ("sublayer", row.sublayer))


def _sources(before: int, num_sublayers: int, blocks: tuple[tuple[int, int], ...]) -> list[Node]:
    if not blocks or not before:
        return [("sum", before) if before else ("source", 0)]
    site = plan_site(before, blocks[0][1], num_sublayers)
    return [("source", n) for n in range(1 + site.complete)] + ([("sum", before)] if site.partial else [])


def sections_of(rows: Sequence[Row], blocks: Sequence[tuple[int, int]], at_least: int = 8) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of rows that hold whole blocks, and ``at_least`` so many sublayers where there are as many."""
    stops = [stop for _, stop in blocks] or [row.sublayer for row in rows if row.sublayer]
    cuts, last = [0], 0
    for stop in stops[:-1]:
        if stop - last >= at_least:
            cuts.append(1 + next(i for i, row in enumerate(rows) if row.sublayer == stop))
            last = stop
    return tuple(zip(cuts, [*cuts[1:], len(rows)], strict=True))
