"""Training several models on the same batches, in turns, with what it takes to report on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

PEAK_LR = 2e-3
WARM_UP = 20  # optimizer steps
AT_LEAST = 10  # steps, however slow the machine
TIMED = 5  # passes that tell how fast this machine is
console = Console()


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices of the model alone, neither norms nor biases, nor what AttnRes adds.

    Decay would pull queries back to zero, which is the uniform average.
    """
    groups: dict[float, list[Tensor]] = {0.1: [], 0.0: []}
    for name, parameter in model.named_parameters():
        groups[0.1 if parameter.ndim > 1 and not name.startswith("attnres.") else 0.0].append(parameter)
    in_groups = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
    return torch.optim.AdamW(in_groups, lr=lr, betas=(0.9, 0.95), fused=True)


class Run:
    """A model in training: its compiled form, its optimizer, and what was measured."""

    def __init__(self, name: str, model: nn.Module, compiled: Callable[..., Any], compile_seconds: float = 0.0) -> None:
        self.name, self.model, self.compiled = name, model, compiled
        self.optimizer = adamw(model, PEAK_LR)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.windows = torch.empty(0)
        self.compile_seconds = compile_seconds

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def logits(self, ids: Tensor) -> Tensor:
        return self.compiled(input_ids=ids, use_cache=False).logits

    def loss(self, batch: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(self.logits(batch[:, :-1]).transpose(1, 2), batch[:, 1:], reduction=reduction)

    def compile(self, batch: Tensor) -> None:
        start = time.perf_counter()
        self.loss(batch).backward()
        self.compile_seconds = time.perf_counter() - start
        self.optimizer.zero_grad()

    def measure(self, batch: Tensor) -> float:
        """Seconds of a forward and backward pass. Gradients are thrown away: the model stays as it is."""
        times = []
        for _ in range(TIMED):
            start = time.perf_counter()
            self.loss(batch).backward()
            times.append(time.perf_counter() - start)
            self.optimizer.zero_grad()
        return statistics.median(times)

    def step(self, batch: Tensor, lr: float) -> None:
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    def evaluate(self, batches: list[Tensor]) -> None:
        """Mean validation loss in nats per byte. It runs through the training graph, which saves a compilation."""
        self.windows = torch.cat([self.loss(batch, "none").detach().mean(1) for batch in batches])
        self.validation.append((len(self.losses), float(self.windows.mean())))


def train(
    runs: list[Run], batches: Iterator[Tensor], validation: list[Tensor], count: int, evaluations: int, deadline: float,
    decay: bool = True,
) -> int:  # fmt: skip
    """``count`` steps of every run, fewer where the deadline comes first: each batch goes to one run after the other.

    All runs therefore see the same batches, stop together, and a moment at which the machine is slow hits all alike.
    Evaluates at the end; if ``evaluations`` are more than one, before the first step and in between too. Returns the
    number of steps done.
    """
    columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    times = (TimeRemainingColumn(), TextColumn("left, loss {task.fields[losses]}"))
    marks = {round(count * i / evaluations) for i in range(evaluations)} if evaluations > 1 else set()
    done = 0
    with Progress(*columns, *times, console=console) as bar:
        task = bar.add_task("training both" if len(runs) > 1 else runs[0].name, total=count, losses="")
        while done < count and (done < AT_LEAST or time.perf_counter() < deadline):
            batch = next(batches)
            lr = PEAK_LR * min((done + 1) / WARM_UP, 1 - done / count if decay else 1.0, 1.0)
            for run in runs:
                if done in marks:
                    run.evaluate(validation)
                run.step(batch, lr)
            done += 1
            bar.update(task, advance=1, losses=" ".join(f"{run.losses[-1]:.3f}" for run in runs))
    for run in runs:
        run.evaluate(validation)
    return done


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner with the time that has passed, for work whose length nobody knows."""
    columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield
        bar.update(task, total=1, completed=1)
