"""Where stages may begin, and where they do."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from torch.fx import Node

from attnres_compile.errors import ConfigError, PartitionError
from attnres_compile.passes.base import site_number
from attnres_compile.passes.cuts import boundary_nodes, place_of
from attnres_compile.patterns.operations import value_of
from attnres_compile.pipelining.balance import balanced, stage_totals
from attnres_compile.pipelining.cost import SegmentCost, segment_costs
from attnres_compile.pipelining.work import tensors_in
from attnres_compile.report import block_size_of
from attnres_compile.rewritten import RewrittenModule


@dataclasses.dataclass(frozen=True)
class Boundary:
    """A place where a stage may begin: before the site ``node``, behind ``before`` sublayers of the model."""

    node: Node
    before: int
    modules: tuple[str, ...]
    aligned: bool


def boundaries_of(rewritten: RewrittenModule) -> tuple[Boundary, ...]:
    """All places where a stage may begin, in the order of the graph. Chains are counted through, one after the other."""
    facts: dict[int, tuple[int, tuple[str, ...], bool]] = {}
    done = 0
    for chain in rewritten.report.chains:
        size = block_size_of(rewritten.report, chain)
        for site in chain.sites:
            aligned = site.before % size == 0 or site.before == chain.num_sublayers
            facts[len(facts)] = (done + site.before, site.modules, aligned)
        done += chain.num_sublayers
    found: list[Boundary] = []
    for node in boundary_nodes(rewritten.graph):
        before, modules, aligned = facts[site_number(node)]
        if not found or found[-1].before < before:
            found.append(Boundary(node, before, modules, aligned))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of all segments between possible boundaries, and the microbatch that the model was captured with."""

    segments: tuple[SegmentCost, ...]
    tokens: int
    sequence: int

    def of_stages(self, starts: Sequence[int]) -> tuple[dict[str, int], ...]:
        """The figures of the stages that begin at segment 0 and at ``starts``."""
        return tuple(total.at(self.tokens, self.sequence) for total in stage_totals(self.segments, starts))


def costs_of(rewritten: RewrittenModule, possible: Sequence[Boundary]) -> Costs:
    """What lies between possible boundaries; tokens and positions are those of the residual stream.

    Raises:
        PartitionError: if a size is not known before the model runs.
    """
    for node in rewritten.graph.nodes:
        if not all(isinstance(size, int) for value in tensors_in(node) for size in value.shape):
            raise PartitionError(
                f"{place_of(node)} has a shape that depends on data, and stages need to know all sizes; pad it to the largest, "
                "or mask instead of selecting."
            )
    sources = possible[0].node.args[0]
    assert isinstance(sources, (list, tuple))
    shape = tuple(value_of(sources[0]).shape)
    tokens, sequence = math.prod(shape[:-1]), shape[-2] if len(shape) > 1 else 1
    return Costs(segment_costs(rewritten.graph, [boundary.node for boundary in possible], tokens, sequence), tokens, sequence)


def choose(possible: Sequence[Boundary], costs: Costs, num_stages: int, wanted: Sequence[int | str] | None) -> tuple[int, ...]:
    """The segments that begin stages 1, 2, ...: those wanted, or those that make the stages' FLOPs even.

    Raises:
        PartitionError: for too few places, or boundaries that are none or out of order.
        ConfigError: for boundaries of other types.
    """
    if len(possible) + 1 < num_stages:
        raise PartitionError(
            f"the model has {len(possible)} places where a stage may begin, too few for {num_stages} stages; ask for fewer ranks "
            "or virtual stages."
        )
    if wanted is None:
        weights = [segment.at(costs.tokens, costs.sequence)["flops"] for segment in costs.segments]
        return balanced(weights, num_stages, [boundary.aligned for boundary in possible])
    return tuple(1 + possible.index(boundary) for boundary in _given(wanted, possible, num_stages))


def _given(wanted: Sequence[int | str], possible: Sequence[Boundary], num_stages: int) -> list[Boundary]:
    if not isinstance(wanted, (list, tuple)):
        raise ConfigError(f"boundaries must be a list of numbers of sublayers and names of modules, not {wanted!r}.")
    if len(wanted) != num_stages - 1:
        raise PartitionError(
            f"{len(wanted)} boundaries make {len(wanted) + 1} stages, not {num_stages}; give where stages 1 to {num_stages - 1} "
            "begin."
        )
    found = [_one_given(entry, possible) for entry in wanted]
    for first, second in itertools.pairwise(found):
        if first.before >= second.before:
            raise PartitionError(f"boundaries must go up; {second.before} sublayers come after {first.before}.")
    return found


def _one_given(entry: int | str, possible: Sequence[Boundary]) -> Boundary:
    if not isinstance(entry, (int, str)) or isinstance(entry, bool):
        raise ConfigError(f"a boundary is a number of sublayers or the name of a module, not {entry!r}.")
    if isinstance(entry, int):
        for boundary in possible:
            if boundary.before == entry:
                return boundary
        counts = ", ".join(str(boundary.before) for boundary in possible)
        raise PartitionError(f"no stage can begin after {entry} sublayers; it can after {counts}.")
    for boundary in possible:
        if any(module == entry or module.startswith(f"{entry}.") for module in boundary.modules):
            return boundary
    names = ", ".join(boundary.modules[0] for boundary in possible)
    raise PartitionError(f"no norm of module {entry!r} reads the stream where a stage can begin; these do: {names}.")
