"""One training step, simulated: when every rank computes, when every transfer runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from attnres_compile.errors import ConfigError
from attnres_compile.transport import Hop

# In forwards of the same stage. B is the whole backward; zero-bubble schedules split it into I, gradients of inputs, which the
# stage before waits for, and W, gradients of weights, which nothing waits for.
SECONDS_OF = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


class Operation(NamedTuple):
    """What a rank does at a time: ``kind`` "F" (forward), "B" (backward), "I" or "W" (its halves) of a stage's microbatch."""

    stage: int
    kind: str
    microbatch: int


class Computation(NamedTuple):
    """An operation between two times, in seconds from the start of the step."""

    operation: Operation
    start: float
    end: float


class Transfer(NamedTuple):
    """What ``operation`` made, on its way from one rank to another; times in seconds from the start of the step."""

    operation: Operation
    ranks: tuple[int, int]
    start: float
    end: float
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins every two ranks, each way apart: ``bandwidth`` in bytes per second, ``latency`` in seconds per transfer.

    Raises:
        ConfigError: for a bandwidth that is not above zero or a latency below it.
    """

    bandwidth: float = math.inf
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ConfigError(f"bandwidth must be above zero, not {self.bandwidth}.")
        if not 0 <= self.latency < math.inf:
            raise ConfigError(f"latency must be zero or more seconds, not {self.latency}.")

    def seconds(self, nbytes: int) -> float:
        return self.latency + nbytes / self.bandwidth if nbytes else 0.0


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A simulated step: the ``computations`` of every rank and the ``transfers`` of every link, in the order of time."""

    computations: tuple[tuple[Computation, ...], ...]
    transfers: tuple[Transfer, ...]

    @property
    def seconds(self) -> float:
        """Of the step, from the first forward to the last backward."""
        return max((row[-1].end for row in self.computations if row), default=0.0)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """The fraction of the step in which each rank computes nothing."""
        return tuple(1 - sum(done.end - done.start for done in row) / self.seconds for row in self.computations)

    @property
    def bubble(self) -> float:
        """The mean of :attr:`bubbles`."""
        return sum(self.bubbles) / len(self.bubbles)

    @property
    def nbytes(self) -> int:
        """Bytes that all ranks send in the step."""
        return sum(transfer.nbytes for transfer in self.transfers)

    @property
    def busiest_link_seconds(self) -> float:
        """Seconds for which the directed link with the most to do is taken."""
        taken: dict[tuple[int, int], float] = {}
        for transfer in self.transfers:
            taken[transfer.ranks] = taken.get(transfer.ranks, 0.0) + transfer.end - transfer.start
        return max(taken.values(), default=0.0)


def simulate(
    orders: Sequence[Sequence[Operation]], hops: Sequence[Hop], forward_seconds: Sequence[float], link: Link, overlap: bool = True
) -> Timeline:
    """Run every rank's operations in their order, each as soon as the rank is free and what it needs has arrived.

    A transfer starts when its operation has ended and the link between the two ranks, in that direction, is free. It takes the
    latency and its bytes over the bandwidth, whatever other links do. Ranks compute meanwhile and have posted their receives
    early enough; without ``overlap`` the sending rank waits until what it sends has arrived. Hops within a rank, and hops that
    carry nothing, take no time. A backward takes two forwards, each of its halves one. Optimizer, reduction of gradients over
    replicas and loss take none.

    Args:
        orders: the operations of every rank.
        hops: what goes from every stage to the next, for one microbatch.
        forward_seconds: of each stage, for one microbatch.

    Raises:
        ConfigError: if the orders wait for each other in a circle.
    """
    run = _Run(orders, hops, forward_seconds, link, overlap)
    runnable = list(range(len(orders)))
    while runnable:
        runnable += run.advance(runnable.pop())
    for row, order in zip(run.rows, orders, strict=True):
        if len(row) < len(order):
            stage, kind, microbatch = order[len(row)]
            raise ConfigError(f"the schedule never ends: {kind} of microbatch {microbatch} in stage {stage} waits for ever.")
    return Timeline(tuple(map(tuple, run.rows)), tuple(run.transfers))


class _Need(NamedTuple):
    """What a forward, or a backward, of a stage's microbatch waits for: the stage before, or the one behind."""

    backward: bool
    stage: int
    microbatch: int


class _Run:
    """A step in progress. Ranks may be advanced in any order: what starts when depends on arrivals alone."""

    def __init__(
        self,
        orders: Sequence[Sequence[Operation]],
        hops: Sequence[Hop],
        forward_seconds: Sequence[float],
        link: Link,
        overlap: bool,
    ) -> None:
        self.orders, self.hops, self.forward_seconds, self.link, self.overlap = orders, hops, forward_seconds, link, overlap
        self.rows: list[list[Computation]] = [[] for _ in orders]
        self.transfers: list[Transfer] = []
        self._clock = [0.0] * len(orders)
        self._link_free: dict[tuple[int, int], float] = {}
        self._arrived: dict[_Need, float] = {}
        self._waiting: dict[_Need, int] = {}

    def advance(self, rank: int) -> list[int]:
        """Run operations of ``rank`` until one lacks what it needs; the ranks that have what they waited for."""
        row, order, awake = self.rows[rank], self.orders[rank], []
        while len(row) < len(order):
            operation = order[len(row)]
            needed = _needed(operation)
            if needed is not None and needed not in self._arrived:
                self._waiting[needed] = rank
                break
            ready = 0.0 if needed is None else self._arrived.pop(needed)
            start = max(self._clock[rank], ready)
            end = start + SECONDS_OF[operation.kind] * self.forward_seconds[operation.stage]
            self._clock[rank] = end
            row.append(Computation(operation, start, end))
            given = self._given(operation)
            if given is not None:
                self._arrived[given] = arrival = self._send(operation, given, end)
                if not self.overlap:
                    self._clock[rank] = arrival
                if given in self._waiting:
                    awake.append(self._waiting.pop(given))
        return awake

    def _given(self, operation: Operation) -> _Need | None:
        """Which need the operation meets. After the last stage's forward comes its own backward."""
        stage, kind, microbatch = operation
        if kind == "F":
            last = stage == len(self.hops)
            return _Need(last, stage if last else stage + 1, microbatch)
        return None if kind == "W" or stage == 0 else _Need(True, stage - 1, microbatch)

    def _send(self, operation: Operation, given: _Need, end: float) -> float:
        """When what ``operation`` made by ``end`` is where it is needed."""
        if given.stage == operation.stage:
            return end
        hop = self.hops[min(given.stage, operation.stage)]
        nbytes, ranks = (hop.gradient_nbytes, hop.ranks[::-1]) if given.backward else (hop.nbytes, hop.ranks)
        if not nbytes:
            return end
        start = max(end, self._link_free.get(ranks, 0.0))
        arrival = self._link_free[ranks] = start + self.link.seconds(nbytes)
        self.transfers.append(Transfer(operation, ranks, start, arrival, nbytes))
        return arrival


def _needed(operation: Operation) -> _Need | None:
    """Nothing for a first stage's forward, nor for gradients of weights, which follow those of inputs on the same rank."""
    stage, kind, microbatch = operation
    return None if kind == "W" or (kind == "F" and stage == 0) else _Need(kind != "F", stage, microbatch)
