"""The evidence's scripts on their tiny scale, in a process of their own: a run that is killed, then what a user runs.

    python evidence_runs.py EXAMPLES FOLDER KILLED_AT ROWS
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path


def main(examples: str, folder: str, killed_at: str, names: str) -> None:
    sys.path.insert(0, examples)
    import data
    import rows
    import torch
    import training
    import workers

    torch.set_num_threads(1)  # a fork has no other thread
    size = rows.TINY.sizes[0]
    task = training.Task(rows.TINY, size, rows.FULL, 0, size.peak_lr, size.steps)
    work = Path(folder, "work")

    class Killed(training.Training):
        def step(self) -> None:
            if self.done == int(killed_at):
                os.kill(os.getpid(), signal.SIGKILL)
            super().step()

    text = data.corpus().text
    seen, held_out = (set(data.runs(data.lines_of(part.numpy().tobytes()))) for part in (text.train, text.validation))
    print(f"{len(seen & held_out)} of {len(held_out)} runs of lines are in both texts")

    child = os.fork()
    if not child:
        workers.Training = Killed
        workers.run_all([task], work / "tiny", workers=1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print("left behind:", os.waitstatus_to_exitcode(status), *sorted(path.name for path in (work / "tiny").iterdir()))

    workers.run_all([task], Path(folder, "uninterrupted"), workers=1)
    options = ["--scale", "tiny", "--workers", "1", "--work", str(work), "--out"]
    call(examples, "train.py", "--rows", names, "--seeds", "1", *options, str(Path(folder, "trained")))
    call(examples, "continue_training.py", "--seeds", "1", *options, str(Path(folder, "continued")))


def call(examples: str, script: str, *arguments: str) -> None:
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(Path(examples, script)), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
