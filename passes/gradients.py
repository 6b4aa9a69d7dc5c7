"""Which values of a graph gradients may flow through."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn
from torch.fx import GraphModule, Node

from attnres_compile.passes.modes import Modes, is_switch
from attnres_compile.passes.normalize import attribute
from attnres_compile.patterns.mutation import memory_of, written_tensors
from attnres_compile.patterns.operations import is_call, name_of, value_of

_STOPS = frozenset({"detach", "detach_"})


def with_gradients(graph_module: GraphModule) -> frozenset[Node]:
    """The values that a parameter, frozen or not, or an input that requires gradients can get one through.

    What is made without gradients, or is no floating-point or complex number, lets none through. May hold more than autograd
    finds, never less: parameters can be thawed after the capture.
    """
    modes = Modes(graph_module.graph)
    found: set[Node] = set()
    written: set[Hashable] = set()  # memory that a value with gradients was written into
    while True:
        before = len(found), len(written)
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                flows = _is_trained(attribute(graph_module, str(node.target)))
            elif node.op == "placeholder":
                flows = isinstance(value_of(node), torch.Tensor) and value_of(node).requires_grad
            elif is_call(node) and not is_switch(node):
                flows = name_of(node) not in _STOPS and not modes.is_without_gradients(node)
                flows = flows and any(source in found for source in node.all_input_nodes)
                written |= {memory_of(value) for value in written_tensors(node) if flows}
            else:
                continue
            if (flows or memory_of(node) in written) and _has_gradient(value_of(node)):
                found.add(node)
        if before == (len(found), len(written)):
            return frozenset(found)


def _is_trained(value: object) -> bool:
    return isinstance(value, nn.Parameter) or (isinstance(value, torch.Tensor) and value.requires_grad)


def _has_gradient(value: object) -> bool:
    """Whether a value can have one; what is no tensor may hold some."""
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()
