"""How the benchmarks measure: sides interleaved in one process, and only behind a comparison of what they compute.

A side is a callable without arguments. All sides of a benchmark run once per round, and a ratio is taken within a round, so
that a machine that slows down for a while slows them all.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

Side = Callable[[], object]
WARM_UPS = 3
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class WrongResultError(Exception):
    """A side computes something else than its reference, so its time means nothing."""


@dataclass(frozen=True)
class Spread:
    """Median, least and most of repeated measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g} to {self.most:.3g})"


# ------------------------------------------------------------------------------------------------------------ time


def interleaved(sides: Mapping[str, Side], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every call. Every other round runs in reverse order, so that no side always follows the same one."""
    clock = stopwatch(device)
    if device.type == "cpu":
        _keep_freed_memory()
    for side in sides.values():
        side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            times[name].append(clock(sides[name]))
    return times


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep what is freed, as the allocators that are usual for training do. Returning it to the system and getting it
    again, zeroed, costs more than many a side computes, and which side pays is chance. Elsewhere this does nothing.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the options' numbers in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for option, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**26), (mmap_max, 0)):
            library.mallopt(option, value)


def stopwatch(device: torch.device) -> Callable[[Side], float]:
    """A function that calls a side and returns milliseconds: wall clock on a CPU, events on a GPU."""
    if device.type != "cuda":
        return _wall_clock
    # Overwriting the L2 cache makes a side read its inputs from memory, keeps the GPU busy while Python launches, and leaves
    # as many lines to be written back as the side itself leaves to others.
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def events(side: Side) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        result = side()
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end)

    return events


def _wall_clock(side: Side) -> float:
    start = time.perf_counter()
    result = side()  # freed behind the clock
    spent = 1e3 * (time.perf_counter() - start)
    del result
    return spent


def captured(side: Side, device: torch.device) -> Side:
    """``side`` as a CUDA graph, warmed up: what is measured is the GPU's time, not Python's. Elsewhere the side itself.

    All graphs share one pool of memory, since nobody reads what a replay leaves behind: the side must have been compared.
    """
    if device.type != "cuda":
        return side
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            side()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        side()
    return graph.replay


_pools: list[object] = []


def _pool() -> object:
    if not _pools:
        _pools.append(torch.cuda.graph_pool_handle())
    return _pools[0]


def first_call(side: Side) -> float:
    """Seconds of the first call, in which everything is compiled: with empty caches, so that no side profits from another's."""
    cache = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)  # later calls may still load from it
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}/triton"):
        start = time.perf_counter()
        side()
        return time.perf_counter() - start


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes per second that a copy of ``size`` bytes reads and writes: the ceiling of everything that only moves data."""
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, 20, device)["copy"]
    return 2 * size / (1e-3 * statistics.median(times))


# ------------------------------------------------------------------------------------------------------------ gate


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative error in the L2 norm; infinite if a number is missing."""
    if found.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    error = ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def gate(what: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> float:
    """The largest relative error of ``found``.

    Raises:
        WrongResultError: if it is beyond the tolerance.
    """
    error = max((distance(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    if error > tolerance:
        raise WrongResultError(f"{what}: relative error {error:.1e} is beyond {tolerance:.0e}")
    return error


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh floating tensors hold NaN meanwhile, so that what a kernel leaves unwritten shows."""

    def filling(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args: object, **kwargs: object) -> Tensor:
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return fill

    with contextlib.ExitStack() as patches:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patches.enter_context(mock.patch.object(owner, name, filling(getattr(owner, name))))
        yield


# ----------------------------------------------------------------------------------------------------------- report


def ratios(times: Mapping[str, Sequence[float]], name: str, to: str) -> Spread:
    """How many times as long as ``to`` a side takes, by rounds."""
    return Spread.of([a / b for a, b in zip(times[name], times[to], strict=True)])
