"""Pictures of simulated steps: every rank over time, and what transfers cost over numbers of ranks. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from attnres_compile.inspection.plots import check_format, save  # isort: skip; raises a ConfigError without matplotlib
import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from attnres_compile.pipelining.simulation import Computation, Timeline
from attnres_compile.pipelining.timeline import SimulatedStep, StepComparison, Sweep
from attnres_compile.pipelining.wording import seconds_text

__all__ = ["check_format", "cost_over_ranks", "overview", "save", "timelines"]

_KINDS = {
    "F": ("Blues", "forward"),
    "B": ("Oranges", "backward"),
    "I": ("Oranges", "backward, inputs"),
    "W": ("Greens", "backward, weights"),
}
SENT = "#7a1fa2"
_NAIVE, _CACHED, _GREY = "#c77c02", "#2c2f6d", "#9a9a9a"
_FONT = 8
_NUMBERED = 640  # operations per picture up to which those that are wide enough have their microbatch's number
_WIDTH = 16.0  # inches


def timelines(step: StepComparison) -> Figure:
    """Ranks by time, naive above cached on one axis of time."""
    figure = _figure(_timeline_height(step))
    _draw_timelines(figure, step)
    return figure


def cost_over_ranks(swept: Sweep) -> Figure:
    """Bubble, and what transfers add to the step, against the number of ranks."""
    figure = _figure(4.5)
    _draw_costs(figure, swept)
    return figure


def overview(step: StepComparison, swept: Sweep | None = None) -> Figure:
    """The timelines, and below them the costs where ``swept`` has any."""
    if swept is None or not swept.steps:
        return timelines(step)
    heights = (_timeline_height(step), 4.5)
    figure = _figure(sum(heights))
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_timelines(above, step)
    _draw_costs(below, swept)
    return figure


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _timeline_height(step: StepComparison) -> float:
    return 2 * max(2.2, 0.9 + min(0.32 * step.ranks, 3 + 0.06 * step.ranks))


def _draw_timelines(figure: Figure | SubFigure, step: StepComparison) -> None:
    rows = figure.subplots(2, 1, sharex=True)
    for axes, (name, one) in zip(rows, (("naive", step.naive), ("cached", step.cached)), strict=True):
        _draw_timeline(axes, one.timeline)
        axes.set_title(f"{name} transport: {_in_short(one)}", fontsize=_FONT + 2, loc="left")
        axes.axvline(one.seconds, color="black", linewidth=0.8)
    rows[0].set_xlim(0, 1.005 * max(step.naive.seconds, step.cached.seconds))
    rows[1].set_xlabel("seconds")
    kinds = {done.operation.kind for row in step.naive.timeline.computations for done in row}
    keys = [Patch(color=_colours(kind)(0.6), label=label) for kind, (_, label) in _KINDS.items() if kind in kinds]
    keys.append(Patch(color=SENT, label="the rank sends"))
    figure.legend(handles=keys, loc="outside upper right", ncols=len(keys), fontsize=_FONT, frameon=False)
    stages = f"{step.virtual} stages per rank, later ones darker" if step.virtual > 1 else "one stage per rank"
    figure.suptitle(f"{step.schedule}, {step.ranks} ranks, {stages}, {step.microbatches} microbatches", x=0.01, ha="left")


def _draw_timeline(axes: Axes, timeline: Timeline) -> None:
    """Bars of computation; under each rank's a thin one for the times at which it sends."""
    ranks = len(timeline.computations)
    for rank, row in enumerate(timeline.computations):
        edge = 0.5 if ranks <= 16 and len(row) <= 160 else 0.0
        shades = _shades(row)
        for stage, kind in itertools.product(shades, _KINDS):
            spans = [(x.start, x.end - x.start) for x in row if x.operation.stage == stage and x.operation.kind == kind]
            colour = _colours(kind)(shades[stage])
            axes.broken_barh(spans, (rank - 0.4, 0.64), facecolor=colour, edgecolor="white", linewidth=edge)
        sent = [(x.start, x.end - x.start) for x in timeline.transfers if x.ranks[0] == rank]
        axes.broken_barh(sent, (rank + 0.27, 0.18), facecolor=SENT)
    if sum(map(len, timeline.computations)) <= _NUMBERED:
        _number(axes, timeline)
    axes.set_ylim(ranks - 0.4, -0.6)
    axes.set_ylabel("rank")
    axes.set_yticks(range(0, ranks, -(-ranks // 16)))
    axes.tick_params(labelsize=_FONT)
    axes.spines[["top", "right"]].set_visible(False)


def _shades(row: Sequence[Computation]) -> dict[int, float]:
    """How dark each stage of a rank is drawn, within the colours of a kind."""
    stages = sorted({done.operation.stage for done in row})
    return {stage: 0.35 + 0.5 * i / (len(stages) - 1) if len(stages) > 1 else 0.5 for i, stage in enumerate(stages)}


def _number(axes: Axes, timeline: Timeline) -> None:
    """The microbatch in the middle of every computation that has room for it."""
    points_per_second = 72 * 0.93 * _WIDTH / timeline.seconds
    for rank, row in enumerate(timeline.computations):
        shades = _shades(row)
        for done in row:
            text = str(done.operation.microbatch)
            if (done.end - done.start) * points_per_second > 0.8 * _FONT * len(text):
                middle = (done.start + done.end) / 2
                colour = "white" if shades[done.operation.stage] > 0.6 else "black"
                axes.text(middle, rank - 0.08, text, ha="center", va="center", fontsize=_FONT - 1, color=colour)


def _draw_costs(figure: Figure | SubFigure, swept: Sweep) -> None:
    ranks = [step.ranks for step in swept.steps]
    bubble, added = figure.subplots(1, 2)
    free = [1 - (1 - step.cached.timeline.bubble) * step.cached.seconds / step.cached.free_seconds for step in swept.steps]
    bubble.plot(ranks, [100 * value for value in free], ":", color=_GREY, label="free transfers")
    for name, colour, marker in (("naive", _NAIVE, "s"), ("cached", _CACHED, "o")):
        ones: list[SimulatedStep] = [getattr(step, name) for step in swept.steps]
        bubble.plot(ranks, [100 * one.timeline.bubble for one in ones], marker=marker, color=colour, label=name)
        added.plot(ranks, [100 * one.overhead for one in ones], marker=marker, color=colour, label=name)
    first = swept.steps[0]
    bubble.set(title="bubble, mean of ranks", ylabel="% of the step")
    added.set(title="what transfers add to the step", ylabel="% of the step with free transfers")
    for axes in (bubble, added):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(count) for count in ranks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"ranks ({first.schedule}, {first.virtual} per rank, {first.microbatches} microbatches)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=_FONT)


def _colours(kind: str) -> Colormap:
    return matplotlib.colormaps[_KINDS[kind][0]]


def _in_short(one: SimulatedStep) -> str:
    took = f"{seconds_text(one.seconds)}, bubble {one.timeline.bubble:.1%}"
    return f"{took}, transfers add {seconds_text(one.waiting_seconds)} ({one.overhead:.1%})"
