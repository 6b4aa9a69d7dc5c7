"""Quantities and tables in plain characters, up to 140 columns wide."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType

_WIDTH = 140
_LABEL = re.compile(r"(.*\D)(\d+)")


def rendered(parts: Iterable[RenderableType]) -> str:
    """Plain text, without spaces at the ends of lines."""
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def bytes_text(nbytes: float) -> str:
    """``nbytes`` in the largest binary unit of which there is one at least; nothing for none."""
    return _scaled(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def seconds_text(seconds: float) -> str:
    """Four digits of seconds, milliseconds or microseconds."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds / 1e-6:.4g} us"


def flops_text(flops: float) -> str:
    """``flops`` in the largest decimal unit of which there is one at least; nothing for none."""
    return _scaled(flops, 1000, ("", "K", "M", "G", "T", "P", "E"))


def labels_text(labels: Sequence[str]) -> str:
    """Labels with three or more in a row that count up by one as "b0-b7"."""
    split = [(found[1], int(found[2])) if (found := _LABEL.fullmatch(label)) else (label, None) for label in labels]
    runs: list[list[int]] = []
    for i, (stem, number) in enumerate(split):
        follows = number is not None and i > 0 and split[i - 1] == (stem, number - 1)
        if follows:
            runs[-1].append(i)
        else:
            runs.append([i])
    texts = [[f"{labels[run[0]]}-{labels[run[-1]]}"] if len(run) > 2 else [labels[i] for i in run] for run in runs]
    return ", ".join(itertools.chain.from_iterable(texts))


def ratio_text(naive: float, cached: float) -> str:
    """How many times smaller; nothing where both are zero, but for rounding."""
    return f"{naive / cached:.2f}x" if cached > 1e-12 else ""


def count_text(number: int, noun: str) -> str:
    """A number of things, in the plural where there are several."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    if not number:
        return ""
    power = 0
    while abs(number) >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{number:.4g} {units[power]}".rstrip()
