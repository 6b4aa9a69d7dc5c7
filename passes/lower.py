"""Choose what computes each site: fused kernels where there are some for its device and dtype, plain torch elsewhere."""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from attnres_compile.errors import ConfigError
from attnres_compile.kernels import differentiable
from attnres_compile.passes.base import Program, describe
from attnres_compile.passes.regions import GradientRegions
from attnres_compile.patterns.operations import value_of

log = logging.getLogger(__name__)

_LOWERED: dict[Any, Callable[..., list[torch.Tensor]]] = {
    torch.ops.attnres.site.default: differentiable.site,
    torch.ops.attnres.site_with_prior.default: differentiable.site,
    torch.ops.attnres.inter.default: differentiable.inter,
    torch.ops.attnres.merge.default: differentiable.merge,
}


@dataclasses.dataclass(frozen=True)
class Lower:
    """Replaces the operators by functions over one set of kernels, and hands every source on from reader to reader.

    Fused kernels are opaque to the compiler behind. Plain torch it fuses; either way the functions bring their own backward.

    Sites that weigh their sources otherwise (``attnres::site_variant``) are plain torch as they stand, on every device.

    Args:
        kernels: "naive" or "fused" for all sites; None chooses by device and dtype.

    Raises:
        ConfigError: if "fused" is asked for such sites.
    """

    kernels: str | None = None
    name: str = "lower"

    def run(self, program: Program) -> tuple[Program, int]:
        if self.kernels == differentiable.FUSED and not program.config.is_plain:
            raise ConfigError(
                f"there are no fused kernels for {program.config.departures}; leave that out, or leave the choice of kernels to "
                "device and options."
            )
        graph = program.graph_module.graph
        regions = GradientRegions(graph)
        calls = [node for node in graph.nodes if node.op == "call_function" and node.target in _LOWERED]
        waiting = Counter((regions[node], source) for node in calls for source in _sources(node))
        latest: dict[tuple[int, Node], Node] = {}
        chosen: Counter[str] = Counter()
        for node in calls:
            kernels = self.kernels or _choose(node)
            chosen[kernels] += 1
            sources = _sources(node)
            keys = [(regions[node], source) for source in sources]
            waiting.subtract(keys)
            if sources:
                node.args = ([latest.get(key, key[1]) for key in keys], *node.args[1:])
            first = _lowered(node)
            node.target, node.kwargs = _LOWERED[node.target], {**node.kwargs, "kernels": kernels}
            for i, key in enumerate(keys):
                if waiting[key]:
                    latest[key] = _item(node, first + i, f"{key[1].name}_again", value_of(key[1]))
        for kernels, count in chosen.items():
            log.info("%d sites and phases on the %s kernels", count, kernels)
        program.graph_module.recompile()
        return program, len(calls)


def _sources(node: Node) -> list[Node]:
    """What ``node`` attends over; nothing for phase 2, whose tensors have no other reader."""
    return [] if node.target is torch.ops.attnres.merge.default else list(node.args[0])  # type: ignore[arg-type]


def _lowered(node: Node) -> int:
    """Let readers take a site's output from the list that its function returns; where in that list the sources begin."""
    if node.target is torch.ops.attnres.inter.default:
        return 2 * len(node.args[1])  # type: ignore[arg-type]
    if node.target is not torch.ops.attnres.merge.default:
        output = _item(node, 0, f"{node.name}_read", value_of(node))
        node.replace_all_uses_with(output, delete_user_cb=lambda user: user is not output)
    return 1


def _choose(node: Node) -> str:
    tensors = list(node.args[0]) if isinstance(node.args[0], (list, tuple)) else [node.args[0], node.args[2]]
    return differentiable.kernels_for([value_of(tensor) for tensor in tensors])


def _item(node: Node, position: int, name: str, value: Any) -> Node:
    """Element ``position`` of what ``node`` returns, taken right behind it."""
    with node.graph.inserting_after(node):
        item = node.graph.create_node("call_function", operator.getitem, (node, position), name=name)
    return describe(item, node, Lower.name, value)
