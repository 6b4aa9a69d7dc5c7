"""How the time of detection and rewriting grows with depth: a Llama of tiny width at 4 to 128 layers.

The ratio is that of the seconds per layer to those at ``BASELINE`` layers: 1.0 is linear growth. The full variant can't
be linear: its sites have as many sources as there are sublayers before them, so the rewritten graph itself grows with the
square of the depth.
"""

from __future__ import annotations

import time

import torch
from compile_time import llama
from rich.table import Table

from attnres_compile.capture import Captured, capture, copy_graph
from attnres_compile.config import AttnResConfig
from attnres_compile.passes.base import Program, run_passes
from attnres_compile.passes.pipeline import DETECTION, PLANNING, REWRITING

DEPTHS = (4, 8, 16, 32, 64, 128)
BASELINE = 8
REPETITIONS = 3
CONFIGS = {"detect": None, "block": AttnResConfig(num_blocks=8), "full": AttnResConfig(variant="full")}


def run() -> Table:
    table = Table(title="detecting in and rewriting a Llama, beside its capture", title_justify="left")
    steps = [header for name in CONFIGS for header in (f"{name} (s)", "ms/layer", "ratio")]
    for header in ("layers", "nodes", "capture (s)", *steps):
        table.add_column(header, justify="right")
    timed_capture(BASELINE)  # pays for the warm-up of the process
    baseline = {name: least_seconds(timed_capture(BASELINE)[0], config) / BASELINE for name, config in CONFIGS.items()}
    for depth in DEPTHS:
        captured, capturing = timed_capture(depth)
        cells = [str(depth), str(len(captured.graph_module.graph.nodes)), f"{capturing:.2f}"]
        for name, config in CONFIGS.items():
            spent = least_seconds(captured, config)
            cells += [f"{spent:.3f}", f"{1e3 * spent / depth:.2f}", f"{spent / depth / baseline[name]:.2f}"]
        table.add_row(*cells)
    return table


def timed_capture(depth: int) -> tuple[Captured, float]:
    model, ids = llama(depth), torch.ones(1, 8, dtype=torch.int64)
    start = time.perf_counter()
    captured = capture(model, (), {"input_ids": ids, "use_cache": False})
    return captured, time.perf_counter() - start


def least_seconds(captured: Captured, config: AttnResConfig | None) -> float:
    """The least seconds of some repetitions: of detection alone, or of planning and rewriting where ``config`` is given."""
    best = float("inf")
    for _ in range(REPETITIONS):
        program = Program(copy_graph(captured.graph_module), config or AttnResConfig(), captured.parameters)
        if config is not None:
            program = run_passes(program, DETECTION)
        start = time.perf_counter()
        run_passes(program, DETECTION if config is None else PLANNING + REWRITING)
        best = min(best, time.perf_counter() - start)
    return best
