"""Which values travel over which hop, and which a rank keeps: plain data, without torch.

Block AttnRes attends to every complete block on every later stage. Naively every hop carries all blocks that a later stage
still reads: O(C) of them. With a cache a rank keeps what it received or made, and a hop carries what the receiving rank lacks:
O(P) (section "Pipeline parallelism" of arXiv 2603.15031).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class CutValue:
    """A value that one stage makes and later stages read.

    ``name`` is its node's in the rewritten graph. ``label`` is what readers of a plan see: ``b0`` for the embedding, ``b3``
    for the third block's sum, ``p`` with a stage number for a partial sum that a cut in mid-block carries over, else the name.
    ``kind`` is "block", "partial" or "other". ``nbytes`` is the size in bytes of one microbatch's value.
    """

    name: str
    label: str
    kind: str
    producer: int
    consumers: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    differentiable: bool = True


@dataclasses.dataclass(frozen=True)
class StageTransport:
    """What one stage does with cut values, by name and in the order of the graph.

    ``reads`` is what its own operations use and ``makes`` what they make for later stages. ``receives`` and ``sends`` are the
    values on the hops before and behind it; a value that is sent and neither made here nor read here is relayed. ``fetches`` are
    taken from the rank's cache, ``keeps`` put there, and ``frees`` dropped from it once the stage is done: no later stage of
    the rank wants them.
    """

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    receives: tuple[str, ...]
    sends: tuple[str, ...]
    fetches: tuple[str, ...]
    keeps: tuple[str, ...]
    frees: tuple[str, ...]

    @property
    def relays(self) -> tuple[str, ...]:
        """What passes through without being made here."""
        return tuple(name for name in self.sends if name not in self.makes)


def looped(ranks: int, virtual: int) -> tuple[int, ...]:
    """The rank of every stage where stages go round the ranks: those of GPipe, 1F1B, Interleaved1F1B and LoopedBFS."""
    return tuple(stage % ranks for stage in range(ranks * virtual))


def folded(ranks: int) -> tuple[int, ...]:
    """The rank of every stage in V schedules (ZBVZeroBubble, DualPipeV): down the ranks and up again."""
    return (*range(ranks), *reversed(range(ranks)))


def plan_transport(values: Sequence[CutValue], placement: Sequence[int], cached: bool = True) -> tuple[StageTransport, ...]:
    """What every stage receives, sends, fetches, keeps and frees; ``placement`` is the rank of every stage.

    Between neighbours on one rank values are handed over and nothing travels.
    """
    stages = [_Stage() for _ in placement]
    for value in values:
        stages[value.producer].makes.append(value.name)
        for consumer in value.consumers:
            stages[consumer].reads.append(value.name)
        holders = _travel(value, placement, stages, cached)
        if cached:
            _cache(value, placement, stages, holders)
    return tuple(stage.frozen() for stage in stages)


class _Stage:
    """A :class:`StageTransport` while it is put together."""

    def __init__(self) -> None:
        for field in dataclasses.fields(StageTransport):
            setattr(self, field.name, [])

    reads: list[str]
    makes: list[str]
    receives: list[str]
    sends: list[str]
    fetches: list[str]
    keeps: list[str]
    frees: list[str]

    def frozen(self) -> StageTransport:
        return StageTransport(**{field.name: tuple(getattr(self, field.name)) for field in dataclasses.fields(StageTransport)})


def _travel(value: CutValue, placement: Sequence[int], stages: list[_Stage], cached: bool) -> dict[int, int]:
    """Send ``value`` down the stages; the ranks that then hold it, each with the stage through which it got there.

    It leaves for a rank that lacks it from the last stage before that one whose rank holds it.
    """
    holders = {placement[value.producer]: value.producer}
    for stage in range(value.producer, max(value.consumers)):
        following = placement[stage + 1]
        first = next((c for c in value.consumers if c > stage and placement[c] not in holders), stage)
        handed_over = stage == value.producer and placement[stage] == following
        lacking = stage < first and not any(placement[later] in holders for later in range(stage + 1, first))
        if not cached or handed_over or lacking:
            stages[stage].sends.append(value.name)
            stages[stage + 1].receives.append(value.name)
            holders.setdefault(following, stage + 1)
    return holders


def _cache(value: CutValue, placement: Sequence[int], stages: list[_Stage], holders: dict[int, int]) -> None:
    """Let the stages that read or relay ``value`` and do not receive it take it from their rank's cache."""
    for rank, holder in holders.items():
        readers = [
            stage
            for stage in range(holder + 1, len(placement))
            if placement[stage] == rank
            and value.name not in stages[stage].receives
            and (stage in value.consumers or value.name in stages[stage].sends)
        ]
        for stage in readers:
            stages[stage].fetches.append(value.name)
        if readers:
            stages[holder].keeps.append(value.name)
            stages[readers[-1]].frees.append(value.name)


@dataclasses.dataclass(frozen=True)
class Hop:
    """What goes from stage ``source`` to the next, for one microbatch. Gradients go back in the same sizes."""

    source: int
    ranks: tuple[int, int]
    values: tuple[CutValue, ...]

    @property
    def is_local(self) -> bool:
        return self.ranks[0] == self.ranks[1]

    @property
    def nbytes(self) -> int:
        """Bytes between ranks, forward."""
        return 0 if self.is_local else sum(value.nbytes for value in self.values)

    @property
    def gradient_nbytes(self) -> int:
        """Bytes between ranks, backward."""
        return 0 if self.is_local else sum(value.nbytes for value in self.values if value.differentiable)


def hops_of(values: Iterable[CutValue], placement: Sequence[int], transport: Sequence[StageTransport]) -> tuple[Hop, ...]:
    """The hops between neighbouring stages, first to last."""
    named = {value.name: value for value in values}
    return tuple(
        Hop(stage, (placement[stage], placement[stage + 1]), tuple(named[name] for name in transport[stage].sends))
        for stage in range(len(placement) - 1)
    )
