"""Values that lie on several ranks (torch's DTensors), and what the plain tensors beside them are: copies or parts of them.

A DTensor has the shape of the whole; its placements say, for every dimension of its device mesh, whether ranks hold copies
(``Replicate``), parts along a dimension (``Shard``) or terms of a sum (``Partial``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from attnres_compile.patterns.operations import MOVES, is_call, name_of, value_of


def is_distributed(value: Any) -> bool:
    """Whether ``value`` is a DTensor. By its attributes: importing the class takes as long as the rest of a detection."""
    return isinstance(value, torch.Tensor) and hasattr(value, "placements") and hasattr(value, "device_mesh")


def is_device_mesh(value: Any) -> bool:
    """Whether ``value``, which may be an input of a graph, is the mesh on which DTensors lie."""
    return hasattr(value, "mesh_dim_names") and hasattr(value, "get_coordinate")


def placements_of(node: Node) -> tuple[Any, ...] | None:
    """The placements of a DTensor, or None for anything else."""
    value = value_of(node)
    return tuple(value.placements) if is_distributed(value) else None


def local_of(value: torch.Tensor) -> torch.Tensor:
    """The part of an example value that this rank holds; a plain tensor is its own."""
    if not is_distributed(value):
        return value
    distributed: Any = value
    with torch.no_grad():
        part: torch.Tensor = distributed.to_local()
    return part


def taken_from(node: Node) -> Node | None:
    """The DTensor of which ``node`` is this rank's part."""
    if is_call(node) and name_of(node) in MOVES and node.args and isinstance(node.args[0], Node):
        source = node.args[0]
        if is_distributed(value_of(source)) and not is_distributed(value_of(node)):
            return source
    return None


def nearest(node: Node) -> list[Node]:
    """The DTensors from which the plain tensor ``node`` was computed, and no other DTensor in between, in order of the graph.

    A number for a shape is no computation on values, but is rare enough to be taken for one.
    """
    found: set[Node] = set()
    seen = {node}
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if is_distributed(value_of(source)):
                found.add(source)
            elif source not in seen:
                seen.add(source)
                pending.append(source)
    return sorted(found)
