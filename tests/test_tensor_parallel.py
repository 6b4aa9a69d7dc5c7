"""Tensor parallelism on real processes, held against one process in float64; blocks split along the sequence."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import run_ranks
from tensor_parallel import LAYERS, MOST_SOURCES, ROWS, WIDTH, on_four_ranks, on_two_ranks

TOLERANCE = 1e-12
SUBLAYERS = 2 * LAYERS


@pytest.fixture(scope="module")
def two() -> list[Any]:
    return run_ranks(on_two_ranks, 2)


@pytest.fixture(scope="module")
def four() -> list[Any]:
    return run_ranks(on_four_ranks, 4)


def assert_equal(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["output"] < TOLERANCE
        assert rank["gradients"] < TOLERANCE
        assert rank["queries"] == found[0]["queries"]  # to the bit: ranks must not drift apart


def bytes_of(tokens: int) -> int:
    return MOST_SOURCES * ROWS * tokens * WIDTH * 8


CASES = [
    ("rewritten", "whole"), ("rewritten", "split"), ("rewritten", "split DTensor"), ("rewritten", "unreduced DTensor"),
    ("sharded", 8), ("sharded", 1), ("compiled", "whole"), ("compiled", "split DTensor"), ("compiled", "sharded"),
    "split already", "distributed queries",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_give_what_one_process_gives(two: list[Any], case: Any) -> None:
    assert_equal([rank[case] for rank in two])


@pytest.mark.parametrize("case", ["split", ("sharded", 8), ("sharded", 5)], ids=str)
def test_four_ranks_give_what_one_process_gives(four: list[Any], case: Any) -> None:
    assert_equal([rank[case] for rank in four])


def test_an_optimizer_step_with_queries_as_dtensors(two: list[Any]) -> None:
    assert max(rank["distributed queries"]["step"] for rank in two) < TOLERANCE


def test_every_rank_holds_its_part_of_the_blocks(two: list[Any], four: list[Any]) -> None:
    for rank in two:
        assert rank["rewritten", "whole"]["bytes"] == bytes_of(8)
        assert rank["sharded", 8]["bytes"] == rank["rewritten", "split"]["bytes"] == bytes_of(8 // 2)
        assert rank["sharded", 1]["bytes"] == bytes_of(1)  # fewer tokens than ranks
    for rank in four:
        assert rank["sharded", 8]["bytes"] == rank["split"]["bytes"] == bytes_of(8 // 4)
        assert rank["sharded", 5]["bytes"] <= bytes_of(2)  # of parts of 2, 2, 1 and 0 tokens; collectives pad


def test_all_reduces_become_reduce_scatters_and_all_gathers(two: list[Any], four: list[Any]) -> None:
    halves = {"reduce_scatter_tensor": SUBLAYERS, "all_gather_into_tensor": SUBLAYERS}
    for rank in two:
        assert rank["rewritten", "whole"]["collectives"] == {"all_reduce": SUBLAYERS}
    for rank in (*two, *four):
        assert rank["sharded", 8]["collectives"] == halves


REFUSED = {
    "features": "PlacementError: the residual stream that layers.0.norm2 reads is split along its features",
    "odd length": "PlacementError: layers.0.norm2 takes this rank's part of the residual stream, (2, ",
    "split query": "PlacementError: a query or key-norm weight is placed as (Shard(dim=0),)",
    "not parallel": "PlacementError: shard_sequence was asked for, but no branch of the residual stream comes from a DTensor",
    "symbolic length": "PlacementError: shard_sequence can't split a sequence whose length is a symbol",
    "no flag": "ConfigError: shard_sequence must be True or False, not 2.",
    "FSDP": "ConfigError: FSDPTransformer was wrapped for distributed training before it had AttnRes parameters",
    "pipeline": "PartitionError: Transformer holds DTensors",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_way_out(two: list[Any], case: str) -> None:
    for rank in two:
        assert rank["refusals"][case].startswith(REFUSED[case])
