"""Compute the sites of a block together: every complete block is read once per block, not once per sublayer.

Phase 1 (``attnres::inter``) applies all queries of a block to the blocks that are complete; phase 2 (``attnres::merge``) adds
the partial sum, site by site, by online softmax (section "Two-phase computation"). With one sublayer per block (Full) the
sites of several sublayers in a row count as a block; what such a chunk produced itself enters in phase 2.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator
from itertools import groupby

import torch
from torch.fx import Graph, Node

from attnres_compile.passes.base import MADE_BY, Program, SiteNodes, describe, site_number
from attnres_compile.passes.regions import TAGS, GradientRegions, recompute_with
from attnres_compile.passes.rewrite import Rewrite
from attnres_compile.patterns.operations import dtype_of, same_shape, value_of
from attnres_compile.patterns.residual import match_sum
from attnres_compile.plan import AttnResPlan, SitePlan
from attnres_compile.report import SiteNote

# Sites per chunk where every sublayer is a block of its own. A chunk of K sites among n sources reads about n + K^2 / 2 tensors
# and writes K: at the depths of today's models, n of 16 to 128, the fewest per site are at K from 6 to 16.
FULL_CHUNK = 8


@dataclasses.dataclass(frozen=True)
class _Site:
    """A site on its way through this pass: its number, nodes, plan, and the key that all sites of its block share."""

    index: int
    nodes: SiteNodes
    plan: SitePlan
    block: tuple[int, int]

    @property
    def call(self) -> Node:
        return self.nodes.call

    @property
    def sources(self) -> list[Node]:
        return list(self.call.args[0])  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class TwoPhase:
    """Replaces the sites of each block by one ``attnres::inter`` and an ``attnres::merge`` per site.

    What can't be computed together stays a site by itself; the program's notes say why.
    """

    name: str = "two_phase"

    def run(self, program: Program) -> tuple[Program, int]:
        if not program.config.is_plain:
            reason = f"two phases compute softmax attention with one learned query, not {program.config.departures}"
            alone = tuple(SiteNote(site_number(site.call), reason) for site in program.sites)
            return dataclasses.replace(program, notes=(*program.notes, *alone)), 0
        graph = program.graph_module.graph
        regions = GradientRegions(graph)
        calls = {i: site.call for i, site in enumerate(program.sites)}
        notes: list[SiteNote] = []
        for _, members in groupby(_sites(program), key=lambda site: site.block):
            for group in _computed_together(list(members), regions):
                if isinstance(group, SiteNote):
                    notes.append(group)
                else:
                    calls.update(_Block(graph, group, regions).replace())
        program.graph_module.recompile()
        sites = tuple(dataclasses.replace(site, call=calls[i]) for i, site in enumerate(program.sites))
        changed = sum(new.call is not old.call for new, old in zip(sites, program.sites, strict=True))
        return dataclasses.replace(program, sites=sites, notes=(*program.notes, *notes)), changed


def _sites(program: Program) -> Iterator[_Site]:
    index = 0
    for number, plan in enumerate(program.plans):
        for site in plan.sites:
            yield _Site(index, program.sites[index], site, (number, _block_of(site, plan)))
            index += 1


def _block_of(site: SitePlan, plan: AttnResPlan) -> int:
    return site.complete if plan.block_size > 1 else (site.complete - 1) // FULL_CHUNK


def _computed_together(sites: list[_Site], regions: GradientRegions) -> Iterator[list[_Site] | SiteNote]:
    """Runs of two sites or more that phase 1 can serve at once, and notes on those that it can't."""
    run: list[_Site] = []
    reason = "no other site reads the same complete blocks"
    for site in [*sites, None]:
        why_not = _why_not(run[0], site, regions) if run and site is not None else ""
        if run and (site is None or why_not):
            if len(run) > 1:
                yield run
            else:
                yield SiteNote(run[0].index, why_not or reason)
            reason = why_not or reason
            run = []
        if site is not None:
            if len({dtype_of(source) for source in site.sources}) > 1:
                yield SiteNote(site.index, "its sources differ in dtype")
            else:
                run.append(site)


def _why_not(first: _Site, site: _Site, regions: GradientRegions) -> str:
    """Why ``site`` can't be computed with ``first``, the first site of a run; "" if it can."""
    prefix = _complete(first)
    if site.sources[: len(prefix)] != prefix:
        return "the stream is scaled or laid out anew between this site and others of its block, and so are the complete blocks"
    if site.call.args[3] != first.call.args[3]:
        return "the norms that read the block's sites differ in eps"
    if regions[site.call] != regions[first.call]:
        return "gradients are switched on or off between this site and others of its block"
    return ""


def _complete(first: _Site) -> list[Node]:
    """The sources that all sites of a run share: those of its first site, but for the partial sum."""
    sources = first.sources
    return sources[:-1] if first.plan.partial else sources


class _Block:
    """Writes the two phases of one run of sites into the graph."""

    def __init__(self, graph: Graph, sites: list[_Site], regions: GradientRegions) -> None:
        self.graph, self.sites, self.regions = graph, sites, regions
        self.complete = _complete(sites[0])

    def replace(self) -> dict[int, Node]:
        """The new output of every site, by the site's number."""
        first = self.sites[0].call
        queries = [site.call.args[1] for site in self.sites]
        key_norms = [site.call.args[2] for site in self.sites if site.call.args[2] is not None]
        arguments = (self.complete, queries, key_norms, first.args[3])
        values = [value_of(first)] * len(self.sites) + [_per_token(value_of(first))] * len(self.sites)
        with self.graph.inserting_before(first):
            inter = self._call(torch.ops.attnres.inter.default, arguments, first, "attnres_inter", values)
        _recompute_with_the_last_reader(inter, self.sites)
        found = {}
        for s, site in enumerate(self.sites):
            with self.graph.inserting_before(site.call):
                mixed = self._item(inter, s, site.call, "mixed")
                output = self._merged(site, mixed, inter, s)
            site.call.replace_all_uses_with(output)
            self.graph.erase_node(site.call)
            found[site.index] = output
        return found

    def _merged(self, site: _Site, mixed: Node, inter: Node, s: int) -> Node:
        """The site's output, put before its call: phase 2 with what the block has produced so far."""
        _, query, key_norm, eps, scale, *_ = site.call.args
        value = value_of(site.call)
        recent = site.sources[len(self.complete) :]
        if not recent:
            return mixed if scale == 1.0 else self._call(torch.mul, (mixed, scale), site.call, "attnres_read", value)
        lse = self._item(inter, len(self.sites) + s, site.call, "lse")
        if len(recent) > 1:
            arguments = (recent, query, key_norm, eps, scale, mixed, lse)
            return self._call(torch.ops.attnres.site_with_prior.default, arguments, site.call, site.call.name, value)
        total = recent[0]
        partial, branch = self._terms_of(total, site.call) or (total, None)
        operands = (partial, branch, mixed, lse, query, key_norm, eps, scale)
        merge = self._call(torch.ops.attnres.merge.default, operands, site.call, "attnres_merge", [value_of(total), value])
        again = self._item(merge, 0, site.call, "total")
        # Later readers take the sum from here: gradients then reach the merge as one.
        total.replace_all_uses_with(again, delete_user_cb=lambda user: again < user and self._together(user, merge))
        if branch is not None:
            self.graph.erase_node(total)
        return self._item(merge, 1, site.call, "read")

    def _terms_of(self, total: Node, call: Node) -> tuple[Node, Node] | None:
        """The operands of the add that made the partial sum, if the merge can do it: nothing reads the sum before.

        Under activation checkpointing the sum is kept and the branch is not, so the add stays in its own region.
        """
        found = match_sum(total) if total.meta.get(MADE_BY) == Rewrite.name and total.target is torch.add else None
        if found is None or any(total.meta.get(tag) != call.meta.get(tag) for tag in TAGS):
            return None
        alike = all(same_shape(term, total) and dtype_of(term) == dtype_of(total) for term in (found.left, found.right))
        later = min(total.users) is call and all(self._together(user, call) for user in total.users)
        return (found.left, found.right) if alike and later else None

    def _together(self, user: Node, node: Node) -> bool:
        return self.regions[user] == self.regions[node]

    def _item(self, list_node: Node, position: int, origin: Node, name: str) -> Node:
        value = list_node.meta["example_value"][position]
        return self._call(operator.getitem, (list_node, position), origin, f"{list_node.name}_{name}", value)

    def _call(self, function: object, arguments: tuple[object, ...], origin: Node, name: str, value: object) -> Node:
        node = self.graph.create_node("call_function", function, arguments, name=name)  # type: ignore[arg-type]
        self.regions.adopt(node, origin)
        return describe(node, origin, TwoPhase.name, value)


def _per_token(value: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        return value.new_empty(math.prod(value.shape[:-1]), dtype=dtype)


def _recompute_with_the_last_reader(inter: Node, sites: list[_Site]) -> None:
    """Phase 1 serves several checkpoint regions. As part of the last of them it is recomputed once, when the first site of the
    backward pass needs it; as part of an earlier one the partitioner would keep its outputs for the later ones. The final norm
    is in no region, and does not keep a phase 1 that it shares with the last layers.
    """
    inside = [site.call for site in sites if "ac_graph_id" in site.call.meta]
    others = sites if sites[-1].call in inside else sites[:-1]
    recompute_with(inter, max(inside, key=lambda call: call.meta["ac_graph_id"]) if len(inside) == len(others) else None)
