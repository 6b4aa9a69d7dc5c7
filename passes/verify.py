"""Prove on the rewritten graph what the rewrite promises. A failure is a defect of this package, and stops it."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Iterator

import torch
from torch.fx import Node

from attnres_compile.chain import ResidualChain
from attnres_compile.errors import VerificationError
from attnres_compile.passes.base import MADE_BY, Program, SiteNodes, is_site
from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.passes.normalize import operation_key
from attnres_compile.patterns.operations import argument, dtype_of, is_call, same_shape
from attnres_compile.patterns.residual import match_sum


@dataclasses.dataclass(frozen=True)
class Verify:
    """Checks sites against plans, shapes against the stream, and that no other operation was lost or doubled."""

    name: str = "verify"

    def run(self, program: Program) -> tuple[Program, int]:
        checks = (_sites_follow_plans, _sites_look_like_the_stream, _sources_add_up_to_the_stream, _other_operations_survive)
        for check in checks:
            check(program)
        return program, 0


def _sites_follow_plans(program: Program) -> None:
    planned = [site.num_sources for plan in program.plans for site in plan.sites]
    found = [len(_sources(site.call)) for site in program.sites]
    in_graph = sum(is_site(node) for node in program.graph_module.graph.nodes)
    if planned != found or in_graph != len(planned):
        raise VerificationError(f"planned sites with {planned} sources; the graph has {in_graph} sites with {found}.")
    for site in program.sites:
        for node in site.parameters.values():
            if list(node.users) != [_user_of_parameters(site)]:
                raise VerificationError(f"parameter {node.name!r} is not used by its own site alone.")
        expected_scale = len(_sources(site.call)) if program.config.scale == "preserve" else 1
        if site.call.args[4] != expected_scale:
            raise VerificationError(
                f"the weights of site {site.call.name!r} add up to {site.call.args[4]}, not {expected_scale}."
            )
        if not site.call.users:
            raise VerificationError(f"nothing reads the site {site.call.name!r}.")


def _user_of_parameters(site: SiteNodes) -> Node:
    """The site itself, or what makes the weights of all sites of a chain."""
    offset = argument(site.call, 6, "offset", None) if site.call.target is torch.ops.attnres.site_variant.default else None
    row = offset.args[0] if isinstance(offset, Node) and offset.target is operator.getitem else site.call
    assert isinstance(row, Node)
    return row


def _sites_look_like_the_stream(program: Program) -> None:
    for chain, sites in _sites_by_chain(program):
        for (read, _), site in zip(chain.sites, sites, strict=True):
            if not same_shape(site.call, read.stream) or dtype_of(site.call) != dtype_of(read.stream):
                raise VerificationError(
                    f"site {site.call.name!r} differs from the stream {read.stream.name!r} in shape or dtype."
                )


def _sources_add_up_to_the_stream(program: Program) -> None:
    """The sources of a site hold the root and the branch of every add before it, each exactly once."""
    index = GraphIndex(program.graph_module.graph, program.parameters)
    for chain, sites in _sites_by_chain(program):
        leaves = {chain.root, *(add.branch for add in chain.adds)}
        known: dict[Node, Counter[Node]] = {}
        expected, done = Counter([chain.root]), 0
        for (_, before), site in zip(chain.sites, sites, strict=True):
            expected.update(add.branch for sublayer in chain.sublayers[done:before] for add in sublayer)
            done = before
            found: Counter[Node] = Counter()
            for source in _sources(site.call):
                found.update(_terms_of(index, source, leaves, known))
            if found != expected:
                missing, extra = list((expected - found).elements()), list((found - expected).elements())
                raise VerificationError(f"site {site.call.name!r}: sources miss {missing} and hold {extra} besides the stream.")


def _terms_of(index: GraphIndex, value: Node, leaves: set[Node], known: dict[Node, Counter[Node]]) -> Counter[Node]:
    """What ``value`` is the sum of, up to transparent operations, and how often: ``leaves``, or what is none of them.

    Every value is looked at once per chain: the sites of a chain share most of their sources.
    """
    if value not in known:
        made_here = MADE_BY in value.meta
        total = match_sum(value) if made_here and value not in leaves else None
        source = index.transparent(value) or (value.args[0] if made_here and value.args else None)
        if total is not None:
            known[value] = _terms_of(index, total.left, leaves, known) + _terms_of(index, total.right, leaves, known)
        elif value not in leaves and isinstance(source, Node):
            known[value] = _terms_of(index, source, leaves, known)
        else:
            known[value] = Counter([value])
    return known[value]


def _other_operations_survive(program: Program) -> None:
    stream = {node for chain in program.chains for add in chain.adds for node in (add.node, *add.path)}
    stream |= {node for chain in program.chains for read, _ in chain.reads for node in read.path}
    may_go = {operation_key(node) for node in stream}
    kept = [node for node in program.graph_module.graph.nodes if is_call(node) and MADE_BY not in node.meta]
    now, before = Counter(map(operation_key, kept)), Counter(program.operations)
    lost = [key for key in (before - now) if key not in may_go]
    extra = list(now - before)
    if lost or extra:
        raise VerificationError(f"operations of the original graph were lost: {lost}, or are new without a pass's name: {extra}.")


def _sources(call: Node) -> list[Node]:
    return list(call.args[0])  # type: ignore[arg-type]


def _sites_by_chain(program: Program) -> Iterator[tuple[ResidualChain, tuple[SiteNodes, ...]]]:
    position = 0
    for chain in program.chains:
        count = len(chain.sites)
        yield chain, program.sites[position : position + count]
        position += count
