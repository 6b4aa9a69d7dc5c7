"""What ranks do to break a pipeline, each in its own way."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from typing import Any

import pipelines
import torch.distributed as dist

import attnres_compile as ac
from attnres_compile.pipelining.cache import BlockCache

MICROBATCHES = 4


def break_step(fault: str) -> tuple[str, str, float, int]:
    """Run one step with ``fault`` on rank 1; what this rank saw of it: the error's type and text, seconds, and cached tensors."""
    config = ac.AttnResConfig(block_size=3)
    transport = "naive" if fault == "transport" and dist.get_rank() == 1 else "cached"
    plan = ac.partition(pipelines.converted(config), 2, 2, args=(pipelines.example(),), transport=transport)
    if fault == "values" and dist.get_rank() == 1:
        plan = dataclasses.replace(plan, values=(plan.values[1], plan.values[0], *plan.values[2:]))
    stages = pipelines.stages_of(plan)
    if dist.get_rank() == 1:
        _FAULTS.get(fault, lambda stages: None)(stages)
    schedule = pipelines.schedule_of("Interleaved1F1B", stages, MICROBATCHES)
    start = time.monotonic()
    error = ("", "")
    try:
        pipelines.step(schedule, stages, *pipelines.batch(MICROBATCHES))
    except Exception as caught:
        root = caught
        while not isinstance(root, ac.AttnResError) and root.__cause__ is not None:
            root = root.__cause__  # type: ignore[assignment]
        error = (type(root).__name__, str(root))
    return *error, time.monotonic() - start, len(stages[0].cache)


def _lose_a_deposit(stages: list[Any]) -> None:
    cache: BlockCache = stages[0].cache
    deposit = cache.deposit

    def losing(microbatch: int, name: str, stage: int, gradient: Any) -> None:
        if microbatch != 2:
            deposit(microbatch, name, stage, gradient)

    cache.deposit = losing  # type: ignore[method-assign]


def _double_a_deposit(stages: list[Any]) -> None:
    cache: BlockCache = stages[0].cache
    deposit = cache.deposit

    def doubling(microbatch: int, name: str, stage: int, gradient: Any) -> None:
        for _ in range(2 if microbatch == 2 else 1):
            deposit(microbatch, name, stage, gradient)

    cache.deposit = doubling  # type: ignore[method-assign]


def _swap_inputs(stages: list[Any]) -> None:
    first, second, *_ = stages[0].plan.stages[1].graph.find_nodes(op="placeholder")
    first.append(second)
    second.append(first)
    stages[0].plan.stages[1].recompile()


def _swap_outputs(stages: list[Any]) -> None:
    output = stages[0].plan.stages[1].graph.output_node()
    (first, second, *rest), kept = output.args[0]
    output.args = (((second, first, *rest), kept),)
    stages[0].plan.stages[1].recompile()


def _swap_receives(stages: list[Any]) -> None:
    stages[0]._given.reverse()


def _in_forward(stages: list[Any], action: Any) -> None:
    calls = []

    def hook(*_: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            action()

    stages[0].submod.register_forward_pre_hook(hook)


def _die(stages: list[Any]) -> None:
    _in_forward(stages, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _hang(stages: list[Any]) -> None:
    _in_forward(stages, lambda: time.sleep(60))


def _raise(stages: list[Any]) -> None:
    def fail() -> None:
        raise ValueError("the model fails")

    _in_forward(stages, fail)


def _other_dtype(stages: list[Any]) -> None:
    stages[0].submod.register_forward_hook(lambda module, inputs, made: ([value.float() for value in made[0]], made[1]))


_FAULTS = {
    "lost": _lose_a_deposit, "doubled": _double_a_deposit, "swapped inputs": _swap_inputs, "swapped outputs": _swap_outputs,
    "swapped receives": _swap_receives, "killed": _die, "hangs": _hang, "raises": _raise, "dtype": _other_dtype,
}  # fmt: skip
