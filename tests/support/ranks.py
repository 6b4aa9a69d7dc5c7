"""Real processes over gloo: one function run on every rank, its results or its error brought back."""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["attnres_compile.pipeline", "attnres_compile", "torch.distributed.fsdp"])
TRANSFER_SECONDS = 120  # what a rank may lag behind on a busy machine


class RankError(AssertionError):
    """A rank raised, died or did not end."""


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, seconds: float = 600) -> list[Any]:
    """What ``function(*arguments)`` returns on each of ``world`` ranks.

    Raises:
        RankError: with the tracebacks of all ranks that failed.
    """
    outcomes = try_ranks(function, world, *arguments, seconds=seconds)
    failed = [f"rank {rank}:\n{value}" for rank, (done, value) in enumerate(outcomes) if not done]
    if failed:
        raise RankError("\n".join(failed))
    return [value for _, value in outcomes]


def try_ranks(
    function: Callable[..., Any], world: int, *arguments: Any, seconds: float = 600, transfer_seconds: float = TRANSFER_SECONDS
) -> list[tuple[bool, Any]]:
    """Of each rank whether it returned, with what, or else the text of its error.

    ``seconds`` are for all of it; ``transfer_seconds`` are how long a rank waits for another.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ends = [_CONTEXT.Pipe(duplex=False) for _ in range(world)]
        processes = [
            _CONTEXT.Process(target=_rank, args=(function, rank, world, store, ends[rank][1], transfer_seconds, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for _, sender in ends:
            sender.close()
        deadline = time.monotonic() + seconds
        outcomes = [_outcome(receiver, deadline) for receiver, _ in ends]
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
        return outcomes


def _outcome(receiver: multiprocessing.connection.Connection, deadline: float) -> tuple[bool, Any]:
    if not receiver.poll(max(0.0, deadline - time.monotonic())):
        return False, "did not end in time"
    try:
        return receiver.recv()
    except EOFError:
        return False, "died"


def _rank(
    function: Callable[..., Any], rank: int, world: int, store: str, sender: Any, transfer_seconds: float,
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=transfer_seconds),
    )  # fmt: skip
    try:
        sender.send((True, function(*arguments)))
    except Exception:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        os._exit(0)  # a process group whose peer is gone may never come down
