"""Where a rewritten graph is cut into stages, and which values then cross from stage to stage."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import operator
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from attnres_compile.errors import PartitionError
from attnres_compile.passes.base import is_site
from attnres_compile.passes.gradients import with_gradients
from attnres_compile.passes.modes import is_switch
from attnres_compile.passes.normalize import attribute
from attnres_compile.patterns.mutation import memory_of, written_tensors
from attnres_compile.patterns.operations import argument, is_call, module_of, name_of, source_line_of, value_of

# Functions that draw random numbers and are no operators of ATen, which marks its own.
_RANDOM = frozenset({
    "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "gumbel_softmax", "multi_head_attention_forward",
    "fractional_max_pool2d", "fractional_max_pool2d_with_indices", "fractional_max_pool3d", "fractional_max_pool3d_with_indices",
})  # fmt: skip
# Operations inside vmap depend on its level, which no edge of the graph shows.
_BATCHED = ("_vmap", "_add_batch_dim", "_remove_batch_dim", "lazy_load_decompositions")
# Whose functions are known to give the same every time, but for the random ones.
_KNOWN = frozenset({"torch", "_operator", "builtins", "math"})
# Norms that write their running statistics, and the argument that says so.
_WITH_STATISTICS = {"batch_norm": (5, "training"), "instance_norm": (5, "use_input_stats")}


def boundary_nodes(graph: Graph) -> list[Node]:
    """Where a stage may begin: at the sites, each of which begins the sublayer that reads it, in the order of the graph."""
    return [node for node in graph.nodes if is_site(node)]


@dataclasses.dataclass(frozen=True)
class Cuts:
    """A graph divided into stages.

    ``stage`` numbers the stage of every node that is computed once; ``free`` nodes depend on no parameter and no random number
    and are computed wherever they are read (rotary tables, masks). ``crossing`` are the values that later stages read, in the
    order of the graph, with these stages; gradients flow through those that are ``differentiable``. ``homes`` are the stages that
    read each parameter, buffer or body of control flow.
    """

    stage: dict[Node, int]
    free: frozenset[Node]
    crossing: dict[Node, tuple[int, ...]]
    differentiable: frozenset[Node]
    homes: dict[str, tuple[int, ...]]


def cut(graph_module: GraphModule, starts: Sequence[Node]) -> Cuts:
    """Cut a graph before each of ``starts``.

    Raises:
        PartitionError: if a value that would cross can't be sent, or a tensor is written to in another stage than it is made in,
            or a buffer in one stage and read in others.
    """
    graph = graph_module.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    positions = [order[node] for node in starts]
    free = _free(graph_module)
    stage: dict[Node, int] = {}
    for node in graph.nodes:
        if node in free or node.op == "get_attr" or is_switch(node):
            continue
        parent = node.args[0] if node.target is operator.getitem else None
        if node.op in ("placeholder", "output"):
            stage[node] = 0 if node.op == "placeholder" else len(starts)
        elif isinstance(parent, Node) and parent in stage and not isinstance(value_of(parent), torch.Tensor):
            stage[node] = stage[parent]  # what a split or a chunk returned does not travel as a tuple
        else:
            stage[node] = bisect.bisect_right(positions, order[node])
    readers: dict[Node, set[int]] = {}
    for node, where in stage.items():
        for source in _needed(node, free):
            readers.setdefault(source, set()).add(where)
    crossing = {
        node: later
        for node in graph.nodes
        if node in stage and (later := tuple(sorted(where for where in readers.get(node, ()) if where > stage[node])))
    }
    for node in crossing:
        _check_sendable(node)
    homes = {node: tuple(sorted(readers[node])) for node in graph.nodes if node.op == "get_attr" and node in readers}
    _check_writes(graph, stage, crossing, homes)
    differentiable = with_gradients(graph_module).intersection(crossing)
    return Cuts(stage, free, crossing, differentiable, {str(node.target): stages for node, stages in homes.items()})


def _needed(node: Node, free: frozenset[Node]) -> Iterator[Node]:
    """What ``node`` reads: the operands that are not free, and what free ones are made of, placeholders and buffers."""
    seen: set[Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in free:
            waiting.extend(source.all_input_nodes)
        else:
            yield source


def _free(graph_module: GraphModule) -> frozenset[Node]:
    graph = graph_module.graph
    written = {memory_of(value) for node in graph.nodes for value in _written(node)}
    fixed: set[Node] = set()
    free: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or node.op == "get_attr":
            is_parameter = node.op == "get_attr" and isinstance(attribute(graph_module, str(node.target)), nn.Parameter)
            if not is_parameter and memory_of(node) not in written:
                fixed.add(node)
        elif is_call(node) and not is_switch(node) and node.users and _is_repeatable(node):
            moves = _written(node) or memory_of(node) in written
            if not moves and all(source in free or source in fixed for source in node.all_input_nodes):
                free.add(node)
    return frozenset(free)


def _is_repeatable(node: Node) -> bool:
    """Whether a call is known to give the same whenever and wherever it is made. Operators of others may do anything."""
    target: Any = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        known = target.namespace in ("aten", "prims")
    else:
        known = node.op == "call_method" or str(getattr(target, "__module__", "")).split(".")[0] in _KNOWN
    name = name_of(node)
    return known and not name.startswith(_BATCHED) and not _is_random(name)


@functools.cache
def _is_random(name: str) -> bool:
    """Whether an operation, by its canonical name, may draw random numbers."""
    packet: Any = getattr(torch.ops.aten, name, None)
    # Every object has an __eq__; only operators have overloads.
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if hasattr(packet, "overloads") else []
    return name in _RANDOM or any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def _written(node: Node) -> tuple[Node, ...]:
    """What ``node`` writes to, running statistics among it."""
    if name_of(node) not in _WITH_STATISTICS or not argument(node, *_WITH_STATISTICS[name_of(node)]):
        return written_tensors(node)
    statistics = (argument(node, 1, "running_mean"), argument(node, 2, "running_var"))
    return tuple(value for value in statistics if isinstance(value, Node))


def _check_sendable(node: Node) -> None:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        raise PartitionError(
            f"{place_of(node)} would cross from one pipeline stage to a later one, and is no tensor but {type(value).__name__}, "
            "which can't be sent; move the boundary, or let the model compute it where it is used."
        )


def _check_writes(
    graph: Graph, stage: dict[Node, int], crossing: dict[Node, tuple[int, ...]], homes: dict[Node, tuple[int, ...]]
) -> None:
    """Stages have copies of their own of what crosses; and microbatches overlap, so that a buffer changes meanwhile."""
    made: dict[Hashable, Node] = {}
    for node in crossing:
        made.setdefault(memory_of(node), node)
    read: dict[Hashable, set[int]] = {}
    buffers: dict[Hashable, Node] = {}
    for node, stages in homes.items():
        buffers.setdefault(memory_of(node), node)
        read.setdefault(memory_of(node), set()).update(stages)
    for node, stages in crossing.items():
        read.setdefault(memory_of(node), set()).update(stages)
    for node in graph.nodes:
        for value in _written(node):
            memory, here = memory_of(value), stage.get(node, 0)
            source, buffer = made.get(memory), buffers.get(memory)
            others = sorted(read.get(memory, set()) - {here})
            if buffer is not None and others:
                raise PartitionError(
                    f"{place_of(node)} writes in place, in stage {here}, into {str(buffer.target)!r}, of which stage "
                    f"{others[0]} has a copy of its own; move the boundary, or let one sublayer alone use it."
                )
            if source is not None and stage[source] < here:
                raise PartitionError(
                    f"{place_of(node)} writes in place, in stage {here}, into a value of stage {stage[source]} that crosses "
                    "the boundary; move the boundary, or make the operation out of place."
                )


def place_of(node: Node) -> str:
    """A node's name, with its module and its source line."""
    place = ", ".join(part for part in (module_of(node) and f"module {module_of(node)!r}", source_line_of(node)) if part)
    return f"{node.name!r} [{place}]" if place else repr(node.name)
