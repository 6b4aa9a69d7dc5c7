"""Processes that share out the runs of an experiment by file locks: each takes the next one that nobody has taken."""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from files import result_path
from training import OutOfTime, Task, Training


def run_all(tasks: Sequence[Task], folder: Path, workers: int, deadline: float = math.inf) -> bool:
    """Train what is not trained yet; whether all of it now is. Deadlines are of ``time.perf_counter``.

    Every worker computes on one thread. With one worker this process is it.

    Raises:
        SystemExit: if a worker failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if workers == 1:
        work(tasks, folder, deadline - time.perf_counter())
    else:
        context = multiprocessing.get_context("spawn")
        left = deadline - time.perf_counter()
        processes = [context.Process(target=work, args=(tasks, folder, left), daemon=True) for _ in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a worker failed, see above; what is finished is kept, and the same command goes on from there.")
    return all(is_finished(task, folder) for task in tasks)


def work(tasks: Sequence[Task], folder: Path, left: float) -> None:
    torch.set_num_threads(1)
    deadline = time.perf_counter() + left
    for task in tasks:
        with claimed(folder / f"{task.name}.lock") as mine:
            if not mine or is_finished(task, folder):
                continue
            training = Training(task, folder)
            start = f", from step {training.done}" if training.done else ""
            try:
                training.run(deadline)
            except OutOfTime:
                print(f"{task.name}: stopped at step {training.done}; the same command goes on from there", flush=True)
                return
            result = json.loads(result_path(folder, task.name).read_text())
            times = f"{result['seconds']:.0f} s, {result['cpu_seconds']:.0f} s of processor time"
            print(f"{task.name}: {result['final']:.4f} nats per byte ({times}{start})", flush=True)


def is_finished(task: Task, folder: Path) -> bool:
    """Whether there is a result, of this very task."""
    path = result_path(folder, task.name)
    if not path.exists():
        return False
    task.check(path, json.loads(path.read_text())["identity"])
    return True


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process holds the lock now. It ends with the process, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
