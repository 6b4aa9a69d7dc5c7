"""Ancestor questions about a graph, answered in constant time by bitsets."""

from __future__ import annotations

from functools import cached_property

from torch.fx import Graph, Node

from attnres_compile.patterns.mutation import written_tensors
from attnres_compile.patterns.operations import is_float_tensor, reads_only_metadata
from attnres_compile.patterns.residual import match_sum, transparent_source


class GraphIndex:
    """A frozen view of ``graph``: positions, ancestors, and the linear past of every value.

    ``parameters`` names the placeholders that hold parameters and buffers: they are no activations.
    """

    def __init__(self, graph: Graph, parameters: frozenset[str]) -> None:
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.parameters = parameters
        self.ancestors: dict[Node, int] = {}
        for node in self.nodes:
            bits = 1 << self.position[node]
            for source in node.all_input_nodes:
                if not reads_only_metadata(node, source):
                    bits |= self.ancestors[source]
            self.ancestors[node] = bits
        # At once, since passes that hold an index go on to change the graph.
        self._transparent = {node: transparent_source(node, self.have_common_past) for node in self.nodes}

    def is_parameter(self, node: Node) -> bool:
        return node.op == "get_attr" or (node.op == "placeholder" and node.name in self.parameters)

    def bit(self, node: Node) -> int:
        return 1 << self.position[node]

    @cached_property
    def activations(self) -> int:
        """Bitset of the float tensors that are no parameters."""
        return sum(self.bit(node) for node in self.nodes if is_float_tensor(node) and not self.is_parameter(node))

    def have_common_past(self, a: Node, b: Node) -> bool:
        """Whether some activation is an ancestor of both."""
        return bool(self.ancestors[a] & self.ancestors[b] & self.activations)

    def transparent(self, node: Node) -> Node | None:
        """The value that ``node`` passes through, if it is a transparent operation."""
        return self._transparent[node]

    def peel(self, node: Node) -> tuple[Node, tuple[Node, ...]]:
        """The value behind all transparent operations that lead to ``node``, and those operations in order."""
        path: list[Node] = []
        while (source := self.transparent(node)) is not None:
            path.append(node)
            node = source
        return node, tuple(reversed(path))

    @cached_property
    def writes(self) -> tuple[tuple[Node, Node], ...]:
        """Pairs (operation, tensor that it writes to in place)."""
        return tuple((node, written) for node in self.nodes for written in written_tensors(node))

    @cached_property
    def linear_past(self) -> dict[Node, int]:
        """For every node the activations from which it comes through transparent operations and sums alone."""
        past: dict[Node, int] = {}
        for node in self.nodes:
            bits = self.bit(node)
            source = self.transparent(node)
            total = match_sum(node) if source is None else None
            if source is not None:
                bits |= past[source]
            elif total is not None:
                bits |= past[total.left] | past[total.right]
            past[node] = bits & self.activations
        return past

    def images(self, stream: Node) -> dict[Node, Node | None]:
        """The values that are ``stream`` up to transparent operations, each with the value that it was made from."""
        found: dict[Node, Node | None] = {stream: None}
        pending = [stream]
        while pending:
            value = pending.pop()
            for user in value.users:
                if user not in found and self.transparent(user) is value:
                    found[user] = value
                    pending.append(user)
        return found
