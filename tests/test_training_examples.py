"""The examples of training stacks run as users run them, for a few steps and without Inductor."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(repository: Path, folder: Path, script: str, *options: str, launch: tuple[str, ...] = ()) -> str:
    without = repository / "tests" / "support" / "without_inductor.py"
    command = [sys.executable, *launch, str(without), str(repository / "examples" / script), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ddp(repository: Path, tmp_path: Path) -> None:
    shown = run(repository, tmp_path, "ddp_train.py", "--steps", "3", launch=LAUNCH)
    losses = [(float(ranks), float(alone)) for ranks, alone in re.findall(r"^ +\d+ +(\S+) +(\S+)$", shown, re.MULTILINE)]
    assert len(losses) == 3 and all(abs(ranks - alone) <= 2e-5 for ranks, alone in losses)  # five digits are shown


def test_trainer(repository: Path, tmp_path: Path) -> None:
    shown = run(repository, tmp_path, "trainer_train.py", "--steps", "4")
    whole, resumed = (re.search(rf"^{name}: losses (.*)$", shown, re.MULTILINE)[1] for name in ("in one go", "resumed"))
    assert whole == resumed and len(whole.split(",")) == 2
    assert float(re.search(r"loaded again: loss (\S+)", shown)[1]) < 5.6  # below ln 256 = 5.55 and what is lost in bfloat16


def test_lora(repository: Path, tmp_path: Path) -> None:
    shown = run(repository, tmp_path, "lora_train.py", "--steps", "2")
    assert "loaded again: logits differ by 0.0e+00 at most" in shown
    assert float(re.search(r"merged: logits differ by (\S+) at most", shown)[1]) <= 1e-5
