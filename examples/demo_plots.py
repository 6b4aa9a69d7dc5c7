"""The demo's picture: losses of both models with their difference, and a heat map of the depth attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from demo_depth import Depth
from demo_training import Run
from matplotlib.axes import Axes

COLOURS = ("#555555", "#c2410c")
SMOOTHING = 20


def draw(runs: Sequence[Run], depth: Depth, path: Path) -> None:
    figure = plt.figure(figsize=(14, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.1))[0]
    losses, difference = left.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    _losses(losses, runs)
    _difference(difference, *runs)
    _heat_map(right.subplots(), depth)
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


def _heat_map(axes: Axes, depth: Depth) -> None:
    """Numbers are weights. Colours compare them with equal shares, which is what zero queries give."""
    equal = 1 / (~depth.weights.isnan()).sum(1, keepdim=True)
    relative = depth.weights / equal
    span = min(1.0, (relative - 1).abs().nan_to_num(0).max().item())
    image = axes.imshow(relative.numpy(), cmap="RdBu_r", vmin=1 - span, vmax=1 + span, aspect="auto")
    for row, weights in enumerate(depth.weights.tolist()):
        for column, weight in enumerate(weights):
            if weight == weight:  # NaN: the site has no such source
                colour = "white" if abs(relative[row, column] - 1) > 0.7 * span else "black"
                axes.text(column, row, f"{weight:.0%}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(depth.sources)), depth.sources, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(depth.sites)), depth.sites)
    axes.tick_params(length=0)
    axes.set(title="What each sublayer reads: mean softmax weights over depth", facecolor="#e5e5e5")
    axes.spines[:].set_visible(False)
    clipped = relative.nan_to_num(0).max().item() > 1 + span
    axes.figure.colorbar(image, ax=axes, shrink=0.6, extend="max" if clipped else "neither", label="relative to an equal share")


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
