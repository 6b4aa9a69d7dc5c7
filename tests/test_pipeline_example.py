"""The pipeline example runs as a user runs it, on two processes and for a few steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# 8 layers are 16 sublayers; 8 blocks of 2, 4 stages of 4. A value is 2 x 128 bytes of text x 128 numbers x 4 bytes.
VALUE, MICROBATCHES = 2 * 128 * 128 * 4, 4
CACHED, NAIVE = 3 + 2 + 2, 3 + 5 + 7  # values over the three hops; their gradients go back in the same sizes


def test_pipeline_against_one_process(repository: Path, tmp_path: Path) -> None:
    done = run(repository, tmp_path, "--steps", "3", "--microbatches", str(MICROBATCHES))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pipeline.png").read_bytes().startswith(b"\x89PNG")
    steps = [(float(a), float(b), float(c)) for a, b, c in re.findall(r"│ \d +│ +(\S+) │ +(\S+) │ +(\S+e\S+) │", done.stdout)]
    assert len(steps) == 3
    assert all(abs(pipeline - alone) <= 1e-5 * alone and shown <= 1e-5 for pipeline, alone, shown in steps)
    assert steps[-1][0] < steps[0][0]  # it learns
    cached, naive = (f"{2 * MICROBATCHES * values * VALUE:,}" for values in (CACHED, NAIVE))
    rows = re.findall(r"│ (cached|naive) +│ +(\S+) │ +(\S.*?) │", done.stdout)
    assert rows == [("cached", cached, cached), ("naive", naive, "not run")]


def test_what_a_schedule_cannot_run(repository: Path, tmp_path: Path) -> None:
    done = run(repository, tmp_path, "--virtual-stages", "1")
    assert done.returncode == 1
    assert "\nInterleaved1F1B has two or more stages per rank, so virtual can't be 1" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr.split("Interleaved1F1B has")[0]


def run(repository: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(repository / "examples" / "pipeline_train.py"), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
