"""The page about two checkpoints: self-contained, well-formed, complete, and small."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import networkx
import pytest

from attnres_compile.compare import GraphDiff
from attnres_compile.comparison.graphs import GraphComparison, ReplacedRead
from attnres_compile.comparison.layout import lay_out, rows_of, sections_of
from attnres_compile.comparison.numbers import OutputComparison, SiteComparison
from attnres_compile.comparison.page import page
from attnres_compile.comparison.report import Checkpoint, CheckpointComparison, Inputs
from attnres_compile.comparison.streams import Stream, StreamRead, sources_in_words
from attnres_compile.config import AttnResConfig
from attnres_compile.plan import AttnResPlan, plan_chain

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta"}


def stream(layers: int, prefix: str = "model.layers") -> Stream:
    """A decoder of so many layers, each of attention and MLP."""
    parts = [(f"{prefix}.{i}.{part}",) for i in range(layers) for part in ("self_attn", "mlp")]
    norms = [(f"{prefix}.{i}.{norm}",) for i in range(layers) for norm in ("input_layernorm", "post_attention_layernorm")]
    reads = [StreamRead(names, k, k - 1 if k else None) for k, names in enumerate([*norms, ("model.norm",)])]
    return Stream("prenorm", 64, "model.embed_tokens", tuple(parts), tuple(reads))


def plan_of(found: Stream, config: AttnResConfig) -> AttnResPlan:
    return plan_chain(len(found.sublayers), [read.before for read in found.reads if read.before], config)


def comparison(found: Stream, source: AttnResConfig | None, destination: AttnResConfig | None) -> CheckpointComparison:
    """A comparison of two models with this stream, converted so: errors grow with depth from the eighth site on."""

    def checkpoint(path: str, config: AttnResConfig | None) -> Checkpoint:
        sizes = (tuple(stop - start for start, stop in plan_of(found, config).blocks),) if config else None
        return Checkpoint(path, "LlamaForCausalLM", "float32", config, sizes)

    generator = random.Random(0)
    plan = plan_of(found, destination) if destination else None
    sites, replaced = [], []
    for read in (read for read in found.reads if read.site is not None):
        site = plan.sites[read.site] if plan and read.site is not None else None
        weights = tuple(generator.random() for _ in range(site.num_sources)) if site else None
        error = 1e-7 if read.site < 7 else 1e-3 * read.before
        sites.append(SiteComparison(read.site, 0, read.modules, read.before, 3 * error, error, 1.0, weights))
        if plan and site:
            replaced.append(ReplacedRead(read.site, read.modules, f"add_{read.before}", sources_in_words(site, plan.blocks)))
    diff = GraphDiff(("add = add(a, b)",), ("attnres_sites_0 = site(a, b)",), 40, (("linear", 30), ("mul", 10)))
    return CheckpointComparison(
        checkpoint("/models/one", source), checkpoint("/models/two", destination), Inputs(None, 128, 0),
        OutputComparison("logits", (1, 128, 61), 0.1, 0.01, 0.02, 1e-3, 2e-3, 0.99), tuple(sites), 2e-6, (found,),
        GraphComparison(tuple(replaced), diff, ()),
    )  # fmt: skip


class Balanced(HTMLParser):
    """Collects what a page refers to and its visible text; every element must be closed in order."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def drawings(markup: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", markup, re.DOTALL)]


def sites_drawn(markup: str) -> list[tuple[int, str]]:
    """Number and readers of every site on the right, from the hover titles of its rows."""
    found = []
    for group in (group for drawing in drawings(markup) for group in drawing.iter(f"{SVG}g")):
        if "heat" in group.attrib["class"].split():
            title = group.findtext(f"{SVG}title") or ""
            number, readers = re.search(r"(?:site (\d+), )?read by (.*)", title).groups()  # type: ignore[union-attr]
            found.append((int(number or -1), readers))
    return found


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        pytest.param(None, AttnResConfig(), id="converted"),
        pytest.param(None, AttnResConfig(variant="full"), id="full"),
        pytest.param(AttnResConfig(num_blocks=3), AttnResConfig(num_blocks=6), id="both"),
        pytest.param(None, None, id="plain"),
        pytest.param(AttnResConfig(), None, id="reverted"),
    ],
)
def test_the_page_is_well_formed_and_has_every_site_once_in_order(
    source: AttnResConfig | None, destination: AttnResConfig | None
) -> None:
    found = stream(12)
    markup = page(comparison(found, source, destination))
    parsed = Balanced(markup)
    assert parsed.tags.isdisjoint({"script", "link", "img", "iframe", "object", "use", "image", "foreignObject"})
    assert {name for name, _ in parsed.attributes}.isdisjoint({"href", "src", "xlink:href", "onload", "onclick"})
    drawn = sites_drawn(markup)
    expected = [(read.site if destination else -1, read.modules[0]) for read in found.reads if read.site is not None]
    assert drawn == expected
    shown = [text.text or "" for drawing in drawings(markup) for text in drawing.iter(f"{SVG}text")]
    readers = [element for drawing in drawings(markup) for element in drawing.iter(f"{SVG}text") if _is(element, "reader")]
    names = ["".join(element.itertext()).split(" ")[-1] for element in readers]
    assert [name for name in names if name != "norm"] == [read.modules[0].removeprefix("model.") for read in found.reads[:-1]]
    assert any("standard residual stream" in line for line in shown) == (source is None or destination is None)


def _is(element: ElementTree.Element, style: str) -> bool:
    return style in element.attrib.get("class", "").split()


@pytest.mark.parametrize("config", [AttnResConfig(), AttnResConfig(variant="full")], ids=["block", "full"])
def test_ninety_six_layers_fit_into_three_megabytes_and_reach_for_nothing(config: AttnResConfig) -> None:
    markup = page(comparison(stream(96), None, config))
    assert len(markup.encode()) < 3e6
    assert set(re.findall(r"https?://[^\"' )]*", markup)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in markup and "@import" not in markup
    assert [number for number, _ in sites_drawn(markup)] == list(range(192))
    heights = [float(drawing.attrib["height"]) for drawing in drawings(markup)[1:]]
    assert sum(heights) / 194 >= 30  # a row is high enough to read


def test_names_in_a_row_do_not_overlap() -> None:
    """No text is wider than its box, at the 7 pixels that a letter of the page's font takes at most."""
    long = dataclasses.replace(stream(12, "a_rather_long_name_of_a_model.decoder.transformer_layers"), root="r")
    found = dataclasses.replace(long, sublayers=(*long.sublayers[:-1], ("of_all_modules_the_longest_name_by_far.and.more", "b")))
    for drawing in drawings(page(comparison(found, None, AttnResConfig())))[1:]:
        for row in drawing.iter(f"{SVG}g"):
            (box,) = row.iter(f"{SVG}rect")
            end = float(box.attrib["x"]) + float(box.attrib["width"])
            for element in row.findall(f"{SVG}text"):
                if _is(element, "reader") or _is(element, "sublayer"):
                    assert float(element.attrib["x"]) + 7 * len("".join(element.itertext())) <= end


def test_the_sites_that_differ_most_are_framed_and_the_first_is_flagged() -> None:
    markup = page(comparison(stream(12), None, AttnResConfig()))
    groups = [group for drawing in drawings(markup) for group in drawing.iter(f"{SVG}g")]
    hot = [group.findtext(f"{SVG}title") for group in groups if _is(group, "hot")]
    assert [re.search(r"site (\d+)", title or "")[1] for title in hot] == ["19", "20", "21", "22", "23"]  # type: ignore[index]
    first = [group for group in groups if any((text.text or "").startswith("first ") for text in group.iter(f"{SVG}text"))]
    assert ["site 7," in (group.findtext(f"{SVG}title") or "") for group in first] == [True]
    assert [_is(group, "h0") for group in groups if _is(group, "heat")] == [True] * 7 + [False] * 17


NASTY = "<script>alert(\"&')</script>\x00\x1b\ud800</svg><!--"


def test_all_text_is_escaped() -> None:
    plain = stream(4)
    reads = tuple(dataclasses.replace(read, modules=(f"{NASTY}{read.before}",)) for read in plain.reads)
    nasty = Stream(NASTY, 64, NASTY, tuple((f"{i}{NASTY}",) for i in range(8)), reads)
    found = comparison(nasty, None, AttnResConfig(num_blocks=4))
    markup = page(dataclasses.replace(
        found,
        source=dataclasses.replace(found.source, path=NASTY, model=NASTY, dtype=NASTY),
        inputs=Inputs(NASTY, 4, None),
        output=dataclasses.replace(found.output, name=NASTY),
        graph=dataclasses.replace(found.graph, diff=GraphDiff((NASTY,), (NASTY,), 1, ((NASTY, 1),)), differences=(NASTY,)),
    ))  # fmt: skip
    parsed = Balanced(markup)
    assert "script" not in parsed.tags
    markup.encode("utf-8")
    assert len(drawings(markup)) == 2
    assert [readers for _, readers in sites_drawn(markup)][-1] == f"{NASTY}8".translate({0: 0xFFFD, 0x1B: 0xFFFD, 0xD800: 0xFFFD})


def test_what_should_not_differ_stands_in_the_page() -> None:
    found = comparison(stream(2), None, AttnResConfig())
    assert 'role="alert"' not in page(found)
    loud = page(dataclasses.replace(found, graph=dataclasses.replace(found.graph, differences=("mul is new",))))
    assert 'role="alert"' in loud and "mul is new" in loud


def test_errors_that_are_not_finite_are_drawn_as_the_worst() -> None:
    found = comparison(stream(12), None, AttnResConfig())
    broken = dataclasses.replace(found.sites[3], max_abs_error=math.nan, mean_abs_error=math.nan)
    markup = page(dataclasses.replace(found, sites=(*found.sites[:3], broken, *found.sites[4:])))
    groups = [group for drawing in drawings(markup) for group in drawing.iter(f"{SVG}g")]
    (row,) = [group for group in groups if "site 3," in (group.findtext(f"{SVG}title") or "")]
    assert _is(row, "hot") and _is(row, "h4")


@pytest.mark.parametrize(
    "config", [None, AttnResConfig(num_blocks=3), AttnResConfig(variant="full")], ids=["plain", "block", "full"]
)
def test_edges_of_the_drawing_are_those_of_the_plan(config: AttnResConfig | None) -> None:
    found = stream(4)
    plan = plan_of(found, config) if config else None
    graph = lay_out(found, [stop - start for start, stop in plan.blocks] if plan else None, 0).graph
    assert networkx.is_directed_acyclic_graph(graph)
    for i, row in enumerate(rows_of(found)):
        if row.read is not None and row.read.site is not None:
            sources = set(graph.predecessors(("read", i)))
            if plan is None:
                assert sources == {("sum", row.read.before)}
                continue
            site = plan.sites[row.read.site]
            partial = {("sum", row.read.before)} if site.partial else set()
            assert sources == {("source", n) for n in range(1 + site.complete)} | partial
            assert len(sources) == site.num_sources
    # Every sublayer's output reaches the last read, and so does the root.
    last = ("read", len(rows_of(found)) - 1)
    assert {node for node in graph if node[0] in ("sublayer", "source", "sum")} <= networkx.ancestors(graph, last)


def test_several_reads_between_two_sublayers_and_sublayers_without_one() -> None:
    reads = (StreamRead(("a",), 1, 0), StreamRead(("b",), 1, 1), StreamRead(("c",), 3, 2))
    found = Stream("prenorm", 8, "", (("one",), ("two",), ("three",)), reads)
    assert [(row.read and row.read.modules[0], row.sublayer) for row in rows_of(found)] == [
        (None, None), (None, 1), ("a", None), ("b", 2), (None, 3), ("c", None),
    ]  # fmt: skip
    markup = page(comparison(found, None, AttnResConfig()))
    assert [readers for _, readers in sites_drawn(markup)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("layers", "num_blocks", "expected"), [(2, 2, [4]), (12, 8, [9, 9, 6]), (96, 8, [24] * 8)], ids=["one", "several", "each"]
)
def test_sections_hold_whole_blocks(layers: int, num_blocks: int, expected: list[int]) -> None:
    found = stream(layers)
    rows = rows_of(found)
    sections = sections_of(rows, plan_of(found, AttnResConfig(num_blocks=num_blocks)).blocks)
    assert [first for first, _ in sections[1:]] == [stop for _, stop in sections[:-1]] and sections[-1][1] == len(rows)
    assert [sum(row.sublayer is not None for row in rows[first:stop]) for first, stop in sections] == expected
