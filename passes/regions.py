"""Regions of a graph that computation must not be moved across, or that it is recomputed with."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from attnres_compile.patterns.operations import PERMUTES, RESHAPES, name_of

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


def keep_for(reader: Node, sources: Iterable[Node]) -> None:
    """Let what an earlier checkpoint region made, and ``reader`` in a later one reads, be kept: the border of a region is.

    The compiler behind us keeps it by itself unless it is a view, as the output of a linear layer is. Then all regions before
    would be recomputed at once, when the backward pass begins, and all that they make would be held.
    """
    region = reader.meta.get("ac_graph_id")
    for source in sources:
        own = source.meta.get("ac_graph_id")
        if region is None or own is None or own >= region:
            continue
        while name_of(source) in RESHAPES | PERMUTES and source.all_input_nodes[0].meta.get("ac_graph_id") == own:
            source = source.all_input_nodes[0]
        source.meta[POLICY] = _KEEP


def _keep_results(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Not what an operation begins with, under autocast: casts of its weights."""
    is_cast = operation is torch.ops.aten._to_copy.default
    return CheckpointPolicy.PREFER_RECOMPUTE if is_cast else CheckpointPolicy.MUST_SAVE


_KEEP = functools.partial(create_selective_checkpoint_contexts, _keep_results)


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
