"""Keep the block representations of a tensor-parallel model split along the sequence (section "Prefill memory")."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from attnres_compile.chain import ResidualChain
from attnres_compile.errors import PlacementError, VerificationError
from attnres_compile.passes.base import MADE_BY, Program, SiteNodes, is_site
from attnres_compile.passes.localize import evaluate, insert_behind, is_sum, terms_of
from attnres_compile.passes.moves import gathered, own_copy, part, scattered, split
from attnres_compile.passes.rewrite import Rewrite
from attnres_compile.patterns.norm_forms import NormForm, match_norm
from attnres_compile.patterns.operations import MOVES, name_of, reads_only_metadata, shape_of, value_of
from attnres_compile.patterns.placements import is_distributed, nearest, placements_of, taken_from

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ShardSequence:
    """Of every source of a stream that all ranks hold whole, each rank keeps the tokens of its part of the sequence.

    The all-reduce that ends a branch becomes a reduce-scatter; sums, sites and the norms that read them are computed on the
    parts, and what the norms give is gathered for the next sublayer. With T ranks, n sources take ``n * tokens / T * D`` elements
    on each; a sequence that T does not divide is split as ``torch.chunk`` does it. A stream that is split already stays as it
    is, and so does one of fewer tokens than ranks, as when tokens are generated one by one.
    """

    name: str = "shard_sequence"

    def run(self, program: Program) -> tuple[Program, int]:
        graph = program.graph_module.graph
        position, changes = 0, 0
        for chain in program.chains:
            sites = program.sites[position : position + len(chain.sites)]
            position += len(chain.sites)
            origin = _origin(chain, sites)
            if origin is not None:
                sharder = _Sharder(graph, sites, origin)
                sharder.run()
                _verify(sharder)
                changes += len(sites)
        program.graph_module.recompile()
        return program, changes


def _origin(chain: ResidualChain, sites: tuple[SiteNodes, ...]) -> Node | None:
    """A DTensor from which the stream comes; None if the stream is to stay as it is.

    Raises:
        PlacementError: if the stream can't be split.
    """
    terms = {term for site in sites for source in _sources(site) for term in terms_of(source)}
    origins = sorted({origin for term in terms for origin in _origins(term)})
    if not origins:
        raise PlacementError(
            "shard_sequence was asked for, but no branch of the residual stream comes from a DTensor: call "
            "torch.distributed.tensor.parallel.parallelize_module on the model first."
        )
    if any(placement.is_shard() for origin in origins for placement in placements_of(origin) or ()):
        log.info("shard_sequence: the stream is split over ranks already")
        return None
    mesh = value_of(origins[0]).device_mesh
    if mesh.ndim != 1:
        raise PlacementError(
            f"shard_sequence splits along one dimension, and the model lies on {mesh}; give parallelize_module the dimension of "
            'tensor parallelism alone, such as mesh["tp"].'
        )
    shapes = {str(shape_of(term)) for term in terms}
    if len(shapes) > 1:
        raise PlacementError(
            f"shard_sequence can't split a stream whose values differ in shape: {', '.join(sorted(shapes))}; leave it out."
        )
    shape = shape_of(sites[0].call) or ()
    tokens = shape[-2]
    if not isinstance(tokens, int):
        raise PlacementError(
            f"shard_sequence can't split a sequence whose length is a symbol ({tokens}), which DTensor does not pad; compile "
            "with torch.compile(..., dynamic=False), and pad inputs to few lengths."
        )
    if tokens < mesh.size():
        log.info("shard_sequence: with %d tokens on %d ranks, all of them keep the whole stream", tokens, mesh.size())
        return None
    return _without_moves(origins[0])


def _without_moves(value: Node) -> Node:
    """A DTensor on the same mesh from before its last moves, which may be replaced."""
    while name_of(value) in MOVES and isinstance(value.args[0], Node) and is_distributed(value_of(value.args[0])):
        value = value.args[0]
    return value


def _origins(term: Node) -> list[Node]:
    return [term] if is_distributed(value_of(term)) else nearest(term)


def _sources(site: SiteNodes) -> list[Node]:
    return list(site.call.args[0])  # type: ignore[arg-type]


class _Sharder:
    """Moves the sites of one chain, with what they read and what reads them, to the parts of the sequence."""

    def __init__(self, graph: Graph, sites: tuple[SiteNodes, ...], origin: Node) -> None:
        self.graph, self.sites, self.origin = graph, sites, origin
        self.dim = len(shape_of(sites[0].call) or ()) - 2
        self.parts: dict[Node, Node] = {}
        self.copies: dict[Node, Node] = {}
        self.on_parts: set[Node] = set()
        """All operations on parts of the stream."""
        self.like: Node

    def run(self) -> None:
        self.like = self._split_root(min(term for source in _sources(self.sites[0]) for term in terms_of(source)))
        for site in self.sites:
            call = site.call
            sources = _sources(site)
            form = None if _asks_for_shape(call) else match_norm(call)
            before = [value for value in call.args[1:] if isinstance(value, Node)]
            parameters = (self._copy(_uncopied(value)) if isinstance(value, Node) else value for value in call.args[1:])
            call.args = ([self._part(source) for source in sources], *parameters)
            self._evaluate(call)
            self._erase_unused([*sources, *before])
            self._gather(call if form is None else self._on_parts(form))

    def _split_root(self, root: Node) -> Node:
        """The root as a DTensor that is split along the sequence: what all other values are to look like."""
        whole = self._insert(max(root, self.origin), split, (root, self.origin, self.dim), root, f"{root.name}_split")
        self._take_part(root, whole)
        return whole

    def _part(self, value: Node) -> Node:
        if value not in self.parts:
            if is_sum(value):
                operands = tuple(self._part(operand) for operand in value.all_input_nodes)
                self.parts[value] = self._insert(max(*operands, value), torch.add, operands, value, value.name)
                self.parts[value].meta[MADE_BY] = Rewrite.name
                self.on_parts.add(self.parts[value])
            else:
                self._take_part(value, self._scatter(value))
        return self.parts[value]

    def _take_part(self, value: Node, whole: Node) -> None:
        self.parts[value] = self._insert(whole, part, (whole, whole), value, f"{value.name}_part")
        self.on_parts.add(self.parts[value])

    def _scatter(self, value: Node) -> Node:
        """``value`` as a DTensor that is split along the sequence, by a reduce-scatter where an all-reduce made it."""
        terms = self._not_yet_added(value)
        if terms is not None:
            return self._insert(max(value, self.like), scattered, (terms, self.like), value, f"{value.name}_scattered")
        return self._insert(max(value, self.like), split, (value, self.like, self.dim), value, f"{value.name}_split")

    def _not_yet_added(self, value: Node) -> Node | None:
        """The DTensor of ``Partial`` terms whose sum ``value`` is, if only the sites read that sum."""
        whole = taken_from(value) or (value.args[0] if value.target is part else None)
        if not isinstance(whole, Node) or name_of(whole) not in MOVES or list(whole.users) != [value]:
            return None
        terms = whole.args[0]
        if not isinstance(terms, Node) or not any(p.is_partial() for p in placements_of(terms) or ()):
            return None
        return terms if all(_is_read_by_sites_alone(user) for user in value.users) else None

    def _copy(self, parameter: Node) -> Node:
        """A parameter as the parts need it: gradients are summed over ranks."""
        if parameter not in self.copies:
            place = max(parameter, self.like)
            self.copies[parameter] = self._insert(place, own_copy, (parameter, self.like), parameter, f"{parameter.name}_copy")
        return self.copies[parameter]

    def _on_parts(self, form: NormForm) -> Node:
        """Let the norm that reads a site run on the parts as well."""
        for node in form.nodes:
            for affine in (form.weight, form.bias):
                if affine is not None and affine in node.all_input_nodes:
                    node.replace_input_with(affine, self._copy(affine))
        for node in sorted(form.nodes):
            self._evaluate(node)
        return form.output

    def _gather(self, output: Node) -> None:
        """Give the readers of ``output`` the whole sequence."""
        readers = [user for user in output.users if user not in self.on_parts]
        whole = self._insert(output, gathered, (output, self.like), output, f"{output.name}_gathered")
        own: Node | None = None
        for reader in readers:
            value = value_of(reader)
            if name_of(reader) == "from_local" and _is_like(value, value_of(whole)):
                reader.replace_all_uses_with(whole)
                self.graph.erase_node(reader)
                continue
            if own is None:
                own = self._insert(whole, part, (whole, whole), output, f"{output.name}_whole")
            reader.replace_input_with(output, own)

    def _evaluate(self, node: Node) -> None:
        """The example value of an operation on parts."""
        self.on_parts.add(node)
        node.meta["example_value"] = evaluate(node)

    def _erase_unused(self, values: Iterable[Node]) -> None:
        """Remove the sums and the all-reduces that nothing needs any more."""
        for value in values:
            if value._erased or value.users:
                continue
            if is_sum(value) or value.target in (part, own_copy) or name_of(value) in MOVES:
                operands = value.all_input_nodes
                self.graph.erase_node(value)
                self._erase_unused(operands)

    def _insert(self, place: Node, function: Callable[..., Any], arguments: tuple[Any, ...], origin: Node, name: str) -> Node:
        return insert_behind(place, function, arguments, origin, name, ShardSequence.name)


def _uncopied(parameter: Node) -> Node:
    """What ``parameter``, an argument of a site, is a copy of, if it is one."""
    source = parameter.args[0] if parameter.target is own_copy else parameter
    assert isinstance(source, Node)
    return source


def _is_like(value: Any, other: Any) -> bool:
    return is_distributed(value) and value.placements == other.placements and value.device_mesh == other.device_mesh


def _asks_for_shape(call: Node) -> bool:
    """Whether a reader wants the shape of ``call``, which is no longer that of the whole on a part."""
    return any(reads_only_metadata(user, call) for user in call.users)


def _is_read_by_sites_alone(user: Node) -> bool:
    return is_site(user) or is_sum(user)


def _verify(sharder: _Sharder) -> None:
    """No operation may mix parts of the sequence with the whole of it.

    Raises:
        VerificationError: naming the operation.
    """
    local = value_of(sharder.parts[next(iter(sharder.parts))]).shape
    for site in sharder.sites:
        if any(value_of(source).shape != local for source in _sources(site)):
            raise VerificationError(f"site {site.call.name!r} reads sources of other shapes than {tuple(local)}, a rank's part.")
    copies = set(sharder.copies.values())
    for node in sharder.on_parts:
        wholes = [source for source in node.all_input_nodes if source not in sharder.on_parts and source not in copies]
        if node.target is not part and any(isinstance(value_of(source), torch.Tensor) for source in wholes):
            raise VerificationError(f"{node.name!r} computes on a part of the sequence, and reads {wholes} besides.")
        outside = [user for user in node.users if user not in sharder.on_parts and user.target is not gathered]
        if outside:
            raise VerificationError(f"{outside} read {node.name!r}, a part of the sequence, as if it were the whole.")
