"""What ``gpu.py`` runs, in order of importance."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import block
import block_case
import block_sides
import kernel_time
import models
import peers
import step_time
import torch
import triton
from gpu import Findings, Section
from kernel_time import ODD, SHAPES, Shape
from rich.table import Table
from rich.text import Text
from timing import copy_bandwidth

from attnres_compile.kernels.differentiable import FUSED, NAIVE

# The shape of Llama 3.2 1B, with random weights.
LLAMA = models.Size(
    layers=16, width=2048, intermediate=8192, heads=32, kv_heads=8, vocabulary=128256, sequence=2048, batch=4, context=2048,
    dtype=torch.bfloat16, device="cuda", rounds=20,
)  # fmt: skip
TOY = models.Size(
    layers=2, width=32, intermediate=64, heads=2, kv_heads=2, vocabulary=64, sequence=16, context=16, blocks=2, rounds=2
)
FEW_SOURCES = 4
# The reference and the sides that stack keep too much for 80 GB at 8192 tokens.
BLOCK_TOKENS = {"Kimi K3": 4096}
AHEAD_SECONDS = 100
AHEAD_TOKENS = {"kernels": 2048, "peer": 512}  # enough to compile what the full size needs


def sections(dry_run: bool) -> list[Section]:
    llama = TOY if dry_run else LLAMA
    toy: Callable[[Shape], Shape] = kernel_time.toy if dry_run else lambda shape: shape
    shapes = {shape.name: toy(shape) for shape in SHAPES}

    def block_section(name: str, sources: int) -> Section:
        shape = shapes[name]
        tokens = min(shape.tokens, BLOCK_TOKENS.get(name, shape.tokens))
        shape = replace(shape, tokens=tokens, sources=min(sources, shape.sources))
        return Section(f"block {name}, n={sources}", 60, functools.partial(one_block, shape, dry_run))

    def decoding(mode: str) -> Section:
        sides = (models.STANDARD, models.BLOCK)
        size = replace(llama, batch=1, rounds=3 if dry_run else 50)
        return Section(f"decode {mode}", 60, lambda: whole_model(lambda: step_time.decode(size, sides, mode)))

    sides = (models.STANDARD, models.BLOCK, models.STACKED)
    return [
        Section("device", 10, functools.partial(device, dry_run)),
        Section("compile ahead", AHEAD_SECONDS + 10, functools.partial(compile_ahead, dry_run)),
        *(Section(f"kernels {name}", 20, functools.partial(kernels, shape, dry_run)) for name, shape in shapes.items()),
        Section("kernels otherwise", 20, lambda: otherwise([toy(shape) for shape in ODD], dry_run)),
        block_section("1B", 8),
        block_section("Kimi K3", 8),
        Section("training step", 170, lambda: whole_model(lambda: step_time.training(llama, sides))),
        Section("prefill", 80, lambda: whole_model(lambda: step_time.prefill(llama, sides))),
        decoding("reduce-overhead"),
        decoding("default"),
        block_section("8B", 8),
        block_section("3B", 8),
        *(block_section(name, FEW_SOURCES) for name in ("Kimi K3", "8B", "1B", "3B")),
    ]


def title(dry_run: bool) -> str:
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    if dry_run:
        return f"Dry run on the CPU at toy sizes, {versions}: these numbers mean nothing"
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return f"{torch.cuda.get_device_name()}, driver {driver}, {versions}"


@functools.cache
def bandwidth(dry_run: bool) -> float:
    """Bytes per second."""
    return copy_bandwidth(torch.device("cpu"), 2**22) if dry_run else copy_bandwidth(torch.device("cuda"))


def device(dry_run: bool) -> Findings:
    found, missing = peers.find()
    made = Table(title="what is measured")
    made.add_column("what")
    made.add_column("")
    made.add_row("copy, bytes read and written", f"{bandwidth(dry_run) / 1e12:.3g} TB/s")
    for name in found:
        made.add_row(name, "found")
    for name, reason in missing.items():
        made.add_row(name, Text(reason))
    return Findings([made], {"copy_bytes_per_second": bandwidth(dry_run), "peers": list(found), "missing": missing})


def kernels(shape: Shape, dry_run: bool) -> Findings:
    rows = kernel_time.measure(shape, NAIVE if dry_run else FUSED, bandwidth(dry_run), 2 if dry_run else 30)
    return Findings([kernel_time.table(shape, rows)], rows)


def otherwise(shapes: list[Shape], dry_run: bool) -> Findings:
    """Only whether the kernels are right."""
    errors = {str(shape): kernel_time.check(shape, NAIVE if dry_run else FUSED) for shape in shapes}
    made = Table(title="largest relative error against float64")
    for header in ("shape", *next(iter(errors.values()))):
        made.add_column(header)
    for name, found in errors.items():
        made.add_row(name, *(f"{error:.0e}" for error in found.values()))
    return Findings([made], errors)


def sides_of_block(dry_run: bool) -> tuple[dict[str, block_case.Implementation], dict[str, block_case.Implementation]]:
    """Our own sides, and the peers, which may fail."""
    ours = block_sides.two_phase(NAIVE if dry_run else FUSED)
    return {block.STANDARD: block_sides.standard(), block.TWO_PHASE: ours, block.STACKED: block_sides.stacked()}, peers.find()[0]


def block_size(shape: Shape, dry_run: bool) -> block_case.Size:
    return block_case.Size(
        shape.tokens, shape.width, shape.sources, shape.sublayers, shape.dtype, shape.device, rounds=2 if dry_run else 20
    )


def one_block(shape: Shape, dry_run: bool) -> Findings:
    own, others = sides_of_block(dry_run)
    measured = block.measure(block_size(shape, dry_run), {**own, **others}, optional={block.STACKED, *others})
    return Findings([block.table(measured)], measured)


def whole_model(compare: Callable[[], step_time.Compared]) -> Findings:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    compared = compare()
    return Findings([compared.table()], compared)


# -------------------------------------------------------------------------------------------------- compile ahead


def compile_ahead(dry_run: bool) -> Findings:
    """Compile the Triton kernels of the later sections into the cache on disk, in processes side by side.

    Autotuning compiles dozens of variants one after the other, which would take most of the time. What is tuned here is tuned
    again later, by a process that has the GPU for itself.
    """
    tasks = [f"kernels:{shape.name}" for shape in SHAPES]
    # flash-attn-res compiles anew for every number of tokens, and the full number of them would not fit side by side.
    names = [name for name in peers.find()[0] if not name.startswith("flash-attn-res")]
    tasks += [f"peer:{shape.name}:{name}" for name in names for shape in SHAPES]
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), *(["--dry-run"] if dry_run else []), "--ahead"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    begin, limit = time.monotonic(), AHEAD_SECONDS
    if dry_run or (os.cpu_count() or 1) < 8:
        tasks = tasks[:1]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    processes = {task: subprocess.Popen([*command, task], env=environment, **quiet) for task in tasks}
    made = Table(title="compiling ahead")
    made.add_column("what")
    made.add_column("")
    outcome = {}
    try:
        for task, process in processes.items():
            try:
                status = process.wait(max(0.0, limit - (time.monotonic() - begin)))
                outcome[task] = "done" if status == 0 else f"exit status {status}"
            except subprocess.TimeoutExpired:
                outcome[task] = "not finished"
    finally:
        for process in processes.values():
            process.kill()
    for task, what in outcome.items():
        made.add_row(task, what)
    return Findings([made], outcome)


def compile_one(task: str, dry_run: bool) -> None:
    """What a process of :func:`compile_ahead` does: "kernels:SHAPE" or "peer:SHAPE:NAME"."""
    kind, name, *peer = task.split(":")
    shape = next(shape for shape in SHAPES if shape.name == name)
    shape = kernel_time.toy(shape) if dry_run else replace(shape, tokens=AHEAD_TOKENS[kind])
    if kind == "kernels":
        kernel_time.check(shape, NAIVE if dry_run else FUSED)
        return
    size = replace(block_size(shape, dry_run), rounds=1)
    measured = block.measure(size, {peer[0]: peers.find()[0][peer[0]]}, optional=peer)
    if measured.missing:
        raise RuntimeError(measured.missing[peer[0]])
