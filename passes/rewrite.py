"""Replace what the readers of a residual stream read: depth attention over sources instead of the plain sum."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node, map_arg

from attnres_compile.chain import Read, ResidualAdd, ResidualChain
from attnres_compile.config import AttnResConfig
from attnres_compile.passes.base import MADE_BY, SITE_NUMBER, Program, SiteNodes, describe
from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.passes.multi_stream import weigh_by_streams
from attnres_compile.passes.normalize import IN_PLACE_SPELLING, restore_in_place
from attnres_compile.passes.regions import keep_for, recompute_with
from attnres_compile.patterns.operations import (
    dtype_of,
    is_call,
    is_float_tensor,
    reads_only_metadata,
    same_shape,
    value_of,
)  # fmt: skip
from attnres_compile.patterns.placements import local_of
from attnres_compile.patterns.residual import keeps_elements
from attnres_compile.plan import AttnResPlan, SitePlan
from attnres_compile.site_parameters import parameter_shapes

DEFAULT_EPS = 1e-6
LEAST_EPS = 1e-12  # a source may be zero, where a sublayer's last weight is, and its key must not be zero times infinity


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """Puts one ``attnres::site`` behind every site of every chain; its parameters become graph inputs.

    Sites that depart from Attention Residuals proper (``AttnResConfig.departures``) are ``attnres::site_variant`` instead. The
    new placeholders stand behind the others, named ``attnres_sites_{i}_query``, ``attnres_sites_{i}_key_norm`` and so on.
    Graph outputs and raw readers keep the plain sum; residual adds that nothing reads any more are removed.
    """

    name: str = "rewrite"

    def run(self, program: Program) -> tuple[Program, int]:
        graph = program.graph_module.graph
        index = GraphIndex(graph, program.parameters)
        inputs = _SiteInputs(graph, program.config)
        sites: list[SiteNodes] = []
        for chain, plan in zip(program.chains, program.plans, strict=True):
            sites.extend(_ChainRewriter(graph, index, chain, plan, program.config, inputs).run())
        for chain in program.chains:
            _erase_dead_stream(graph, chain)
        restore_in_place(graph, keep={node for chain in program.chains for node in _values_of(chain)})
        program.graph_module.recompile()
        return dataclasses.replace(program, sites=tuple(sites)), len(sites)


class _SiteInputs:
    """Hands out the placeholders of site after site."""

    def __init__(self, graph: Graph, config: AttnResConfig) -> None:
        self._graph, self._config, self._count = graph, config, 0
        self._last = list(graph.find_nodes(op="placeholder"))[-1:]

    def next(self, stream: Node, num_sources: int) -> tuple[int, dict[str, Node]]:
        """The number of the next site, which reads ``stream``, and its parameters by name."""
        number, value = self._count, value_of(stream)
        self._count += 1
        shapes = parameter_shapes(self._config, value.shape[-1], num_sources)
        with torch.no_grad():
            made = {name: local_of(value).new_empty(shape) for name, shape in shapes.items()}
        return number, {name: self._placeholder(f"attnres_sites_{number}_{name}", empty) for name, empty in made.items()}

    def _placeholder(self, name: str, value: torch.Tensor) -> Node:
        if self._last:
            with self._graph.inserting_after(self._last[0]):
                node = self._graph.placeholder(name)
        else:
            with self._graph.inserting_before(next(iter(self._graph.nodes))):
                node = self._graph.placeholder(name)
        node.meta["example_value"] = value
        self._last = [node]
        return node


class _ChainRewriter:
    """Follows one stream and keeps its sources: the root, the complete blocks, and the running block.

    A source is a list of terms. They are added up only where a site reads them, at the site's place in the graph, and
    the list then holds their sum: a block is summed once.
    """

    def __init__(
        self, graph: Graph, index: GraphIndex, chain: ResidualChain, plan: AttnResPlan, config: AttnResConfig,
        inputs: _SiteInputs,
    ) -> None:  # fmt: skip
        self.graph, self.index, self.chain, self.plan, self.config, self.inputs = graph, index, chain, plan, config, inputs
        self.skips = {add.node: add.skip for add in chain.adds}
        self.place = chain.root
        self.like: Node = chain.root
        self.complete: list[list[Node]] = [[chain.root]]
        self.running: list[Node] = []
        self.changed: dict[tuple[Node, Any], Node] = {}

    def run(self) -> list[SiteNodes]:
        sites: list[SiteNodes] = []
        waiting = list(zip(self.chain.sites, self.plan.sites, strict=True))
        for done, sublayer in enumerate(self.chain.sublayers, start=1):
            for add in sublayer:
                self._step(add)
            if done % self.plan.block_size == 0 or done == self.chain.num_sublayers:
                self.complete.append(self.running)
                self.running = []
            while waiting and waiting[0][0][1] == done:
                (read, _), site = waiting.pop(0)
                sites.append(self._site(read, site))
        if self.config.weights == "mhc":
            weigh_by_streams(self.graph, sites, [before for _, before in self.chain.sites])
        return sites

    def _step(self, add: ResidualAdd) -> None:
        """Carry all sources over the transparent operations on the stream, then take the branch as a new term."""
        self.place = add.node
        if not all(self._keeps_elements(operation) for operation in add.path):
            for source in (*self.complete, self.running):
                source[:] = [self._carry(self._shaped(term, self.like), add.path) for term in source]
        branch = add.branch
        if add.scale != 1.0:
            branch = self._call(torch.mul, (branch, add.scale), add.node)
        if dtype_of(branch) != dtype_of(add.node):
            # The original add promoted; partial sums must not round more than the stream did.
            branch = self._call(torch.Tensor.to, (branch, dtype_of(add.node)), add.node)
        if not same_shape(branch, add.node):
            branch = self._call(torch.Tensor.expand_as, (branch, self.like), add.node)
        self.running.append(branch)
        self.like = branch

    def _keeps_elements(self, operation: Node) -> bool:
        source = self.index.transparent(operation)
        return source is not None and keeps_elements(operation, source)

    def _carry(self, source: Node, path: tuple[Node, ...]) -> Node:
        """``source`` behind the transparent operations ``path``; one copy of each serves all later sites."""
        for operation in path:
            key = (source, operation)
            if key not in self.changed:
                self.changed[key] = self._relaid(source, (operation,))
            source = self.changed[key]
        return source

    def _relaid(self, source: Node, path: tuple[Node, ...]) -> Node:
        for operation in path:
            substitute = functools.partial(_substitute, self.index.transparent(operation), source)
            source = self._insert(functools.partial(self.graph.node_copy, operation, substitute))
            _mark_as_copy(source)
            source.meta["example_value"] = _evaluate(source)
        return source

    def _shaped(self, source: Node, like: Node) -> Node:
        """``source`` in the shape of ``like``: relayouts of the stream that keep the order of its elements."""
        if same_shape(source, like):
            return source
        key = (source, str(value_of(like).shape))
        if key not in self.changed:
            self.changed[key] = self._call(torch.Tensor.reshape_as, (source, like), like)
        return self.changed[key]

    def _sum(self, terms: list[Node]) -> Node:
        while len(terms) > 1:
            left, right = (self._shaped(term, self.like) for term in terms[:2])
            terms[:2] = [self._call(torch.add, (left, right), self.place)]
        return self._shaped(terms[0], self.like)

    def _site(self, read: Read, site: SitePlan) -> SiteNodes:
        sources = [self._sum(source) for source in self.complete[: 1 + site.complete]]
        if site.partial:
            sources.append(self._sum(self.running))
        scale = float(len(sources)) if self.config.scale == "preserve" else 1.0
        eps = self.config.eps if self.config.eps is not None else read.eps if read.eps is not None else DEFAULT_EPS
        eps = max(eps, LEAST_EPS)
        if read.path:  # features lie elsewhere in the stream's own layout, so every source takes the readers' way
            self.place = read.stream
            sources = [self._relaid(source, read.path) for source in sources]
        number, parameters = self.inputs.next(read.stream, len(sources))
        function: Any = torch.ops.attnres.site.default
        arguments: tuple[Any, ...] = (sources, parameters.get("query"), parameters.get("key_norm"), eps, scale)
        if not self.config.is_plain:
            function = torch.ops.attnres.site_variant.default
            how = (self.config.weights, self.config.heads, self.config.normalize_keys)
            arguments = (*arguments, parameters.get("projection"), parameters.get("offset"), *how)
        reader = read.edges[0][1]
        call = self._call(function, arguments, reader, f"attnres_sites_{number}", _mixture_of(sources))
        call.meta[SITE_NUMBER] = number
        recompute_with(call, reader)
        keep_for(call, sources)
        self._repoint(read.stream, call, set(read.edges))
        return SiteNodes(call, parameters, read.stream)

    def _repoint(self, value: Node, replacement: Node, edges: set[tuple[Node, Node]]) -> None:
        """Let the readers behind ``edges`` read ``replacement``, the site's image of ``value``.

        Transparent operations on the way are re-pointed where the readers alone use them, and copied where the stream
        goes on through them too. Who asks for the shape alone may ask the replacement, so that the stream can go.
        """
        for user in list(value.users):
            if (value, user) in edges:
                _replace_read(user, value, replacement, keep_skip=self.skips.get(user))
            elif user in self.index.position and reads_only_metadata(user, value):
                user.replace_input_with(value, replacement)
            elif self._is_image(user, value) and self._leads_to(user, edges):
                if self._leads_only_to(user, edges):
                    user.replace_input_with(value, replacement)
                else:
                    with self.graph.inserting_after(user):
                        copy = self.graph.node_copy(user, functools.partial(_substitute, value, replacement))
                    _mark_as_copy(copy)
                    self._repoint(user, copy, edges)

    def _is_image(self, user: Node, value: Node) -> bool:
        return user in self.index.position and self.index.transparent(user) is value

    def _leads_to(self, value: Node, edges: set[tuple[Node, Node]]) -> bool:
        return any(
            (value, user) in edges or (self._is_image(user, value) and self._leads_to(user, edges)) for user in value.users
        )

    def _leads_only_to(self, value: Node, edges: set[tuple[Node, Node]]) -> bool:
        return all(
            (value, user) in edges
            or reads_only_metadata(user, value)
            or (self._is_image(user, value) and self._leads_only_to(user, edges))
            for user in value.users
        )

    def _call(
        self,
        function: Any,
        arguments: tuple[Any, ...],
        origin: Node,
        name: str = "attnres_sum",
        value: torch.Tensor | None = None,
    ) -> Node:
        node = self._insert(lambda: self.graph.create_node("call_function", function, arguments, name=name))
        return describe(node, origin, Rewrite.name, _evaluate(node) if value is None else value)

    def _insert(self, make: Callable[[], Node]) -> Node:
        """Right behind the stream node, hence in its autocast and gradient-mode region, after what was put there before."""
        with self.graph.inserting_after(self.place):
            node = make()
        self.place = node
        return node


def _mark_as_copy(node: Node) -> None:
    """A copy computes what the original computes, and never in place: the tensor that it reads has other readers."""
    node.meta[MADE_BY] = Rewrite.name
    node.meta.pop(IN_PLACE_SPELLING, None)


def _substitute(original: Node | None, replacement: Node, node: Node) -> Node:
    return replacement if node is original else node


def _replace_read(user: Node, value: Node, replacement: Node, keep_skip: Node | None) -> None:
    if keep_skip is value:
        # The add reads the stream twice: once as the skip operand, once as (or in) its branch.
        arguments = list(user.args)
        arguments[1 if arguments[0] is value else 0] = replacement
        user.args = tuple(arguments)
        return
    user.replace_input_with(value, replacement)


def _mixture_of(sources: list[Node]) -> torch.Tensor:
    """The example value of a site. Asking the operator itself costs a dispatch over all sources, site after site."""
    values = [value_of(source) for source in sources]
    with torch.no_grad():
        mixture: torch.Tensor = values[0].new_empty(
            values[0].shape, dtype=functools.reduce(torch.promote_types, {v.dtype for v in values})
        )
    return mixture


def _evaluate(node: Node) -> Any:
    """The example value of a new node, computed on the example values of its inputs."""
    arguments = map_arg(node.args, value_of)
    keywords = map_arg(node.kwargs, value_of)
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        assert callable(node.target)
        return node.target(*arguments, **keywords)


def _values_of(chain: ResidualChain) -> set[Node]:
    """The values that sites read, or are made of: nothing may be written into them."""
    adds = (node for add in chain.adds for node in (add.node, add.branch, *add.path))
    return {chain.root, *adds, *(node for read, _ in chain.reads for node in read.path)}


def _erase_dead_stream(graph: Graph, chain: ResidualChain) -> None:
    """Remove the residual adds that nothing reads any more, and the transparent operations that led to them.

    Only these: a general dead-code pass would remove in-place operations whose results are unused.
    """
    paths = [reversed(read.path) for read, _ in chain.reads]
    adds = [(add.node, *reversed(add.path)) for add in reversed(chain.adds)]
    for nodes in (*paths, *adds):
        for node in nodes:
            if not node.users and is_call(node) and is_float_tensor(node):
                graph.erase_node(node)
