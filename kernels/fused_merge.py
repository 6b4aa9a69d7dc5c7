"""Triton kernels of one merge: add a sublayer's output to the stream, mix with the earlier blocks, normalise.

Forward and backward pass once over the rows. A program holds ``tokens`` rows of D features as chunks of ``width``
features: as many elements as its threads load in one 128-bit load each. D is padded to a multiple of the width, not to a
power of two.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# (kernels have no types, and their tuples grow)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnres_compile.kernels.launch import ALIGNMENT, Config, num_programs, rows, tuned

STATISTICS = {"": 3, "rms": 4, "layer": 5}  # rows of the statistics, by norm
FEW_TOKENS = 1024
LANES = 64 if torch.version.hip else 32  # threads of a warp


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _mask(row, column, tokens, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Which elements of a chunk exist; None where all do."""
    if D % WIDTH == 0:
        mask = None if TOKENS == 1 else (row < tokens)[:, None]
    else:
        mask = (column < D)[None, :]
        if TOKENS > 1:
            mask = mask & (row < tokens)[:, None]
    return mask


@triton.jit
def _load(
    pointer, start: tl.constexpr, row, tokens, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr
):
    """A chunk of rows of ``[T, D]``: features from ``start`` on, as ``[TOKENS, WIDTH]`` in storage dtype."""
    column = start + tl.arange(0, WIDTH)
    offset = row.to(tl.int64)[:, None] * D + column[None, :]
    mask = _mask(row, column, tokens, D, TOKENS, WIDTH)
    POLICY: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if mask is None:
        chunk = tl.load(pointer + offset, eviction_policy=POLICY)
    else:
        chunk = tl.load(pointer + offset, mask=mask, other=0.0, eviction_policy=POLICY)
    return chunk


@triton.jit
def _load_all(pointer, row, tokens, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr):
    """Whole rows, as a tuple of chunks."""
    chunks = ()
    for start in tl.static_range(0, D, WIDTH):
        chunks += (_load(pointer, start, row, tokens, D, TOKENS, WIDTH, KEEP),)
    return chunks


@triton.jit
def _store(pointer, chunk, start: tl.constexpr, row, tokens, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of :func:`_load`, which rounds to the storage dtype."""
    column = start + tl.arange(0, WIDTH)
    offset = row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(pointer + offset, chunk.to(pointer.dtype.element_ty), mask=_mask(row, column, tokens, D, TOKENS, WIDTH))


@triton.jit
def _features(pointer, start: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """A chunk of a parameter ``[D]`` in float32, the same for every row.

    Every row loads it again: it stays in the first-level cache, whereas registers are what limits these kernels.
    """
    # In the shape of rows: a chunk ``[1, WIDTH]`` would get a layout of its own and be exchanged between threads.
    column = tl.broadcast_to((start + tl.arange(0, WIDTH))[None, :], [TOKENS, WIDTH])
    if D % WIDTH == 0:
        chunk = tl.load(pointer + column, eviction_policy="evict_last")
    else:
        chunk = tl.load(pointer + column, mask=column < D, other=0.0, eviction_policy="evict_last")
    return chunk.to(tl.float32)


# `tokens` changes from batch to batch, and `lse` is a row of [S, T] that begins anywhere: neither compiles anew.
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["lse"])
def _forward(
    partial, branch, mixed, lse, weight, norm_weight, norm_bias,
    total, y, stats,
    tokens, eps, scale, norm_eps,
    D: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    present = row < tokens
    # All loads stand before the first store, as none is moved across one: that many bytes are in flight.
    all_p = _load_all(partial, row, tokens, D, TOKENS, WIDTH, False)
    if branch is not None:
        all_f = _load_all(branch, row, tokens, D, TOKENS, WIDTH, False)
    all_o = _load_all(mixed, row, tokens, D, TOKENS, WIDTH, False)
    earlier = tl.load(lse + row, mask=present, other=0.0)

    squares = tl.zeros([TOKENS, WIDTH], tl.float32)
    products = tl.zeros([TOKENS, WIDTH], tl.float32)
    sums_x = tl.zeros([TOKENS, WIDTH], tl.float32)
    sums_o = tl.zeros([TOKENS, WIDTH], tl.float32)
    all_x = ()
    for start in tl.static_range(0, D, WIDTH):
        stored = all_p[start // WIDTH]
        if branch is not None:
            # Rounded before it is scored: every other reader of the total sees the rounded value.
            stored = (stored.to(tl.float32) + all_f[start // WIDTH].to(tl.float32)).to(total.dtype.element_ty)
            _store(total, stored, start, row, tokens, D, TOKENS, WIDTH)
        all_x += (stored,)
        x = stored.to(tl.float32)
        squares += x * x
        products += x * _features(weight, start, D, TOKENS, WIDTH)
        if NORM == "layer":
            sums_x += x
            sums_o += all_o[start // WIDTH].to(tl.float32)
    if NORM == "layer":
        square, product, sum_x, sum_o = tl.reduce((squares, products, sums_x, sums_o), 1, _add4)
    else:
        square, product = tl.reduce((squares, products), 1, _add2)
    inverse_rms = tl.rsqrt(square / D + eps)
    score = product * inverse_rms
    m = tl.sigmoid(score - earlier)
    tl.store(stats + row, m, mask=present)
    tl.store(stats + tokens + row, score, mask=present)
    tl.store(stats + 2 * tokens + row, inverse_rms, mask=present)

    if NORM == "layer":
        mean = scale * (sum_o + m * (sum_x - sum_o)) / D
        tl.store(stats + 3 * tokens + row, mean, mask=present)
    squares = tl.zeros([TOKENS, WIDTH], tl.float32)
    all_h = ()
    for start in tl.static_range(0, D, WIDTH):
        o = all_o[start // WIDTH].to(tl.float32)
        h = scale * (o + m[:, None] * (all_x[start // WIDTH].to(tl.float32) - o))
        if NORM == "layer":
            h = h - mean[:, None]
            if start + WIDTH > D:
                h = tl.where((start + tl.arange(0, WIDTH) < D)[None, :], h, 0.0)
        squares += h * h
        all_h += (h,)
    if NORM != "":
        inverse = tl.rsqrt(tl.sum(squares, 1) / D + norm_eps)
        tl.store(stats + (4 if NORM == "layer" else 3) * tokens + row, inverse, mask=present)
    for start in tl.static_range(0, D, WIDTH):
        h = all_h[start // WIDTH]
        if NORM != "":
            h = h * inverse[:, None]
        if norm_weight is not None:
            h = h * _features(norm_weight, start, D, TOKENS, WIDTH)
        if norm_bias is not None:
            h = h + _features(norm_bias, start, D, TOKENS, WIDTH)
        _store(y, h, start, row, tokens, D, TOKENS, WIDTH)


@triton.jit
def _zeros(D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(0, D, WIDTH):
        chunks += (tl.zeros([TOKENS, WIDTH], tl.float32),)
    return chunks


@triton.jit
def _store_sums(sums, chunks, kind: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """This program's row of ``sums`` ``[kinds, programs, D]``."""
    row = (kind * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * D
    for start in tl.static_range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)
        tl.store(sums + row + column, tl.sum(chunks[start // WIDTH], 0), mask=column < D)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    grad_y, grad_total, total, mixed, weight, norm_weight, norm_bias, stats,
    grad, grad_mixed, grad_lse, sums,
    tokens, scale,
    D: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, REREAD: tl.constexpr,
):  # fmt: skip
    # Sums over this program's rows, which give the gradients of the parameters.
    dw = _zeros(D, TOKENS, WIDTH)
    if norm_weight is not None:
        dg = _zeros(D, TOKENS, WIDTH)
    if norm_bias is not None:
        db = _zeros(D, TOKENS, WIDTH)
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.num_programs(0)):
        row = tile * TOKENS + tl.arange(0, TOKENS)
        present = row < tokens
        all_d = _load_all(grad_y, row, tokens, D, TOKENS, WIDTH, REREAD)
        all_x = _load_all(total, row, tokens, D, TOKENS, WIDTH, REREAD)
        all_o = _load_all(mixed, row, tokens, D, TOKENS, WIDTH, REREAD)
        if grad_total is not None:
            incoming = _load_all(grad_total, row, tokens, D, TOKENS, WIDTH, False)
        m = tl.load(stats + row, mask=present, other=0.0)
        score = tl.load(stats + tokens + row, mask=present, other=0.0)
        inverse_rms = tl.load(stats + 2 * tokens + row, mask=present, other=0.0)
        if NORM == "rms":
            inverse = tl.load(stats + 3 * tokens + row, mask=present, other=0.0)
        if NORM == "layer":
            mean = tl.load(stats + 3 * tokens + row, mask=present, other=0.0)
            inverse = tl.load(stats + 4 * tokens + row, mask=present, other=0.0)

        # With e = x - o, z the normalised mixture and d the gradient of z, everything that a row needs is linear in the
        # sums of d e, d z, z e, d and e: one reduction. Padding adds nothing, as d and e are zero there.
        sums_de = tl.zeros([TOKENS, WIDTH], tl.float32)
        sums_dz = tl.zeros([TOKENS, WIDTH], tl.float32)
        sums_ze = tl.zeros([TOKENS, WIDTH], tl.float32)
        sums_d = tl.zeros([TOKENS, WIDTH], tl.float32)
        sums_e = tl.zeros([TOKENS, WIDTH], tl.float32)
        next_dg = ()
        next_db = ()
        for start in tl.static_range(0, D, WIDTH):
            d = all_d[start // WIDTH].to(tl.float32)
            o = all_o[start // WIDTH].to(tl.float32)
            e = all_x[start // WIDTH].to(tl.float32) - o
            if norm_bias is not None:
                next_db += (db[start // WIDTH] + d,)
            if NORM != "":
                z = scale * (o + m[:, None] * e)
                if NORM == "layer":
                    z = z - mean[:, None]
                z = z * inverse[:, None]
                if norm_weight is not None:
                    next_dg += (dg[start // WIDTH] + d * z,)
                    d = d * _features(norm_weight, start, D, TOKENS, WIDTH)
                sums_dz += d * z
                sums_ze += z * e
                if NORM == "layer":
                    sums_d += d
                    sums_e += e
            sums_de += d * e
        if norm_weight is not None:
            dg = next_dg
        if norm_bias is not None:
            db = next_db
        # `toward` is the gradient of m.
        if NORM == "rms":
            sum_dz, sum_de, sum_ze = tl.reduce((sums_dz, sums_de, sums_ze), 1, _add3)
            mean_dz = sum_dz / D
            toward = scale * inverse * (sum_de - mean_dz * sum_ze)
        elif NORM == "layer":
            sum_dz, sum_de, sum_ze, sum_d, sum_e = tl.reduce((sums_dz, sums_de, sums_ze, sums_d, sums_e), 1, _add5)
            mean_dz = sum_dz / D
            mean_d = sum_d / D
            toward = scale * inverse * (sum_de - mean_dz * sum_ze - mean_d * sum_e)
        else:
            toward = scale * tl.sum(sums_de, 1)
        d_score = m * (1.0 - m) * toward
        tl.store(grad_lse + row, -d_score, mask=present)
        along_w = d_score * inverse_rms
        along_x = d_score * score * inverse_rms * inverse_rms / D

        next_dw = ()
        for start in tl.static_range(0, D, WIDTH):
            if REREAD:
                d = _load(grad_y, start, row, tokens, D, TOKENS, WIDTH, False).to(tl.float32)
                x = _load(total, start, row, tokens, D, TOKENS, WIDTH, False).to(tl.float32)
                o = _load(mixed, start, row, tokens, D, TOKENS, WIDTH, False).to(tl.float32)
            else:
                d = all_d[start // WIDTH].to(tl.float32)
                x = all_x[start // WIDTH].to(tl.float32)
                o = all_o[start // WIDTH].to(tl.float32)
            if norm_weight is not None:
                d = d * _features(norm_weight, start, D, TOKENS, WIDTH)
            if NORM != "":
                z = scale * (o + m[:, None] * (x - o))
                if NORM == "layer":
                    z = z - mean[:, None]
                    d = d - mean_d[:, None]
                d = (d - z * (inverse * mean_dz)[:, None]) * inverse[:, None]
            d = scale * d
            _store(grad_mixed, (1.0 - m)[:, None] * d, start, row, tokens, D, TOKENS, WIDTH)
            dx = m[:, None] * d + along_w[:, None] * _features(weight, start, D, TOKENS, WIDTH) - along_x[:, None] * x
            if grad_total is not None:
                dx += incoming[start // WIDTH].to(tl.float32)
            _store(grad, dx, start, row, tokens, D, TOKENS, WIDTH)
            next_dw += (dw[start // WIDTH] + along_w[:, None] * x,)
        dw = next_dw
    _store_sums(sums, dw, 0, D, WIDTH)
    if norm_weight is not None:
        _store_sums(sums, dg, 1, D, WIDTH)
    if norm_bias is not None:
        _store_sums(sums, db, 1 if norm_weight is None else 2, D, WIDTH)


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
    return triton.cdiv(D, width) * vector


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
    """The arguments of :func:`_forward`, outputs included."""
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
    """The arguments of :func:`_backward`, outputs included but for the sums, whose size depends on the launch."""
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
    ``m = sigmoid(s - lse)`` the read is ``h = scale (mixed + m (total - mixed))``, online softmax over one more source
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
        total (``partial`` itself without a branch), y, and statistics ``[3 + k, T]`` float32: m, s, r, then the inverse rms
        of h (k = 1) or its mean and inverse standard deviation (k = 2).
    """
    arguments = _forward_arguments(partial, branch, mixed, lse, weight, eps, scale, norm, norm_weight, norm_bias, norm_eps)
    tokens, D = arguments["y"].shape

    def launch(config: Config) -> None:
        constants = _constants(D, norm, config, backward=False)
        grid = (triton.cdiv(tokens, config.tokens),)
        _forward[grid](**arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages)

    if tokens:
        _run("merge_forward", norm, arguments, _forward_configs(D, partial.dtype, LANES), launch)
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
        _backward[(programs,)](**arguments, sums=sums, **constants, num_warps=config.num_warps, num_stages=config.num_stages)
        return [partial.sum(0) for partial in sums]  # apart: an operator's outputs may not share memory

    if tokens:
        sums = _run("merge_backward", norm, arguments, _backward_configs(D, total.dtype, norm, LANES), launch)
    else:
        sums = [torch.zeros(D, dtype=torch.float32, device=total.device) for _ in range(kinds)]
    grad_norm_weight = sums[1] if arguments["norm_weight"] is not None else None
    grad_norm_bias = sums[-1] if arguments["norm_bias"] is not None else None
    grad, grad_mixed = arguments["grad"].view(total.shape), arguments["grad_mixed"].view(total.shape)
    return grad, grad_mixed, arguments["grad_lse"], sums[0], grad_norm_weight, grad_norm_bias


TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def variants(D: int, dtype: torch.dtype, lanes: int = 32) -> list[tuple[str, Any, dict[str, str], dict[str, Any], Config]]:
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
            (_forward, forward, _forward_configs(D, dtype, lanes)),
            (_backward, backward, _backward_configs(D, dtype, norm, lanes)),
        ):
            for config in configs:
                name = f"merge{kernel.__name__}-{norm or 'none'}-{config.num_warps}x{config.tokens}x{config.width}"
                types = {key: _type(value) for key, value in arguments.items() if value is not None}
                absent = {key: None for key, value in arguments.items() if value is None}
                constants = _constants(D, norm, config, backward=kernel is _backward) | absent
                found.append((name, kernel, types, constants, config))
    return found


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"
