"""What the pictures show: data, labels that can be read, and files that are whole."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from models import randomise
from torch import nn

import attnres_compile as ac
from attnres_compile.inspection import plots
from attnres_compile.inspection.measure import inspect_model, mixing_row
from attnres_compile.inspection.report import Inspection
from attnres_compile.inspection.results import ChainInspection, ReadInspection, SublayerInspection
from attnres_compile.inspection.tick_labels import thin_out
from attnres_compile.plan import plan_chain


def inspected(layers: int, config: ac.AttnResConfig | None) -> Inspection:
    """An inspection of ``layers`` layers with two sublayers each, with numbers drawn at random."""
    count = 2 * layers
    names = [f"layer {i} {part}" for i in range(layers) for part in ("attention", "MLP")]
    sublayers = tuple(SublayerInspection(name, (), 1.0 + i % 7) for i, name in enumerate(names))
    reads, rows = [ReadInspection(names[0], "", 0, None, 0.5)], [torch.eye(count + 1, dtype=torch.float64)[0]]
    plan = plan_chain(count, range(1, count + 1), config or ac.AttnResConfig())
    blocks = names if plan.block_size == 1 else [f"block {n + 1}" for n in range(len(plan.blocks))]
    for i, site in enumerate(plan.sites):
        read = ReadInspection([*names, "output"][i + 1], "", i + 1, i, 2.0 + i)
        row = (torch.arange(count + 1) <= i + 1).double()
        if config is not None:
            weights = torch.randn(site.num_sources, dtype=torch.float64).softmax(0)
            sources = ("embedding", *blocks[: site.complete], *(["partial sum"] if site.partial else []))
            entropy = 0.9 * float(torch.special.entr(weights).sum())
            read = ReadInspection(read.name, "", i + 1, i, 2.0 + i, sources, weights, entropy)
            row = mixing_row(weights, site, plan.block_size, count, float(site.num_sources))
        reads.append(read)
        rows.append(row)
    sizes = tuple(stop - start for start, stop in plan.blocks) if config else None
    chain = ChainInspection("", "prenorm", 16, 64, 0.3, sublayers, tuple(reads), torch.stack(rows), sizes)
    return Inspection("GPT2LMHeadModel", config, (chain,))


CONFIGS = {"block": ac.AttnResConfig(), "full": ac.AttnResConfig(variant="full"), "plain": None}
CASES = [
    pytest.param(layers, config, id=f"{layers} layers, {name}") for layers in (12, 96) for name, config in CONFIGS.items()
]  # fmt: skip


def titled(figure: Figure, title: str) -> Axes:
    (axes,) = (axes for axes in figure.axes if axes.get_title() == title)
    return axes


def texts(axes: Axes, which: str) -> list[str]:
    return [label.get_text() for label in getattr(axes, f"get_{which}ticklabels")()]


def assert_legible(figure: Figure) -> None:
    """All labels of ticks and axes lie within the figure; along an axis no two overlap, and no diagram covers another."""
    figure.draw_without_rendering()
    frame = figure.bbox.padded(1)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            boxes = [label.get_window_extent() for place, label in ticks if low <= place <= high and label.get_text()]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), (axes.get_title(), axis.axis_name)
            for box in (*boxes, axis.label.get_window_extent()):
                assert frame.containsx(box.x0) and frame.containsx(box.x1) and frame.containsy(box.y0) and frame.containsy(box.y1)
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(a.padded(-1).overlaps(b.padded(-1)) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize(("layers", "config"), CASES)
def test_the_overview_is_legible_and_complete(layers: int, config: ac.AttnResConfig | None) -> None:
    found = inspected(layers, config)
    figure = plots.overview(found)
    assert_legible(figure)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    maps = ["depth attention", "depth mixing matrix, AttnRes"] if config else []
    assert titles == [*maps, "depth mixing matrix, standard residual"]
    rows = texts(titled(figure, titles[-1]), "y")
    assert rows[0] == "layer 0 attention" and rows[-1] == "output"
    assert len(rows) == 25 if layers == 12 else 16 <= len(rows) <= 32


@pytest.mark.parametrize("layers", [12, 96])
@pytest.mark.parametrize("name", ["block", "full"])
def test_depth_attention_shows_the_weights(layers: int, name: str) -> None:
    found = inspected(layers, CONFIGS[name])
    figure = plots.depth_attention(found)
    assert_legible(figure)
    (chain,) = found.chains
    axes = titled(figure, "depth attention")
    shown = axes.images[0].get_array()
    np.testing.assert_array_equal(np.ma.filled(shown, np.nan), chain.depth_attention.numpy())
    assert chain.depth_attention.shape == (2 * layers, 2 * layers + 1 if name == "full" else 10)
    assert texts(axes, "y")[0] == "layer 0 MLP" and texts(axes, "y")[-1] == "output"
    ends = ["embedding", f"layer {layers - 1} MLP"] if name == "full" else ["embedding", "partial sum"]
    assert [texts(axes, "x")[0], texts(axes, "x")[-1]] == ends
    # Every label stands at its own row and column.
    for which, names in (("y", [site.name for site in chain.sites]), ("x", chain.sources)):
        places = getattr(axes, f"get_{which}ticks")()
        assert [names[int(place)] for place in places] == texts(axes, which)
    numbers = [text.get_text() for text in axes.texts]
    assert len(numbers) == (int(chain.depth_attention.isfinite().sum()) if (layers, name) == (12, "block") else 0)
    assert numbers[:1] in ([], [f"{float(chain.sites[0].weights[0]):.2f}"])


@pytest.mark.parametrize("name", ["block", "full"])
def test_the_mixing_matrix_stands_beside_the_standard_one_in_the_same_colours(name: str) -> None:
    found = inspected(12, CONFIGS[name])
    figure = plots.mixing_matrix(found)
    (chain,) = found.chains
    images = [titled(figure, f"depth mixing matrix, {title}").images[0] for title in ("AttnRes", "standard residual")]
    assert images[0].norm is images[1].norm
    for image, matrix in zip(images, (chain.mixing, chain.standard_mixing), strict=True):
        shown = np.ma.filled(image.get_array(), np.nan)
        np.testing.assert_array_equal(np.isnan(shown), np.triu(np.ones((25, 25)), 1) > 0)
        np.testing.assert_array_equal(np.nan_to_num(shown), matrix.numpy())
    boundaries = [line.get_xdata()[0] for line in titled(figure, "depth mixing matrix, AttnRes").lines]
    assert boundaries == ([3 * block + 0.5 for block in range(1, 9)] if name == "block" else [])


def test_one_strong_weight_does_not_hide_the_others() -> None:
    found = inspected(12, CONFIGS["full"])
    found.chains[0].mixing[20, 3] = 1000.0
    norm = titled(plots.mixing_matrix(found), "depth mixing matrix, AttnRes").images[0].norm
    assert norm(1.0) > 0.2


def test_lines_have_the_numbers() -> None:
    found = inspected(12, CONFIGS["block"])
    (chain,) = found.chains
    (axes,) = plots.magnitudes(found).axes
    added, read = axes.lines[:2]
    assert list(added.get_ydata()) == [0.3, *(sublayer.magnitude for sublayer in chain.sublayers)]
    assert list(read.get_xdata()) == list(range(1, 26))
    assert list(read.get_ydata()) == [read.magnitude for read in chain.reads]
    assert [line.get_xdata()[0] for line in axes.lines[2:]] == [3 * block + 0.5 for block in range(1, 9)]
    assert texts(axes, "x")[1] == "layer 0 attention" and axes.get_yscale() == "log"
    (axes,) = plots.entropies(found).axes
    bound, of_mean, mean = (list(line.get_ydata()) for line in axes.lines[:3])
    assert bound == [math.log(len(site.sources)) for site in chain.sites]
    assert (of_mean, mean) == ([site.entropy_of_mean for site in chain.sites], [site.entropy for site in chain.sites])
    # The third site is the first that reads block 1 whole: the line stands before it.
    assert axes.lines[3].get_xdata()[0] == 1.5


def test_several_chains_get_a_part_each() -> None:
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=97)
    ).eval()
    randomise(model, 0)
    ac.convert_(model)
    for site in model.attnres.sites:
        nn.init.normal_(site.query)
    found = inspect_model(model)
    for draw, count in ((plots.overview, 14), (plots.depth_attention, 4), (plots.magnitudes, 2), (plots.entropies, 2)):
        figure = draw(found)
        assert_legible(figure)
        assert len(figure.axes) == count
        assert [part.get_suptitle().partition(":")[0] for part in figure.subfigs] == [
            "T5ForConditionalGeneration encoder", "T5ForConditionalGeneration decoder",
        ]  # fmt: skip


def test_weights_relative_to_equal_ones() -> None:
    found = inspected(4, CONFIGS["block"])
    figure = Figure()
    axes = figure.subplots()
    plots.draw_depth_attention(axes, found.chains[0], relative=True)
    thin_out(figure)
    first = found.chains[0].sites[0].weights
    assert axes.images[0].get_array()[0, :2].tolist() == pytest.approx((2 * first).tolist())
    assert axes.texts[0].get_text() == f"{float(first[0]):.2f}"


def test_models_that_give_nothing_to_draw() -> None:
    plain = inspected(2, None)
    for draw in (plots.depth_attention, plots.entropies):
        with pytest.raises(ac.ConfigError, match="has no AttnRes"):
            draw(plain)
    broken = inspected(2, CONFIGS["full"])
    broken.chains[0].mixing.fill_(math.nan)
    for read in broken.chains[0].sites:
        read.weights.fill_(math.nan)
    assert_legible(plots.overview(broken))


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PNG"])
def test_suffixes_are_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    plots.save(plots.magnitudes(inspected(2, None)), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix.lower() == ".png" else b"<svg" in content
    with pytest.raises(ac.ConfigError, match=r"\.png, \.svg"):
        plots.check_format(tmp_path / "picture.jpeg")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_matplotlib_is_optional_and_pyplot_is_left_alone() -> None:
    code = (
        "import sys, attnres_compile, attnres_compile.cli, attnres_compile.inspection\n"
        "print('matplotlib' in sys.modules)\n"
        "import attnres_compile.inspection.plots\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert run(code).split() == ["False", "False"]
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import attnres_compile\n"
        "try:\n    import attnres_compile.inspection.plots\n"
        "except attnres_compile.ConfigError as error:\n    print(error)"
    )
    (line,) = run(code).splitlines()
    assert line.endswith('install it with: pip install "attnres-compile[plots]"')
