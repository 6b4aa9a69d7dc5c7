"""One block of Block AttnRes between its sublayers: what the residual costs, without what it connects.

S sublayers read their inputs from the residual; what they put out ("branches") are given tensors. Every read is a compiled
function of its own, as in a model, where matrix products lie between them. All sides get the same gradients for the same
outputs: the reads, the block's end, and for the sources what later blocks would send back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from block_case import MODES, Block, Implementation, Size
from block_sides import reference, stacked, standard, two_phase
from rich.table import Table
from rich.text import Text
from timing import TOLERANCES, Side, Spread, captured, gate, interleaved, ratios
from torch import Tensor

STANDARD, TWO_PHASE, STACKED = "standard", "two-phase", "stacked"
WIDER = {torch.float32: torch.float64}  # the reference's dtype; float32 for 16 bits


@dataclass
class Measured:
    """Milliseconds by mode and side, the sides' largest relative errors, and why a side is missing."""

    size: Size
    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def ratio(self, mode: str, side: str, to: str) -> Spread:
        return ratios(self.times[mode], side, to)


def measure(size: Size, sides: Mapping[str, Implementation], optional: Collection[str] = ()) -> Measured:
    """Compare every side with the definition, then time them. A side in ``optional`` may fail, and is then missing."""
    torch.compiler.reset()
    device, tolerance = torch.device(size.device), TOLERANCES[size.dtype]
    block, measured = Block(size), Measured(size)
    forwards = {name: implementation.prepare() for name, implementation in sides.items()}
    for mode in MODES:
        expected = _expected(block, mode)
        ready: dict[str, Side] = {}
        for name, implementation in sides.items():
            if name in measured.missing:
                continue
            try:
                side = implementation.side(forwards[name], block, mode)
                found = implementation.separately(block, side(), mode)
                error = gate(f"{name}, {mode}", found, expected[implementation.layout == "stream"], tolerance)
                measured.errors[name] = max(error, measured.errors.get(name, 0.0))
                del found
                ready[name] = captured(side, device)
            except Exception as error:
                if name not in optional:
                    raise
                measured.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        del expected
        measured.times[mode] = interleaved(ready, size.rounds, device)
    return measured


def _expected(block: Block, mode: str) -> list[list[Tensor]]:
    """What AttnRes computes, and what the standard residual computes."""
    wide = block.converted(WIDER.get(block.size.dtype, torch.float32))
    return [way.side(way.prepare(), wide, mode)() for way in (reference(), standard(compile_=False))]


def table(measured: Measured) -> Table:
    """A row per side, with ratios to the standard residual and to the first way to compute AttnRes."""
    names = list(measured.times[MODES[0]])
    first = names[1] if len(names) > 1 else names[0]
    made = Table(title=f"one block, {measured.size}: median (least to most) of {measured.size.rounds}", title_justify="left")
    made.add_column("side")
    for mode in MODES:
        for header in (f"{mode} (ms)", f"to {names[0]}", f"to {first}"):
            made.add_column(header, justify="right")
    made.add_column("error", justify="right")
    for name in names:
        cells = []
        for mode in MODES:
            if name not in measured.times[mode]:
                cells += ["", "", ""]
                continue
            spread = Spread.of(measured.times[mode][name])
            cells += [
                f"{spread.median:.3g}",
                *("" if name == to else str(measured.ratio(mode, name, to)) for to in (names[0], first)),
            ]
        made.add_row(name, *cells, f"{measured.errors[name]:.0e}")
    if measured.missing:
        made.caption = Text("; ".join(f"{name} is missing: {reason}" for name, reason in measured.missing.items()))
    return made


def run(size: Size | None = None) -> Table:
    size = size or Size()
    sides = {STANDARD: standard(), TWO_PHASE: two_phase(), STACKED: stacked()}
    return table(measure(size, sides))
