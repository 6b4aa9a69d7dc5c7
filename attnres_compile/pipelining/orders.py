"""The order of operations on every rank, as torch's schedules have it."""

from __future__ import annotations

from attnres_compile.errors import ConfigError
from attnres_compile.pipelining.simulation import Operation

# The placement of stages that each schedule wants.
SCHEDULES = {
    "GPipe": "looped",
    "1F1B": "looped",
    "Interleaved1F1B": "looped",
    "LoopedBFS": "looped",
    "InterleavedZeroBubble": "looped",
    "ZBVZeroBubble": "folded",
    "DualPipeV": "folded",
}


def schedule_orders(name: str, ranks: int, microbatches: int, virtual: int) -> tuple[tuple[Operation, ...], ...]:
    """What every rank does in one step, in torch's own order; no process group is needed.

    A forward and a backward that DualPipeV overlaps come one after the other.

    Raises:
        ConfigError: for an unknown schedule, or numbers that it can't run.
    """
    from attnres_compile import pipeline  # imports torch.distributed.pipelining, which takes seconds

    placement = placement_of(name)
    single = pipeline.has_one_stage_per_rank(name)
    wanted = virtual == 1 if single else virtual == 2 if placement == "folded" else virtual >= 2
    if not wanted:
        stages = "one stage" if single else "two stages" if placement == "folded" else "two or more stages"
        raise ConfigError(f"{name} has {stages} per rank, so virtual can't be {virtual}; choose another schedule or number.")
    if microbatches < 1 or ranks < 1:
        raise ConfigError(f"{name} can't run {microbatches} microbatches on {ranks} ranks; both must be above zero.")
    try:
        found = pipeline.computations(name, ranks, microbatches, virtual)
    except (ValueError, AssertionError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"{name} can't run {microbatches} microbatches on {ranks} ranks: {said}.") from error
    orders = tuple(tuple(Operation(*computation) for computation in row) for row in found)
    return tuple(map(_numbered, orders)) if single else orders


def placement_of(name: str) -> str:
    """The placement of stages that a schedule wants: "looped" or "folded".

    Raises:
        ConfigError: for an unknown schedule.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"unknown schedule {name!r}; the schedules are: {', '.join(SCHEDULES)}.")
    return SCHEDULES[name]


def _numbered(row: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """Microbatches in the order in which the loops of GPipe and 1F1B take them.

    torch's list for 1F1B, which nothing executes, counts the forwards of the last rank from one.
    """
    done = {"F": 0, "B": 0}
    numbered = []
    for operation in row:
        numbered.append(operation._replace(microbatch=done[operation.kind]))
        done[operation.kind] += 1
    return tuple(numbered)
