"""Write the stages of a rewritten graph as graphs of their own, with their transfers as nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.node import Argument

from attnres_compile.passes.base import describe, is_site, site_number
from attnres_compile.passes.cuts import Cuts
from attnres_compile.passes.modes import Modes, ModeWriter
from attnres_compile.passes.transfers import block_cache_get, block_cache_put, block_recv, block_send
from attnres_compile.patterns.operations import is_call, value_of
from attnres_compile.transport import StageTransport

NAME = "partition"


@dataclasses.dataclass(frozen=True)
class StageGraph:
    """One stage: its graph, and its sites in order, each with its number in the whole model and its node.

    Its inputs are the model's for the first stage, and what it receives, then what it fetches, for the others. It returns
    what it sends and what it keeps as two tuples; the last stage returns the model's outputs as one.
    """

    graph: Graph
    sites: tuple[tuple[int, Node], ...]


def stage_graphs(
    graph_module: GraphModule, cuts: Cuts, transport: tuple[StageTransport, ...], labels: dict[str, str]
) -> tuple[StageGraph, ...]:
    """The graphs of all stages; every operation that is computed once is in exactly one of them.

    ``labels`` name the crossing values, by their node's name.
    """
    graph = graph_module.graph
    numbers = {node: site_number(node) for node in graph.nodes if is_site(node)}
    modes, named = Modes(graph), {node.name: node for node in graph.nodes}
    writers = (_StageWriter(graph, cuts, stage, plan, labels, modes, named) for stage, plan in enumerate(transport))
    return tuple(writer.write(numbers, is_last=stage == len(transport) - 1) for stage, writer in enumerate(writers))


class _StageWriter:
    def __init__(
        self, original: Graph, cuts: Cuts, stage: int, transport: StageTransport, labels: dict[str, str], modes: Modes,
        named: dict[str, Node],
    ) -> None:  # fmt: skip
        self.original, self.cuts, self.stage, self.transport = original, cuts, stage, transport
        self.labels, self.modes, self.named = labels, modes, named
        self.graph = Graph()
        self.copies: dict[Node, Node] = {}

    def write(self, numbers: dict[Node, int], is_last: bool) -> StageGraph:
        own = [node for node, stage in self.cuts.stage.items() if stage == self.stage and is_call(node)]
        output = self.original.output_node()
        looked_up = [node for node in output.all_input_nodes if node in self.cuts.free or node.op == "get_attr"]
        wanted = set(self._with_free_operands([*own, *(looked_up if is_last else ())]))
        self._inputs()
        for node in self.original.nodes:
            if node.op == "get_attr" and node in wanted:
                self.copies[node] = self.graph.node_copy(node)
        for node in self._arrivals():
            self._arrive(node)
        writer = ModeWriter(self.modes, self.graph)
        for node in self.original.nodes:
            if node in wanted and node not in self.copies:
                writer.switch(self.modes[node])
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        writer.switch(())
        if is_last:
            self.graph.output(map_arg(output.args[0], self.copies.__getitem__))
        else:
            self._departures()
        sites = tuple((numbers[node], self.copies[node]) for node in own if node in numbers)
        return StageGraph(self.graph, sites)

    def _with_free_operands(self, roots: list[Node]) -> Iterator[Node]:
        """``roots``, and what is computed or looked up wherever it is read."""
        seen: set[Node] = set()
        waiting = list(roots)
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                yield node
                waiting.extend(source for source in node.all_input_nodes if source in self.cuts.free or source.op == "get_attr")

    def _arrivals(self) -> list[Node]:
        return [self.named[name] for name in (*self.transport.receives, *self.transport.fetches)]

    def _inputs(self) -> None:
        inputs = self._arrivals() if self.stage else list(self.original.find_nodes(op="placeholder"))
        for node in inputs:
            copy = self.graph.placeholder(node.name)
            copy.meta = {"example_value": value_of(node)}
            self.copies[node] = copy

    def _arrive(self, node: Node) -> None:
        label = self.labels[node.name]
        if node.name in self.transport.receives:
            arrived = self.graph.call_function(block_recv, (self.copies[node], label, self.stage - 1))
        else:
            arrived = self.graph.call_function(block_cache_get, (self.copies[node], label))
        self.copies[node] = describe(arrived, node, NAME, value_of(node))

    def _departures(self) -> None:
        relays = self.transport.relays
        sent = []
        for node in map(self.named.__getitem__, self.transport.sends):
            relayed: dict[str, Argument] = {"relayed": True} if node.name in relays else {}
            arguments = (self.copies[node], self.labels[node.name], self.stage + 1)
            sent.append(describe(self.graph.call_function(block_send, arguments, relayed), node, NAME, value_of(node)))
        kept, elsewhere = [], {*self.transport.sends, *self.transport.receives}
        for node in map(self.named.__getitem__, self.transport.keeps):
            alone: dict[str, Argument] = {} if node.name in elsewhere else {"alone": True}
            put = self.graph.call_function(block_cache_put, (self.copies[node], self.labels[node.name]), alone)
            kept.append(describe(put, node, NAME, value_of(node)))
        self.graph.output((tuple(sent), tuple(kept)))
