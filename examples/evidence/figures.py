"""The paper's figures in miniature, from the entries of the table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from rows import BASELINE, BLOCK_4, BLOCK_8, FULL
from tables import Entry

from attnres_compile.inspection.tick_labels import thin_out

# Hues that differ for every kind of colour vision.
GREY, BLUE, GREEN, RED = "#555555", "#0072b2", "#009e73", "#c2410c"
MAIN = {BASELINE.name: GREY, BLOCK_4.name: BLUE, BLOCK_8.name: GREEN, FULL.name: RED}
DPI = 100


def draw_all(entries: Sequence[Entry], folder: Path) -> list[Path]:
    """Write every figure that there are results for; their paths. Depth mixing is that of the last group."""
    groups = list(dict.fromkeys(entry.group for entry in entries))
    last = [entry for entry in entries if entry.group == groups[-1]]
    figures = {
        "losses.png": losses(entries, groups),
        "dynamics.png": dynamics(entries, groups),
    }
    if main := [entry for entry in last if _is_main(entry)]:
        figures["depth.png"] = mixing(main)
    if others := [entry for entry in last if not _is_main(entry) and entry.row.config is not None]:
        figures["depth_ablations.png"] = mixing(others)
    for name, figure in figures.items():
        save(figure, folder / name)
    return [folder / name for name in figures]


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 256 colours, a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def losses(entries: Sequence[Entry], groups: Sequence[str]) -> Figure:
    """Validation loss on the way, its distance to the baseline's of the same seed, and that distance at the end, of every row."""
    figure, grid = plt.subplots(len(groups), 3, figsize=(17, 5 * len(groups)), layout="constrained", squeeze=False)
    for (curves, distances, ends), group in zip(grid, groups, strict=True):
        chosen = [entry for entry in entries if entry.group == group]
        baseline = next((entry for entry in chosen if entry.row.name == BASELINE.name), None)
        main = [entry for entry in chosen if _is_main(entry)]
        for entry in main:
            colour = MAIN[entry.row.name]
            _band(curves, _steps(entry), [_curve(r) for r in entry.results.values()], colour, entry.row.title)
            if baseline is not None and entry is not baseline:
                seeds = [seed for seed in entry.results if seed in baseline.results]
                values = [_minus(_curve(entry.results[seed]), _curve(baseline.results[seed])) for seed in seeds]
                _band(distances, _steps(entry), values, colour, entry.row.title)
        curves.set(title=f"{group}\nvalidation loss", xlabel="step", ylabel="nats per byte")
        distances.axhline(0, color=GREY, linewidth=1)
        distances.set(title=f"{group}\nminus baseline of the same seed", xlabel="step", ylabel="nats per byte")
        curves.legend(frameon=False)
        _ends(ends, [entry for entry in chosen if entry.differences], group)
    _tidy(figure)
    return figure


def dynamics(entries: Sequence[Entry], groups: Sequence[str]) -> Figure:
    """Magnitudes of what sublayers add, and gradient norms of their weights, over depth; bands are the range of the seeds."""
    figure, grid = plt.subplots(len(groups), 2, figsize=(14, 5 * len(groups)), layout="constrained", squeeze=False)
    for (magnitudes, gradients), group in zip(grid, groups, strict=True):
        for entry in (entry for entry in entries if entry.group == group and _is_main(entry)):
            colour = MAIN[entry.row.name]
            results = list(entry.results.values())
            depth = range(1, len(results[0]["sublayers"]) + 1)
            _band(magnitudes, depth, [r["added"][1:] for r in results], colour, entry.row.title)
            _band(gradients, depth, [r["gradients"] for r in results], colour, entry.row.title)
        magnitudes.set(title=f"{group}\noutput magnitude", ylabel="root mean square of what a sublayer adds")
        gradients.set(title=f"{group}\ngradient norm of a sublayer's weights", ylabel="norm of the validation loss's gradient")
        for axes in (magnitudes, gradients):
            axes.set(xlabel="sublayer (attention is odd, MLP even)", ylim=(0, None))
            axes.legend(frameon=False)
    _tidy(figure)
    return figure


def mixing(entries: Sequence[Entry]) -> Figure:
    """Depth mixing matrices, means over tokens and seeds. Norms hide the scale of what they read: rows have a mean of one."""
    columns = min(len(entries), 4)
    rows = -(-len(entries) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.6 * columns + 1, 4.6 * rows), layout="constrained", squeeze=False)
    matrices = [_relative(torch.tensor(entry.mean_of("mixing"), dtype=torch.float64)) for entry in entries]
    finite = torch.cat([matrix[matrix.isfinite()] for matrix in matrices])
    low, high = min(0.0, float(finite.quantile(0.01))), max(2.0, float(finite.quantile(0.99)))
    norm = TwoSlopeNorm(vmin=low, vcenter=1.0, vmax=high)
    for axes, entry, matrix in zip(grid.flat, entries, matrices, strict=False):
        result = next(iter(entry.results.values()))
        axes.set_facecolor("#d8d8d8")
        image = axes.imshow(matrix.numpy(), cmap="RdBu_r", norm=norm, aspect="auto", interpolation="none")
        axes.set_xticks(range(matrix.shape[1]), ["embedding", *result["sublayers"]], fontsize=7)
        axes.set_yticks(range(matrix.shape[0]), result["readers"], fontsize=7)
        axes.set(title=entry.row.title, xlabel="output of sublayer", ylabel="reader")
    for axes in list(grid.flat)[len(entries) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=grid, extend="both", label="coefficient over its row's mean")
    about = f"means over tokens and {len(entries[0].results)} seeds, white is the standard residual"
    figure.suptitle(f"{entries[0].group}: depth mixing matrices, {about}")
    thin_out(figure)
    return figure


def _ends(axes: Axes, entries: Sequence[Entry], group: str) -> None:
    for place, entry in enumerate(entries):
        mean = sum(entry.differences) / len(entry.differences)
        axes.errorbar([mean], [place], xerr=None if entry.half_width is None else [entry.half_width], fmt="s", color=BLUE)
        axes.plot(entry.differences, [place] * len(entry.differences), "o", color=RED, markersize=4, alpha=0.8)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(entries)), [entry.row.title for entry in entries])
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(
        title=f"{group}\nat the end, minus baseline of the same seed", xlabel="nats per byte; 95 % interval and single seeds"
    )


def _band(axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """The mean of several curves, and their range."""
    table = torch.tensor(values, dtype=torch.float64)
    axes.plot(x, table.mean(0), ".-", color=colour, label=label)
    axes.fill_between(x, table.amin(0), table.amax(0), color=colour, alpha=0.15, linewidth=0)


def _relative(matrix: torch.Tensor) -> torch.Tensor:
    """Rows over the mean of their coefficients, NaN where there is no such source."""
    shown = torch.stack([torch.arange(matrix.shape[1]) <= min(i, matrix.shape[1] - 1) for i in range(matrix.shape[0])])
    means = (matrix * shown).sum(1, keepdim=True) / shown.sum(1, keepdim=True)
    return (matrix / means).where(shown, float("nan"))


def _steps(entry: Entry) -> list[int]:
    return [step for step, _ in _shown(next(iter(entry.results.values())))]


def _curve(result: dict[str, Any]) -> list[float]:
    return [loss for _, loss in _shown(result)]


def _shown(result: dict[str, Any]) -> list[tuple[int, float]]:
    """Validation losses; without the first if that is of random weights, beside which all others look alike."""
    return result["evaluated"][0 if result["identity"]["start"] else 1 :]


def _minus(left: list[float], right: list[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def _is_main(entry: Entry) -> bool:
    return entry.row.name in MAIN


def _tidy(figure: Figure) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
