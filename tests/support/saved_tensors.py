"""What a compiled training step keeps for its backward pass, after AOTAutograd's min-cut partitioner."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node

from attnres_compile.backend import compile_rewritten
from attnres_compile.parameters import ATTRIBUTE

_VIEWS = ("aten.view.default", "aten.permute.default", "aten.unsqueeze.default", "aten.detach.default", "aten.t.default")


@dataclasses.dataclass(frozen=True)
class Saved:
    """One step: ``bytes`` of the tensors kept, parameters not counted and every storage once; ``operations`` that made them;
    what the ``forward`` and the ``backward`` graph compute, by operation.
    """

    bytes: int
    operations: Counter[str]
    forward: Counter[str]
    backward: Counter[str]
    gradients: dict[str, Tensor]


def step(model: nn.Module, loss: Callable[[Callable[..., Any]], Tensor]) -> Saved:
    """Compile ``model`` (rewritten, if it was converted) with Inductor's decompositions and plain aten behind them, and run
    ``loss(compiled)`` and its backward pass.
    """
    torch.compiler.reset()
    graphs: list[Graph] = []

    def keep(graph_module: GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(graph_module.graph)
        return make_boxed_func(graph_module.forward)

    aot = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table(), partition_fn=min_cut_rematerialization_partition
    )

    def rewriting(graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_rewritten(graph_module, inputs, lambda graph, values, mode: aot(graph, values))

    compiled = torch.compile(model, backend=rewriting if hasattr(model, ATTRIBUTE) else aot, dynamic=False)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss(compiled)
    total.backward()
    forward, backward = graphs
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Saved(sum(storages.values()), _kept(forward), _computed(forward), _computed(backward), gradients)


def _kept(graph: Graph) -> Counter[str]:
    kept: set[Node] = set()
    for node in next(iter(graph.find_nodes(op="output"))).args[0]:  # type: ignore[union-attr]
        while isinstance(node, Node) and str(node.target) in _VIEWS:
            node = node.args[0]
        if isinstance(node, Node) and node.op == "call_function":
            kept.add(node)
    return Counter(_operation(node.args[0] if node.target is operator.getitem else node) for node in kept)  # type: ignore[arg-type]


def _computed(graph: Graph) -> Counter[str]:
    return Counter(_operation(node) for node in graph.nodes if node.op == "call_function")


def _operation(node: Node) -> str:
    """What a node computes; what draws random numbers stands inside an operator that keeps their state."""
    inner = [argument for argument in node.args if isinstance(argument, torch._ops.OpOverload)]
    return str(inner[0] if inner else node.target)
