"""The residual streams of a model in the user's own words: which modules add to them, and which read them."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

from torch.fx import Node

from attnres_compile.chain import ResidualAdd, ResidualChain
from attnres_compile.passes.base import Program
from attnres_compile.patterns.operations import module_of, shape_of
from attnres_compile.plan import SitePlan


@dataclasses.dataclass(frozen=True)
class StreamRead:
    """Norms, by the qualified names of their modules, that read the stream ``before`` sublayers have added to it.

    ``site`` is the number of the site that they read, or None where the root is all there is to read.
    """

    modules: tuple[str, ...]
    before: int
    site: int | None


@dataclasses.dataclass(frozen=True)
class Stream:
    """One chain: the module of its root, those of every sublayer's outputs, and its reads in stream order."""

    kind: str
    hidden_size: int
    root: str
    sublayers: tuple[tuple[str, ...], ...]
    reads: tuple[StreamRead, ...]


def streams_of(program: Program) -> tuple[Stream, ...]:
    """The streams of a program whose chains were found; sites are numbered as in its report."""
    streams: list[Stream] = []
    first = 0
    for chain in program.chains:
        streams.append(_stream(chain, program.parameters, first))
        first += len(chain.sites)
    return tuple(streams)


def _stream(chain: ResidualChain, parameters: frozenset[str], first: int) -> Stream:
    numbers = iter(range(first, first + len(chain.sites)))
    stream = {chain.root, *(add.node for add in chain.adds), *(read.stream for read, _ in chain.reads)}
    reads = tuple(StreamRead(read.modules, before, next(numbers) if before else None) for read, before in chain.reads)
    sublayers = tuple(_writers(adds, stream, parameters) for adds in chain.sublayers)
    return Stream(chain.kind, chain.hidden_size, module_of(chain.root) or chain.root.name, sublayers, reads)


def _writers(adds: tuple[ResidualAdd, ...], stream: set[Node], parameters: frozenset[str]) -> tuple[str, ...]:
    """The modules around the branches' last projections: dropouts and norms behind those say little about a sublayer."""
    found: dict[Node, str] = {}
    for add in adds:
        waiting, seen = deque([add.branch]), set(stream)
        while waiting:
            node = waiting.popleft()
            if node in seen:
                continue
            seen.add(node)
            if any(_is_matrix(source, parameters) for source in node.all_input_nodes):
                found[node] = _around(module_of(node), module_of(add.node))
            else:
                waiting.extend(source for source in node.all_input_nodes if source.op != "placeholder")
    in_order = [found[node] for node in sorted(found)] or [module_of(add.branch) or module_of(add.node) for add in adds]
    return tuple(dict.fromkeys(in_order))


def _around(projection: str, adding: str) -> str:
    """The module that holds a projection, or the projection where that module holds the add too."""
    parent = projection.rpartition(".")[0]
    return parent if parent and not f"{adding}.".startswith(f"{parent}.") else projection


def _is_matrix(node: Node, parameters: frozenset[str]) -> bool:
    return node.name in parameters and len(shape_of(node) or ()) > 1


def sources_in_words(site: SitePlan, blocks: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """What a site attends to, for people; ``blocks`` are half-open ranges of sublayers, which people count from one."""
    complete = [f"block {i} ({_sublayers(*block)})" for i, block in enumerate(blocks[: site.complete], start=1)]
    partial = [f"partial sum ({_sublayers(site.before - site.partial, site.before)})"] if site.partial else []
    return ("embedding", *complete, *partial)


def _sublayers(start: int, stop: int) -> str:
    return f"sublayer {stop}" if stop - start == 1 else f"sublayers {start + 1} to {stop}"
