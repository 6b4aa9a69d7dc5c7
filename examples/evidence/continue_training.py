"""Go on from trained baselines with and without a conversion: same weights, same new batches, same learning rates.

    python examples/evidence/continue_training.py [--scale tiny|cpu|gpu] [--workers 2] [--seeds 3]

Run train.py first: its baselines of the largest size are what this starts from. Each run has a fresh optimizer, since queries
are new. Like train.py it goes on after a kill.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

import typer
from data import corpus
from reporting import RESULTS, WORK, run_and_write
from rows import BASELINE, SCALES, Scale
from training import Task
from workers import is_finished

PARTS_OF_PEAK = (0.25, 1.0)  # of the learning rate that the baseline was trained with


def main(
    scale_name: Annotated[str, typer.Option("--scale", help=f"One of {', '.join(SCALES)}.")] = "cpu",
    workers: Annotated[int | None, typer.Option(help="Processes, with one thread each.", min=1)] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds, from 0 on.", min=1)] = None,
    minutes: Annotated[float, typer.Option(help="Stop after so many; the same command goes on.")] = math.inf,
    work: Annotated[Path, typer.Option(help="Folder of checkpoints and single results.")] = WORK,
    out: Annotated[Path | None, typer.Option(help="Folder of tables and figures.")] = None,
) -> None:
    """Continue trained baselines as they are and converted, and write what came of it."""
    deadline = time.perf_counter() + 60 * minutes
    if scale_name not in SCALES:
        raise typer.BadParameter(f"--scale is one of {', '.join(SCALES)}, not {scale_name}.")
    scale, folder = SCALES[scale_name], work / scale_name
    size = scale.sizes[-1]
    baselines = [Task(scale, size, BASELINE, seed, size.peak_lr, size.steps) for seed in range(seeds or scale.seeds)]
    if missing := [task.name for task in baselines if not is_finished(task, folder)]:
        raise SystemExit(f"{missing[0]} is not trained yet; run train.py --scale {scale_name} --rows {BASELINE.name} first.")
    tasks = continued(scale, baselines)
    print(f"Text: {corpus()}.\n{len(tasks)} runs of {scale.continued_steps} steps.", flush=True)
    run_and_write(tasks, folder, out or RESULTS / f"{scale_name}-continued", workers or scale.workers, deadline)


def continued(scale: Scale, baselines: list[Task]) -> list[Task]:
    """The baseline's row among them: more training alone lowers the loss, too."""
    return [
        Task(scale, start.size, row, start.seed, part * start.peak_lr, scale.continued_steps, start.name)
        for part in PARTS_OF_PEAK
        for start in baselines
        for row in scale.rows
        if row.name in scale.continued_rows
    ]


if __name__ == "__main__":
    typer.run(main)
