"""Streams of models on several ranks: every rank attends over depth for the tokens that it holds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Graph, Node, map_arg

from attnres_compile.errors import PlacementError
from attnres_compile.passes.base import MADE_BY, Program, SiteNodes, describe
from attnres_compile.passes.moves import own_copy, part, whole_of
from attnres_compile.passes.rewrite import Rewrite
from attnres_compile.patterns.operations import constant, module_of, name_of, same_shape, shape_of, source_line_of, value_of
from attnres_compile.patterns.placements import is_distributed, local_of, nearest, placements_of


@dataclasses.dataclass(frozen=True)
class Localize:
    """Lets sites compute on plain tensors: the parts of a distributed stream that a rank holds.

    Depth attention is local to tokens, so no rank needs what others hold. Queries and key-norm weights are the same on all
    ranks; where ranks hold different tokens, their gradients are added up.
    """

    name: str = "localize"

    def run(self, program: Program) -> tuple[Program, int]:
        graph = program.graph_module.graph
        if not any(is_distributed(value_of(node)) for node in graph.nodes):
            return program, 0
        localizer = _Localizer(graph)
        changes = sum(localizer.localize(site) for site in program.sites)
        localizer.erase_replaced()
        program.graph_module.recompile()
        return program, changes


class _Localizer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.parts: dict[tuple[Node, tuple[Any, ...]], Node] = {}
        self.replaced: set[Node] = set()

    def localize(self, site: SiteNodes) -> bool:
        call = site.call
        sources: Any = call.args[0]
        terms = sorted({term for source in sources for term in terms_of(source)})
        if placements_of(site.stream) is not None:
            like = _like(site, terms)
            call.args = ([self._part(source, like) for source in sources], *call.args[1:])
            values = [value_of(source) for source in call.args[0]]  # type: ignore[union-attr]
            call.meta["example_value"] = values[0].new_empty(values[0].shape, dtype=value_of(call).dtype)
            self._hand_out(call, like)
            shards: Node | None = like
        else:
            origins = sorted({origin for term in terms for origin in nearest(term)})
            if not origins:
                return False
            shards = _split(site, origins)
        if shards is not None and not any(placement.is_shard() for placement in placements_of(shards) or ()):
            shards = None
        query, key_norm = (None if tensor is None else self._own_copy(tensor, shards) for tensor in (site.query, site.key_norm))
        call.args = (call.args[0], query, key_norm, *call.args[3:])
        return True

    def erase_replaced(self) -> None:
        """Remove the sums of DTensors that only sites read."""
        for node in sorted(self.replaced, reverse=True):
            if not node.users:
                self.graph.erase_node(node)

    def _part(self, value: Node, like: Node) -> Node:
        """This rank's part of ``value``; a sum's is the sum of the parts of its terms, so that phase 2 can do the add."""
        key = (value, placements_of(like) or ())
        if key not in self.parts:
            if is_sum(value):
                operands = tuple(self._part(operand, like) for operand in value.all_input_nodes)
                self.parts[key] = self._insert(max(*operands, value), torch.add, operands, value, value.name)
                self.parts[key].meta[MADE_BY] = Rewrite.name
                self.replaced.add(value)
            else:
                self.parts[key] = self._insert(max(value, like), part, (value, like), value, f"{value.name}_part")
        return self.parts[key]

    def _hand_out(self, call: Node, like: Node) -> None:
        whole = self._insert(call, whole_of, (call, like), call, f"{call.name}_whole")
        call.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)

    def _own_copy(self, parameter: Node, like: Node | None) -> Node:
        arguments = (parameter,) if like is None else (parameter, like)
        return self._insert(parameter if like is None else like, own_copy, arguments, parameter, f"{parameter.name}_copy")

    def _insert(self, place: Node, function: Callable[..., Any], arguments: tuple[Node, ...], origin: Node, name: str) -> Node:
        return insert_behind(place, function, arguments, origin, name, Localize.name)


def insert_behind(
    place: Node, function: Callable[..., Any], arguments: tuple[Any, ...], origin: Node, name: str, made_by: str
) -> Node:
    """A new call behind ``place``, or behind all placeholders where that is one."""
    while place.next.op == "placeholder":
        place = place.next
    with place.graph.inserting_after(place):
        node = place.graph.create_node("call_function", function, arguments, name=name)
    return describe(node, origin, made_by, evaluate(node))


def evaluate(node: Node) -> Any:
    """The example value of a call, computed on those of its inputs.

    In their fake mode, where there is one: outside of it DTensors cache by shape, and a symbolic shape has no hash.
    """
    arguments, keywords = map_arg(node.args, value_of), map_arg(node.kwargs, value_of)
    inputs = (local_of(value) for source in node.all_input_nodes if isinstance(value := value_of(source), torch.Tensor))
    mode = next((value.fake_mode for value in inputs if hasattr(value, "fake_mode")), contextlib.nullcontext())
    with torch.no_grad(), mode:
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        return node.target(*arguments, **keywords)  # type: ignore[operator]


def is_sum(value: Node) -> bool:
    """Whether ``value`` is a sum of two terms that rewriting put into the graph."""
    return value.meta.get(MADE_BY) == Rewrite.name and value.target is torch.add and not value.kwargs and len(value.args) == 2


def terms_of(source: Node) -> Iterable[Node]:
    """What a source of a site is the sum of."""
    if not is_sum(source):
        return (source,)
    return (term for operand in source.all_input_nodes for term in terms_of(operand))


def _like(site: SiteNodes, terms: list[Node]) -> Node:
    """The first of a site's ``terms``, DTensors, that is placed as the stream is.

    Raises:
        PlacementError: if the stream can't be attended to where it lies.
    """
    placements = placements_of(site.stream)
    found = next((term for term in terms if placements_of(term) == placements and same_shape(term, site.stream)), None)
    if found is None:
        raise _refusal(site, f"is placed as {placements}, and its terms as {list(map(placements_of, terms))}")
    _check(site, found)
    return found


def _split(site: SiteNodes, origins: list[Node]) -> Node | None:
    """The DTensor of which the terms of a plain stream hold parts; None if every rank holds the whole stream.

    Raises:
        PlacementError: if the terms are parts of differently placed DTensors, or of one that can't be attended to.
    """
    for origin in origins:
        _check(site, origin)
    kinds = {(value_of(origin).device_mesh, placements_of(origin)) for origin in origins}
    parts = {kind for kind in kinds if any(placement.is_shard() for placement in kind[1] or ())}
    if parts and len(kinds) > 1:
        raise _refusal(site, f"has terms placed as {sorted(str(placements) for _, placements in kinds)}")
    if not parts:
        return None
    for reader in site.call.users:
        if name_of(reader) == "from_local" and _sizes(reader) != _sizes(origins[0]):
            raise PlacementError(
                f"{module_of(reader) or 'the model'} takes this rank's part of the residual stream, {shape_of(site.call)}, for "
                f"one of equal parts, which {shape_of(origins[0])} on all ranks does not have. Pad the sequence to a multiple of "
                "the number of ranks, or set use_local_output=False where branches end and at the embedding."
            )
    return origins[0]


def _sizes(node: Node) -> list[float | None]:
    return [constant(size) for size in shape_of(node) or ()]


def _check(site: SiteNodes, value: Node) -> None:
    placements = placements_of(value) or ()
    rank = value_of(value).dim()
    if any(placement.is_partial() for placement in placements):
        raise _refusal(site, f"consists of sums that are not added up yet ({placements} at {value.name!r})")
    if any(placement.is_shard() and placement.dim % rank == rank - 1 for placement in placements):
        raise _refusal(site, f"is split along its features ({placements} at {value.name!r}), over which keys are normalised")


def _refusal(site: SiteNodes, what: str) -> PlacementError:
    reader = next(iter(site.call.users), site.call)
    return PlacementError(
        f"the residual stream that {module_of(reader) or 'the model'} reads {what} [{source_line_of(site.stream)}]. Give every "
        "layer that ends a branch, and the embedding, the same output_layouts in the parallelize plan: Replicate(), or Shard(1) "
        "for a stream that is split along the sequence."
    )
