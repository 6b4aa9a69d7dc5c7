"""The evidence's script on its tiny scale: every row trains, a killed run goes on to the same bits, tables and figures are written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KILLED_AT = 7  # of 12 steps; the last checkpoint before is of step 4
FIGURES = ("losses.png", "dynamics.png", "depth.png", "depth_ablations.png")
# Trains the row once without interruption, and again in another folder until it kills itself.
INTERRUPTED = """
import os, signal, sys
from pathlib import Path
examples, folder = sys.argv[1:]
sys.path.insert(0, examples)
import rows, training, workers
scale = rows.TINY
task = training.Task(scale, scale.sizes[0], rows.FULL, 0, scale.sizes[0].peak_lr, scale.steps)
workers.run_all([task], Path(folder, "uninterrupted"), workers=1)

class Killed(training.Training):
    def step(self):
        if self.done == {killed_at}:
            os.kill(os.getpid(), signal.SIGKILL)
        super().step()

workers.Training = Killed
workers.run_all([task], Path(folder, "work", "tiny"), workers=1)
"""


@pytest.fixture(scope="module")
def folder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a killed run, the same command again, and continue_training.py leave behind."""
    folder = tmp_path_factory.mktemp("evidence")
    examples = repository / "examples" / "evidence"
    killed = run("-c", INTERRUPTED.replace("{killed_at}", str(KILLED_AT)), str(examples), str(folder))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    work = folder / "work" / "tiny"
    assert [path.name for path in work.glob("*.pt")] == ["tiny-full-0.checkpoint.pt"]
    assert not list(work.glob("*.json"))
    done = run(str(examples / "train.py"), "--scale", "tiny", "--seeds", "1", "--workers", "1", *folders(folder, "trained"))
    assert done.returncode == 0, done.stderr
    assert "tiny-full-0: " in done.stdout and "from step 4)" in done.stdout
    return folder


def test_a_killed_run_goes_on_to_the_same_bits(folder: Path) -> None:
    resumed = result(folder / "work" / "tiny" / "tiny-full-0.json")
    uninterrupted = result(folder / "uninterrupted" / "tiny-full-0.json")
    assert len(resumed["losses"]) == 12
    for name in ("losses", "evaluated", "final", "added", "read", "gradients", "mixing"):
        assert resumed[name] == uninterrupted[name], name  # to the last bit, as JSON holds every digit


def test_every_row_learns_and_is_shown(folder: Path) -> None:
    entries = {entry["row"]: entry for entry in json.loads((folder / "trained" / "results.json").read_text())}
    table = (folder / "trained" / "table.md").read_text()
    assert len(entries) == 10
    for name, entry in entries.items():
        (steps,), (final,) = entry["evaluated"], entry["final"]
        assert [step for step, _ in steps] == [0, 4, 8, 12]
        assert steps[0][1] - steps[-1][1] > 0.3, name
        assert len(entry["added"][0]) == len(entry["gradients"][0]) + 1 == len(entry["read"][0]) == len(entry["mixing"]) == 5
        assert min(entry["gradients"][0]) > 0 and f"| {final:.4f} |" in table
    plain, rewritten = entries["baseline"], entries["standard"]
    assert rewritten["final"][0] == pytest.approx(plain["final"][0], abs=1e-5)  # the machinery alone changes nothing
    assert rewritten["parameters"] == plain["parameters"] < entries["full"]["parameters"]
    assert entries["full"]["mixing"] != plain["mixing"] == rewritten["mixing"]
    for name in FIGURES:
        assert (folder / "trained" / name).read_bytes().startswith(b"\x89PNG")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)


def folders(folder: Path, out: str) -> list[str]:
    return ["--work", str(folder / "work"), "--out", str(folder / out)]


def result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
