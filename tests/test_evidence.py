"""The evidence's scripts on their tiny scale: a killed run goes on to the same bits, rows learn, tables and figures appear."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROWS = ("baseline", "standard", "full", "mhc")
KILLED_AT = 7  # of 12 steps; the last checkpoint before is of step 4
FIGURES = ("losses.png", "dynamics.png", "depth.png", "depth_ablations.png")


@pytest.fixture(scope="module")
def folder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a killed run, an uninterrupted one, train.py and continue_training.py leave behind."""
    folder = tmp_path_factory.mktemp("evidence")
    script, examples = repository / "tests" / "support" / "evidence_runs.py", repository / "examples" / "evidence"
    command = [sys.executable, str(script), str(examples), str(folder), str(KILLED_AT), ",".join(ROWS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "left behind: -9 tiny-full-0.checkpoint.pt tiny-full-0.lock\n" in done.stdout
    assert "from step 4)" in done.stdout  # of the killed run, and no other
    assert done.stdout.count("from step") == 1
    assert re.search(r"^0 of \d{5} runs of lines are in both texts$", done.stdout, re.MULTILINE)
    return folder


def test_a_killed_run_goes_on_to_the_same_bits(folder: Path) -> None:
    resumed = loaded(folder / "work" / "tiny" / "tiny-full-0.json")
    uninterrupted = loaded(folder / "uninterrupted" / "tiny-full-0.json")
    assert len(resumed["losses"]) == 12
    for name in ("losses", "evaluated", "final", "added", "read", "gradients", "mixing"):
        assert resumed[name] == uninterrupted[name], name  # to the last bit: JSON holds every digit


def test_rows_learn_and_are_shown(folder: Path) -> None:
    entries = {entry["row"]: entry for entry in loaded(folder / "trained" / "results.json")}
    table = (folder / "trained" / "table.md").read_text()
    assert tuple(entries) == ROWS
    for name, entry in entries.items():
        (evaluated,), (final,) = entry["evaluated"], entry["final"]
        assert [step for step, _ in evaluated] == [0, 4, 8, 12]
        assert evaluated[0][1] - evaluated[-1][1] > 0.3, name
        assert len(entry["added"][0]) == len(entry["gradients"][0]) + 1 == len(entry["read"][0]) == len(entry["mixing"]) == 5
        assert min(entry["gradients"][0]) > 0
        assert f"| {final:.4f} |" in table
    plain, rewritten = entries["baseline"], entries["standard"]
    assert rewritten["final"][0] == pytest.approx(plain["final"][0], abs=1e-5)  # the machinery alone changes nothing
    assert rewritten["parameters"] == plain["parameters"] < entries["full"]["parameters"]
    assert entries["full"]["mixing"] != plain["mixing"] == rewritten["mixing"]
    assert all((folder / "trained" / name).read_bytes().startswith(b"\x89PNG") for name in FIGURES)


def test_continuing_starts_where_the_baseline_ended(folder: Path) -> None:
    trained = loaded(folder / "work" / "tiny" / "tiny-baseline-0.json")
    continued = loaded(folder / "continued" / "results.json")
    assert [(entry["group"], entry["row"]) for entry in continued] == [
        (f"tiny, continued at {lr}", row) for lr in (0.001, 0.004) for row in ("baseline", "full")
    ]
    for entry in continued:
        assert entry["evaluated"][0][0] == [0, pytest.approx(trained["evaluated"][-1][1], abs=1e-5)]  # converted or not
        assert entry["evaluated"][0][-1][1] < entry["evaluated"][0][0][1]


def loaded(path: Path) -> Any:
    return json.loads(path.read_text())
