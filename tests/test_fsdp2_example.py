"""The FSDP2 example runs as a user runs it, on two processes and for a few steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_fsdp2_against_one_process(repository: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(repository / "examples" / "fsdp2_train.py"), "--steps", "3", "--checkpoint", "saved"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [(float(a), float(b)) for a, b in re.findall(r"│ +\d+ │ +(\d\.\d+) │ +(\d\.\d+) │", done.stdout)]
    assert len(losses) == 3
    assert losses[-1][0] < losses[0][0]  # it learns
    assert float(re.search(r"Largest difference: (\S+)", done.stdout)[1]) <= 1e-5
    assert (tmp_path / "saved" / ".metadata").is_file()
