"""Ancestor questions about a graph, answered in constant time by bitsets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from functools import cached_property

from torch.fx import Graph, Node

from attnres_compile.passes.modes import Modes
from attnres_compile.patterns.mutation import memory_of, written_tensors
from attnres_compile.patterns.norms import normalised_input
from attnres_compile.patterns.operations import is_float_tensor, name_of, reads_only_metadata
from attnres_compile.patterns.residual import match_sum, transparent_source


class GraphIndex:
    """A frozen view of ``graph``: positions, ancestors, and the linear past of every value.

    ``parameters`` names the placeholders that hold parameters and buffers: they are no activations.
    """

    def __init__(self, graph: Graph, parameters: frozenset[str]) -> None:
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.modes = Modes(graph)
        self.parameters = parameters
        self.ancestors: dict[Node, int] = {}
        self.readers: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        """Who reads a value, and not its shape, dtype or device alone; of a tensor written to, the writers too."""
        self.linear_past: dict[Node, int] = {}
        """For every node the activations from which it comes through transparent operations and sums alone."""
        self._transparent: dict[Node, Node | None] = {}
        self._normalised: dict[Node, Node | None] = {}
        # All at once, since passes that hold an index go on to change the graph.
        writers: dict[Hashable, list[Node]] = defaultdict(list)
        for node in self.nodes:
            self._look_back(node, writers)
            for written in written_tensors(node):
                writers[memory_of(written)].append(node)
            self._look_through(node)

    def _look_back(self, node: Node, writers: Mapping[Hashable, list[Node]]) -> None:
        bits = self.bit(node)
        for source in node.all_input_nodes:
            if not reads_only_metadata(node, source):
                for value in (source, *(writers.get(memory_of(source), ()) if writers else ())):
                    bits |= self.ancestors[value]
                    self.readers[value].append(node)
        self.ancestors[node] = bits

    def _look_through(self, node: Node) -> None:
        source = transparent_source(node, self.depends_on_stream)
        self._transparent[node] = source
        bits = self.bit(node)
        total = match_sum(node) if source is None else None
        if source is not None:
            bits |= self.linear_past[source]
        elif total is not None:
            bits |= self.linear_past[total.left] | self.linear_past[total.right]
        self.linear_past[node] = bits & self.activations

    def is_parameter(self, node: Node) -> bool:
        return node.op == "get_attr" or (node.op == "placeholder" and node.name in self.parameters)

    def bit(self, node: Node) -> int:
        return 1 << self.position[node]

    @cached_property
    def activations(self) -> int:
        """Bitset of the float tensors that are no parameters."""
        return sum(self.bit(node) for node in self.nodes if is_float_tensor(node) and not self.is_parameter(node))

    def depends_on_stream(self, factor: Node, value: Node) -> bool:
        """Whether ``factor`` may be more than a given scale of ``value``.

        It may if it has an activation as ancestor that ``value`` has too. A mask is allowed that was used inside branches
        before: what is computed from the graph's inputs without parameters, and not from anything that ``value`` sums up.
        """
        past = self.ancestors[factor]
        shared = past & self.ancestors[value] & self.activations
        return bool(shared and (past & self.linear_past[value] or past & self._parameter_bits))

    def transparent(self, node: Node) -> Node | None:
        """The value that ``node`` passes through, if it is a transparent operation."""
        return self._transparent[node]

    def normalised(self, node: Node) -> Node | None:
        """The tensor of which ``node`` is the norm, if it is one."""
        if node not in self._normalised:
            self._normalised[node] = normalised_input(node, self.position)
        return self._normalised[node]

    def peel(self, node: Node) -> tuple[Node, tuple[Node, ...]]:
        """The value behind all transparent operations that lead to ``node``, and those operations in order."""
        path: list[Node] = []
        while (source := self.transparent(node)) is not None:
            path.append(node)
            node = source
        return node, tuple(reversed(path))

    def behind(self, node: Node) -> Node:
        """The value behind all transparent operations and all ``detach`` that lead to ``node``."""
        node = self.peel(node)[0]
        while name_of(node) == "detach" and isinstance(node.args[0], Node):
            node = self.peel(node.args[0])[0]
        return node

    @cached_property
    def writes(self) -> tuple[tuple[Node, Node], ...]:
        """Pairs (operation, tensor that it writes to in place)."""
        return tuple((node, written) for node in self.nodes for written in written_tensors(node))

    @cached_property
    def _parameter_bits(self) -> int:
        return sum(self.bit(node) for node in self.nodes if self.is_parameter(node))

    @cached_property
    def live(self) -> int:
        """Bitset of what the graph's output, or a write in place, is computed from."""
        roots = [node for node in self.nodes if node.op == "output"] + [node for node, _ in self.writes]
        bits = 0
        for node in roots:
            bits |= self.ancestors[node]
        return bits

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
