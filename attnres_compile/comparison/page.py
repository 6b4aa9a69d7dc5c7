"""A comparison of two checkpoints as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attnres_compile.comparison.drawing import COLORS, HEATS, ChainDrawing
from attnres_compile.comparison.markup import element, text
from attnres_compile.comparison.report import CheckpointComparison

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --dim: #68707f; --paper: #fff; --panel: #f4f5f8; --line: #d5d9e2;
  --alarm: #b3141d; --wash: 14%;
  --h0: #9aa3b2; --h1: #d9a400; --h2: #e77f00; --h3: #dd4a1c; --h4: #b3141d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --dim: #98a1b3; --paper: #14171d; --panel: #1e232c; --line: #39404d;
  --alarm: #ff7b78; --wash: 24%; --h0: #7a8394; --h1: #e3b93c; --h2: #f39b3d; --h3: #f47346; --h4: #ff5a5f; } }
body { margin: 0 auto; padding: 1.2rem 1.6rem 4rem; width: max-content; min-width: 56rem; background: var(--paper);
  color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .6rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
h1, p, .alarm, td { overflow-wrap: anywhere; }
p, .alarm, .tiles, .legend, .note { max-width: 62rem; }
code, td, svg text { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
dl.about { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: 0; max-width: 62rem; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
.alarm { border: 2px solid var(--alarm); border-radius: 6px; padding: .5rem .9rem; margin: 1rem 0; color: var(--alarm); }
.alarm ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem; }
.tiles b { display: block; font-size: 1.15rem; } .tiles span, .legend, .note { color: var(--dim); font-size: .85rem; }
.head { position: sticky; top: 0; z-index: 1; background: var(--paper); border-bottom: 1px solid var(--line); }
details { break-inside: avoid; } summary { cursor: pointer; }
details.rows > summary { background: var(--panel); padding: .15rem .5rem; font-size: .85rem; color: var(--dim); }
svg { display: block; overflow: hidden; } svg text { font-size: 11.5px; fill: var(--ink); }
svg .title { font: 600 13px system-ui, sans-serif; } svg .lane { text-anchor: middle; fill: var(--dim); font-size: 10px; }
svg .end { text-anchor: end; } svg .index { fill: var(--dim); font-size: 10px; }
svg .number { fill: color-mix(in srgb, var(--heat) 60%, var(--ink)); }
path { fill: none; } .stream { stroke: var(--block, var(--dim)); stroke-width: 2; } .root { fill: var(--dim); }
.read, .write { stroke: var(--dim); stroke-width: 1; } .write { stroke-dasharray: 3 2; }
.add { stroke: var(--ink); fill: var(--paper); stroke-width: 1.2; } .dot { stroke: var(--ink); stroke-linecap: round; }
.tick { stroke: var(--ink); } .thin { stroke-width: 1; stroke-opacity: .3; }
.w0 { stroke-opacity: .2; } .w1 { stroke-opacity: .4; } .w2 { stroke-opacity: .7; }
.band { fill: var(--block); fill-opacity: .1; } .box { fill: var(--panel); stroke: var(--line); }
.output { stroke-dasharray: 4 2; } .site { fill: var(--heat, var(--dim)); stroke: var(--paper); }
.heat .box { fill: color-mix(in srgb, var(--heat) var(--wash), var(--panel)); } .h0 .box { fill: var(--panel); }
.hot .box { stroke: var(--heat); stroke-width: 2.5; } .hot .number { font-weight: 700; } .row:hover .box { stroke: var(--ink); }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; background: var(--heat); }
table { border-collapse: collapse; margin: .4rem 0; } td, th { padding: .1rem .7rem; text-align: right; font-size: .85rem; }
th { border-bottom: 1px solid var(--line); } .left { text-align: left; max-width: 44rem; }
@media print { :root { --paper: #fff; --ink: #000; --panel: #f4f5f8; } body { width: auto; min-width: 0; padding: 0; }
  .head { position: static; } h2, .legend, .head { break-after: avoid; }
  svg { max-width: 100%; height: auto; } .rows > summary { list-style: none; } }
"""
_BLOCKS = "".join(f".b{i} {{ --block: hsl({(210 + 97 * i) % 360} 60% 52%); }}" for i in range(COLORS))
_HEATS = "".join(f".h{i} {{ --heat: var(--h{i}); }}" for i in range(HEATS))


def page(comparison: CheckpointComparison) -> str:
    """The comparison as HTML: the numbers, the streams side by side, and what rewriting did to the graph.

    It loads nothing, holds no script, prints, and follows the reader's choice of light or dark.
    """
    title = text(f"{comparison.source.path} → {comparison.destination.path}")
    chains = (part for i in range(len(comparison.streams)) for part in _chain(comparison, i))
    parts = (*_about(comparison), *_alarm(comparison), *_numbers(comparison), *chains, *_graph(comparison), *_sites(comparison))
    head = element("head", '<meta charset="utf-8">', element("title", title), element("style", _STYLE, _BLOCKS, _HEATS))
    body = element("body", element("h1", title), *(f"\n{part}" for part in parts), "\n")
    return "<!DOCTYPE html>\n" + element("html", head, "\n", body, lang="en") + "\n"


def _about(comparison: CheckpointComparison) -> Iterator[str]:
    rows = [
        (role, f"{checkpoint.path}: {checkpoint.model}, {checkpoint.dtype}, {checkpoint.stream}")
        for role, checkpoint in (("original", comparison.source), ("other", comparison.destination))
    ]
    cells = (element("dt", role) + element("dd", text(what)) for role, what in (*rows, ("on", str(comparison.inputs))))
    yield element("dl", *cells, class_="about")


def _alarm(comparison: CheckpointComparison) -> Iterator[str]:
    """What differs and should not, and where the streams part."""
    if comparison.graph.differences:
        listed = element("ul", *(element("li", text(difference)) for difference in comparison.graph.differences))
        yield element("div", "<b>What should be the same differs</b>", listed, class_="alarm", role="alert")
    first, rounding = comparison.first_different_site, f"rounding (a mean error of {comparison.rounding:.1g} RMS)"
    if first is None:
        yield element("p", text(f"At every site the readers read the same, but for {rounding}."))
    else:
        readers = element("code", text(", ".join(first.modules)))
        yield element("p", f"The streams part at site {first.site}, read by {readers}: beyond {text(rounding)}.")


def _numbers(comparison: CheckpointComparison) -> Iterator[str]:
    numbers = (*comparison.numbers(), ("sites", str(len(comparison.sites))))
    tiles = (element("div", element("b", text(value)), element("span", text(name))) for name, value in numbers)
    yield element("div", *tiles, class_="tiles")
    output = element("code", text(comparison.output.name))
    yield element("p", f"Errors are those of {output}, of shape {list(comparison.output.shape)}.", class_="note")


def _chain(comparison: CheckpointComparison, chain: int) -> Iterator[str]:
    drawing, stream = ChainDrawing(comparison, chain), comparison.streams[chain]
    what = f"Residual stream {chain}: {stream.kind}, {len(stream.sublayers)} sublayers of width {stream.hidden_size}"
    yield element("h2", text(what + (f", in {drawing.prefix[:-1]}" if drawing.prefix else "")))
    if chain == 0:
        yield element("p", _legend(), class_="legend")
    sections = (
        f'<details open class="rows">{element("summary", text(_summary(drawing, *rows)))}{drawing.section(*rows)}</details>'
        for rows in drawing.sections
    )
    yield element("section", element("div", drawing.head(), class_="head"), *sections)


def _legend() -> str:
    heats = " ".join(element("i", class_=f"h{i}") for i in range(HEATS))
    return (
        "Read downwards. Vertical lines are what lasts: the stream, or the embedding (e), the blocks (by number) and the running "
        "partial sum (p). A dot marks a source that a sublayer reads, fainter the smaller its mean depth weight. ⊕ adds a "
        "sublayer's output. ◆ is a site. Colours tell the mean error of what is read over the original's RMS, from rounding "
        f"{heats} to the size of the stream; frames mark the largest. Module names leave out what all share, which stands above. "
        "Hover over a row for all that is known of it."
    )


def _summary(drawing: ChainDrawing, first: int, stop: int) -> str:
    sublayers = [row.sublayer for row in drawing.rows[first:stop] if row.sublayer]
    start, end = sublayers[0], sublayers[-1]
    inside = [n for n, (low, high) in enumerate(drawing.right.blocks, start=1) if low + 1 >= start and high <= end]
    blocks = "" if not inside else f"block {inside[0]}, " if len(inside) == 1 else f"blocks {inside[0]} to {inside[-1]}, "
    worst = drawing.worst(first, stop)
    error = f" · largest error {worst.mean_rel_error:.1e} at site {worst.site}" if worst and worst.mean_rel_error else ""
    return f"{blocks}sublayers {start} to {end}{error}"


def _graph(comparison: CheckpointComparison) -> Iterator[str]:
    graph, diff = comparison.graph, comparison.graph.diff
    yield element("h2", "The graph") + element("p", text(graph.summary()))
    reads = [(str(read.site), ", ".join(read.modules), "; ".join(read.sources), read.node) for read in graph.replaced]
    yield _folded("Reads replaced", ("site", "reader", "reads, instead of the stream", "operation"), reads, (1, 2, 3))
    yield _folded("Operations that stay", ("operation", "number"), [(kind, str(count)) for kind, count in diff.kinds], (0,))
    for what, lines in (("Operations removed", diff.removed), ("Operations added", diff.added)):
        yield _folded(what, ("operation",), [(line,) for line in lines], (0,))


def _sites(comparison: CheckpointComparison) -> Iterator[str]:
    columns = ("site", "stream", "reader", "after sublayer", "max error", "mean error", "RMS", "max / RMS", "mean / RMS")
    rows = []
    for site in comparison.sites:
        errors = (site.max_abs_error, site.mean_abs_error, site.original_rms, site.max_rel_error, site.mean_rel_error)
        place = (str(site.site), str(site.chain), ", ".join(site.modules), str(site.before))
        rows.append((*place, *(f"{error:.3g}" for error in errors)))
    yield element("h2", "What the readers read") + _folded("All sites", columns, rows, (2,))


def _folded(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """A table behind its title, or nothing if it is empty; ``left`` counts the columns of text."""
    lines = [
        element("tr", *(element(tag, text(cell), class_="left" if i in left else "right") for i, cell in enumerate(cells)))
        for tag, cells in (("th", columns), *(("td", row) for row in rows))
    ]
    return element("details", element("summary", f"{text(title)} ({len(rows)})"), element("table", *lines)) if rows else ""
