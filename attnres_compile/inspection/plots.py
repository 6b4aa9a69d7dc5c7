"""Pictures of an inspection: depth attention, mixing matrix, magnitudes, entropies. Needs matplotlib, an optional extra.

Importing this module without it raises a ConfigError that says how to install it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnres_compile.errors import ConfigError
from attnres_compile.inspection.report import Inspection, title_of
from attnres_compile.inspection.results import ROOT, ChainInspection
from attnres_compile.inspection.short_names import OUTPUT

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

    from attnres_compile.inspection.tick_labels import thin_out
except ImportError as error:
    raise ConfigError(
        f'matplotlib can\'t be imported ({error}); install it with: pip install "attnres-compile[plots]"'
    ) from error

# Viridis runs from dark to light for every kind of colour vision, and in grayscale.
_COLOURS = "viridis"
_DARK, _LIGHT, _GREY = "#2c2f6d", "#c77c02", "#9a9a9a"
_FORMATS = (".png", ".svg")
_DPI = 150
_FONT = 8  # points, of tick labels and numbers
_LEGIBLE = (32, 12)  # rows and columns up to which the cells of a heat map have numbers
_MARKED = 64  # points up to which a line has markers


def depth_attention(inspection: Inspection) -> Figure:
    """What every site reads: mean softmax weights, sites by sources; a heat map per chain.

    Raises:
        ConfigError: for a model without AttnRes, which has none.
    """
    _require_sites(inspection)
    return _figure(inspection, 9, _map_height, lambda part, chain: draw_depth_attention(part.subplots(), chain))


def mixing_matrix(inspection: Inspection) -> Figure:
    """The depth mixing matrix beside the standard residual's, reads by sublayers, in the same colours; a row per chain."""

    def draw(part: SubFigure, chain: ChainInspection) -> None:
        _draw_mixing(part.subplots(1, len(_matrices(chain)), squeeze=False)[0], chain)

    return _figure(inspection, 16 if inspection.config else 9, _map_height, draw)


def magnitudes(inspection: Inspection) -> Figure:
    """Root mean squares of what every sublayer adds and of what its norm reads; a diagram per chain."""
    return _figure(inspection, 12, lambda _: 4.5, lambda part, chain: _draw_magnitudes(part.subplots(), chain))


def entropies(inspection: Inspection) -> Figure:
    """Entropy of every site's weights in nats, beside log n; a diagram per chain.

    Raises:
        ConfigError: for a model without AttnRes, which has none.
    """
    _require_sites(inspection)
    return _figure(inspection, 12, lambda _: 4.5, lambda part, chain: _draw_entropies(part.subplots(), chain))


def overview(inspection: Inspection) -> Figure:
    """All of the above that the model has; two rows per chain."""

    def draw(part: SubFigure, chain: ChainInspection) -> None:
        if chain.block_sizes is None:
            matrix, sizes = part.subplots(1, 2)
            _draw_mixing([matrix], chain)
        else:
            maps, lines = part.subfigures(2, 1, squeeze=False, height_ratios=(_map_height(chain), 4.5))[:, 0]
            attention, *matrices = maps.subplots(1, 3)
            sizes, spread = lines.subplots(1, 2)
            draw_depth_attention(attention, chain)
            _draw_mixing(matrices, chain)
            _draw_entropies(spread, chain)
        _draw_magnitudes(sizes, chain)

    return _figure(inspection, 22 if inspection.config else 18, lambda c: _map_height(c) + (4.5 if c.block_sizes else 0), draw)


def check_format(path: Path) -> None:
    """Raise where :func:`save` could not write ``path``, before any work is done.

    Raises:
        ConfigError: for a suffix other than .png and .svg.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path}: no format for pictures; end the name in one of {', '.join(_FORMATS)}.")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG or an SVG, by suffix.

    Raises:
        ConfigError: as :func:`check_format` does.
    """
    check_format(path)
    figure.savefig(path, format=path.suffix.lower()[1:], dpi=_DPI)


def draw_depth_attention(axes: Axes, chain: ChainInspection, relative: bool = False) -> None:
    """The heat map of one chain; labels may need :func:`attnres_compile.inspection.tick_labels.thin_out` after it.

    With ``relative`` the colours compare weights with equal ones, 1 / n, which shows what little training has changed.
    """
    weights = chain.depth_attention
    shown, norm, extend, label = weights, *_norm(weights), "mean softmax weight"
    if relative:
        shown = weights * (~weights.isnan()).sum(1, keepdim=True)
        finite = shown[shown.isfinite()].tolist() or [1.0]
        norm, extend, label = Normalize(min(finite), max(finite)), "neither", "mean softmax weight over 1 / n"
    image = _heat_map(axes, shown, [site.name for site in chain.sites], chain.sources, norm, weights)
    axes.set(title="depth attention", xlabel="source", ylabel="site")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, extend=extend, label=label)


def _figure(
    inspection: Inspection, width: float, height: Callable[[ChainInspection], float],
    draw: Callable[[SubFigure, ChainInspection], None],
) -> Figure:  # fmt: skip
    """A figure with a part per chain, one above the other; sizes in inches."""
    heights = [height(chain) for chain in inspection.chains]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, chain in zip(parts, inspection.chains, strict=True):
        part.suptitle(f"{title_of(inspection, chain)}; means over {chain.num_tokens} tokens", fontweight="bold")
        draw(part, chain)
    thin_out(figure)
    return figure


def _map_height(chain: ChainInspection) -> float:
    return min(max(5.0, 2.0 + 0.18 * len(chain.reads)), 12.0)


def _require_sites(inspection: Inspection) -> None:
    if inspection.config is None:
        raise ConfigError(f"{inspection.model} has no AttnRes, so it has no weights over depth; convert it first.")


def _norm(values: Tensor) -> tuple[Normalize, str]:
    """Colours by square roots, and whether the bar of colours ends in an arrow: "max" or "neither".

    One strong weight among thousands must not hide all others: the scale ends at the 99th percentile where the largest
    value is more than twice that.
    """
    finite = values[values.isfinite()]
    if not len(finite):
        return Normalize(0.0, 1.0), "neither"
    largest, high = float(finite.max()), float(finite.quantile(0.99))
    clipped = largest > 2 * high > 0
    return PowerNorm(0.5, vmin=0.0, vmax=high if clipped else max(largest, 1e-6)), "max" if clipped else "neither"


def _heat_map(
    axes: Axes, values: Tensor, rows: Sequence[str], columns: Sequence[str], norm: Normalize, numbers: Tensor
) -> AxesImage:
    """``values`` as colours, with ``numbers`` in the cells where there is room. NaN stays hatched: there is no such source."""
    axes.set_facecolor("#e8e8e8")
    axes.patch.set(hatch="////", edgecolor="#c8c8c8", linewidth=0)
    image = axes.imshow(values.numpy(), cmap=_COLOURS, norm=norm, aspect="auto", interpolation="none")
    if len(rows) <= _LEGIBLE[0] and len(columns) <= _LEGIBLE[1]:
        for i, j in values.isfinite().nonzero().tolist():
            colour = "black" if norm(float(values[i, j])) > 0.55 else "white"
            axes.text(j, i, f"{float(numbers[i, j]):.2f}", ha="center", va="center", fontsize=_FONT - 1, color=colour)
    axes.set_xticks(range(len(columns)), columns, fontsize=_FONT)
    axes.set_yticks(range(len(rows)), rows, fontsize=_FONT)
    return image


def _matrices(chain: ChainInspection) -> list[tuple[str, Tensor]]:
    standard = ("standard residual", chain.standard_mixing)
    return [standard] if chain.block_sizes is None else [("AttnRes", chain.mixing), standard]


def _draw_mixing(all_axes: Sequence[Axes], chain: ChainInspection) -> None:
    shown = chain.standard_mixing > 0
    norm, extend = _norm(torch.cat([matrix[shown] for _, matrix in _matrices(chain)]))
    rows, columns = [read.name for read in chain.reads], [ROOT, *(sublayer.name for sublayer in chain.sublayers)]
    for axes, (title, matrix) in zip(all_axes, _matrices(chain), strict=True):
        image = _heat_map(axes, matrix.where(shown, math.nan), rows, columns, norm, matrix)
        axes.set(title=f"depth mixing matrix, {title}", xlabel="output of sublayer", ylabel="reader")
        for end in _block_ends(chain):
            axes.axvline(end + 0.5, color="white", linewidth=0.8)
    figure = all_axes[0].figure
    assert figure is not None
    figure.colorbar(image, ax=list(all_axes), extend=extend, label="mean coefficient")


def _draw_magnitudes(axes: Axes, chain: ChainInspection) -> None:
    count = len(chain.sublayers)
    added = [chain.root_magnitude, *(sublayer.magnitude for sublayer in chain.sublayers)]
    places = [read.before + 1 for read in chain.reads]  # a read stands at the sublayer that it feeds
    read = [found.magnitude for found in chain.reads]
    _line(axes, range(count + 1), added, _DARK, "-", "o", "added by the sublayer")
    _line(axes, places, read, _LIGHT, "--", "s", "read by its norm")
    values = [value for value in (*added, *read) if value > 0 and math.isfinite(value)]
    if values and max(values) > 30 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel="sublayer", ylabel="mean root mean square over features")
    _finish(axes, chain, [ROOT, *(sublayer.name for sublayer in chain.sublayers), OUTPUT], [e + 0.5 for e in _block_ends(chain)])


def _draw_entropies(axes: Axes, chain: ChainInspection) -> None:
    places = range(len(chain.sites))
    _line(axes, places, [math.log(len(site.sources)) for site in chain.sites], _GREY, ":", "", "log n, of equal weights")
    _line(axes, places, [site.entropy_of_mean or 0.0 for site in chain.sites], _LIGHT, "--", "s", "of the mean weights")
    _line(axes, places, [site.entropy or 0.0 for site in chain.sites], _DARK, "-", "o", "of a token's weights, mean")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="site", ylabel="entropy over depth (nats)")
    starts = [i - 0.5 for i, site in enumerate(chain.sites) if site.before in _block_ends(chain)]
    _finish(axes, chain, [site.name for site in chain.sites], starts)


def _line(axes: Axes, x: Sequence[int], y: Sequence[float], colour: str, style: str, marker: str, label: str) -> None:
    axes.plot(x, y, color=colour, linestyle=style, marker=marker if len(x) <= _MARKED else "", markersize=4, label=label)


def _finish(axes: Axes, chain: ChainInspection, names: Sequence[str], ends: Sequence[float]) -> None:
    for i, end in enumerate(ends):
        axes.axvline(end, color=_GREY, linewidth=0.8, zorder=0, label="end of a block" if i == 0 else None)
    axes.set_xticks(range(len(names)), names, fontsize=_FONT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=0.9, edgecolor="none", fontsize=_FONT)


def _block_ends(chain: ChainInspection) -> list[int]:
    """Numbers of the sublayers that end a block; none where every sublayer does."""
    sizes = chain.block_sizes or ()
    return [sum(sizes[: i + 1]) for i in range(len(sizes))] if max(sizes, default=1) > 1 else []
