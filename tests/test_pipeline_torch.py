"""What ``attnres_compile/pipeline.py`` assumes of torch.distributed.pipelining, one by one: what fails here has moved."""

from __future__ import annotations

import inspect

import pytest
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules

from attnres_compile import pipeline

OVERRIDDEN = {
    "forward_one_chunk": ["fwd_chunk_id", "args", "kwargs", "save_forward_output"],
    "backward_one_chunk": ["bwd_chunk_id", "loss", "full_backward", "last_backward"],
    "forward_maybe_with_nosync": ["args", "kwargs"],
    "backward_maybe_with_nosync": ["backward_type", "bwd_kwargs", "last_backward"],
    "_retrieve_recv_activations": ["fwd_chunk_id"],
    "_retrieve_recv_grads": ["bwd_chunk_id"],
    "_get_init_p2p_neighbors_ops": [],
    "get_fwd_recv_ops": ["fwd_chunk_id"],
    "get_fwd_send_ops": ["fwd_chunk_id"],
    "get_bwd_recv_ops": ["bwd_chunk_id"],
    "get_bwd_send_ops": ["bwd_chunk_id"],
    "set_local_fwd_input": ["prev_stage_outputs", "mb_index"],
    "get_local_bwd_output": ["mb_index"],
    "set_local_bwd_input": ["next_stage_bwd_outputs", "mb_index"],
    "clear_runtime_states": [],
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_methods_have_these_parameters(name: str) -> None:
    assert name in vars(pipeline.BlockCacheStage)
    assert list(inspect.signature(getattr(PipelineStage, name)).parameters)[1:] == OVERRIDDEN[name]


@pytest.mark.parametrize("name", ["_prepare_forward_infra", "_prepare_backward_infra"])
def test_preparation_begins_with_the_number_of_microbatches(name: str) -> None:
    assert list(inspect.signature(getattr(PipelineStage, name)).parameters)[1] == "num_microbatches"


@pytest.mark.parametrize("name", ["fwd_cache", "bwd_cache", "args_recv_info", "stage_index_to_group_rank", "chunks"])
def test_stages_have_these_attributes(name: str) -> None:
    source = "".join(inspect.getsource(kind.__init__) for kind in PipelineStage.__mro__[:-1] if "__init__" in vars(kind))
    assert f"self.{name}" in source


def test_operations_may_stand_for_send_and_receive() -> None:
    """torch sorts operations by ``op == dist.isend``; what is called then takes the tensor, group, tag and the peer by name."""
    source = inspect.getsource(schedules._batch_p2p) + inspect.getsource(dist.batch_isend_irecv)
    assert "group_dst" in source and "group_src" in source


def test_orders_of_schedules() -> None:
    rows = pipeline.computations("Interleaved1F1B", 2, 2, 2)
    assert rows[0][:4] == [(0, "F", 0), (0, "F", 1), (2, "F", 0), (2, "F", 1)]
    assert sorted(rows[1]) == sorted((stage, kind, i) for stage in (1, 3) for kind in "FB" for i in (0, 1))
    assert pipeline.has_one_stage_per_rank("GPipe") and not pipeline.has_one_stage_per_rank("LoopedBFS")
