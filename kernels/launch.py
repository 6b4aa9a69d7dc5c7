"""What the Triton wrappers share: rows, tables of addresses, and the choice among a few launch configurations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16  # bytes: the widest load of a thread
PER_LAUNCH = 16  # addresses that one launch writes
INTERPRETED_PROGRAMS = 3  # enough that programs have several rows and unequal shares of them
REPETITIONS = 5
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}  # Triton's names of pointers to storage

_picked: dict[tuple[Hashable, ...], Config] = {}


@dataclass(frozen=True)
class Config:
    """How one kernel is launched; every kernel says which of the fields it reads.

    Args:
        num_warps: warps of a program.
        num_stages: loop iterations that the compiler keeps in flight.
        tokens: rows that a program holds at a time.
        width: features that a program holds in one block of registers.
        programs: programs on each multiprocessor, for kernels whose programs loop over rows.
        reread: rows are read a second time, from the cache, instead of being held in registers.
    """

    num_warps: int
    num_stages: int = 1
    tokens: int = 1
    width: int = 0
    programs: int = 0
    reread: bool = False


# For compiling without a GPU: a name, the kernel, the types of its arguments, its compile-time arguments, its configuration.
Variant = tuple[str, Any, dict[str, str], dict[str, Any], Config]


def lanes_of(device: torch.device) -> int:
    """Threads of a warp; the interpreter counts as NVIDIA."""
    return 64 if device.type == "cuda" and torch.version.hip is not None else 32


@triton.jit
def _write_addresses(table, values):  # type: ignore[no-untyped-def]
    for i in tl.static_range(len(values)):
        tl.store(table + i, values[i].to(tl.int64))


def rows(x: Tensor) -> Tensor:
    """``x`` as a matrix of tokens; copies only what is not contiguous or not aligned.

    Args:
        x: ``[..., D]``.

    Returns:
        ``[T, D]``, contiguous, on a 16-byte boundary.
    """
    matrix = x.reshape(-1, x.shape[-1]).contiguous()
    return matrix if matrix.data_ptr() % ALIGNMENT == 0 else matrix.clone()


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where each tensor begins, for kernels over any number of tensors.

    A kernel writes the table: the launch carries the addresses as arguments, so nothing is copied from pageable memory
    and a CUDA graph replays it. Always the same number of arguments, so it is compiled once.

    Args:
        tensors: n results of :func:`rows`, on one device. Who calls keeps them alive until the reader of the table is launched.

    Returns:
        int64 ``[n]`` on that device.
    """
    values = [tensor.data_ptr() for tensor in tensors]
    padded = values + [values[-1]] * (-len(values) % PER_LAUNCH)
    table = torch.empty(len(padded), dtype=torch.int64, device=tensors[0].device)
    for start in range(0, len(padded), PER_LAUNCH):
        _write_addresses[(1,)](table[start:], tuple(padded[start : start + PER_LAUNCH]), num_warps=1)
    return table[: len(values)]


def num_programs(tokens: int, device: torch.device, per_multiprocessor: int = 1) -> int:
    """Size of the grid of a kernel whose programs loop over ``tokens`` rows (or tiles of rows).

    Returns:
        ``per_multiprocessor`` times the multiprocessors, at most one program for each row; a few in the interpreter.
    """
    if device.type == "cpu":
        return min(tokens, INTERPRETED_PROGRAMS)
    return min(tokens, per_multiprocessor * _multiprocessors(device))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def tuned(name: str, key: tuple[Hashable, ...], candidates: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    """The fastest of a few configurations, timed once per key and process.

    The first candidate is taken without timing where there is no GPU, under deterministic algorithms (how a sum is split
    depends on the configuration, so a timing must not decide on bits), and while a CUDA graph is captured, unless the key
    was timed before.

    Args:
        name: the kernel.
        key: what the choice depends on: width, dtype, what is fused.
        candidates: at least one; the first is the one to take untimed.
        launch: launches the kernel. It is called many times, so it must not accumulate into its outputs.
    """
    if len(candidates) == 1 or not torch.cuda.is_available() or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    entry = (name, torch.cuda.current_device(), *key)
    if entry in _picked:
        return _picked[entry]
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]
    _picked[entry] = min(candidates, key=lambda config: _milliseconds(config, launch))
    return _picked[entry]


def _milliseconds(config: Config, launch: Callable[[Config], object]) -> float:
    launch(config)  # compiles
    # Filling the cache anew makes every repetition read from memory, and keeps the GPU busy while Python launches.
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPETITIONS)]
    for start, end in events:
        flush.zero_()
        start.record()
        launch(config)
        end.record()
    torch.cuda.synchronize()
    # What disturbs a launch only ever makes it longer.
    fastest: float = min(start.elapsed_time(end) for start, end in events)
    return fastest
