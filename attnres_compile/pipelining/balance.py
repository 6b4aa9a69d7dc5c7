"""Where to cut a chain of segments into pipeline stages.

The slowest stage sets the pace of a pipeline, so stages are made as equal as they can be in FLOPs. Forward alone or forward and
backward makes no difference: the backward pass takes twice the forward pass everywhere. A cut at the end of a block spares the
hop a partial sum, so such cuts are preferred as long as the slowest stage hardly gets slower.

Stages of equal FLOPs differ in memory. The embedding and the output projection weigh little or nothing beside their parameters,
and under 1F1B the earlier ranks keep the activations of more microbatches. :func:`stage_totals` tells what each stage holds.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from attnres_compile.errors import ConfigError

_Cost = TypeVar("_Cost")
_Numbers = NDArray[np.float64]


def balanced(
    weights: Sequence[float], stages: int, aligned: Sequence[bool] | None = None, tolerance: float = 0.05
) -> tuple[int, ...]:
    """The segments that begin a new stage: ``stages - 1`` numbers, increasing, from 1 to ``len(weights) - 1``.

    The largest stage is at most ``1 + tolerance`` times as large as the smallest possible largest stage. Among such cuts the most
    are aligned; among those the largest stage is the smallest; among those stages are as even as possible (least squares). Exact
    up to the rounding of float64, in O(stages * segments^2).

    Args:
        weights: the cost of every segment, in any unit.
        stages: how many to make; none is empty.
        aligned: for each possible cut, the starts of segments 1, 2, ..., whether it is at the end of a block.
        tolerance: how much larger than necessary the largest stage may be for the sake of alignment.

    Raises:
        ConfigError: for fewer segments than stages, no stages, weights that are negative or not finite, a negative tolerance.
    """
    if stages < 1:
        raise ConfigError(f"a pipeline has at least one stage, not {stages}.")
    if len(weights) < stages:
        raise ConfigError(f"{len(weights)} segments can't make {stages} stages; use fewer ranks or fewer stages per rank.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ConfigError("the weights of segments must be finite and not negative.")
    if not tolerance >= 0:
        raise ConfigError(f"the tolerance must not be negative, but is {tolerance}.")
    preferred = [False] * (len(weights) - 1) if aligned is None else list(aligned)
    if len(preferred) != len(weights) - 1:
        raise ConfigError(f"{len(weights)} segments have {len(weights) - 1} possible cuts, but aligned has {len(preferred)}.")

    ends = np.concatenate([[0.0], np.cumsum(np.asarray(weights, dtype=np.float64))])
    stage_cost = ends[None, :] - ends[:, None]  # [first segment, segment behind the last]
    stage_cost[np.tril_indices(len(ends))] = np.inf  # no stage is empty
    gains = np.array([0.0, *map(float, preferred), 0.0])
    smallest = _best_cuts(stage_cost, np.zeros_like(gains), stages, np.maximum).cost
    largest = _best_cuts(_up_to(stage_cost, smallest * (1 + tolerance)), gains, stages, np.maximum).cost
    return _best_cuts(_up_to(stage_cost, largest) ** 2, gains, stages, np.add).cuts


def block_ends(sublayers_before: Sequence[int], block_size: int) -> tuple[bool, ...]:
    """Whether each cut, given by the number of sublayers before it, is at the end of a block of ``block_size`` sublayers."""
    return tuple(before % block_size == 0 for before in sublayers_before)


def stage_totals(costs: Sequence[_Cost], cuts: Sequence[int]) -> tuple[_Cost, ...]:
    """The costs of the stages that begin at segment 0 and at ``cuts``: sums of numbers, or of anything else that can be added."""
    add: Any = operator.add
    return tuple(functools.reduce(add, costs[start:end]) for start, end in itertools.pairwise((0, *cuts, len(costs))))


class _Cuts(NamedTuple):
    cost: float
    cuts: tuple[int, ...]


def _up_to(stage_cost: _Numbers, limit: float) -> _Numbers:
    return np.where(stage_cost <= limit, stage_cost, np.inf)


def _best_cuts(stage_cost: _Numbers, gains: _Numbers, stages: int, combine: np.ufunc) -> _Cuts:
    """The cuts of the largest total gain, and among those of the lowest cost, by dynamic programming over the last stage.

    ``combine`` makes the cost of the whole from its stages': a maximum or a sum. Either way, a better beginning never makes the
    whole worse. ``gains`` are of the cuts before each segment.
    """
    gain, cost = np.where(np.arange(len(gains)) == 0, 0.0, -np.inf), np.where(np.arange(len(gains)) == 0, 0.0, np.inf)
    beginnings = []
    for _ in range(stages):
        costs = combine(cost[:, None], stage_cost)
        gained = np.where(np.isfinite(costs), (gain + gains)[:, None], -np.inf)
        gain = gained.max(0)
        costs[gained < gain] = np.inf
        start = costs.argmin(0)
        cost = costs[start, np.arange(len(start))]
        beginnings.append(start)
    cuts = []
    place = len(gains) - 1
    for start in reversed(beginnings[1:]):
        place = int(start[place])
        cuts.append(place)
    return _Cuts(float(cost[-1]), tuple(reversed(cuts)))
