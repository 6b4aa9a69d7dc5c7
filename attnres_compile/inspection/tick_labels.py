"""Names along the axes of a figure that don't run into each other, however many there are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

_MOST = 32  # labels per axis
_STEPS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 96, 192, 384)  # with most of them, labels fall on the same part of every layer


def thin_out(figure: Figure) -> None:
    """Turn names along horizontal axes that don't fit, then leave out as many of each axis as it takes."""
    figure.draw_without_rendering()
    both = (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis))
    named = [axis for axis in both if isinstance(axis.get_major_locator(), FixedLocator)]  # numbers thin themselves out
    for axis in named:
        if axis.axis_name == "x" and _overlap(axis, range(len(axis.get_ticklabels()))):
            axis.set_tick_params(labelrotation=90)
    figure.draw_without_rendering()
    for axis in named:
        _thin_out(axis)


def _overlap(axis: Axis, kept: Sequence[int]) -> bool:
    labels = axis.get_ticklabels()
    boxes = [labels[i].get_window_extent().padded(1) for i in kept]
    return any(left.overlaps(right) for left, right in itertools.pairwise(boxes))


def _thin_out(axis: Axis) -> None:
    """Every k-th label and the last, with the smallest k at which they are not too many and none overlaps the next."""
    texts, ticks = [label.get_text() for label in axis.get_ticklabels()], axis.get_ticklocs()
    count = len(texts)
    for step in (*_STEPS, count):
        kept = [*range(0, count - (step + 1) // 2, step), count - 1] if count else []
        if len(kept) <= _MOST and not _overlap(axis, kept):
            if step > 1:
                axis.set_ticks([ticks[i] for i in kept], [texts[i] for i in kept])
            return
