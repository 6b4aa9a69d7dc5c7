"""What the pipeline example shows: progress while it trains, and its results beside those of one process."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from unittest import mock

import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import attnres_compile as ac


@dataclasses.dataclass
class Outcome:
    """Of every step: the loss, where it is known, and the bytes that this process sent."""

    losses: list[float] = dataclasses.field(default_factory=list)
    sent: list[int] = dataclasses.field(default_factory=list)


class SentBytes:
    """Counts what the process group is asked to send, below torch's schedules and everything of ours."""

    def __enter__(self) -> SentBytes:
        self.nbytes = 0
        call = dist.ProcessGroup.send

        def send(group: dist.ProcessGroup, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
            self.nbytes += sum(tensor.nbytes for tensor in tensors)
            return call(group, tensors, peer, tag)

        self._patch = mock.patch.object(dist.ProcessGroup, "send", send)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def progress(what: str, batches: Iterable[Tensor], steps: int, is_shown: bool = True) -> Iterator[Tensor]:
    """``steps`` batches, with a bar on stderr that tells how far they are."""
    console = Console(stderr=True)
    yield from track(itertools.islice(batches, steps), f"training, {what}", steps, console=console, disable=not is_shown)


def report(plan: ac.PipelinePlan, outcomes: list[Outcome], alone: Outcome, microbatches: int) -> None:
    """Print the plan, the bytes of a step, and the losses; ``outcomes`` are those of the ranks."""
    console = Console()
    console.print(plan.explain(), soft_wrap=True, highlight=False, markup=False, end="\n\n")
    # The first step also votes on how to start.
    (sent,) = {sum(step) for step in list(zip(*(outcome.sent for outcome in outcomes), strict=True))[1:]}
    table = Table("transport", title="Bytes between ranks in one step", title_justify="left")
    for header in ("by the plan", "the process group was asked to send"):
        table.add_column(header, justify="right")
    for name, cached in (("cached", True), ("naive", False)):
        was_run = plan.cached == cached
        table.add_row(name, f"{plan.step_nbytes(microbatches, cached):,}", f"{sent:,}" if was_run else "not run")
    console.print(table)
    table = Table("step", title="Loss in nats per byte", title_justify="left")
    for header in ("pipeline", "one process", "relative difference"):
        table.add_column(header, justify="right")
    (losses,) = (outcome.losses for outcome in outcomes if outcome.losses)
    differences = [abs(a - b) / b for a, b in zip(losses, alone.losses, strict=True)]
    for number, row in enumerate(zip(losses, alone.losses, differences, strict=True)):
        table.add_row(str(number), f"{row[0]:.6f}", f"{row[1]:.6f}", f"{row[2]:.1e}")
    console.print(table)
    console.print(f"Largest relative difference of the losses: {max(differences):.1e}")
