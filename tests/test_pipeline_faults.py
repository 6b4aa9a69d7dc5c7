"""A pipeline that is broken says so, on the rank where it is and on the others, and leaves nothing in the block cache."""

from __future__ import annotations

import pytest
import torch
from pipeline_faults import break_step
from ranks import try_ranks

from attnres_compile.errors import TransferError
from attnres_compile.pipelining.cache import BlockCache

PATIENCE = 20  # seconds that a rank waits for another

HERE = {
    "lost": "lost its gradient of",
    "doubled": "twice",
    "swapped inputs": "rank 1 holds another pipeline plan",
    "swapped outputs": "rank 1 holds another pipeline plan",
    "swapped receives": "on rank 1 stage 1 takes",
    "transport": "rank 1 holds another pipeline plan",
    "values": "rank 1 holds another pipeline plan",
    "dtype": "the plan has float64",
}


@pytest.mark.parametrize("fault", HERE)
def test_found_by_the_rank_that_is_wrong(fault: str) -> None:
    outcomes = try_ranks(break_step, 2, fault, transfer_seconds=PATIENCE)
    assert all(done for done, _ in outcomes), outcomes
    (_, (name0, text0, seconds0, left0)), (_, (name1, text1, seconds1, left1)) = outcomes
    assert name1 == "TransferError" and HERE[fault] in text1
    # The other rank finds the same, or that its peer is gone, and on which hop.
    assert name0 == "TransferError" and (HERE[fault] in text0 or "(rank 0)" in text0)
    assert max(seconds0, seconds1) < 30
    assert (left0, left1) == (0, 0)


def test_without_a_fault() -> None:
    for done, (name, text, _, left) in try_ranks(break_step, 2, "none", transfer_seconds=PATIENCE):
        assert (done, name, text, left) == (True, "", "", 0)


@pytest.mark.parametrize("fault", ["killed", "hangs", "raises"])
def test_a_lost_peer_is_named_with_the_hop(fault: str) -> None:
    outcomes = try_ranks(break_step, 2, fault, seconds=120, transfer_seconds=PATIENCE)
    done, (name, text, seconds, left) = outcomes[0]
    assert done and name == "TransferError"
    assert "rank 0" in text and "rank 1" in text and "microbatch" in text and "stage" in text
    assert seconds < 30 and left == 0
    if fault == "killed":
        assert outcomes[1] == (False, "died")
    if fault == "raises":
        assert outcomes[1][1][3] == 0


class TestBlockCache:
    def test_values_and_deposits(self) -> None:
        cache = BlockCache()
        cache.put(0, "b0", torch.ones(3))
        assert torch.equal(cache.get(0, "b0"), torch.ones(3)) and len(cache) == 1 and cache.nbytes == 12
        cache.drop(0, "b0")
        cache.deposit(0, "b0", 4, torch.full((3,), 2.0))
        cache.deposit(0, "b0", 2, None)
        cache.deposit(0, "b0", 6, torch.full((3,), 5.0))
        assert torch.equal(cache.collect(0, "b0", [2, 4, 6]), torch.full((3,), 7.0))
        assert len(cache) == 0 and cache.peak_nbytes == 24

    def test_no_difference_to_any_reader(self) -> None:
        cache = BlockCache()
        cache.deposit(1, "b0", 2, None)
        assert cache.collect(1, "b0", [2]) is None

    @pytest.mark.parametrize(
        ("stages", "message"), [([2, 4], "stage 4 lost its gradient"), ([], "stage 2 deposited a foreign gradient")]
    )
    def test_lost_or_foreign(self, stages: list[int], message: str) -> None:
        cache = BlockCache()
        cache.deposit(1, "b0", 2, torch.ones(1))
        with pytest.raises(TransferError, match=f"{message} of b0, microbatch 1"):
            cache.collect(1, "b0", stages)

    def test_twice(self) -> None:
        cache = BlockCache()
        cache.put(3, "b0", torch.ones(1))
        with pytest.raises(TransferError, match="b0 of microbatch 3 was put into the block cache twice"):
            cache.put(3, "b0", torch.ones(1))
        cache.deposit(3, "b0", 2, torch.ones(1))
        with pytest.raises(TransferError, match="stage 2 deposited the gradient of b0, microbatch 3, twice"):
            cache.deposit(3, "b0", 2, torch.ones(1))

    def test_not_there(self) -> None:
        with pytest.raises(TransferError, match="b7 of microbatch 0 is not in the block cache"):
            BlockCache().drop(0, "b7")
