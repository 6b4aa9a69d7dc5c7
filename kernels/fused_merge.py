"""Triton kernels of one merge: add a sublayer's output to the stream, mix with the earlier blocks, normalise.

Forward and backward pass once over the rows. A program holds ``tokens`` rows of D features as chunks of ``width``
features: as many elements as its threads load in one 128-bit load each. D is padded to a multiple of the width, not to a
power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from attnres_compile.kernels import fused_merge_kernels as kernels
from attnres_compile.kernels.launch import ALIGNMENT, TYPES, Config, Variant, lanes_of, num_programs, rows, tuned
from attnres_compile.kernels.naive_merge import STATISTICS

FEW_TOKENS = 1024


def _tile(D: int, vector: int, threads: int, limit: int) -> tuple[int, int]:
    """How many rows fit, and how wide chunks are: the narrowest of which a row takes at most ``limit`` elements of a thread.

    Narrow chunks put few warps on a row (one, if that is enough), so that they seldom wait for each other; many rows to a
    program leave few partial sums of the gradients of parameters.
    """
    widest = threads * vector
    width = min(widest, max(16, triton.next_power_of_2(D)), 32 * vector)
    while width < widest and _held(D, vector, width) > limit:
        width *= 2
    return widest // width, width


def _held(D: int, vector: int, width: int) -> int:
    """Elements of each row tensor that a thread holds: one vector of every chunk."""
    return int(triton.cdiv(D, width)) * vector


def _config(D: int, dtype: torch.dtype, lanes: int, threads: int, limit: int, programs: int = 0) -> tuple[int, Config]:
    """A configuration, and how many elements of a row it has a thread hold."""
    vector = ALIGNMENT // dtype.itemsize
    tokens, width = _tile(D, vector, threads, limit)
    held = _held(D, vector, width)
    return held, Config(threads // lanes, tokens=tokens, width=width, programs=programs, reread=programs > 0 and held > 16)


def _forward_configs(D: int, dtype: torch.dtype, lanes: int) -> list[Config]:
    # Rows of 7168 in 16 bits take 138 and 92 registers with 128 and 256 threads: 3 and 2 programs, each with 42 KB in
    # flight, fit on a multiprocessor, where about 20 KB hide the latency of memory.
    return [_config(D, dtype, lanes, threads, limit)[1] for threads, limit in ((128, 56), (256, 32))]


def _backward_configs(D: int, dtype: torch.dtype, norm: str, lanes: int) -> list[Config]:
    # The parameters' sums stay in registers, 2 or 3 per element, so registers decide. Reading a row again once its sums are
    # known costs no memory traffic (it was just read: it comes from a cache) and frees so many of them that a thread holds
    # 32 elements without spilling, 24 under LayerNorm; 16 fit anyway. Then 8 warps fill a multiprocessor, with all loads of
    # 16 KB of row in flight at once. As two programs, one's sums overlap with the other's loads, but more partial sums are
    # left.
    most = 24 if norm == "layer" else 32
    configs = []
    for threads, limit, programs in ((128, most, 2), (256, most, 1), (256, 16, 1)):
        held, config = _config(D, dtype, lanes, threads, limit, programs)
        if held <= limit and config not in configs:
            configs.append(config)
    # LayerNorm of 7168 in 16 bits holds 32 after all, which only spills where rows share a program; nothing wider was tried.
    return configs or [_config(D, dtype, lanes, 256, 32, 1)[1]]


def _constants(D: int, norm: str, config: Config, backward: bool) -> dict[str, Any]:
    common = {"D": D, "NORM": norm, "TOKENS": config.tokens, "WIDTH": config.width}
    return common | {"REREAD": config.reread} if backward else common


def _forward_arguments(
    partial: Tensor, branch: Tensor | None, mixed: Tensor, lse: Tensor, weight: Tensor, eps: float, scale: float,
    norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of :func:`kernels.forward`, outputs included."""
    p = rows(partial)
    return {
        "partial": p,
        "branch": None if branch is None else rows(branch),
        "mixed": rows(mixed),
        "lse": lse.contiguous(),
        "weight": weight.contiguous(),
        "norm_weight": norm_weight.contiguous() if norm and norm_weight is not None else None,
        "norm_bias": norm_bias.contiguous() if norm == "layer" and norm_bias is not None else None,
        "total": p if branch is None else torch.empty_like(p),
        "y": torch.empty_like(p),
        "stats": torch.empty(STATISTICS[norm], len(p), dtype=torch.float32, device=p.device),
        "tokens": len(p),
        "eps": eps,
        "scale": scale,
        "norm_eps": norm_eps,
    }


def _backward_arguments(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, mixed: Tensor, weight: Tensor, scale: float,
    norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, stats: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of :func:`kernels.backward`, outputs included but for the sums, whose size depends on the launch."""
    x = rows(total)
    return {
        "grad_y": rows(grad_y),
        "grad_total": None if grad_total is None else rows(grad_total),
        "total": x,
        "mixed": rows(mixed),
        "weight": weight.contiguous(),
        "norm_weight": norm_weight.contiguous() if norm and norm_weight is not None else None,
        "norm_bias": norm_bias.contiguous() if norm == "layer" and norm_bias is not None else None,
        "stats": stats.contiguous(),
        "grad": torch.empty_like(x),
        "grad_mixed": torch.empty_like(x),
        "grad_lse": torch.empty(len(x), dtype=torch.float32, device=x.device),
        "tokens": len(x),
        "scale": scale,
    }


def _run(name: str, norm: str, arguments: dict[str, Any], configs: list[Config], launch: Callable[[Config], Any]) -> Any:
    x, tokens = arguments["total"], arguments["tokens"]
    if tokens < FEW_TOKENS:
        configs = configs[-1:]  # too few rows to fill the GPU: the one with the most threads on a row
    kinds = tuple(value.dtype if isinstance(value, Tensor) else value is None for value in arguments.values())
    with torch.cuda.device_of(x):
        return launch(tuned(name, (x.shape[-1], tokens.bit_length(), norm, kinds), configs, launch))


def merge_forward(
    partial: Tensor, branch: Tensor | None, mixed: Tensor, lse: Tensor, weight: Tensor, eps: float, scale: float,
    norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Adds a sublayer's output to the partial sum of its block and merges that with the completed blocks.

    ``total = partial + branch`` has the score ``s = (weight . total) r`` with ``r = rsqrt(mean(total^2) + eps)``. With
    ``m = sigmoid(s - lse)`` the read is ``h = scale ((1 - m) mixed + m total)``, online softmax over one more source
    (section "Block AttnRes", phase 2); ``y`` is h under the sublayer's own norm. Arithmetic is float32; total and y are
    rounded once each.

    Args:
        partial: ``[..., D]``, float32, float16 or bfloat16: the storage dtype.
        branch: ``[..., D]``, or None where nothing is added.
        mixed: ``[..., D]``, what the completed blocks mix to with weights of sum 1.
        lse: ``[T]`` float32, the log-sum-exp of their scores; T tokens are all leading dimensions.
        weight: ``[D]`` float32, pseudo-query times key-norm weight.
        eps: added to the mean square of a key.
        scale: the sum of the weights.
        norm: ``""``, ``"rms"`` or ``"layer"``.
        norm_weight: ``[D]``, or None for ones.
        norm_bias: ``[D]``, or None for zeros; only LayerNorm reads it.
        norm_eps: the norm's own eps.

    Returns:
        total (``partial`` itself without a branch), y, and statistics ``[3 + k, T]`` float32: s - lse, s, r, then the inverse rms
        of h (k = 1) or its mean and inverse standard deviation (k = 2).
    """
    arguments = _forward_arguments(partial, branch, mixed, lse, weight, eps, scale, norm, norm_weight, norm_bias, norm_eps)
    tokens, D = arguments["y"].shape

    def launch(config: Config) -> None:
        constants = _constants(D, norm, config, backward=False)
        grid = (triton.cdiv(tokens, config.tokens),)
        kernels.forward[grid](**arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages)

    if tokens:
        _run("merge_forward", norm, arguments, _forward_configs(D, partial.dtype, lanes_of(partial.device)), launch)
    total = partial if branch is None else arguments["total"].view(partial.shape)
    return total, arguments["y"].view(partial.shape), arguments["stats"]


def merge_backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, mixed: Tensor, weight: Tensor, scale: float,
    norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of :func:`merge_forward`.

    Args:
        grad_y: ``[..., D]``.
        grad_total: ``[..., D]``, the gradient that reaches the total from its later readers, or None.
        total: ``[..., D]`` as returned, like ``stats``; the other arguments are those of the forward.

    Returns:
        The gradients of the total (which are those of partial and branch; ``grad_total`` is included) and of ``mixed`` in
        storage dtype, of ``lse`` ``[T]``, of ``weight`` ``[D]``, and of the norm's weight and bias ``[D]``, None where there
        is none; all but the first two are float32.
    """
    arguments = _backward_arguments(grad_y, grad_total, total, mixed, weight, scale, norm, norm_weight, norm_bias, stats)
    tokens, D = arguments["grad"].shape
    kinds = 1 + (arguments["norm_weight"] is not None) + (arguments["norm_bias"] is not None)

    def launch(config: Config) -> list[Tensor]:
        constants = _constants(D, norm, config, backward=True)
        programs = num_programs(triton.cdiv(tokens, config.tokens), total.device, config.programs)
        sums = torch.empty(kinds, programs, D, dtype=torch.float32, device=total.device)
        kernels.backward[(programs,)](
            **arguments, sums=sums, **constants, num_warps=config.num_warps, num_stages=config.num_stages
        )
        return [partial.sum(0) for partial in sums]  # apart: an operator's outputs may not share memory

    if tokens:
        sums = _run("merge_backward", norm, arguments, _backward_configs(D, total.dtype, norm, lanes_of(total.device)), launch)
    else:
        sums = [torch.zeros(D, dtype=torch.float32, device=total.device) for _ in range(kinds)]
    grad_norm_weight = sums[1] if arguments["norm_weight"] is not None else None
    grad_norm_bias = sums[-1] if arguments["norm_bias"] is not None else None
    grad, grad_mixed = arguments["grad"].view(total.shape), arguments["grad_mixed"].view(total.shape)
    return grad, grad_mixed, arguments["grad_lse"], sums[0], grad_norm_weight, grad_norm_bias


def variants(D: int, dtype: torch.dtype, lanes: int = 32) -> list[Variant]:
    """Every kernel that may be launched at a width, with all that it can fuse, to be compiled without a GPU.

    Args:
        D: features.
        dtype: the storage dtype.
        lanes: threads of a warp: 32 for NVIDIA, 64 for AMD's gfx9.

    Returns:
        A name, the kernel, the types of its run-time arguments, its constants and the configuration, of each.
    """
    x = torch.empty(1, D, dtype=dtype, device="meta")
    feature = x[0]
    single = torch.empty(1, D, dtype=torch.float32, device="meta")
    found = []
    for norm in STATISTICS:
        forward = _forward_arguments(x, x, x, single[:, 0], single[0], 0.0, 0.0, norm, feature, feature, 0.0)
        backward = _backward_arguments(x, x, x, x, single[0], 0.0, norm, feature, feature, single) | {"sums": single}
        for kernel, arguments, configs in (
            (kernels.forward, forward, _forward_configs(D, dtype, lanes)),
            (kernels.backward, backward, _backward_configs(D, dtype, norm, lanes)),
        ):
            for config in configs:
                name = f"merge_{kernel.__name__}-{norm or 'none'}-{config.num_warps}x{config.tokens}x{config.width}"
                types = {key: _type(value) for key, value in arguments.items() if value is not None}
                absent = {key: None for key, value in arguments.items() if value is None}
                constants = _constants(D, norm, config, backward=kernel is kernels.backward) | absent
                found.append((name, kernel, types, constants, config))
    return found


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"
