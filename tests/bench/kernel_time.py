"""Every kernel by itself: its time against that of a copy of as many bytes as it must move at least.

The least is every input read once and every output written once. A kernel is timed on the very tensors on which it was
compared with its definition in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from timing import Spread, captured, copy_bandwidth, gate, interleaved, poisoned
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import attnres_compile  # noqa: F401  (finds its subpackages in a checkout)
from attnres_compile.kernels.differentiable import FUSED, KERNELS, NAIVE, Kernels

EPS, SCALE = 1e-6, 1.0
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
OUTPUTS = {"merge forward": 2, "inter forward": 2, "site forward": 1}  # what comes behind are statistics


@dataclass(frozen=True)
class Shape:
    """T tokens of D features, n complete blocks of S sublayers."""

    name: str
    width: int
    sublayers: int
    sources: int = 8
    tokens: int = 8192
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    norm: str = "rms"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: T={self.tokens}, D={self.width}, n={self.sources}, S={self.sublayers}, {dtype}"


# Sublayers in 8 blocks: 2 per layer of 16, 28 and 32 layers, and 12 layers per block. The last block has 8 sources.
SHAPES = (Shape("1B", 2048, 4), Shape("Kimi K3", 7168, 24), Shape("8B", 4096, 8), Shape("3B", 3072, 7))
# What the shapes above leave out: other dtypes and norms, a number of tokens and a width that divide by nothing.
ODD = (
    Shape("float32", 2048, 4, dtype=torch.float32, norm="layer", tokens=1031),
    Shape("float16", 1544, 3, sources=2, dtype=torch.float16, norm="", tokens=1031),
)


@dataclass(frozen=True)
class Row:
    """``bytes`` is the least that must move; ``share`` of the time is what a copy of as many bytes takes."""

    shape: str
    kernel: str
    error: float
    bytes: int
    milliseconds: Spread
    share: Spread


Call = tuple[Callable[..., Any], tuple[Any, ...]]


class Data:
    """Random tensors for the six kernels: rows ``[T, D]``, vectors ``[D]``, scores of about one."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator(shape.device).manual_seed(0)

        def random(*size: int, dtype: torch.dtype = shape.dtype, std: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator, device=shape.device) * std).to(dtype)

        T, D, n, S = shape.tokens, shape.width, shape.sources, shape.sublayers
        self.norm = shape.norm
        self.sources = [random(T, D) for _ in range(n)]
        self.partial, self.branch, self.mixed = random(T, D), random(T, D), random(T, D)
        self.grad_mixed = [random(T, D) for _ in range(S)]
        self.grad_sources = [random(T, D) for _ in range(n + 1)]
        self.weights = random(S, D, dtype=torch.float32, std=D**-0.5)
        self.lse, self.grad_lse = random(T, dtype=torch.float32), random(S, T, dtype=torch.float32)
        affine = {"": 0, "rms": 1, "layer": 2}[shape.norm]
        self.norm_weight = 1 + random(D, std=0.1) if affine else None
        self.norm_bias = random(D) if affine > 1 else None

    def calls(self, kernels: Kernels) -> dict[str, Call]:
        """The six kernels with their arguments; the backward ones take what their own forward kept."""
        weight, affine = self.weights[0], (self.norm_weight, self.norm_bias)
        merge = (self.partial, self.branch, self.mixed, self.lse, weight, EPS, SCALE, self.norm, *affine, EPS)
        total, _, merge_stats = kernels.merge_forward(*merge)
        of_merge = (self.grad_mixed[0], self.grad_sources[0], total, self.mixed, weight, SCALE, self.norm, *affine, merge_stats)
        inter = (self.sources, self.weights, EPS)
        _, *inter_stats = kernels.inter_forward(*inter)
        of_inter = (self.grad_mixed, self.grad_lse, self.grad_sources[:-1], self.sources, self.weights, *inter_stats)
        site = ([*self.sources, self.partial], weight, EPS, SCALE, None, None)
        _, *site_stats = kernels.site_forward(*site)
        of_site = (self.grad_mixed[0], self.grad_sources, site[0], weight, SCALE, None, None, *site_stats)
        return {
            "merge forward": (kernels.merge_forward, merge),
            "merge backward": (kernels.merge_backward, of_merge),
            "inter forward": (kernels.inter_forward, inter),
            "inter backward": (kernels.inter_backward, of_inter),
            "site forward": (kernels.site_forward, site),
            "site backward": (kernels.site_backward, of_site),
        }

    def float64(self) -> Data:
        wide = object.__new__(Data)
        vars(wide).update(tree_map_only(Tensor, Tensor.double, vars(self)))
        return wide


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def least_bytes(arguments: Any, outputs: Any) -> int:
    """Of every input and every output once."""
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in [*tensors(arguments), *tensors(outputs)]}
    return sum(sizes.values())


def results(name: str, call: Call) -> list[Tensor]:
    """What a kernel computes, without what it keeps for its backward: that one shows whether it is right."""
    function, arguments = call
    return tensors(function(*arguments)[: OUTPUTS.get(name)])


def check(shape: Shape, kernels: str) -> dict[str, float]:
    """The largest relative error of every kernel against float64."""
    data = Data(shape)
    expected = Data.float64(data).calls(KERNELS[NAIVE])
    with poisoned():
        calls = data.calls(KERNELS[kernels])
        return {
            name: gate(f"{shape}: {name}", results(name, call), results(name, expected[name]), TOLERANCES[shape.dtype])
            for name, call in calls.items()
        }


def measure(shape: Shape, kernels: str, bandwidth: float, rounds: int = 30) -> list[Row]:
    """Check, then time.

    Args:
        bandwidth: bytes per second of a copy.
    """
    errors, device = check(shape, kernels), torch.device(shape.device)
    calls = Data(shape).calls(KERNELS[kernels])
    times = interleaved({name: captured(lambda c=call: c[0](*c[1]), device) for name, call in calls.items()}, rounds, device)
    rows = []
    for name, (function, arguments) in calls.items():
        size = least_bytes(arguments, function(*arguments))
        share = Spread.of([1e3 * size / bandwidth / taken for taken in times[name]])
        rows.append(Row(shape.name, name, errors[name], size, Spread.of(times[name]), share))
    return rows


def table(shape: Shape, rows: list[Row]) -> Table:
    made = Table(title=f"{shape}: least bytes at the speed of a copy, as a share of the time", title_justify="left")
    made.add_column("kernel")
    for header in ("error", "MiB", "ms", "share: median (least to most)"):
        made.add_column(header, justify="right")
    for row in rows:
        share = Spread(*(100 * value for value in (row.share.median, row.share.least, row.share.most)))
        made.add_row(row.kernel, f"{row.error:.0e}", f"{row.bytes / 2**20:.0f}", str(row.milliseconds), f"{share} %")
    return made


def run() -> Table:
    """The widest shape on this machine's GPU."""
    bandwidth = copy_bandwidth(torch.device("cuda"))
    return table(SHAPES[1], measure(SHAPES[1], FUSED, bandwidth))


def toy(shape: Shape) -> Shape:
    """Small enough for a CPU."""
    return replace(shape, width=64, sublayers=min(shape.sublayers, 4), sources=3, tokens=32, device="cpu", dtype=torch.float32)
