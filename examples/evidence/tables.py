"""Results of finished runs in figures: means and spreads over seeds, and differences to the baseline of the same seed."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from files import result_path
from rows import BASELINE, BASELINE_TWICE, Row
from training import Task

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of a table: one residual connection with the results of its seeds.

    ``group`` is the title of the table: what all its rows have in common, a size or a size and a learning rate.
    ``differences`` are final losses minus the baseline's of the same seed, of as many steps if there is one, and empty for the
    baseline itself.
    """

    group: str
    row: Row
    results: dict[int, dict[str, Any]]
    differences: tuple[float, ...]
    step_ratio: float

    @property
    def finals(self) -> list[float]:
        return [result["final"] for result in self.results.values()]

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval of the mean difference; None with fewer than two seeds."""
        count = len(self.differences)
        if count < 2:
            return None
        return QUANTILES.get(count - 1, 1.96) * statistics.stdev(self.differences) / math.sqrt(count)

    @property
    def verdict(self) -> str:
        """What the interval says: "lower" or "higher" than the baseline only where zero is outside of it."""
        if not self.differences:
            return ""
        if self.half_width is None:
            return "one seed says nothing of the spread"
        mean = statistics.fmean(self.differences)
        if abs(mean) <= self.half_width:
            return "within the spread"
        return "lower" if mean < 0 else "higher"

    def mean_of(self, name: str) -> Any:
        """The mean over seeds of a measured list or matrix."""
        return _mean([result[name] for result in self.results.values()])

    def to_dict(self) -> dict[str, Any]:
        found = self.results.values()
        first = next(iter(found))
        return {
            "group": self.group, "row": self.row.name, "options": self.row.options, "seeds": list(self.results),
            "final": self.finals, "differences": list(self.differences), "verdict": self.verdict,
            "half_width_95": self.half_width, "parameters": first["parameters"], "step_ratio": self.step_ratio,
            "seconds": [r["seconds"] for r in found], "cpu_seconds": [r["cpu_seconds"] for r in found],
            "step_cpu_seconds": [r["step_cpu_seconds"] for r in found], "evaluated": [r["evaluated"] for r in found],
            "sublayers": first["sublayers"], "readers": first["readers"], "added": [r["added"] for r in found],
            "read": [r["read"] for r in found], "gradients": [r["gradients"] for r in found], "mixing": self.mean_of("mixing"),
            "identity": first["identity"],
        }  # fmt: skip


def entries(tasks: Sequence[Task], folder: Path) -> list[Entry]:
    """One for every row that has a finished run, in the order of the tasks. Differences are over seeds that both have."""
    found: dict[tuple[str, str], tuple[Row, dict[int, dict[str, Any]]]] = {}
    for task in tasks:
        path = result_path(folder, task.name)
        if path.exists():
            results = found.setdefault((task.group, task.row.name), (task.row, {}))[1]
            results[task.seed] = json.loads(path.read_text())
    made = []
    for (group, name), (row, results) in found.items():
        reference = BASELINE_TWICE if row.longer == 2 and row.options is not None else BASELINE
        baseline = found.get((group, reference.name), (row, {}))[1]
        both = [seed for seed in results if seed in baseline and name != BASELINE.name]
        differences = tuple(results[seed]["final"] - baseline[seed]["final"] for seed in both)
        ratios = [results[seed]["step_cpu_seconds"] / baseline[seed]["step_cpu_seconds"] for seed in both]
        made.append(Entry(group, row, results, differences, statistics.fmean(ratios) if ratios else 1.0))
    return made


def markdown(all_entries: Sequence[Entry]) -> str:
    """A table per group."""
    parts = []
    for group in dict.fromkeys(entry.group for entry in all_entries):
        chosen = [entry for entry in all_entries if entry.group == group]
        identity = next(iter(chosen[0].results.values()))["identity"]
        size, steps, lr = identity["size"], identity["steps"], identity["peak_lr"]
        lines = [
            f"### {group}: {size['layers']} layers, D={size['hidden']}, {steps} steps, peak learning rate {lr:g}",
            "",
            "| residual connection | seeds | validation loss | minus baseline, same seed | 95 % interval | verdict | parameters "
            "| processor time per step |",
            "|---|---|---|---|---|---|---|---|",
            *(_line(entry) for entry in chosen),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def times(all_entries: Sequence[Entry], workers: int) -> str:
    """What all runs took: the clock's seconds depend on what else ran on the machine, processor seconds much less."""
    results = [result for entry in all_entries for result in entry.results.values()]
    cpu, wall = sum(r["cpu_seconds"] for r in results), sum(r["seconds"] for r in results)
    return (
        f"{len(results)} runs took {cpu / 60:.1f} minutes of processor time; on an idle machine {workers} workers would take "
        f"about {cpu / 60 / workers:.0f} minutes (estimated, not measured). By the clock the runs took {wall / 60:.1f} minutes, "
        "added up.\n"
    )


def _line(entry: Entry) -> str:
    cells = [entry.row.title, str(len(entry.results)), _spread(entry.finals, ".4f")]
    if entry.differences:
        half = entry.half_width
        interval = "" if half is None else f"± {half:.4f}"
        cells += [_spread(entry.differences, "+.4f"), interval, entry.verdict]
    else:
        cells += ["", "", ""]
    parameters = next(iter(entry.results.values()))["parameters"]
    return f"| {' | '.join([*cells, f'{parameters:,}', f'{entry.step_ratio:.2f}x'])} |"


def _spread(values: Sequence[float], form: str) -> str:
    mean = f"{statistics.fmean(values):{form}}"
    return f"{mean} (sd {statistics.stdev(values):.4f})" if len(values) > 1 else mean


def _mean(values: Sequence[Any]) -> Any:
    if isinstance(values[0], list):
        return [_mean(column) for column in zip(*values, strict=True)]
    return statistics.fmean(values)
