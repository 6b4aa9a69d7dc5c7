"""One run: a model trained from scratch or from a checkpoint, saved on the way so that a killed run goes on to the same bits."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import corpus
from demo_training import adamw
from files import checkpoint_path, replacing, result_path, weights_path
from measuring import measure
from models import connected, plain_model
from rows import Row, Scale, Size
from torch import Tensor, nn

WARM_UP, FLOOR = 0.05, 0.1  # parts of the steps, and of the peak learning rate at which the cosine ends
CLIP = 1.0


class OutOfTime(Exception):
    """The time that was given is over; the run is saved."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One run of an experiment. ``start`` names the finished run whose weights it begins with, "" for random ones."""

    scale: Scale
    size: Size
    row: Row
    seed: int
    peak_lr: float
    steps: int
    start: str = ""

    @property
    def name(self) -> str:
        place = f"{self.size.name}-{self.row.name}-{self.seed}"
        return f"continued-{place}-{self.peak_lr:g}" if self.start else place

    @property
    def group(self) -> str:
        """What it is compared within: all rows that saw the same batches at the same learning rates."""
        return f"{self.size.name}, continued at {self.peak_lr:g}" if self.start else self.size.name

    def identity(self) -> dict[str, Any]:
        """All that the outcome depends on: a saved run of another identity is not gone on with."""
        scale = self.scale
        size = {name: value for name, value in dataclasses.asdict(self.size).items() if name not in ("peak_lr", "steps")}
        return {
            "size": size, "row": self.row.name, "options": self.row.options, "seed": self.seed,
            "peak_lr": self.peak_lr, "steps": self.steps, "start": self.start, "windows": [scale.windows, scale.final_windows],
            "evaluations": scale.evaluations, "device": scale.device, "compiled": scale.compiled, "text": corpus().fingerprint,
            "torch": torch.__version__,
        }  # fmt: skip

    def check(self, path: Path, found: dict[str, Any]) -> None:
        """Refuse to mix runs of other settings with this one: ``found`` is the identity in ``path``."""
        wanted = json.loads(json.dumps(self.identity()))
        if different := [name for name in wanted if found.get(name) != wanted[name]]:
            name = different[0]
            raise SystemExit(
                f"{path} is of a run with another {name}, {found.get(name)!r} instead of {wanted[name]!r}; remove the file, or "
                "choose another folder with --work."
            )

    def rate(self, step: int) -> float:
        """Learning rate of step ``step``, from 0: linear warm-up, then a cosine."""
        warm_up = max(1, round(WARM_UP * self.steps))
        done = (step - warm_up) / max(1, self.steps - warm_up)
        return self.peak_lr * min((step + 1) / warm_up, FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * max(done, 0.0))) / 2)


class Training:
    """A task at work in ``folder``: model, optimizer, order of the data, and what was measured so far."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        self.before = (0.0, 0.0)  # seconds and processor seconds of the processes that were killed, as far as they were saved
        scale, size = task.scale, task.size
        text = corpus().text
        self.text, self.generator = text, torch.Generator().manual_seed(task.seed)
        self.validation = text.validation_batches(scale.windows // size.batch, size.batch, size.length)
        self.final = text.validation_batches(scale.final_windows // size.batch, size.batch, size.length)
        torch.manual_seed(task.seed)  # the same initial weights in every row
        plain = plain_model(size)
        if task.start:
            plain.load_state_dict(torch.load(weights_path(folder, task.start), weights_only=True))
            self.generator.manual_seed(1_000_000 + task.seed)  # other places of the text than before
        self.model, self.forward = connected(plain, task.row, scale, self.validation[0][:, :-1])
        self.optimizer = adamw(self.model, task.peak_lr)
        self.losses: list[float] = []
        self.step_seconds: list[float] = []  # processor time
        self.evaluated: list[tuple[int, float]] = []
        self._load()

    @property
    def done(self) -> int:
        return len(self.losses)

    def run(self, deadline: float = math.inf) -> None:
        """Train to the end, measure, and write the result.

        Raises:
            OutOfTime: where the deadline, of ``time.perf_counter``, comes first.
        """
        steps, every = self.task.steps, max(1, self.task.steps // self.task.scale.evaluations)
        while self.done < steps:
            if self.done % every == 0 and (not self.evaluated or self.evaluated[-1][0] < self.done):
                self.evaluated.append((self.done, self.evaluate(self.validation)))
                self._save()
            if time.perf_counter() > deadline:
                self._save()
                raise OutOfTime
            stop_with_parent()
            self.step()
        self._save()
        self._finish()

    def step(self) -> None:
        began = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.rate(self.done)
        batch = self.text.batch(self.generator, self.task.size.batch, self.task.size.length)
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.step_seconds.append(time.process_time() - began)

    def loss(self, batch: Tensor) -> Tensor:
        batch = batch.to(self.task.scale.device)
        autocast = torch.autocast(self.task.scale.device, torch.bfloat16, enabled=self.task.scale.compiled)
        with autocast:
            logits = self.forward(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, batches: list[Tensor]) -> float:
        """Mean validation loss in nats per byte. There is no dropout, so the model stays in training mode."""
        return statistics.fmean(self.loss(batch).item() for batch in batches)

    def seconds(self) -> tuple[float, float]:
        """Seconds and processor seconds of this run so far."""
        return (
            self.before[0] + time.perf_counter() - self.began,
            self.before[1] + time.process_time() - self.cpu_began,
        )

    def _save(self) -> None:
        state = {
            "identity": json.dumps(self.task.identity()), "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "data": self.generator.get_state(), "rng": torch.get_rng_state(),
            "losses": self.losses, "step_seconds": self.step_seconds, "evaluated": self.evaluated, "seconds": self.seconds(),
        }  # fmt: skip
        with replacing(checkpoint_path(self.folder, self.task.name)) as path:
            torch.save(state, path)

    def _load(self) -> None:
        path = checkpoint_path(self.folder, self.task.name)
        if not path.exists():
            return
        state = torch.load(path, map_location=self.task.scale.device, weights_only=True)
        self.task.check(path, json.loads(state["identity"]))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["data"].cpu())
        torch.set_rng_state(state["rng"].cpu())
        self.losses, self.step_seconds, self.before = state["losses"], state["step_seconds"], state["seconds"]
        self.evaluated = state["evaluated"]

    def _finish(self) -> None:
        """The result is the last file to be written, and says that the run is over."""
        final = self.evaluate(self.final)
        self.evaluated.append((self.done, self.evaluate(self.validation)))
        measured = measure(self)
        seconds, cpu_seconds = self.seconds()
        result = {
            "identity": self.task.identity(), "final": final, "evaluated": self.evaluated, "losses": self.losses,
            "parameters": sum(p.numel() for p in self.model.parameters()), **measured,
            "seconds": seconds, "cpu_seconds": cpu_seconds, "step_cpu_seconds": statistics.median(self.step_seconds),
            "python": platform.python_version(),
        }  # fmt: skip
        with replacing(weights_path(self.folder, self.task.name)) as path:
            torch.save(self.model.state_dict(), path)
        with replacing(result_path(self.folder, self.task.name)) as path:
            path.write_text(json.dumps(result))
        checkpoint_path(self.folder, self.task.name).unlink()


def stop_with_parent() -> None:
    """A worker whose parent was killed ends, so that no run goes on unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit("the process that started this one is gone.")
