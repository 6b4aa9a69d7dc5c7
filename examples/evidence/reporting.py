"""Tables and figures of an experiment as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import figures
import tables
import torch
from data import corpus
from training import Task
from workers import run_all

WORK = Path("build/evidence")
RESULTS = Path(__file__).resolve().parent / "results"


def run_and_write(tasks: Sequence[Task], folder: Path, out: Path, workers: int, deadline: float) -> None:
    """Do what is not finished in ``folder`` until ``deadline``, and write what is, as :func:`write` does."""
    finished = run_all(tasks, folder, workers, deadline)
    write(tasks, folder, out, workers)
    if not finished:
        print("Not all runs are finished: the tables and figures are of those that are.")


def write(tasks: Sequence[Task], folder: Path, out: Path, workers: int) -> None:
    """Gather what is finished in ``folder`` and write table.md, results.json and the figures to ``out``."""
    entries = tables.entries(tasks, folder)
    if not entries:
        print("No run is finished yet, so there is nothing to show.")
        return
    out.mkdir(parents=True, exist_ok=True)
    table = tables.markdown(entries)
    about = f"Text: {corpus()}. torch {torch.__version__}.\n\n{tables.times(entries, workers)}"
    (out / "table.md").write_text(f"{table}\n{about}")
    (out / "results.json").write_text(json.dumps([rounded(entry.to_dict()) for entry in entries]) + "\n")
    paths = figures.draw_all(entries, out)
    print(f"\n{table}\n{about}\nWritten: {', '.join(str(path) for path in (out / 'table.md', out / 'results.json', *paths))}")


def rounded(value: object) -> object:
    """Numbers with six significant digits: more would make files large and mean nothing."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return {name: rounded(entry) for name, entry in value.items()} if isinstance(value, dict) else value
