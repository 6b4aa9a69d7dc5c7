"""Benchmarks: ``make bench``, or ``python tests/bench/run.py NAME ...`` for some of them.

Every benchmark runs its sides in one process and reports ratios; absolute times belong to the machine that is named. The
whole table for a GPU, with other implementations beside ours, is ``gpu.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import block
import compile_time
import convert_large
import growth
import kernel_time
import pipeline_transport
import saved_bytes
import step_time
import torch
from rich.console import Console
from rich.table import Table

BENCHMARKS: dict[str, Callable[[], Table]] = {
    "block": block.run,
    "step-time": step_time.run,
    "prefill": step_time.run_prefill,
    "decode": step_time.run_decode,
    "compile-time": compile_time.run,
    "growth": growth.run,
    "saved-bytes": saved_bytes.run,
    "convert": convert_large.run,
    "pipeline-memory": pipeline_transport.run_memory,
    "pipeline-step": pipeline_transport.run_steps,
}
ON_GPU: dict[str, Callable[[], Table]] = {"kernels": kernel_time.run}


def main(names: list[str]) -> int:
    known = BENCHMARKS | ON_GPU
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    has_gpu = torch.cuda.is_available()
    impossible = [name for name in names if name in ON_GPU and not has_gpu]
    if impossible:
        print(f"the benchmark {impossible[0]!r} needs a GPU", file=sys.stderr)
        return 2
    console = Console(width=150)
    device = torch.cuda.get_device_name() if has_gpu else "no GPU"
    console.print(f"torch {torch.__version__}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {device}")
    for name in names or (known if has_gpu else BENCHMARKS):
        console.print(known[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
