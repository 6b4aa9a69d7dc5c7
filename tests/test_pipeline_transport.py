"""What moves and what is kept, for values and placements of every kind: ranks run through the plan and find all they need."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_compile.transport import CutValue, StageTransport, folded, hops_of, looped, plan_transport

PROBLEMS = settings(max_examples=500)


@st.composite
def placements(draw: st.DrawFn) -> tuple[int, ...]:
    """Looped, folded or arbitrary, of two stages or more."""
    ranks = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["looped", "folded", "any"]))
    if kind == "folded":
        return folded(ranks)
    if kind == "looped":
        return looped(ranks, draw(st.integers(1 if ranks > 1 else 2, 4)))
    return tuple(draw(st.lists(st.integers(0, ranks - 1), min_size=2, max_size=12)))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[CutValue], tuple[int, ...]]:
    """Values with any producers and readers, and a placement."""
    placement = draw(placements())
    last = len(placement) - 1
    values = []
    for i in range(draw(st.integers(1, 5))):
        producer = draw(st.integers(0, last - 1))
        consumers = tuple(sorted(draw(st.sets(st.integers(producer + 1, last), min_size=1))))
        values.append(CutValue(f"v{i}", f"v{i}", "other", producer, consumers, (1,), "float32", draw(st.integers(1, 100))))
    return values, placement


def run(values: list[CutValue], placement: tuple[int, ...], transport: tuple[StageTransport, ...]) -> None:
    """One microbatch goes through all stages; every rank has a cache. Anything that is not there when wanted fails."""
    caches: dict[int, set[str]] = {rank: set() for rank in placement}
    kept: Counter[tuple[int, str]] = Counter()
    on_the_hop: tuple[str, ...] = ()
    for stage, (rank, does) in enumerate(zip(placement, transport, strict=True)):
        assert does.receives == on_the_hop
        assert does.makes == tuple(value.name for value in values if value.producer == stage)
        assert does.reads == tuple(value.name for value in values if stage in value.consumers)
        received, fetched = set(does.receives), set(does.fetches)
        assert not received & fetched
        assert fetched <= caches[rank]
        assert set(does.reads) <= received | fetched
        assert set(does.sends) <= received | fetched | set(does.makes)
        assert set(does.relays) == set(does.sends) - set(does.makes)
        assert fetched <= set(does.reads) | set(does.sends)
        assert set(does.keeps) <= received | set(does.makes)
        assert not set(does.keeps) & caches[rank]
        caches[rank] |= set(does.keeps)
        kept.update((rank, name) for name in does.keeps)
        assert set(does.frees) <= caches[rank]
        assert not set(does.frees) & set(does.keeps)
        caches[rank] -= set(does.frees)
        on_the_hop = does.sends
        for names in (does.reads, does.makes, does.receives, does.sends, does.fetches, does.keeps, does.frees):
            assert list(names) == [value.name for value in values if value.name in names]  # the order of the graph
    assert on_the_hop == ()
    assert all(not cache for cache in caches.values())
    assert all(count == 1 for count in kept.values())


@given(problems(), st.booleans())
@PROBLEMS
def test_every_stage_has_what_it_reads(problem: tuple[list[CutValue], tuple[int, ...]], cached: bool) -> None:
    values, placement = problem
    run(values, placement, plan_transport(values, placement, cached))


@given(problems())
@PROBLEMS
def test_naive_transport_carries_a_value_to_its_last_reader_and_keeps_nothing(
    problem: tuple[list[CutValue], tuple[int, ...]],
) -> None:
    values, placement = problem
    for stage, does in enumerate(plan_transport(values, placement, cached=False)):
        assert set(does.sends) == {value.name for value in values if value.producer <= stage < max(value.consumers)}
        assert (does.fetches, does.keeps, does.frees) == ((), (), ())


@given(problems())
@PROBLEMS
def test_a_rank_is_sent_a_value_once_and_never_its_own(problem: tuple[list[CutValue], tuple[int, ...]]) -> None:
    values, placement = problem
    arrivals = [
        (hop.ranks[1], value.name)
        for hop in hops_of(values, placement, plan_transport(values, placement))
        for value in hop.values
        if not hop.is_local
    ]
    own = [(placement[value.producer], value.name) for value in values]
    assert max(Counter([*arrivals, *own]).values()) == 1


@given(problems())
@PROBLEMS
def test_cached_hops_carry_no_more_than_naive_ones(problem: tuple[list[CutValue], tuple[int, ...]]) -> None:
    values, placement = problem
    naive, cached = (hops_of(values, placement, plan_transport(values, placement, how)) for how in (False, True))
    for one, other in zip(naive, cached, strict=True):
        assert set(other.values) <= set(one.values)
        assert other.nbytes <= one.nbytes
        assert (one.nbytes == 0) or not one.is_local


@given(placements(), st.data())
@PROBLEMS
def test_what_travels_is_read_or_relayed(placement: tuple[int, ...], data: st.DataObject) -> None:
    """By a stage of the rank that got it, then or later, where all later stages read a block, and the next one a partial sum."""
    last = len(placement) - 1
    values = []
    for i, producer in enumerate(data.draw(st.lists(st.integers(0, last - 1), min_size=1, max_size=5))):
        stop = data.draw(st.sampled_from([producer + 1, last]))
        consumers = tuple(range(producer + 1, stop + 1))
        values.append(CutValue(f"v{i}", f"v{i}", "other", producer, consumers, (1,), "float32", 1))
    transport = plan_transport(values, placement)
    for stage, does in enumerate(transport):
        later = [transport[s] for s in range(stage, last + 1) if placement[s] == placement[stage]]
        for name in does.receives:
            assert any(name in (*one.reads, *one.relays) for one in later)


def test_looped_and_folded_by_hand() -> None:
    """Four stages on two ranks; ``a`` is made in stage 0 and read by all others, ``b`` in stage 1 and read by stage 3."""
    values = [
        CutValue("a", "b0", "block", 0, (1, 2, 3), (1,), "float32", 4),
        CutValue("b", "b1", "block", 1, (3,), (1,), "float32", 4),
    ]
    assert looped(2, 2) == (0, 1, 0, 1)
    assert [(does.sends, does.fetches, does.keeps, does.frees) for does in plan_transport(values, looped(2, 2))] == [
        (("a",), (), ("a",), ()),
        ((), (), ("a", "b"), ()),
        ((), ("a",), (), ("a",)),
        ((), ("a", "b"), (), ("a", "b")),
    ]
    assert folded(2) == (0, 1, 1, 0)
    assert [(does.sends, does.fetches, does.keeps, does.frees) for does in plan_transport(values, folded(2))] == [
        (("a",), (), ("a",), ()),
        (("b",), (), ("a",), ()),
        (("b",), ("a",), (), ("a",)),
        ((), ("a",), (), ("a",)),
    ]
