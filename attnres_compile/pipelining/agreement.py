"""Whether all ranks mean the same, found out before the first transfer."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.fx import GraphModule

from attnres_compile.errors import ConfigError, PartitionError, TransferError
from attnres_compile.pipelining.plan import PipelinePlan


def check_place(plan: PipelinePlan, index: int, group: dist.ProcessGroup | None) -> None:
    """Whether this rank may run stage ``index``.

    Raises:
        PartitionError: if the plan has no stage modules.
        ConfigError: if the group has another number of ranks, or the stage is another rank's.
    """
    if not plan.stages:
        raise PartitionError("this plan has no stage modules; make one with partition, from the model itself.")
    if not 0 <= index < plan.num_stages:
        raise ConfigError(f"the plan has stages 0 to {plan.num_stages - 1}, not {index}.")
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size != plan.ranks:
        raise ConfigError(f"the plan is for {plan.ranks} ranks, the process group has {size}; partition for as many.")
    if plan.placement[index] != rank:
        mine = ", ".join(str(i) for i, other in enumerate(plan.placement) if other == rank)
        raise ConfigError(f"stage {index} belongs to rank {plan.placement[index]}; this rank, {rank}, runs stages {mine}.")


def check_schedule(plan: PipelinePlan, placement: dict[int, int]) -> None:
    """Whether a schedule, which puts stages on ranks, puts them where the plan does.

    Raises:
        ConfigError: if it does not.
    """
    if dict(enumerate(plan.placement)) != placement:
        raise ConfigError(
            f"this schedule puts the stages on ranks {list(placement.values())}, the plan on {list(plan.placement)}; call "
            "partition with placement='folded' for V schedules, 'looped' for the others."
        )


def wire_problem(plan: PipelinePlan, index: int, receives: list[str], sends: list[str]) -> str:
    """How the order in which a stage takes and gives values differs from the plan, which its neighbours go by, or ""."""
    stage, transport = plan.stages[index], plan.transport[index]
    assert isinstance(stage, GraphModule)
    planned = [*transport.receives, *transport.fetches]
    takes = [*receives, *transport.fetches]
    graph_takes = [node.name for node in stage.graph.find_nodes(op="placeholder")] if index else planned
    for found in (takes, graph_takes):
        if found != planned:
            return f"stage {index} takes {', '.join(found)}, where the plan has {', '.join(planned)}"
    if index < plan.num_stages - 1:
        labels = [plan.value(name).label for name in transport.sends]
        graph_gives = [str(node.args[1]) for node in stage.graph.output_node().args[0][0]]  # type: ignore[union-attr, index]
        for found in ([plan.value(name).label for name in sends], graph_gives):
            if found != labels:
                return f"stage {index} sends {', '.join(found)}, where the plan has {', '.join(labels)}"
    return ""


def compare_plans(plan: PipelinePlan, group: dist.ProcessGroup | None, problem: str) -> None:
    """Compare with the other ranks the plan, and what is wrong with this one's stages; all ranks learn of it.

    Raises:
        TransferError: naming the rank that differs or has the problem.
    """
    facts: list[Any] = [None] * plan.ranks
    try:
        dist.all_gather_object(facts, (plan.digest, problem), group=group)
    except RuntimeError as error:
        raise TransferError(f"rank {dist.get_rank(group)} could not compare pipeline plans with the others: {error}") from error
    for rank, (digest, _) in enumerate(facts):
        if digest != facts[0][0]:
            raise TransferError(
                f"rank {rank} holds another pipeline plan than rank 0; call partition alike on all ranks: the same model, "
                "shapes, config, boundaries and transport, and leave the stages' graphs as they are."
            )
    for rank, (_, problem) in enumerate(facts):
        if problem:
            raise TransferError(f"on rank {rank} {problem}; build its stages anew.")
