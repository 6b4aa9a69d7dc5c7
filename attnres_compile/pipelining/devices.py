"""Stages run on another device than the model was captured on: the meta device, or a CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from attnres_compile.patterns.operations import is_call, name_of, value_of
from attnres_compile.rewritten import CallSignature


def captured_on(graph: Graph) -> str:
    """The type of the device that a graph's inputs were on."""
    return str(next(value_of(node).device.type for node in graph.find_nodes(op="placeholder")))


def follow_inputs(graph: Graph) -> None:
    """Where the graph names the device that it was captured on, let it ask its first input for the device."""
    first, *others = graph.find_nodes(op="placeholder")
    kind = captured_on(graph)
    named = [node for node in graph.nodes if is_call(node) and (_uses(node, kind) or _switches(node, kind))]
    if not named:
        return
    with graph.inserting_after(others[-1] if others else first):
        device = graph.call_function(getattr, (first, "device"))
    with graph.inserting_after(device):
        device_type = graph.call_function(getattr, (device, "type"))
    for node in named:
        if _switches(node, kind):
            node.update_arg(0, device_type)
        else:
            node.args = map_aggregate(node.args, lambda leaf: device if _is_device(leaf, kind) else leaf)
            node.kwargs = {
                name: device if _is_device(value, kind) or (name == "device" and value == kind) else value
                for name, value in node.kwargs.items()
            }
    if not device_type.users:
        graph.erase_node(device_type)


def _uses(node: Node, kind: str) -> bool:
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), found.append)
    return any(_is_device(leaf, kind) for leaf in found) or node.kwargs.get("device") == kind


def _is_device(leaf: Any, kind: str) -> bool:
    return isinstance(leaf, torch.device) and leaf.type == kind


def _switches(node: Node, kind: str) -> bool:
    return name_of(node) == "_enter_autocast" and bool(node.args) and node.args[0] == kind


def signature_on(signature: CallSignature, graph: Graph, device: torch.device) -> CallSignature:
    """``signature`` for arguments on ``device``, where the captured ones were on the device of the first stage's ``graph``."""
    kind = captured_on(graph)
    leaves = tuple(
        (leaf[0], leaf[1], device.type) if isinstance(leaf, tuple) and len(leaf) == 3 and leaf[2] == kind else leaf
        for leaf in signature.leaves
    )
    return dataclasses.replace(signature, leaves=leaves)
