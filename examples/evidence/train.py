"""Train every row of the comparison from scratch, on the same batches in the same order, and write tables and figures.

    python examples/evidence/train.py [--scale tiny|cpu|gpu] [--workers 2] [--rows baseline,full] [--seeds 3]

Interrupt or kill it at any moment: the same command goes on where it was, and finished runs are not run again.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Annotated

# Threads that wait by spinning stall each other where other programs use the cores too. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from data import corpus
from reporting import RESULTS, WORK, run_and_write
from rows import SCALES
from training import Task


def main(
    scale_name: Annotated[str, typer.Option("--scale", help=f"One of {', '.join(SCALES)}.")] = "cpu",
    workers: Annotated[int | None, typer.Option(help="Processes, with one thread each.", min=1)] = None,
    rows: Annotated[str, typer.Option(help="Names of rows, separated by commas; all without it.")] = "",
    seeds: Annotated[int | None, typer.Option(help="How many seeds, from 0 on.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Another peak learning rate, of all rows.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop after so many; the same command goes on.")] = math.inf,
    work: Annotated[Path, typer.Option(help="Folder of checkpoints and single results.")] = WORK,
    out: Annotated[Path | None, typer.Option(help="Folder of tables and figures.")] = None,
) -> None:
    """Train all rows, and write what came of it."""
    deadline = time.perf_counter() + 60 * minutes
    if scale_name not in SCALES:
        raise typer.BadParameter(f"--scale is one of {', '.join(SCALES)}, not {scale_name}.")
    scale = SCALES[scale_name]
    wanted = rows.split(",") if rows else [row.name for row in scale.rows]
    if unknown := set(wanted).difference(row.name for row in scale.rows):
        raise typer.BadParameter(f"there is no row {sorted(unknown)[0]}; there are {', '.join(r.name for r in scale.rows)}.")
    tasks = [
        Task(scale, size, row, seed, lr or size.peak_lr, size.steps * row.longer)
        for size in scale.sizes
        for seed in range(seeds or scale.seeds)
        for row in scale.rows
        if row.name in wanted
    ]
    print(f"Text: {corpus()}.\n{len(tasks)} runs.", flush=True)
    folder = work / scale.name
    run_and_write(tasks, folder, out or RESULTS / scale.name, workers or scale.workers, deadline)


if __name__ == "__main__":
    typer.run(main)
