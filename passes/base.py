"""What flows from pass to pass, how passes run, and what every graph between two passes must satisfy."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.fx import GraphModule, Node

from attnres_compile.chain import ResidualChain
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import ConfigError, VerificationError
from attnres_compile.passes.regions import TAGS
from attnres_compile.plan import AttnResPlan
from attnres_compile.report import PassReport, Refusal, SiteNote

log = logging.getLogger(__name__)
DISABLE_VARIABLE = "ATTNRES_DISABLE_PASSES"
# Every pass, and whether it may be left out by its exact name.
PASSES = {
    "normalize": False, "find_chains": False, "plan_blocks": False, "rewrite": False, "verify": True, "localize": False,
    "shard_sequence": True, "two_phase": True, "fuse_norms": True, "lower": True, "policies": True,
}  # fmt: skip
MADE_BY = "attnres_pass"  # meta key of new nodes: the pass that made them
SITE_NUMBER = "attnres_site"  # meta key of sites, see site_number


def describe(node: Node, origin: Node, made_by: str, value: Any) -> Node:
    """Say of a new node where it comes from: the place and the checkpoint region of ``origin``, its pass, its example value."""
    node.meta |= {key: origin.meta[key] for key in ("stack_trace", "nn_module_stack", *TAGS) if key in origin.meta}
    node.meta |= {MADE_BY: made_by, "example_value": value}
    return node


@dataclasses.dataclass(frozen=True)
class SiteNodes:
    """The nodes of one rewritten site: its parameters by name, and the ``call`` that gives what the readers read."""

    call: Node
    parameters: dict[str, Node]
    stream: Node


@dataclasses.dataclass(frozen=True)
class Program:
    """A graph on its way through the passes, and what they found out about it.

    ``parameters`` names the placeholders that hold the model's parameters and buffers; ``sites`` follow the chains.
    """

    graph_module: GraphModule
    config: AttnResConfig
    parameters: frozenset[str] = frozenset()
    chains: tuple[ResidualChain, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    plans: tuple[AttnResPlan, ...] = ()
    sites: tuple[SiteNodes, ...] = ()
    operations: tuple[str, ...] = ()
    notes: tuple[SiteNote, ...] = ()
    history: tuple[PassReport, ...] = ()


class Pass(Protocol):
    """A valid graph in, a valid graph out."""

    @property
    def name(self) -> str: ...

    def run(self, program: Program) -> tuple[Program, int]:
        """The new program, and the number of changes made or of things found."""
        ...


Hook = Callable[[Pass, Program], None]


def run_passes(program: Program, passes: Sequence[Pass], hook: Hook | None = None) -> Program:
    """Run ``passes`` in order; check the graph after each, log its name, change count, time and graph.

    Raises:
        ConfigError: if ``ATTNRES_DISABLE_PASSES`` names a pass that does not exist or that can't be left out.
        VerificationError: if a pass leaves an invalid graph.
    """
    disabled = _disabled()
    for step in passes:
        if step.name in disabled:
            log.info("pass %s: disabled", step.name)
            continue
        start = time.perf_counter()
        program, changes = step.run(program)
        entry = PassReport(step.name, changes, time.perf_counter() - start)
        program = dataclasses.replace(program, history=(*program.history, entry))
        check_graph(program.graph_module, step.name)
        log.info("pass %s: %d changes in %.3f s", entry.name, entry.changes, entry.seconds)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("graph after %s:\n%s", step.name, program.graph_module.graph)
        if hook is not None:
            hook(step, program)
    return program


def _disabled() -> set[str]:
    names = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",") if name.strip()}
    optional = ", ".join(name for name, may_be_left_out in PASSES.items() if may_be_left_out)
    for name in sorted(names):
        if name not in PASSES:
            raise ConfigError(f"{DISABLE_VARIABLE} names {name!r}, which is no pass; those that can be left out are: {optional}.")
        if not PASSES[name]:
            raise ConfigError(
                f"{DISABLE_VARIABLE} names {name!r}, without which the model would run un-rewritten; those that can be left out "
                f"are: {optional}."
            )
    return names


def check_graph(graph_module: GraphModule, after: str) -> None:
    """Hold the graph against its specification.

    Raises:
        VerificationError: naming the pass and the node.
    """
    graph = graph_module.graph
    try:
        graph.lint()
    except (RuntimeError, ValueError) as error:
        raise VerificationError(f"pass {after!r} left a malformed graph: {error}") from error
    for node in filter(is_site, graph.nodes):
        sources, query = node.args[0], node.args[1]
        lacks_query = node.target is torch.ops.attnres.site.default and not isinstance(query, Node)
        if not isinstance(sources, (list, tuple)) or len(sources) < 2 or lacks_query:
            raise VerificationError(f"pass {after!r} left {node.name!r}, a site with fewer than two sources or without a query.")
    for node in graph.find_nodes(op="call_function", target=torch.ops.attnres.inter.default):
        sources, queries, key_norms = node.args[:3]
        if not sources or len(queries) < 2 or len(key_norms) not in (0, len(queries)):
            raise VerificationError(f"pass {after!r} left {node.name!r}, a phase 1 of fewer than two sites or without sources.")


def is_site(node: Node) -> bool:
    return node.op == "call_function" and node.target in (
        torch.ops.attnres.site.default,
        torch.ops.attnres.site_variant.default,
    )


def site_number(site: Node) -> int:
    """The place of a site in ``model.attnres.sites``."""
    number: int = site.meta[SITE_NUMBER]
    return number
