"""Pictures of simulated steps: every computation and transfer at its time, and labels that can be read."""

from __future__ import annotations

import itertools
from collections import Counter

import matplotlib.colors
import pytest
from matplotlib.collections import PolyCollection

from attnres_compile.pipelining import plots
from attnres_compile.pipelining.orders import placement_of
from attnres_compile.pipelining.shapes import ModelShape, plan_from_shape
from attnres_compile.pipelining.simulation import Link
from attnres_compile.pipelining.timeline import StepComparison, Sweep, forward_seconds, simulate_step, simulate_sweep


def swept() -> tuple[StepComparison, Sweep]:
    shape = ModelShape("deep", 16, 1024, 4)
    link = Link(1e9, 1e-5)
    plan = plan_from_shape(shape, 4, 2, 1024)
    step = simulate_step(plan, "Interleaved1F1B", 8, forward_seconds(plan, 1e13), link)
    return step, simulate_sweep(
        lambda ranks: plan_from_shape(shape, ranks, 2, 1024), (2, 4, 8, 64), "Interleaved1F1B", 8, 1e13, link
    )


def test_the_picture_has_every_computation_and_transfer_at_its_time() -> None:
    step, found = swept()
    figure = plots.overview(step, found)
    naive, cached, *_ = figure.axes
    assert naive.get_xlim() == cached.get_xlim()
    for axes, one in ((naive, step.naive), (cached, step.cached)):
        bars: dict[bool, Counter[tuple[float, float]]] = {True: Counter(), False: Counter()}
        for collection in axes.collections:
            assert isinstance(collection, PolyCollection)
            sends = matplotlib.colors.to_hex(collection.get_facecolor()[0]) == plots.SENT
            for path in collection.get_paths():
                box = path.get_extents()
                bars[sends][round(box.x0, 9), round(box.x1, 9)] += 1
        computed = Counter((round(x.start, 9), round(x.end, 9)) for row in one.timeline.computations for x in row)
        assert bars[False] == computed
        assert bars[True] == Counter((round(x.start, 9), round(x.end, 9)) for x in one.timeline.transfers)
        assert f"{one.timeline.bubble:.1%}" in axes.get_title(loc="left")
    bubble, added = figure.axes[2:]
    assert [line.get_label() for line in bubble.lines] == ["free transfers", "naive", "cached"]
    assert list(added.lines[1].get_ydata()) == [100 * one.cached.overhead for one in found.steps]


def test_bubbles_with_free_transfers_in_the_picture() -> None:
    _, found = swept()
    free = plots.cost_over_ranks(found).axes[0].lines[0]
    expected = [100 * (one.ranks - 1) / (2 * 8 + one.ranks - 1) for one in found.steps]
    assert list(free.get_ydata()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ranks", "virtual", "schedule"), [(1, 2, "LoopedBFS"), (2, 1, "GPipe"), (16, 2, "ZBVZeroBubble"), (64, 2, "Interleaved1F1B")]
)
def test_labels_lie_within_the_picture(ranks: int, virtual: int, schedule: str) -> None:
    plan = plan_from_shape(ModelShape("small", ranks * virtual, 1, 2), ranks, virtual, 1, "bf16", placement_of(schedule))
    figure = plots.timelines(simulate_step(plan, schedule, 8, [1.0] * plan.num_stages, Link(20.0)))
    figure.draw_without_rendering()
    frame = figure.bbox.padded(1)
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert frame.containsx(box.x0) and frame.containsx(box.x1) and frame.containsy(box.y0) and frame.containsy(box.y1)
        ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        inside = sorted((label.get_window_extent() for at, label in ticks if 0 <= at < ranks), key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(inside))
    above, below = (axes.get_tightbbox() for axes in figure.axes)
    assert not above.overlaps(below)
    legend = figure.legends[0].get_window_extent()
    assert figure._suptitle is not None
    assert not legend.overlaps(figure._suptitle.get_window_extent())
