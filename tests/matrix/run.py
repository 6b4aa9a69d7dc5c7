"""The core tests under several versions of torch and Python: ``python tests/matrix/run.py``.

Every combination gets an environment of its own in build/matrix, which later runs use again. torch comes as pip finds it: a build
for the CPU alone where there is one, else one that brings CUDA along (some GB) and runs on the CPU all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "matrix"
TORCH = ("2.11.0", "2.12.1", "2.13.0")
PYTHON = ("python3.11", "python3.12")
# What rests on torch's behaviour: capture and its assumptions, the backend, the passes, stages, checkpoints and sharding, and
# what was found by fuzzing.
CORE = (
    "tests/test_capture.py", "tests/test_safety.py", "tests/test_preserve.py", "tests/test_oracle.py", "tests/test_backend.py",
    "tests/test_exported.py", "tests/test_faults_graphs.py", "tests/test_pipeline_torch.py", "tests/passes", "tests/patterns",
    "tests/kernels/test_phases.py", "tests/fuzz/test_found.py", "tests/test_checkpointing.py", "tests/test_split.py",
    "tests/test_split_blocks.py", "tests/test_tensor_parallel.py",
)  # fmt: skip
_NOT_NEEDED = ("torch", "triton", "setuptools", "mypy", "ruff")  # torch brings its own triton, and bounds setuptools


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``result``: pytest's closing line, or why there is none. ``seconds`` of the tests alone."""

    python: str
    torch: str
    result: str
    seconds: float
    is_good: bool


def environment(python: str, torch: str) -> Path:
    """The interpreter of an environment with these versions, made where it is missing.

    Raises:
        RuntimeError: if it can't be made: no such Python, no such torch for it.
    """
    found = shutil.which(python)
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False) if found else None
    if version is None or version.returncode:
        raise RuntimeError(f"no {python} here")
    place = PLACE / f"{version.stdout.split()[-1]}-torch-{torch}"
    interpreter, ready = place / "bin" / "python", place / ".ready"
    if ready.exists():
        return interpreter
    shutil.rmtree(place, ignore_errors=True)
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    needed = [pin for pin in pins if "==" in pin and pin.split("==")[0] not in _NOT_NEEDED]
    install = [interpreter, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    for command in (
        [found, "-m", "venv", place],
        [*install, f"torch=={torch}", "setuptools>=77.0.3"],
        [*install, f"torch=={torch}", *needed],
        [*install, "--no-deps", "--no-build-isolation", "-e", ROOT],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise RuntimeError(f"not installed: {lines[0] if lines else 'pip failed'}")
    ready.touch()
    return interpreter


def outcome(python: str, torch: str, tests: list[str]) -> Outcome:
    try:
        interpreter = environment(python, torch)
    except RuntimeError as error:
        return Outcome(python, torch, str(error), 0.0, is_good=False)
    started = time.monotonic()
    command = [str(interpreter), "-m", "pytest", "-q", *tests]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    closing = re.sub(r" in [\d.]+s.*", "", done.stdout.strip().splitlines()[-1])
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print(f"{python}, torch {torch}: {line}", file=sys.stderr)
    return Outcome(python, torch, closing, time.monotonic() - started, is_good=done.returncode == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", nargs="*", default=TORCH, help="versions of torch")
    parser.add_argument("--python", nargs="*", default=PYTHON, help="names of interpreters")
    parser.add_argument("tests", nargs="*", default=CORE, help="what pytest runs")
    options = parser.parse_args()
    console = Console(stderr=True)
    rows = []
    for python in options.python:
        for torch in options.torch:
            rows.append(outcome(python, torch, list(options.tests)))
            console.print(f"{python}, torch {torch}: {rows[-1].result}", highlight=False)
    table = Table("Python", "torch", "result", "minutes")
    for row in rows:
        table.add_row(row.python, row.torch, row.result, f"{row.seconds / 60:.1f}" if row.seconds else "")
    Console().print(table)
    sys.exit(0 if all(row.is_good for row in rows) else 1)


if __name__ == "__main__":
    main()
