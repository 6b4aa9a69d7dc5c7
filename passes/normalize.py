"""One spelling for what the later passes look at: no checkpoint bodies, no in-place adds, no markers."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.utils.checkpoint import CheckpointPolicy

from attnres_compile.passes.base import Program
from attnres_compile.passes.regions import POLICY
from attnres_compile.patterns.encoder_layer import expand_encoder_layer, is_fused_encoder_layer
from attnres_compile.patterns.mutation import memory_of
from attnres_compile.patterns.operations import (
    IN_PLACE,
    is_call,
    is_float_tensor,
    module_of,
    name_of,
    source_line_of,
    value_of,
)  # fmt: skip
from attnres_compile.patterns.sums import spell_doubles_as_products, spell_sums_as_adds
from attnres_compile.report import Refusal

IN_PLACE_SPELLING = "attnres_in_place"
_FIRST_OPERANDS = ("condition", "input", "tensors", "self")
_INLINED = dict.fromkeys(("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint", "invoke_subgraph"), 0)


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Changes the program's graph in place; the caller hands over a copy."""

    name: str = "normalize"

    def run(self, program: Program) -> tuple[Program, int]:
        graph_module = program.graph_module
        changes = remove_markers(graph_module.graph)
        changes += inline_bodies(graph_module)
        changes += expand_encoder_layers(graph_module.graph)
        changes += lead_with_operands(graph_module.graph)
        changes += spell_sums_as_adds(graph_module.graph)
        replaced, refusals = make_adds_functional(graph_module.graph)
        replaced += spell_doubles_as_products(graph_module.graph)
        operations = tuple(operation_key(node) for node in graph_module.graph.nodes if is_call(node))
        refusals = [*program.refusals, *refusals]
        return dataclasses.replace(program, refusals=tuple(refusals), operations=operations), changes + replaced


def operation_key(node: Node) -> str:
    """What makes an operation of the original graph recognisable in the rewritten one, in place or not."""
    return f"{node.name}:{name_of(node).rstrip('_')}"


def markers_in(graph: Graph) -> list[Node]:
    """What converted models put into their graphs, so that these raise unless they are rewritten."""
    return list(graph.find_nodes(op="call_function", target=torch.ops.attnres.only_rewritten.default))


def remove_markers(graph: Graph) -> int:
    """Drop the markers that converted models put into their graphs."""
    markers = markers_in(graph)
    for node in markers:
        graph.erase_node(node)
    return len(markers)


def inline_bodies(graph_module: GraphModule, kinds: Mapping[str, int] = _INLINED) -> int:
    """Inline activation checkpoints and wrapped functions, without which the chain would be invisible.

    ``kinds`` says of each operator where the body stands among its arguments. The nodes of a checkpoint carry its recompute
    tags, from which the min-cut partitioner does what the checkpoint did, and its policy, if there is one.
    """
    regions = itertools.count(1)
    changes = 0
    while nodes := [node for node in graph_module.graph.nodes if _body_of(graph_module, node, kinds) is not None]:
        for node in nodes:
            body = _body_of(graph_module, node, kinds)
            assert body is not None
            tags: dict[str, Any] = {}
            if "checkpoint" in _operator_name(node):
                tags = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(regions)}
                if "_checkpoint_context_fn" in body.meta:
                    tags[POLICY] = body.meta["_checkpoint_context_fn"]
            _inline(graph_module, node, body, tags, kinds[_operator_name(node)])
            changes += 1
    return changes


def _operator_name(node: Node) -> str:
    target: Any = node.target
    return target.name() if callable(getattr(target, "name", None)) else str(target)


def _body_of(graph_module: GraphModule, node: Node, kinds: Mapping[str, int]) -> GraphModule | None:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    position = kinds.get(_operator_name(node), len(node.args))
    body = node.args[position] if position < len(node.args) else None
    if not isinstance(body, Node) or body.op != "get_attr":
        return None
    found = attribute(graph_module, str(body.target))
    return found if isinstance(found, GraphModule) else None


def attribute(root: Any, path: str) -> Any:
    """What a ``get_attr`` node with the target ``path`` gets."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _inline(graph_module: GraphModule, node: Node, body: GraphModule, tags: dict[str, Any], position: int) -> None:
    graph = graph_module.graph
    arguments = node.args[2:] if _operator_name(node) == "invoke_subgraph" else node.args[position + 1 :]
    copies: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), arguments, strict=False))
    result: Any = None
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                result = map_arg(inner.args[0], lambda n: copies[n])
                continue
            if inner.op == "get_attr":
                name = f"{node.name}_{inner.target}".replace(".", "_")
                setattr(graph_module, name, attribute(body, str(inner.target)))
                copies[inner] = graph.get_attr(name)
                copies[inner].meta = dict(inner.meta)
                continue
            copies[inner] = graph.node_copy(inner, lambda n: copies[n])
            for key, value in tags.items():
                copies[inner].meta.setdefault(key, value)
    if isinstance(result, (tuple, list)):
        for user in list(node.users):
            user.replace_all_uses_with(result[int(user.args[1])])  # type: ignore[arg-type]
            graph.erase_node(user)
    elif node.users:
        node.replace_all_uses_with(result)
    body_node = node.args[position]
    graph.erase_node(node)
    if isinstance(body_node, Node) and not body_node.users:
        graph.erase_node(body_node)


def lead_with_operands(graph: Graph) -> int:
    """Spell ``add(input=x, other=f)`` as ``add(x, other=f)``: patterns look for the first operand in the first place."""
    changes = 0
    for node in graph.nodes:
        if node.op == "call_function" and not node.args and _is_of_torch(node.target):
            first = next((name for name in _FIRST_OPERANDS if name in node.kwargs), None)
            if first is not None:
                node.kwargs, node.args = {k: v for k, v in node.kwargs.items() if k != first}, (node.kwargs[first],)
                changes += 1
    return changes


def _is_of_torch(target: Any) -> bool:
    module = getattr(target, "__module__", None) or getattr(getattr(target, "__self__", None), "__name__", "")
    return isinstance(target, torch._ops.OpOverload) or str(module).startswith("torch")


def expand_encoder_layers(graph: Graph) -> int:
    """Take the fused layers of nn.TransformerEncoder apart."""
    fused = [node for node in graph.nodes if is_fused_encoder_layer(node)]
    for node in fused:
        expand_encoder_layer(graph, node)
    return len(fused)


def make_adds_functional(graph: Graph) -> tuple[int, list[Refusal]]:
    """Replace ``x += y`` by ``z = x + y`` and let later readers of x read z, where nothing else aliases x."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    owners: dict[Hashable, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        owners[memory_of(node)].append(node)
    changes = 0
    refusals = []
    for node in list(graph.nodes):
        name = name_of(node)
        if not is_call(node) or name not in IN_PLACE or not is_float_tensor(node) or not isinstance(node.args[0], Node):
            continue
        target = node.args[0]
        if target.op == "placeholder" or _has_live_alias(target, node, position, owners) or _would_promote(node, target):
            reason = "in-place arithmetic on a graph input, on a tensor that has other views, or of mixed dtypes: left as it is"
            refusals.append(Refusal("add", reason, node.name, module_of(node), source_line_of(node)))
            continue
        for user in [user for user in target.users if user is not node and position[user] > position[node]]:
            user.replace_input_with(target, node)
        node.meta[IN_PLACE_SPELLING] = (node.op, node.target)
        node.op, node.target = "call_function", IN_PLACE[name]  # type: ignore[assignment]
        changes += 1
    return changes, refusals


def restore_in_place(graph: Graph, keep: set[Node]) -> None:
    """Give arithmetic that turned out to be no part of a stream its in-place spelling back, except in the memory of ``keep``."""
    kept = {memory_of(node) for node in keep}
    for node in graph.nodes:
        target = node.args[0] if node.args else None
        if IN_PLACE_SPELLING in node.meta and isinstance(target, Node) and not kept & {memory_of(node), memory_of(target)}:
            node.op, node.target = node.meta[IN_PLACE_SPELLING]


def _would_promote(node: Node, target: Node) -> bool:
    """Whether the functional form would give another dtype than the tensor that was written to."""
    others = [value_of(source).dtype for source in node.all_input_nodes if is_float_tensor(source)]
    return any(torch.promote_types(dtype, value_of(target).dtype) != value_of(target).dtype for dtype in others)


def _has_live_alias(target: Node, node: Node, position: dict[Node, int], owners: dict[Hashable, list[Node]]) -> bool:
    """Whether another value in the memory of ``target`` is an input, or was made before ``node`` and is read after it."""
    for value in owners[memory_of(target)]:
        if value is target or value is node or position[value] > position[node]:
            continue
        if value.op in ("placeholder", "get_attr") or any(position[user] > position[node] for user in value.users):
            return True
    return False
