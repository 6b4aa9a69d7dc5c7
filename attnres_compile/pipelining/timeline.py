"""A plan's training step under a schedule: naive and cached transport side by side, and over numbers of ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from attnres_compile.errors import AttnResError, ConfigError
from attnres_compile.pipelining.orders import placement_of, schedule_orders
from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.pipelining.simulation import Link, Operation, Timeline, simulate
from attnres_compile.transport import looped, plan_transport


@dataclasses.dataclass(frozen=True)
class SimulatedStep:
    """A step with one transport. ``peak_cache_nbytes`` are the most bytes that each rank's block cache ever holds.

    ``free_seconds`` is what the step would take if transfers took no time.
    """

    timeline: Timeline
    free_seconds: float
    peak_cache_nbytes: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return self.timeline.seconds

    @property
    def waiting_seconds(self) -> float:
        """What transfers add to the step: those that no rank had to wait for add nothing."""
        return self.seconds - self.free_seconds

    @property
    def overhead(self) -> float:
        """:attr:`waiting_seconds` as a fraction of the step with free transfers."""
        return self.waiting_seconds / self.free_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only; seconds, bytes and fractions."""
        return {
            "seconds": self.seconds,
            "free_seconds": self.free_seconds,
            "waiting_seconds": self.waiting_seconds,
            "overhead": self.overhead,
            "bubble": self.timeline.bubble,
            "bubbles": list(self.timeline.bubbles),
            "nbytes": self.timeline.nbytes,
            "busiest_link_seconds": self.timeline.busiest_link_seconds,
            "peak_cache_nbytes": list(self.peak_cache_nbytes),
        }


@dataclasses.dataclass(frozen=True)
class StepComparison:
    """The same step with both transports."""

    schedule: str
    ranks: int
    virtual: int
    microbatches: int
    link: Link
    naive: SimulatedStep
    cached: SimulatedStep

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only; a bandwidth without bound is None."""
        return {
            "schedule": self.schedule,
            "ranks": self.ranks,
            "virtual": self.virtual,
            "microbatches": self.microbatches,
            "bandwidth": self.link.bandwidth if math.isfinite(self.link.bandwidth) else None,
            "latency": self.link.latency,
            "naive": self.naive.to_dict(),
            "cached": self.cached.to_dict(),
        }


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The same model on more and more ranks; ``left_out`` says which numbers of ranks could not be had, and why."""

    steps: tuple[StepComparison, ...]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {"steps": [step.to_dict() for step in self.steps], "left_out": list(self.left_out)}


def simulate_step(
    plan: PipelinePlan, schedule: str, microbatches: int, forward_seconds: Sequence[float], link: Link, overlap: bool = True
) -> StepComparison:
    """One training step of ``plan``; :func:`attnres_compile.pipelining.simulation.simulate` says what is assumed.

    Args:
        schedule: the name that torch gives it.
        forward_seconds: of each stage, for one microbatch; :func:`forward_seconds` computes them from FLOPs.
        link: between every two ranks, each way.
        overlap: whether a rank computes while it sends.

    Raises:
        ConfigError: for a schedule that is unknown, or that the plan or the number of microbatches does not suit.
    """
    if len(forward_seconds) != plan.num_stages:
        raise ConfigError(f"{len(forward_seconds)} forward times were given for {plan.num_stages} stages; give one for each.")
    if any(not 0 < seconds < math.inf for seconds in forward_seconds):
        raise ConfigError("forward times must be above zero seconds, and finite.")
    wanted = placement_of(schedule)
    # A looped plan of one rank is folded as well: its stages are all there.
    if plan.ranks > 1 and (plan.placement == looped(plan.ranks, plan.virtual)) != (wanted == "looped"):
        raise ConfigError(f"{schedule} wants a {wanted} placement of stages, which the plan has not; make it with one.")
    orders = schedule_orders(schedule, plan.ranks, microbatches, plan.virtual)
    free = simulate(orders, plan.hops(True), forward_seconds, Link()).seconds

    def step(cached: bool) -> SimulatedStep:
        timeline = simulate(orders, plan.hops(cached), forward_seconds, link, overlap)
        if not math.isfinite(timeline.seconds):
            raise ConfigError("the step would take longer than numbers go; check forward times, bandwidth and latency.")
        return SimulatedStep(timeline, free, peak_cache_nbytes(plan, orders, cached))

    return StepComparison(schedule, plan.ranks, plan.virtual, microbatches, link, step(False), step(True))


def forward_seconds(plan: PipelinePlan, flops_per_second: float) -> tuple[float, ...]:
    """Seconds of each stage's forward on one microbatch.

    Raises:
        ConfigError: if the plan does not know its FLOPs, or the rate is not above zero.
    """
    if not plan.costs:
        raise ConfigError("the plan has no costs, so forward times are not known; give them in seconds.")
    if not flops_per_second > 0:
        raise ConfigError(f"FLOPs per second must be above zero, not {flops_per_second}.")
    return tuple(cost["flops"] / flops_per_second for cost in plan.costs)


def peak_cache_nbytes(plan: PipelinePlan, orders: Sequence[Sequence[Operation]], cached: bool = True) -> tuple[int, ...]:
    """The most bytes that each rank's block cache holds in a step.

    A value is there from the forward of the stage that keeps it to the end of the forward that frees it. A gradient is
    deposited in the backward of the last reader, and stays to the end of the backward of the stage that kept the value.
    """
    transport = plan_transport(plan.values, plan.placement, cached)
    kept = [sum(plan.value(name).nbytes for name in stage.keeps) for stage in transport]
    freed = [sum(plan.value(name).nbytes for name in stage.frees) for stage in transport]
    returned = [sum(plan.value(name).nbytes for name in stage.keeps if plan.value(name).differentiable) for stage in transport]
    deposited = [sum(plan.value(name).nbytes for name in stage.frees if plan.value(name).differentiable) for stage in transport]
    peaks = []
    for order in orders:
        held = peak = 0
        for stage, kind, _ in order:
            if kind != "W":
                held += kept[stage] if kind == "F" else deposited[stage]
                peak = max(peak, held)
                held -= freed[stage] if kind == "F" else returned[stage]
        peaks.append(peak)
    return tuple(peaks)


def simulate_sweep(
    plan_for: Callable[[int], PipelinePlan],
    ranks: Iterable[int],
    schedule: str,
    microbatches: int,
    flops_per_second: float,
    link: Link,
) -> Sweep:
    """Simulate the plan that ``plan_for`` makes for every number of ranks, with the same microbatches."""
    steps, left_out = [], []
    for count in ranks:
        try:
            plan = plan_for(count)
            steps.append(simulate_step(plan, schedule, microbatches, forward_seconds(plan, flops_per_second), link))
        except AttnResError as error:
            left_out.append(f"{count} ranks: {error}")
    return Sweep(tuple(steps), tuple(left_out))
