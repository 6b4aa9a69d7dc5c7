"""Regions of a graph that computation must not be moved across, or that it is recomputed with."""

from __future__ import annotations

from torch.fx import Graph, Node

from attnres_compile.patterns.operations import name_of

TAGS = ("recompute", "ac_graph_id")
"""What marks the nodes of a checkpoint region in torch."""

POLICY = "attnres_checkpoint_policy"
"""meta key of the nodes of a selectively checkpointed region: its ``context_fn``."""


def recompute_with(node: Node, reader: Node | None) -> None:
    """Make ``node`` part of the checkpoint region of ``reader``, or of none."""
    for tag in TAGS:
        node.meta.pop(tag, None)
        if reader is not None and tag in reader.meta:
            node.meta[tag] = reader.meta[tag]


class GradientRegions:
    """Numbers the stretches of a graph between two switches of the gradient mode."""

    def __init__(self, graph: Graph) -> None:
        self._number: dict[Node, int] = {}
        number = 0
        for node in graph.nodes:
            number += name_of(node) in ("_set_grad_enabled", "set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
            self._number[node] = number

    def __getitem__(self, node: Node) -> int:
        return self._number[node]

    def adopt(self, node: Node, neighbour: Node) -> None:
        """``node`` was put beside ``neighbour``."""
        self._number[node] = self._number[neighbour]
