"""Simulated steps against times counted by hand and closed forms."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_compile.errors import ConfigError
from attnres_compile.pipelining.orders import SCHEDULES, placement_of, schedule_orders
from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.pipelining.shapes import ModelShape, plan_from_shape
from attnres_compile.pipelining.simulation import Link, Operation, simulate
from attnres_compile.pipelining.timeline import (
    StepComparison,
    forward_seconds,
    peak_cache_nbytes,
    simulate_step,
    simulate_sweep,
)


def small(ranks: int, virtual: int = 1, placement: str = "looped", block_size: int = 2) -> PipelinePlan:
    """A layer of two sublayers per stage; a value has two bytes."""
    shape = ModelShape("small", ranks * virtual, 1, block_size)
    return plan_from_shape(shape, ranks, virtual, 1, "bf16", placement)


def stepped(
    plan: PipelinePlan, schedule: str, microbatches: int, link: Link | None = None, overlap: bool = True
) -> StepComparison:
    """A forward of every stage takes a second; without ``link`` transfers are free."""
    return simulate_step(plan, schedule, microbatches, [1.0] * plan.num_stages, link or Link(), overlap)


def times(step: StepComparison, rank: int) -> list[tuple[str, int, float, float]]:
    row = step.cached.timeline.computations[rank]
    return [(done.operation.kind, done.operation.microbatch, done.start, done.end) for done in row]


TWO = PipelinePlan(2, 1, (0, 1), (0, 1, 2), (2,), plan_from_shape(ModelShape("two", 1, 1, 2), 2, 1, 1).values)
"""Two stages of one sublayer; the hop between them carries b0 and p0: four bytes."""


def test_gpipe_with_free_transfers() -> None:
    step = stepped(TWO, "GPipe", 2)
    assert times(step, 0) == [("F", 0, 0, 1), ("F", 1, 1, 2), ("B", 0, 5, 7), ("B", 1, 7, 9)]
    assert times(step, 1) == [("F", 0, 1, 2), ("F", 1, 2, 3), ("B", 0, 3, 5), ("B", 1, 5, 7)]
    assert (step.cached.seconds, step.cached.waiting_seconds) == (9, 0)
    assert step.cached.timeline.bubbles == pytest.approx((1 / 3, 1 / 3))


def test_gpipe_with_transfers_of_a_second() -> None:
    step = stepped(TWO, "GPipe", 2, Link(bandwidth=4.0))
    assert times(step, 0) == [("F", 0, 0, 1), ("F", 1, 1, 2), ("B", 0, 7, 9), ("B", 1, 9, 11)]
    assert times(step, 1) == [("F", 0, 2, 3), ("F", 1, 3, 4), ("B", 0, 4, 6), ("B", 1, 6, 8)]
    sent = sorted((x.start, x.end, x.ranks, x.nbytes) for x in step.cached.timeline.transfers)
    assert sent == [(1, 2, (0, 1), 4), (2, 3, (0, 1), 4), (6, 7, (1, 0), 4), (8, 9, (1, 0), 4)]
    assert (step.cached.seconds, step.cached.free_seconds, step.cached.waiting_seconds) == (11, 9, 2)
    assert step.cached.overhead == pytest.approx(2 / 9)
    assert step.cached.timeline.bubble == pytest.approx(5 / 11)
    assert step.cached.timeline.busiest_link_seconds == 2


def test_transfers_of_a_link_wait_for_each_other() -> None:
    """Half a second of latency, and four bytes at 1.6 per second: three seconds each."""
    step = stepped(TWO, "GPipe", 2, Link(bandwidth=1.6, latency=0.5))
    assert times(step, 0) == [("F", 0, 0, 1), ("F", 1, 1, 2), ("B", 0, 13, 15), ("B", 1, 16, 18)]
    assert times(step, 1) == [("F", 0, 4, 5), ("F", 1, 7, 8), ("B", 0, 8, 10), ("B", 1, 10, 12)]


def test_without_overlap_the_sender_waits() -> None:
    step = stepped(TWO, "GPipe", 2, Link(bandwidth=4.0), overlap=False)
    assert times(step, 0) == [("F", 0, 0, 1), ("F", 1, 2, 3), ("B", 0, 8, 10), ("B", 1, 11, 13)]
    assert times(step, 1) == [("F", 0, 2, 3), ("F", 1, 4, 5), ("B", 0, 5, 7), ("B", 1, 8, 10)]


def test_stages_of_unequal_cost() -> None:
    """The backward is twice as long as the forward of its own stage."""
    step = simulate_step(TWO, "1F1B", 2, [1.0, 3.0], Link())
    assert times(step, 0) == [("F", 0, 0, 1), ("F", 1, 1, 2), ("B", 0, 10, 12), ("B", 1, 19, 21)]
    assert times(step, 1) == [("F", 0, 1, 4), ("B", 0, 4, 10), ("F", 1, 10, 13), ("B", 1, 13, 19)]


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
@given(ranks=st.integers(1, 9), more=st.integers(0, 12))
@settings(max_examples=30)
def test_the_bubble_of_one_stage_per_rank(schedule: str, ranks: int, more: int) -> None:
    microbatches = ranks + more
    step = stepped(small(ranks), schedule, microbatches)
    assert step.naive.seconds == step.cached.seconds == 3 * (microbatches + ranks - 1)
    assert step.cached.timeline.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


@pytest.mark.parametrize(("ranks", "virtual", "rounds"), [(2, 2, 1), (2, 3, 4), (4, 2, 2), (4, 4, 3), (8, 2, 2)])
def test_the_bubble_of_interleaved_1f1b(ranks: int, virtual: int, rounds: int) -> None:
    """Virtual stages make the bubble smaller by their number (Narayanan et al., arXiv 2104.04473, section 2.2)."""
    microbatches = rounds * ranks
    step = stepped(small(ranks, virtual), "Interleaved1F1B", microbatches)
    assert step.cached.timeline.bubble == pytest.approx((ranks - 1) / (virtual * microbatches + ranks - 1))


def row(text: str) -> tuple[Operation, ...]:
    return tuple(Operation(int(part[0]), part[1], int(part[2])) for part in text.split())


def test_1f1b_runs_what_its_loop_runs() -> None:
    """As many forwards first as there are stages from here on, then backward and forward in turns."""
    assert schedule_orders("1F1B", 3, 4, 1) == (
        row("0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3"),
        row("1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3"),
        row("2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"),
    )


def test_interleaved_1f1b_in_torchs_order() -> None:
    assert schedule_orders("Interleaved1F1B", 2, 4, 2) == (
        row("0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3"),
        row("1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3"),
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 8), (4, 8), (3, 12)])
def test_every_schedule_does_everything_once_where_the_stage_is(schedule: str, ranks: int, microbatches: int) -> None:
    virtual = 1 if schedule in ("GPipe", "1F1B") else 2
    plan = small(ranks, virtual, placement_of(schedule))
    orders = schedule_orders(schedule, ranks, microbatches, virtual)
    for rank, order in enumerate(orders):
        done = Counter(order)
        assert set(done.values()) == {1}
        stages = [stage for stage, at in enumerate(plan.placement) if at == rank]
        for stage in stages:
            for i in range(microbatches):
                kinds = {kind for kind in "FBIW" if Operation(stage, kind, i) in done}
                assert kinds in ({"F", "B"}, {"F", "I", "W"})
        assert {stage for stage, _, _ in done} == set(stages)
    step = stepped(plan, schedule, microbatches, Link(bandwidth=10.0))
    # All of a rank's computations take the same time whatever the schedule: three forwards per stage and microbatch.
    assert [sum(x.end - x.start for x in row) for row in step.cached.timeline.computations] == pytest.approx(
        [3 * virtual * microbatches] * ranks
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bandwidth", [0.5, 3.0, 50.0])
def test_nothing_starts_before_what_it_needs(schedule: str, bandwidth: float) -> None:
    virtual = 1 if schedule in ("GPipe", "1F1B") else 2
    plan = small(4, virtual, placement_of(schedule), block_size=3)
    last = plan.num_stages - 1
    step = stepped(plan, schedule, 8, Link(bandwidth, 0.1))
    for cached, one in ((False, step.naive), (True, step.cached)):
        ends = {x.operation: x.end for row in one.timeline.computations for x in row}
        arrivals = {(x.operation.stage, x.operation.kind == "F", x.operation.microbatch): x.end for x in one.timeline.transfers}
        backward = {(o.stage, o.microbatch): end for o, end in ends.items() if o.kind in "BI"}
        hops = plan.hops(cached)
        for ran in one.timeline.computations:
            for before, after in itertools.pairwise(ran):
                assert after.start >= before.end
            for (stage, kind, i), start, _ in ran:
                if kind == "F" and stage > 0:
                    made, hop, arrived = ends[Operation(stage - 1, "F", i)], hops[stage - 1], (stage - 1, True, i)
                elif kind in "BI" and stage < last:
                    made, hop, arrived = backward[stage + 1, i], hops[stage], (stage + 1, False, i)
                else:
                    assert kind != "W" or start >= backward[stage, i]
                    continue
                assert start >= made
                assert hop.is_local or start >= arrivals[arrived] >= made + 0.1 + hop.nbytes / bandwidth - 1e-9
        taken: dict[tuple[int, int], float] = {}
        for sent in sorted(one.timeline.transfers, key=lambda x: x.start):
            assert sent.start >= taken.get(sent.ranks, 0.0)
            taken[sent.ranks] = sent.end
        assert one.timeline.nbytes == plan.step_nbytes(8, cached)
        assert one.seconds >= one.free_seconds
    assert step.cached.timeline.nbytes <= step.naive.timeline.nbytes


def test_orders_that_wait_for_each_other_are_refused() -> None:
    orders = [row("0B0 0F0"), row("1F0 1B0")]
    with pytest.raises(ConfigError, match="never ends: B of microbatch 0 in stage 0 waits"):
        simulate(orders, TWO.hops(), [1.0, 1.0], Link())


FOUR = small(2, 2)
"""Four stages of a block each on two ranks. Rank 0 keeps b0 and b1 from stage 0 to 2, rank 1 b0, b1 and b2 from 1 to 3."""


@pytest.mark.parametrize(
    ("schedule", "microbatches", "tensors"), [("LoopedBFS", 1, (2, 3)), ("LoopedBFS", 3, (6, 9)), ("Interleaved1F1B", 4, (8, 9))]
)
def test_the_peak_of_the_caches(schedule: str, microbatches: int, tensors: Sequence[int]) -> None:
    """In the order of Interleaved1F1B above, rank 0 runs 2B1 with two microbatches' blocks and two's gradients in its cache,
    rank 1 runs 1B0 with the blocks of the third and the gradients of the first two."""
    step = stepped(FOUR, schedule, microbatches)
    assert step.cached.peak_cache_nbytes == tuple(2 * count for count in tensors)
    assert step.naive.peak_cache_nbytes == (0, 0)


def test_deposits_are_held_from_the_last_reader_to_the_stage_that_keeps_the_value() -> None:
    assert peak_cache_nbytes(FOUR, [row("2B0 0B0"), row("3B0 3B1 1B0 1B1")]) == (4, 12)
    assert peak_cache_nbytes(FOUR, [row("2I0 0I0 2W0 0W0"), row("3I0 1I0 3I1 1I1")]) == (4, 6)
    fixed = dataclasses.replace(FOUR, values=tuple(dataclasses.replace(value, differentiable=False) for value in FOUR.values))
    assert peak_cache_nbytes(fixed, [row("2B0 0B0"), row("3B0 1B0")]) == (0, 0)
    assert peak_cache_nbytes(fixed, [row("0F0 2F0"), row("1F0 3F0")]) == (4, 6)


def test_forward_times_come_from_flops() -> None:
    plan = plan_from_shape(ModelShape("x", 3, 10, 2), 2, 1, 7, boundaries=(2,))
    assert forward_seconds(plan, 1000.0) == (2 * 7 * 600 * 2 / 1000, 2 * 7 * 600 * 4 / 1000)
    with pytest.raises(ConfigError, match="no costs"):
        forward_seconds(TWO, 1000.0)
    with pytest.raises(ConfigError, match="above zero"):
        forward_seconds(plan, 0.0)


@pytest.mark.parametrize(
    ("plan", "schedule", "microbatches", "words"),
    [
        (small(2), "Chimera", 2, "unknown schedule 'Chimera'; the schedules are: GPipe, 1F1B"),
        (small(2), "Interleaved1F1B", 2, "two or more stages per rank, so virtual can't be 1"),
        (small(2, 2), "1F1B", 2, "one stage per rank, so virtual can't be 2"),
        (small(2, 2), "ZBVZeroBubble", 4, "wants a folded placement"),
        (small(2, 2, "folded"), "Interleaved1F1B", 4, "wants a looped placement"),
        (small(4), "1F1B", 3, "can't run 3 microbatches on 4 ranks"),
        (small(2, 2, "folded"), "DualPipeV", 3, "can't run 3 microbatches on 2 ranks"),
        (small(2), "GPipe", 0, "can't run 0 microbatches"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(plan: PipelinePlan, schedule: str, microbatches: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stepped(plan, schedule, microbatches)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("link", [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (1.0, -1.0), (1.0, math.nan), (1.0, math.inf)])
def test_links_that_can_not_be_are_refused(link: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"bandwidth|latency"):
        Link(*link)


def test_steps_without_end_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 stages; give one for each"):
        simulate_step(TWO, "GPipe", 1, [1.0], Link())
    with pytest.raises(ConfigError, match="above zero seconds, and finite"):
        simulate_step(TWO, "GPipe", 1, [1.0, math.inf], Link())
    with pytest.raises(ConfigError, match="longer than numbers go"):
        simulate_step(TWO, "GPipe", 1, [1.0, 1.0], Link(bandwidth=5e-324))


def test_a_sweep_repeats_the_step_and_says_what_it_leaves_out() -> None:
    shape, link = ModelShape("deep", 16, 1024, 4), Link(1e9, 1e-5)
    plan = plan_from_shape(shape, 4, 2, 1024)
    step = simulate_step(plan, "Interleaved1F1B", 8, forward_seconds(plan, 1e13), link)
    found = simulate_sweep(lambda ranks: plan_from_shape(shape, ranks, 2, 1024), (2, 4, 8, 64), "Interleaved1F1B", 8, 1e13, link)
    assert [one.ranks for one in found.steps] == [2, 4, 8]
    assert found.steps[1].to_dict() == step.to_dict()
    assert found.left_out == ("64 ranks: deep has 32 sublayers, too few for 128 stages; ask for fewer ranks or virtual stages.",)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["steps"][0]["ranks"] == 2
    assert stepped(TWO, "GPipe", 1).to_dict()["bandwidth"] is None
