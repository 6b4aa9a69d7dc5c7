"""What rewriting did to a graph: which reads it replaced, what stayed, and whatever differs that should not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence

from torch.fx import Graph, Node

from attnres_compile.chain import ResidualChain
from attnres_compile.compare import GraphDiff, diff_graphs, match_operations
from attnres_compile.passes.base import MADE_BY
from attnres_compile.passes.normalize import markers_in
from attnres_compile.patterns.operations import module_of, name_of, value_of

_NAMED = 3  # operations that a difference names; it counts the others


@dataclasses.dataclass(frozen=True)
class Operation:
    """A node of a graph without the graph: ``arguments`` and ``value`` (dtype and shape) as text."""

    name: str
    kind: str
    module: str
    arguments: str
    value: str

    def __str__(self) -> str:
        return f"{self.name} [{self.module}]" if self.module else self.name


@dataclasses.dataclass(frozen=True)
class ReplacedRead:
    """A site whose readers read a mixture of ``sources``, in words, instead of the stream; ``node`` is the stream's."""

    site: int
    modules: tuple[str, ...]
    node: str
    sources: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GraphComparison:
    """The graphs as they ran. ``differences`` are those that neither rewriting nor its options account for, in sentences."""

    replaced: tuple[ReplacedRead, ...]
    diff: GraphDiff
    differences: tuple[str, ...]

    def summary(self) -> str:
        """The numbers, in a sentence."""
        diff = self.diff
        return (
            f"{len(self.replaced)} reads of a residual stream replaced; {diff.kept} operations kept, {len(diff.removed)} "
            f"removed, {len(diff.added)} added"
        )


def operations_of(graph: Graph) -> tuple[Operation, ...]:
    """All nodes of a graph as it was captured, but for the marker of converted models. They hold on to nothing."""
    markers = markers_in(graph)
    left_out = {*markers, *(source for marker in markers for source in marker.all_input_nodes)}
    return tuple(_operation(node) for node in graph.nodes if node not in left_out)


def _operation(node: Node) -> Operation:
    text = re.sub(r" at 0x[0-9a-f]+", "", repr((node.args, node.kwargs)))
    value = value_of(node)
    described = f"{value.dtype} {list(value.shape)}".removeprefix("torch.") if hasattr(value, "shape") else ""
    return Operation(node.name, name_of(node), module_of(node), text, described)


def captured_differences(original: Sequence[Operation], other: Sequence[Operation]) -> tuple[str, ...]:
    """How two models differ before anything is rewritten, a sentence for every kind of difference. Conversion makes none."""
    before, after = ({operation.name: operation for operation in operations} for operations in (original, other))
    both = [(before[name], after[name]) for name in before if name in after]
    return tuple(_sentences([
        ("only in the original", [operation for name, operation in before.items() if name not in after], str),
        ("only in the other model", [operation for name, operation in after.items() if name not in before], str),
        *((f"of another {what}", *_changed(both, what)) for what in ("kind", "arguments", "value")),
    ]))  # fmt: skip


def _changed(pairs: list[tuple[Operation, Operation]], what: str) -> tuple[list[Operation], Callable[[Operation], str]]:
    changed = {a: (getattr(a, what), getattr(b, what)) for a, b in pairs if getattr(a, what) != getattr(b, what)}
    return list(changed), lambda operation: "{}: {} before, {} now".format(operation, *changed[operation])


def _sentences(found: Sequence[tuple[str, list[Operation], Callable[[Operation], str]]]) -> Iterator[str]:
    for what, operations, show in found:
        if operations:
            named = "; ".join(map(show, operations[:_NAMED]))
            others = f"; and {len(operations) - _NAMED} more" if len(operations) > _NAMED else ""
            yield f"{len(operations)} operation{'s' if len(operations) > 1 else ''} {what}: {named}{others}"


def stream_nodes(chains: Sequence[ResidualChain]) -> frozenset[str]:
    """Names of the operations that make up the standard residual streams: rewriting leaves out those that nothing reads."""
    adds = (node for chain in chains for add in chain.adds for node in (add.node, *add.path))
    paths = (node for chain in chains for read, _ in chain.reads for node in read.path)
    return frozenset(node.name for node in (*adds, *paths))


def compare_graphs(
    original: Graph, other: Graph, stream: frozenset[str], replaced: tuple[ReplacedRead, ...], known: tuple[str, ...]
) -> GraphComparison:
    """Compare the graphs that ran. ``stream`` names the residual streams' own operations; ``known`` differences come first."""
    _, removed, added = match_operations(original, other)
    strange = [
        (what, [_operation(node) for node in nodes if MADE_BY not in node.meta and node.name not in stream], str)
        for what, nodes in (("lost beside the residual stream", removed), ("new that rewriting did not make", added))
    ]
    return GraphComparison(replaced, diff_graphs(original, other), (*known, *_sentences(strange)))
