"""Benchmarks: ``make bench``, or ``python tests/bench/run.py NAME ...`` for some of them.

Every benchmark runs its sides in one process and reports ratios; absolute times belong to the machine that is named.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import compile_time
import growth
import step_time
import torch
from rich.console import Console
from rich.table import Table

BENCHMARKS: dict[str, Callable[[], Table]] = {
    "compile-time": compile_time.run,
    "growth": growth.run,
    "step-time": step_time.run,
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    console = Console(width=120)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    console.print(f"torch {torch.__version__}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {device}")
    for name in names or BENCHMARKS:
        console.print(BENCHMARKS[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
