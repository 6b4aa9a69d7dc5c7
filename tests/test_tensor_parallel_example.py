"""The tensor-parallel example runs as a user runs it, on two processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# 16 sublayers in 4 blocks: the last sites read the embedding, 3 complete blocks and the fourth.
SOURCES, LENGTH, HIDDEN = 5, 32, 128


def test_split_blocks_against_one_process(repository: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(repository / "examples" / "tensor_parallel.py"), "--length", str(LENGTH), "--blocks", "4"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"│ (.*?) +│ +(\S+) │ +(\S+) │ (.*?) +│", done.stdout)
    assert [name for name, *_ in rows] == ["one process", "whole on every rank", "split along the sequence"]
    assert all(float(error) < 1e-5 for _, error, *_ in rows)  # float32
    whole = SOURCES * LENGTH * HIDDEN * 4
    assert [held for _, _, held, _ in rows] == [f"{whole:,}", f"{whole:,}", f"{whole // 2:,}"]
    halves = "16 reduce-scatter, 16 all-gather"
    assert [collectives for *_, collectives in rows] == ["none", "16 all-reduce", halves]
