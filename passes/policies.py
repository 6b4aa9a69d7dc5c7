"""Selective activation checkpointing: what a policy wants kept is kept, operation by operation, in the rewritten graph too.

A policy decides on aten operations, which exist only once the compiler behind us traces the graph. So the operations of a
checkpoint region run under the region's own dispatch mode while they are traced, as torch runs a region that it finds as a
whole, and the mode tags what comes of each.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from attnres_compile.errors import ConfigError
from attnres_compile.passes.base import MADE_BY, Program
from attnres_compile.passes.regions import POLICY
from attnres_compile.patterns.operations import is_call, source_line_of


@dataclasses.dataclass(frozen=True)
class Policies:
    """Lets every policy decide on the model's own operations in its region. Sites are recomputed, as without a policy.

    Raises:
        ConfigError: if a ``context_fn`` gives something else than two dispatch modes.
    """

    name: str = "policies"

    def run(self, program: Program) -> tuple[Program, int]:
        regions: dict[tuple[int, Any], list[Node]] = defaultdict(list)
        for node in program.graph_module.graph.nodes:
            if POLICY in node.meta and is_call(node) and MADE_BY not in node.meta:
                regions[node.meta["ac_graph_id"], node.meta[POLICY]].append(node)
        for (number, context_fn), nodes in regions.items():
            region = _Region(context_fn, number)
            region.check(source_line_of(nodes[0]))
            for node in nodes:
                function = node.target if callable(node.target) else _method(node.target)
                node.op, node.target = "call_function", region.around(function, node is nodes[0], node is nodes[-1])
        if regions:
            program.graph_module.recompile()
        return program, len(regions)


def _method(name: str) -> Callable[..., Any]:
    def call(value: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(value, name)(*args, **kwargs)

    call.__name__ = name
    return call


class _Region:
    """One checkpoint region while it is traced. A policy may count, so every trace begins with a mode of its own."""

    def __init__(self, context_fn: Callable[[], Any], number: int) -> None:
        self.context_fn, self.number = context_fn, number
        self.mode: Any = None

    def check(self, place: str) -> None:
        contexts = self.context_fn()
        if not all(hasattr(context, "__torch_dispatch__") for context in contexts):
            kinds = ", ".join(type(context).__name__ for context in contexts)
            raise ConfigError(
                f"the context_fn of the activation checkpoint at {place} gives ({kinds}); under torch.compile it must give two "
                "TorchDispatchModes, as functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, policy) "
                "does."
            )

    def around(self, function: Callable[..., Any], is_first: bool, is_last: bool) -> Callable[..., Any]:
        """``function`` under the region's mode, which the first operation of the region makes and the last one drops."""

        def under_policy(*args: Any, **kwargs: Any) -> Any:
            if is_first:
                self.mode, _ = self.context_fn()
                self.mode.ac_graph_id = self.number
            mode = self.mode
            if is_last:
                self.mode = None
            with mode:
                return function(*args, **kwargs)

        under_policy.__name__ = under_policy.__qualname__ = f"{getattr(function, '__name__', 'call')}_under_policy"
        return under_policy
