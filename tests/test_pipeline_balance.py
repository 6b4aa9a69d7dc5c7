"""Stage boundaries against every possible choice of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_compile.errors import ConfigError
from attnres_compile.pipelining.balance import balanced, block_ends, stage_totals


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int, list[bool], float]:
    """Weights of segments, a number of stages, which cuts are aligned, and a tolerance."""
    weights = draw(st.lists(st.integers(0, 20), min_size=1, max_size=9))
    stages = draw(st.integers(1, len(weights)))
    aligned = draw(st.lists(st.booleans(), min_size=len(weights) - 1, max_size=len(weights) - 1))
    return weights, stages, aligned, draw(st.sampled_from([0.0, 0.05, 0.25, 1.0]))


def every_choice(weights: Sequence[int], stages: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(1, len(weights)), stages - 1))


def num_aligned(cuts: Sequence[int], aligned: Sequence[bool]) -> int:
    return sum(aligned[cut - 1] for cut in cuts)


@given(problems())
@settings(max_examples=500)
def test_no_choice_is_better(problem: tuple[list[int], int, list[bool], float]) -> None:
    weights, stages, aligned, tolerance = problem
    totals = {cuts: stage_totals(weights, cuts) for cuts in every_choice(weights, stages)}
    limit = min(map(max, totals.values())) * (1 + tolerance)
    allowed = [cuts for cuts in totals if max(totals[cuts]) <= limit]

    def rank(cuts: tuple[int, ...]) -> tuple[int, int, int]:
        return -num_aligned(cuts, aligned), max(totals[cuts]), sum(total**2 for total in totals[cuts])

    cuts = balanced(weights, stages, aligned, tolerance)
    assert cuts in allowed
    assert rank(cuts) == min(map(rank, allowed))


@given(problems())
def test_without_preference_the_largest_stage_is_the_smallest(problem: tuple[list[int], int, list[bool], float]) -> None:
    weights, stages, _, tolerance = problem
    cuts = balanced(weights, stages, tolerance=tolerance)
    assert max(stage_totals(weights, cuts)) == min(max(stage_totals(weights, other)) for other in every_choice(weights, stages))


@pytest.mark.parametrize(("stages", "largest"), [(8, 24), (16, 12), (32, 6)])
def test_93_layers_in_blocks_of_24_sublayers(stages: int, largest: int) -> None:
    weights = [1] * 187  # 186 sublayers, the first with the embedding, and the output
    aligned = block_ends(range(1, 187), 24)
    cuts = balanced(weights, stages, aligned)
    assert max(stage_totals(weights, cuts)) == largest == -(-187 // stages)
    assert num_aligned(cuts, aligned) == sum(aligned) == 7


def test_93_layers_whose_output_is_heavy() -> None:
    """The last stage has fewer sublayers where the vocabulary's projection weighs as much as seven of them."""
    weights = [1.0] * 186 + [7.0]
    cuts = balanced(weights, 8, block_ends(range(1, 187), 24), tolerance=0.0)
    assert cuts == (24, 48, 72, 96, 120, 144, 168)
    assert stage_totals(weights, cuts) == (24.0,) * 7 + (25.0,)


def test_alignment_costs_no_more_than_the_tolerance() -> None:
    weights, aligned = [10] * 12, block_ends(range(1, 12), 5)
    assert balanced(weights, 3, aligned, tolerance=0.24) == (4, 8)
    assert balanced(weights, 3, aligned, tolerance=0.25) == (5, 10)


def test_large_weights_are_told_apart() -> None:
    """FLOPs of a microbatch of the largest models, and a difference of one."""
    weights = [10**14, 10**14 + 1, 10**14, 10**14]
    assert balanced(weights, 2, [True, False, True], tolerance=0.0) == (2,)
    assert stage_totals(weights, (2,)) == (2 * 10**14 + 1, 2 * 10**14)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 segments can't make 4 stages"):
        balanced([1, 1, 1], 4)
    with pytest.raises(ConfigError, match="at least one stage, not 0"):
        balanced([1, 1, 1], 0)
    with pytest.raises(ConfigError, match="finite and not negative"):
        balanced([1, -1, 1], 2)
    with pytest.raises(ConfigError, match="finite and not negative"):
        balanced([1, float("nan"), 1], 2)
    with pytest.raises(ConfigError, match=r"tolerance must not be negative, but is -0\.1"):
        balanced([1, 1], 2, tolerance=-0.1)
    with pytest.raises(ConfigError, match="2 possible cuts, but aligned has 3"):
        balanced([1, 1, 1], 2, [True] * 3)
