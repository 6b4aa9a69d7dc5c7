"""What pipeline transport costs on real processes over gloo: memory held, bytes on the loopback interface, time of a step.

Every process computes with one thread. Memory is counted, not estimated (``pipeline_held.py``).
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pipeline_held import Held
from rich.console import Console
from rich.table import Table
from timing import TOLERANCES, Spread, WrongResultError, gate, interleaved, ratios
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleInterleaved1F1B

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))  # behind this folder, which has a models.py too

from pipeline_runs import sent_bytes
from ranks import run_ranks

import attnres_compile as ac
from attnres_compile.pipelining.orders import schedule_orders
from attnres_compile.pipelining.timeline import peak_cache_nbytes

SCHEDULE, VIRTUAL, SUBLAYERS, BLOCK_SIZE, VOCABULARY = "Interleaved1F1B", 2, 16, 2, 32
TRANSPORTS = ("cached", "naive")
RANKS = (2, 4)
MICROBATCHES = (4, 8, 16, 32, 64)
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
MIB = 2**20


@dataclass(frozen=True)
class Size:
    """A value that crosses a boundary is ``positions * width`` float32 numbers; ``inner`` is the hidden width of sublayers."""

    positions: int
    width: int
    inner: int


FOR_MEMORY = Size(positions=512, width=512, inner=16)  # 1 MiB per value
FOR_TIME = Size(positions=1024, width=512, inner=512)  # 2 MiB per value


class Sublayer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(size.width)
        self.up, self.down = nn.Linear(size.width, size.inner), nn.Linear(size.inner, size.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """A residual stream with as little around it as there can be, so that blocks are what travels."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.sublayers = nn.ModuleList(Sublayer(size) for _ in range(SUBLAYERS))
        self.norm, self.head = nn.RMSNorm(size.width), nn.Linear(size.width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for sublayer in self.sublayers:
            x = sublayer(x)
        return self.head(self.norm(x))


class Pipeline:
    """One rank's stages and schedule, and its part of a batch."""

    def __init__(self, transport: str, size: Size, microbatches: int) -> None:
        torch.manual_seed(0)
        example = torch.zeros(1, size.positions, dtype=torch.long)
        config = ac.AttnResConfig(block_size=BLOCK_SIZE)
        ranks, rank = dist.get_world_size(), dist.get_rank()
        self.plan = ac.partition(Model(size), ranks, VIRTUAL, args=(example,), config=config, transport=transport)
        mine = [i for i, place in enumerate(self.plan.placement) if place == rank]
        self.stages = [ac.BlockCacheStage(self.plan, i, device="cpu") for i in mine]
        self.schedule = ScheduleInterleaved1F1B(self.stages, microbatches, loss_fn=_loss)
        tokens = torch.randint(VOCABULARY, (microbatches, size.positions))
        self.arguments = (tokens,) if self.plan.placement[0] == rank else ()
        self.wanted = {"target": tokens} if self.plan.placement[-1] == rank else {}

    def step(self) -> list[Tensor]:
        """The gradients of this rank's parameters, by name, and its losses."""
        losses: list[Tensor] = []
        self.schedule.step(*self.arguments, **self.wanted, losses=losses if self.wanted else None, return_outputs=False)
        parameters = sorted((name, p) for stage in self.stages for name, p in stage.submod.named_parameters())
        gradients = [p.grad for _, p in parameters if p.grad is not None]
        for stage in self.stages:
            stage.submod.zero_grad()
        return [*gradients, *(loss.detach() for loss in losses)]


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---------------------------------------------------------------------------------------------------------- memory held


@dataclass(frozen=True)
class Memory:
    """Peaks of one step on one rank, in bytes; ``resident`` is that of the process up to now, as the kernel has it."""

    held: int
    in_transfers: int
    cache: int
    left: int
    resident: int


def memory_of_steps(transport: str) -> list[Memory]:
    """On this rank, for more and more microbatches."""
    found = []
    for microbatches in MICROBATCHES:
        one, held = Pipeline(transport, FOR_MEMORY, microbatches), Held()
        with held.following():
            one.step()
        (cache,) = {stage.cache.peak_nbytes for stage in one.stages}
        orders = schedule_orders(SCHEDULE, one.plan.ranks, microbatches, VIRTUAL)
        simulated = peak_cache_nbytes(one.plan, orders, transport == "cached")[dist.get_rank()]
        if cache != simulated:
            raise WrongResultError(f"the cache held {cache} bytes, where the simulated schedule holds {simulated}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found.append(Memory(held.peak, held.peak_in_transfers, cache, held.left(), peak))
    return found


def run_memory() -> Table:
    table = Table(title=f"pipeline transport: MiB held in a step of {SCHEDULE}, the rank with the most", title_justify="left")
    headers = ("ranks", "microbatches", "cut values and gradients", "in transfers", "block cache", "left over", "peak resident")
    for header in headers:
        table.add_column(header, justify="right")
    for ranks in RANKS:
        by_transport = {name: run_ranks(memory_of_steps, ranks, name) for name in TRANSPORTS}
        for i, microbatches in enumerate(MICROBATCHES):
            cells = []
            for field in ("held", "in_transfers", "cache", "left", "resident"):
                most = [max(getattr(found[i], field) for found in by_transport[name]) / MIB for name in TRANSPORTS]
                cells.append(" / ".join(f"{value:.0f}" for value in most))
            table.add_row(str(ranks), str(microbatches), *cells)
    table.caption = "cached / naive"
    return table


# ----------------------------------------------------------------------------------------------------- bytes and time


@dataclass(frozen=True)
class Steps:
    """Of every transport: bytes by the plan, bytes that the process group was asked to send and that the interface carried, and
    milliseconds of steps.
    """

    planned: dict[str, int]
    asked: dict[str, int]
    carried: dict[str, int]
    milliseconds: dict[str, list[float]]


def steps_in_turns(microbatches: int, rounds: int) -> Steps:
    """On this rank. Every step ends when all ranks are done. What the interface carried is the least of the rounds, less the
    least of as many barriers: what other programs send meanwhile only adds.
    """
    pipelines = {name: Pipeline(name, FOR_TIME, microbatches) for name in TRANSPORTS}
    results = [one.step() for one in pipelines.values()]
    gate("gradients and losses, cached against naive", *results, TOLERANCES[torch.float32])
    asked, carried = {}, {}
    for name, one in pipelines.items():
        with sent_bytes() as counted:
            one.step()
        total = torch.tensor(sum(counted.values()))
        dist.all_reduce(total)
        asked[name] = int(total)
        counts = [_carried(one.step) for _ in range(3)]
        carried[name] = min(counts) - min(_carried(lambda: None) for _ in counts)
    sides = {name: _together(one.step) for name, one in pipelines.items()}
    milliseconds = interleaved(sides, rounds, torch.device("cpu"))
    return Steps(
        {name: one.plan.step_nbytes(microbatches) for name, one in pipelines.items()}, asked, carried, milliseconds
    )  # fmt: skip


def _carried(call: Callable[[], object]) -> int:
    """Bytes that the loopback interface carried between two barriers."""
    dist.barrier()
    before = int(LOOPBACK.read_text())
    dist.barrier()
    call()
    dist.barrier()
    return int(LOOPBACK.read_text()) - before


def _together(call: Callable[[], object]) -> Callable[[], None]:
    def step() -> None:
        call()
        dist.barrier()

    return step


def run_steps(microbatches: int = 4, rounds: int = 8) -> Table:
    table = Table(title=f"pipeline transport: one step of {SCHEDULE}, {microbatches} microbatches", title_justify="left")
    table.add_column("ranks", justify="right")
    table.add_column("transport")
    for header in ("bytes by the plan", "on loopback", "to the plan", "seconds", "to naive"):
        table.add_column(header, justify="right")
    for ranks in RANKS:
        found = run_ranks(steps_in_turns, ranks, microbatches, rounds)[0]
        for name in TRANSPORTS:
            planned, carried = found.planned[name], found.carried[name]
            if found.asked[name] != planned:
                raise WrongResultError(f"{ranks} ranks, {name}: {found.asked[name]} bytes were sent, the plan says {planned}")
            seconds = str(Spread.of([1e-3 * value for value in found.milliseconds[name]]))
            ratio = "" if name == "naive" else str(ratios(found.milliseconds, name, "naive"))
            table.add_row(str(ranks), name, f"{planned:,}", f"{carried:,}", f"{carried / planned:.4f}", seconds, ratio)
    return table


if __name__ == "__main__":
    Console(width=150).print(run_memory(), run_steps())
