"""What ``attnres plan`` shows: the plan of a model that is known by its shape, and a simulated training step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from attnres_compile.checkpoint.files import quoted
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import ConfigError
from attnres_compile.pipelining.orders import placement_of
from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.pipelining.simulation import Link
from attnres_compile.pipelining.sources import planner_of
from attnres_compile.pipelining.step_tables import explain_step, explain_sweep
from attnres_compile.pipelining.timeline import StepComparison, Sweep, forward_seconds, simulate_step, simulate_sweep

SWEPT_RANKS = (2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for. ``bandwidth`` is in bytes per second, ``latency`` in seconds, ``flops`` in FLOPs per second and rank.

    Without a ``schedule`` it is 1F1B for one stage per rank, else Interleaved1F1B.
    """

    source: Path
    ranks: int
    virtual: int
    tokens: int
    dtype: str
    num_blocks: int | None
    block_size: int | None
    boundaries: tuple[int | str, ...] | None
    schedule: str | None
    microbatches: int
    bandwidth: float
    latency: float
    flops: float
    trust_remote_code: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Preview:
    """A plan with a simulated step, and where asked for the same over numbers of ranks."""

    name: str
    plan: PipelinePlan
    step: StepComparison
    sweep: Sweep | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        found = {"name": self.name, "plan": self.plan.to_dict(), "step": self.step.to_dict()}
        return found if self.sweep is None else {**found, "sweep": self.sweep.to_dict()}

    def __str__(self) -> str:
        parts = [f"{self.name} on {self.plan.explain()}", explain_step(self.step)]
        return "\n\n".join(parts if self.sweep is None else [*parts, explain_sweep(self.sweep)])


def preview(request: Request, sweep: bool = False) -> Preview:
    """Plan and simulate.

    Raises:
        CheckpointError, ConfigError: for a source that can't be read, or numbers that don't fit it or each other.
    """
    blocks = {"num_blocks": request.num_blocks, "block_size": request.block_size}
    given = {name: value for name, value in blocks.items() if value is not None}
    config = AttnResConfig.from_options(given) if given else None
    name, planner = planner_of(request.source, config, request.tokens, request.dtype, request.trust_remote_code)
    schedule = request.schedule or ("1F1B" if request.virtual == 1 else "Interleaved1F1B")
    placement, link = placement_of(schedule), Link(request.bandwidth, request.latency)
    plan = planner(request.ranks, request.virtual, placement, request.boundaries)
    step = simulate_step(plan, schedule, request.microbatches, forward_seconds(plan, request.flops), link)
    if not sweep:
        return Preview(name, plan, step, None)

    def plan_for(ranks: int) -> PipelinePlan:
        return planner(ranks, request.virtual, placement, None)

    swept = simulate_sweep(plan_for, SWEPT_RANKS, schedule, request.microbatches, request.flops, link)
    return Preview(name, plan, step, swept)


def places(text: str | None) -> tuple[int | str, ...] | None:
    """Boundaries with commas between them: numbers of sublayers, or names of modules.

    Raises:
        ConfigError: for an empty place.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(parts):
        raise ConfigError(
            "boundaries are numbers of sublayers or names of modules with commas between them, such as 6,12,18; not "
            f"{quoted(text)}."
        )
    return tuple(int(part) if part.isdecimal() else part for part in parts)
