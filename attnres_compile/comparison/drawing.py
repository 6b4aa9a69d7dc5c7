"""The residual streams of two checkpoints side by side, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from attnres_compile.comparison.layout import ROW, Row, Side, lay_out, rows_of, sections_of
from attnres_compile.comparison.markup import element, number, text
from attnres_compile.comparison.numbers import SiteComparison
from attnres_compile.comparison.report import CheckpointComparison
from attnres_compile.comparison.streams import Stream, sources_in_words
from attnres_compile.plan import plan_site

COLORS, HEATS, SHADES = 8, 5, 4  # of blocks, of errors, of depth weights: classes b0.., h0.., w0.. of the style sheet
_LETTERS = 36  # that fit into a box
_GAP, _NUMBER, _HEAD = 36, 116, 44  # pixels: between the sides, for errors, and above all rows
_DENSE = 6  # pixels between lanes below which dots would run together
_HIGHLIGHTED, _LISTED, _LABELS = 5, 20, 20  # sites with a frame, sources in a hover title, lanes with a label


class ChainDrawing:
    """One chain of a comparison: a head with the names of the columns, and sections of whole blocks, as ranges of rows."""

    def __init__(self, comparison: CheckpointComparison, chain: int) -> None:
        self.comparison = comparison
        self.chain, self.stream = chain, comparison.streams[chain]
        self.rows = rows_of(self.stream)
        blocks = [side.block_sizes[chain] if side.block_sizes else None for side in (comparison.source, comparison.destination)]
        self.left = lay_out(self.stream, blocks[0], 0)
        self.right = lay_out(self.stream, blocks[1], self.left.right + _GAP)
        self.width = math.ceil(self.right.right + _NUMBER)
        self.sections = sections_of(self.rows, self.right.blocks or self.left.blocks)
        self.prefix = _common_prefix(self.stream)
        self._sites = {site.site: site for site in comparison.sites if site.chain == chain}
        self._first = comparison.first_different_site
        self._highlighted = {site.site for site in comparison.most_different(_HIGHLIGHTED)}

    def head(self) -> str:
        """Names of the columns, and of the lanes in them."""
        parts = []
        for side, checkpoint in ((self.left, self.comparison.source), (self.right, self.comparison.destination)):
            left = (*side.lanes, side.run)[0] - 6
            parts.append(element("text", text(checkpoint.stream_of(self.chain)), class_="title", x=left, y=15))
            every = max(1, math.ceil(len(side.lanes) / _LABELS))
            labels = [(x, str(i or "e"), f"block {i}" if i else "embedding") for i, x in enumerate(side.lanes) if i % every == 0]
            if side.blocks:
                labels.append((side.run, "p", "partial sum"))
            parts += [element("text", label, _title(what), class_="lane", x=x, y=37) for x, label, what in labels]
        parts.append(element("text", "error / RMS", class_="lane end", x=self.width - 8, y=37))
        return self._svg(0, _HEAD, parts, "columns")

    def section(self, first: int, stop: int) -> str:
        """The rows from ``first`` to ``stop``, both sides."""
        top, bottom = first * ROW, stop * ROW
        parts: list[str] = []
        for side in (self.left, self.right):
            parts += [*self._bands(side, top, bottom), *self._lanes(side, top, bottom)]
            for i in range(first, stop):
                parts += self._row(side, i, self.rows[i]) if i else self._root(side)
        return self._svg(top, bottom - top, parts, f"rows {first} to {stop - 1} of the residual streams")

    def worst(self, first: int, stop: int) -> SiteComparison | None:
        """The site with the largest error in the rows from ``first`` to ``stop``."""
        sites = [self._sites[row.read.site] for row in self.rows[first:stop] if row.read and row.read.site is not None]
        return max(sites, key=lambda site: _rank(site.mean_rel_error), default=None)

    def _svg(self, top: int, height: int, parts: Iterable[str], label: str) -> str:
        size = {"width": self.width, "height": height, "viewBox": f"0 {top} {self.width} {height}"}
        return element("svg", *parts, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=label, **size)

    def _bands(self, side: Side, top: int, bottom: int) -> Iterator[str]:
        """The backgrounds of blocks."""
        places = {row.sublayer: i for i, row in enumerate(self.rows)} | {0: 0}
        for n, (start, stop) in enumerate(side.blocks, start=1):
            y, end = max((places[start] + 1) * ROW, top), min((places[stop] + 1) * ROW, bottom)
            if y < end:
                size = {"x": side.run - 9, "y": y + 1, "width": side.right - side.run + 13, "height": end - y - 2, "rx": 5}
                yield element("rect", _title(f"block {n}"), class_=f"band b{n % COLORS}", **size)

    def _lanes(self, side: Side, top: int, bottom: int) -> Iterator[str]:
        """Vertical lines of what lasts: the sources, and the running sum of every block or of the whole stream."""
        nodes = side.graph.nodes
        end = max(y for (kind, _), y in nodes(data="y") if kind == "read")
        thin = " thin" if side.step < _DENSE else ""
        for n, x in enumerate(side.lanes):
            yield _line(f"stream b{n % COLORS}{thin}", x, max(nodes["source", n]["y"], top), x, min(end, bottom))
        if not side.blocks:
            yield _line("stream", side.run, max(nodes["source", 0]["y"], top), side.run, min(end, bottom))
        for n, (start, stop) in enumerate(side.blocks, start=1):
            first, last = (nodes["sum", k]["y"] for k in (start + 1, stop))
            yield _line(f"stream b{n % COLORS}", side.run, max(first, top), side.run, min(last, bottom))
            if top <= last < bottom:
                x, y = side.lanes[n], nodes["source", n]["y"]
                curve = f"M{number(side.run)} {last}C{number(side.run)} {y} {number(x)} {last} {number(x)} {y}"
                yield element("path", class_=f"stream b{n % COLORS}", d=curve)

    def _root(self, side: Side) -> Iterator[str]:
        x, y = (side.graph.nodes["source", 0][axis] for axis in "xy")
        yield element("circle", class_="root", cx=x, cy=y, r=5)
        yield element("text", text(self._short((self.stream.root,))), _title(self.stream.root), x=x + 12, y=y + 4)

    def _row(self, side: Side, i: int, row: Row) -> Iterator[str]:
        site = self._sites.get(row.read.site) if row.read and row.read.site is not None else None
        parts = [_title(self._hover(side, row, site))]
        style = "row"
        if row.read is not None:
            parts += self._read(side, i, site)
        parts += self._box(side, i, row)
        if row.sublayer is not None:
            y = side.graph.nodes["sum", row.sublayer]["y"]
            parts.append(_line("write", side.box, y, side.run, y))
            plus = f"M{number(side.run - 5)} {y}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0h10m-5 -5v10"
            parts.append(element("path", class_="add", d=plus))
        if site and side is self.right:
            style += f" heat h{self._heat(site)}" + (" hot" if site.site in self._highlighted else "")
            flag = "first " if site is self._first else ""
            error = f"{flag}{site.mean_rel_error:.1e}"
            parts.append(element("text", error, class_="number end", x=self.width - 8, y=i * ROW + 21))
        yield element("g", *parts, class_=style)

    def _read(self, side: Side, i: int, site: SiteComparison | None) -> Iterator[str]:
        """A line from the sources of a read to its box, and a mark on every source."""
        graph, y = side.graph, side.graph.nodes["read", i]["y"]
        places = [graph.nodes[source]["x"] for source in graph.predecessors(("read", i))]
        is_dense = side.step < _DENSE
        yield _line("read", max(places) if is_dense else min(places), y, side.box, y)
        for shade, marked in _by_shade(places, site.weights if site and side is self.right else None):
            marks = "".join(f"M{number(x)} {y - 7}v14" if is_dense else f"M{number(x)} {y}h0" for x in marked)
            style, width = ("tick", side.step) if is_dense else ("dot", 8)
            yield element("path", class_=f"{style} w{shade}", stroke_width=width, d=marks)
        if side.blocks and site:
            yield element("path", class_="site", d=f"M{number(side.site - 6)} {y}l6 -6l6 6l-6 6z")

    def _box(self, side: Side, i: int, row: Row) -> Iterator[str]:
        """On the left the sublayer, on the right who reads for it."""
        size = {"x": side.box, "y": i * ROW + 3, "width": side.right - side.box, "height": ROW - 6, "rx": 4}
        yield element("rect", class_="box" if row.sublayer else "box output", **size)
        writers = self.stream.sublayers[row.sublayer - 1] if row.sublayer else ()
        readers = row.read.modules if row.read else ()
        names, kind = (readers, "reader") if readers and (side is self.right or not writers) else (writers, "sublayer")
        index = element("tspan", f"{row.sublayer} ", class_="index") if row.sublayer else ""
        yield element("text", index, text(self._short(names)), class_=kind, x=side.box + 8, y=i * ROW + 21)

    def _short(self, names: Sequence[str]) -> str:
        """The first of the names without what all share, its middle left out where it is too long for a box."""
        name = (names[0].removeprefix(self.prefix) if names else "") or "the model"
        room = _LETTERS - (3 if len(names) > 1 else 0)
        if len(name) > room:
            name = f"{name[: room // 3]}…{name[-(room - room // 3 - 1) :]}"
        return name + (f" +{len(names) - 1}" if len(names) > 1 else "")

    def _hover(self, side: Side, row: Row, site: SiteComparison | None) -> str:
        """All that is known of a row, a fact a line."""
        lines = []
        if row.sublayer is not None:
            lines.append(f"sublayer {row.sublayer}: {', '.join(self.stream.sublayers[row.sublayer - 1])}")
        if row.read is not None:
            lines.append(f"{f'site {site.site}, ' if site and side.blocks else ''}read by {', '.join(row.read.modules)}")
        if site and side.blocks:
            words = sources_in_words(plan_site(site.before, side.blocks[0][1], len(self.stream.sublayers)), side.blocks)
            few = len(words) <= _LISTED
            lines.append(f"{len(words)} sources" + (f": {_listed(words, site, side is self.right)}" if few else ""))
        if site and side is self.right:
            errors = (site.max_abs_error, site.mean_abs_error, site.mean_rel_error)
            lines.append("max error {:.3g}, mean {:.3g}, mean over the original's RMS {:.3g}".format(*errors))
        return "\n".join(lines)

    def _heat(self, site: SiteComparison) -> int:
        """0 for rounding, up to the hottest for errors as large as the stream."""
        limit, error = self.comparison.rounding, _rank(site.mean_rel_error)
        if error <= limit:
            return 0
        share = 1 - math.log(min(error, 1.0)) / math.log(limit) if limit < 1 else 1.0
        return min(HEATS - 1, 1 + int(share * (HEATS - 1)))


def _listed(words: Sequence[str], site: SiteComparison, is_other: bool) -> str:
    weights = site.weights if is_other else None
    return ", ".join(f"{word} {weight:.3f}" for word, weight in zip(words, weights, strict=True)) if weights else ", ".join(words)


def _by_shade(places: Sequence[float], weights: Sequence[float] | None) -> Iterator[tuple[int, list[float]]]:
    """Places grouped by the depth weight of their source relative to the site's largest."""
    largest = max(weights or (0.0,))
    shades = [min(SHADES - 1, int(weight / largest * SHADES)) for weight in weights or ()] if largest > 0 else []
    for shade in range(SHADES):
        found = [x for x, its in zip(places, shades or [SHADES - 1] * len(places), strict=True) if its == shade]
        if found:
            yield shade, found


def _common_prefix(stream: Stream) -> str:
    """Leading components, with their dot, that the names of all sublayers and readers share."""
    names = [name.split(".") for group in (*stream.sublayers, *(read.modules for read in stream.reads)) for name in group]
    shared = 0
    while all(len(name) > shared + 1 for name in names) and len({name[shared] for name in names}) == 1:
        shared += 1
    return "".join(f"{part}." for part in names[0][:shared]) if names else ""


def _line(style: str, x: float, y: float, to_x: float, to_y: float) -> str:
    """A line, or nothing where it would go up: what lies above or below a section is not drawn."""
    way = f"M{number(x)} {number(y)}L{number(to_x)} {number(to_y)}"
    return element("path", class_=style, d=way) if to_y > y or x != to_x else ""


def _title(what: str) -> str:
    return element("title", text(what))


def _rank(error: float) -> float:
    """Errors in the order of their size; one that is not a number is the worst."""
    return math.inf if math.isnan(error) else error
