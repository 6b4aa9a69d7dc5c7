"""The demo's picture: losses of both models with their difference, and a heat map of the depth attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from demo_training import Run
from matplotlib.axes import Axes

from attnres_compile.inspection.plots import draw_depth_attention
from attnres_compile.inspection.results import ChainInspection
from attnres_compile.inspection.tick_labels import thin_out

COLOURS = ("#555555", "#c2410c")
SMOOTHING = 20


def draw(runs: Sequence[Run], depth: ChainInspection, path: Path) -> None:
    figure = plt.figure(figsize=(14, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.1))[0]
    losses, difference = left.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    _losses(losses, runs)
    _difference(difference, *runs)
    draw_depth_attention(right.subplots(), depth, relative=True)
    thin_out(figure)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _losses(axes: Axes, runs: Sequence[Run]) -> None:
    for run, colour in zip(runs, COLOURS, strict=True):
        steps, losses = zip(*run.validation, strict=True)
        axes.plot(steps, losses, "o-", color=colour, linewidth=2, label=f"{run.name}, validation: {losses[-1]:.4f} at the end")
        axes.plot(*_smoothed(run.losses), color=colour, alpha=0.5, linewidth=1)
    axes.plot([], [], color="black", alpha=0.5, linewidth=1, label=f"training, mean of {SMOOTHING} steps")
    axes.set(ylabel="nats per byte", title="Loss from the same checkpoint")
    axes.legend(frameon=False)
    _tidy(axes)


def _difference(axes: Axes, baseline: Run, other: Run) -> None:
    """The curves above lie close together; both models saw the same batches, so differences step by step mean something."""
    validation = [(step, b - a) for (step, a), (_, b) in zip(baseline.validation, other.validation, strict=True)]
    axes.plot(*zip(*validation, strict=True), "o-", color=COLOURS[1])
    training = [b - a for a, b in zip(baseline.losses, other.losses, strict=True)]
    axes.plot(*_smoothed(training), color=COLOURS[1], alpha=0.5, linewidth=1)
    axes.axhline(0, color=COLOURS[0], linewidth=1)
    axes.set(xlabel="steps after the conversion", ylabel="difference", title=f"{other.name} minus {baseline.name}")
    _tidy(axes)


def _smoothed(losses: list[float]) -> tuple[list[float], list[float]]:
    """Means of ``SMOOTHING`` consecutive losses, each at the middle of its steps."""
    width = min(SMOOTHING, len(losses))
    means = [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]
    return [i + width / 2 for i in range(len(means))], means


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
