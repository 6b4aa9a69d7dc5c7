"""The backward of phase 1 of Block AttnRes; :mod:`attnres_compile.kernels.fused_inter` says how both are laid out.

One kernel writes the gradients of the sources and leaves one coefficient for each query, source and token. The gradient of
the weights is their product with the sources, in a second kernel with a slice of the features per program, because its sum
goes over the tokens: sums of ``S * D`` numbers fit no program that has all features of a token.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnres_compile.kernels.fused_inter import (
    DTYPES,
    SOURCES,
    UNSPECIALIZED,
    WIDE,
    constants,
    grid,
    pick,
    pointers,
    power_of_two,
    product,
    signature,
    split,
    split_weights,
    tile_constants,
)
from attnres_compile.kernels.launch import Config, Variant, addresses, lanes_of, num_programs, rows, tuned

PROGRAMS = 4  # of the weight gradient, on each multiprocessor: enough to hide the latency of their loads


@triton.jit
def _softmax_tile(
    table, lse, scores, n, S, T, first, token,
    dtype: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    SLICES: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of 16 sources: softmax weights, scores and the products of gradient and source, all [TOKENS, QUERIES, SOURCES]."""
    DEPTH: tl.constexpr = WIDTH // SLICES
    s = tl.arange(0, QUERIES)
    i = first + tl.arange(0, SOURCES)
    batch = tl.arange(0, TOKENS * SLICES)
    t = token + batch // SLICES
    grad = pointers(table + n, s, s < S, dtype)[None, :] + (t * D)[:, None]
    source = pointers(table, i, i < n, dtype)[None, :] + (t * D)[:, None]
    columns = (batch % SLICES * DEPTH)[:, None] + tl.arange(0, DEPTH)[None, :]
    toward = tl.zeros([TOKENS * SLICES, QUERIES, SOURCES], tl.float32)
    for k in tl.range(0, D, WIDTH, num_stages=STAGES):
        c = (k + columns)[:, None, :]
        there = (t < T)[:, None, None] & (c < D)
        d = tl.load(grad[:, :, None] + c, mask=(s < S)[None, :, None] & there, other=0.0, eviction_policy="evict_last")
        v = tl.load(source[:, :, None] + c, mask=(i < n)[None, :, None] & there, other=0.0, eviction_policy="evict_last")
        toward = tl.dot(d, tl.permute(v, (0, 2, 1)), toward, input_precision=PRECISION)
    toward = tl.sum(tl.reshape(toward, [TOKENS, SLICES, QUERIES, SOURCES]), 1)
    t = token + tl.arange(0, TOKENS)
    of_query = (t < T)[:, None] & (s < S)[None, :]
    z = tl.load(
        scores + (s[None, :, None] * n + i[None, None, :]).to(tl.int64) * T + t[:, None, None],
        mask=of_query[:, :, None] & (i < n)[None, None, :],
        other=float("-inf"),
    )
    level = tl.load(lse + s[None, :].to(tl.int64) * T + t[:, None], mask=of_query, other=0.0)
    return tl.exp(z - level[:, :, None]), z, toward


@triton.jit
def _gradient_tile(
    table, halves, factors, grad_lse, inverse_rms, coefficients, n, S, T, first, token, w, z, toward, expected,
    D: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of 16 sources and their coefficients. ``expected`` is the mean of ``toward`` under the softmax."""
    dtype: tl.constexpr = halves.dtype.element_ty
    s = tl.arange(0, QUERIES)
    i = first + tl.arange(0, SOURCES)
    t = token + tl.arange(0, TOKENS)
    of_source = (t < T)[:, None] & (i < n)[None, :]
    at = s[None, :].to(tl.int64) * T + t[:, None]
    level = tl.load(grad_lse + at, mask=(t < T)[:, None] & (s < S)[None, :], other=0.0)
    r = tl.load(inverse_rms + i[None, :].to(tl.int64) * T + t[:, None], mask=of_source, other=0.0)
    ds = w * (toward + (level - expected)[:, :, None])
    shrink = tl.sum(ds * tl.where(w > 0.0, z, 0.0), 1) * r * r / D
    ds *= r[:, None, :]
    at = (i.to(tl.int64)[None, None, :] * T + t[:, None, None]) * QUERIES + s[None, :, None]
    tl.store(coefficients + at, ds, mask=of_source[:, None, :])
    if factors is not None:
        ds *= tl.load(factors + s, mask=s < S, other=0.0)[None, :, None]
    operands = ()
    for j in tl.static_range(TOKENS):
        of_w = tl.trans(pick(w, j, TOKENS))
        of_ds = tl.trans(pick(ds, j, TOKENS))
        up = tl.full([SOURCES], 1.0, tl.float32)
        if dtype == tl.float16:
            # Gradients may be of any magnitude: each row is scaled into the middle of float16's range.
            down, up = power_of_two(tl.maximum(tl.max(of_w, 1), tl.max(tl.abs(of_ds), 1)))
            of_w *= (down * 2.0**13)[:, None]
            of_ds *= (down * 2.0**13)[:, None]
            up *= 2.0**-13
        operand = (split(of_w, dtype), split(of_ds, dtype), pick(shrink, j, TOKENS), up)
        operands = operands + (operand,)  # noqa: RUF005, Triton can't unpack
    grad = pointers(table + n, s, s < S, dtype) + token * D
    source = pointers(table, i, i < n, dtype) + token * D
    # The gradient that a source has from elsewhere is missing where its address is zero.
    given = tl.load(table + n + S + i, mask=i < n, other=0) != 0
    incoming = pointers(table + n + S, i, i < n, dtype) + token * D
    output = pointers(table + n + S + n, i, i < n, dtype) + token * D
    LAST: tl.constexpr = (D - 1) // WIDTH * WIDTH
    for k in tl.range(0, D, WIDTH, num_stages=STAGES):
        c = (LAST - k + tl.arange(0, WIDTH))[None, :]
        weight = halves + s[:, None] * D + c
        high = tl.load(weight, mask=(s < S)[:, None] & (c < D), other=0.0, eviction_policy="evict_last")
        if dtype != tl.float32:
            low = tl.load(weight + S * D, mask=(s < S)[:, None] & (c < D), other=0.0, eviction_policy="evict_last")
        for j in tl.static_range(TOKENS):
            there = (token + j < T) & (c < D)
            row = j * D + c
            d = tl.load(grad[:, None] + row, mask=(s < S)[:, None] & there, other=0.0, eviction_policy="evict_first")
            there = (i < n)[:, None] & there
            v = tl.load(source[:, None] + row, mask=there, other=0.0, eviction_policy="evict_first")
            e = tl.load(incoming[:, None] + row, mask=there & given[:, None], other=0.0, eviction_policy="evict_first")
            weights, slopes, shrink_j, unscale = operands[j]
            x = product(weights[0], weights[1], d, tl.zeros([SOURCES, WIDTH], tl.float32), PRECISION)
            x = product(slopes[0], slopes[1], high, x, PRECISION)
            if dtype != tl.float32:
                x = tl.dot(slopes[0], low, x)
            if dtype == tl.float16:
                x *= unscale[:, None]
            x += e.to(tl.float32) - shrink_j[:, None] * v.to(tl.float32)
            tl.store(output[:, None] + row, x.to(dtype), mask=there, eviction_policy="evict_first")


@triton.jit
def _tile(
    table, halves, factors, lse, grad_lse, scores, inverse_rms, coefficients, n, S, T, token,
    D: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr,
    SLICES: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """All that :func:`_source_gradients` does for the tokens from one on."""
    dtype: tl.constexpr = halves.dtype.element_ty
    if MANY:
        expected = tl.zeros([TOKENS, QUERIES], tl.float32)
        for first in range(0, n, SOURCES):
            w, z, toward = _softmax_tile(
                table, lse, scores, n, S, T, first, token, dtype, D, QUERIES, TOKENS, WIDTH, SLICES, STAGES, PRECISION
            )
            expected += tl.sum(w * toward, 2)
        for first in range(0, n, SOURCES):
            w, z, toward = _softmax_tile(
                table, lse, scores, n, S, T, first, token, dtype, D, QUERIES, TOKENS, WIDTH, SLICES, STAGES, PRECISION
            )
            _gradient_tile(
                table, halves, factors, grad_lse, inverse_rms, coefficients, n, S, T, first, token, w, z, toward, expected,
                D, QUERIES, TOKENS, NARROW, STAGES, PRECISION,
            )  # fmt: skip
    else:
        w, z, toward = _softmax_tile(
            table, lse, scores, n, S, T, 0, token, dtype, D, QUERIES, TOKENS, WIDTH, SLICES, STAGES, PRECISION
        )
        _gradient_tile(
            table, halves, factors, grad_lse, inverse_rms, coefficients, n, S, T, 0, token, w, z, toward,
            tl.sum(w * toward, 2), D, QUERIES, TOKENS, NARROW, STAGES, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _source_gradients(
    table, halves, factors, lse, grad_lse, scores, inverse_rms, coefficients, n, S, T,
    D: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, NARROW: tl.constexpr,
    SLICES: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, LOOP: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """``dv_i = sum_s w_si do_s + sum_s ds_si r_i W_s - (sum_s ds_si score_si) r_i^2 / D v_i`` and what comes in.

    With MANY, more than 16 sources: the means under the softmax are summed up in a sweep of their own.

    table: addresses of n sources, S gradients of the mixtures, n incoming gradients (0: none), n outputs.
    coefficients [n, T, QUERIES]: ``ds_si r_i``.
    """
    if LOOP:
        for tile in tl.range(tl.program_id(0), tl.cdiv(T, TOKENS), tl.num_programs(0), disable_licm=True):
            _tile(
                table, halves, factors, lse, grad_lse, scores, inverse_rms, coefficients, n, S, T,
                tile * tl.full([], TOKENS, tl.int64), D, QUERIES, TOKENS, WIDTH, NARROW, SLICES, STAGES, PRECISION, MANY,
            )  # fmt: skip
    else:
        _tile(
            table, halves, factors, lse, grad_lse, scores, inverse_rms, coefficients, n, S, T,
            tl.program_id(0).to(tl.int64) * TOKENS, D, QUERIES, TOKENS, WIDTH, NARROW, SLICES, STAGES, PRECISION, MANY,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "groups", "share"])
def _weight_gradients(
    table, coefficients, partial, n, S, T, groups, share,
    dtype: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """partial [programs, S, D]: ``sum_i sum_t coefficients_ist v_it`` over every groups-th source and a share of the tokens."""
    program = tl.program_id(1)
    c = (tl.program_id(0) * WIDTH + tl.arange(0, WIDTH))[None, :]
    s = tl.arange(0, QUERIES)
    begin = (program // groups).to(tl.int64) * share
    end = tl.minimum(begin + share, T)
    total = tl.zeros([QUERIES, WIDTH], tl.float32)
    for i in range(program % groups, n, groups):
        source = tl.multiple_of(tl.load(table + i).to(tl.pointer_type(dtype)), 16)
        for first in tl.range(begin, end, TOKENS, num_stages=STAGES):
            t = first + tl.arange(0, TOKENS)
            v = tl.load(source + t[:, None] * D + c, mask=(t < end)[:, None] & (c < D), other=0.0)
            at = (i * T.to(tl.int64) + t[None, :]) * QUERIES + s[:, None]
            q = tl.load(coefficients + at, mask=(t < end)[None, :], other=0.0)
            if dtype == tl.float16:
                down, up = power_of_two(tl.max(tl.abs(q), 1))
                high, low = split(q * down[:, None], dtype)
                total += product(high, low, v, tl.zeros([QUERIES, WIDTH], tl.float32), PRECISION) * up[:, None]
            else:
                high, low = split(q, dtype)
                total = product(high, low, v, total, PRECISION)
    at = (program.to(tl.int64) * S + s[:, None]) * D + c
    tl.store(partial + at, total, mask=(s < S)[:, None] & (c < D))


# ---------------------------------------------------------------------------------------------------------------- host


def _candidates(D: int, S: int, dtype: torch.dtype, lanes: int) -> list[Config]:
    """As those of the forward. Tokens have S more rows here that must stay in L2, so there are fewer of them in flight."""
    if dtype == torch.float32 or S > 32 or D % 8 != 0:  # twice the bytes, twice the queries, or loads of single numbers
        return [Config(num_warps=4, num_stages=2, tokens=1, width=128)]
    if lanes == 64:
        return [Config(num_warps=4, num_stages=2, tokens=tokens, width=256) for tokens in (1, 2)]
    one = Config(num_warps=4, num_stages=3, tokens=1, width=256)
    long = Config(num_warps=8, num_stages=2, tokens=1, width=512)
    if D < WIDE:
        return [Config(num_warps=8, num_stages=2, tokens=2, width=256), one if S <= 16 else long]
    # The scaling of float16 takes registers, and 32 queries take shared memory.
    alone = replace(long, num_stages=3, width=512 if S <= 16 and dtype == torch.bfloat16 else 256, programs=1)
    return [alone, replace(one, programs=2), one] if S <= 16 else [alone, long]


def _source_constants(D: int, S: int, config: Config, lanes: int, many: bool) -> dict[str, Any]:
    common = tile_constants(D, S, config, lanes)
    return common | {"NARROW": common["WIDTH"] // 2, "MANY": many}  # the second sweep has twice as many blocks in flight


def _weight_config(dtype: torch.dtype, S: int) -> Config:
    narrow = dtype == torch.float32 or S > 32
    return Config(num_warps=4, num_stages=3, tokens=32, width=64 if narrow else 128)


def _weight_constants(D: int, S: int, dtype: torch.dtype, config: Config, lanes: int) -> dict[str, Any]:
    return constants(D, S, config, lanes) | {"TOKENS": config.tokens, "dtype": DTYPES[dtype]}


def inter_backward(
    grad_mixed: Sequence[Tensor],
    grad_lse: Tensor,
    grad_sources: Sequence[Tensor | None],
    sources: Sequence[Tensor],
    weights: Tensor,
    lse: Tensor,
    scores: Tensor,
    inverse_rms: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of :func:`attnres_compile.kernels.fused_inter.inter_forward`.

    Args:
        grad_mixed: S gradients of the mixtures, ``[..., D]`` in the dtype of the sources; of the source where n is 1.
        grad_lse: float32 ``[S, T]``, the gradient of the log-sum-exp.
        grad_sources: for each source a gradient that it has from elsewhere, or None; added here, once.
        sources: the n sources ``[..., D]``.
        weights: float32 ``[S, D]``.
        lse: what the forward returned, as ``scores`` and ``inverse_rms``.

    Returns:
        The n gradients of the sources, ``[..., D]`` in their dtype, and that of the weights, float32 ``[S, D]``.
    """
    matrices = [rows(source) for source in sources]
    n, (S, D), (T, _), dtype = len(sources), weights.shape, matrices[0].shape, sources[0].dtype
    grads = [torch.empty(source.shape, dtype=dtype, device=source.device) for source in sources]
    if T == 0:
        return grads, torch.zeros_like(weights)
    # An empty tensor has the address 0.
    incoming = [weights.new_empty(0) if grad is None else rows(grad) for grad in grad_sources]
    upstream = [rows(grad) for grad in grad_mixed]
    table = addresses([*matrices, *upstream, *incoming, *grads])
    halves, factors = split_weights(weights, dtype)
    lanes = lanes_of(weights.device)
    coefficients = weights.new_empty(n, T, constants(D, S, _weight_config(dtype, S), lanes)["QUERIES"])
    statistics = [statistic.contiguous() for statistic in (lse, grad_lse, scores, inverse_rms)]

    def launch(config: Config) -> None:
        _source_gradients[grid(T, config, weights.device)](
            table, halves, factors, *statistics, coefficients, n, S, T,
            **_source_constants(D, S, config, lanes, n > SOURCES.value),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    launch(tuned("inter_backward", (D, dtype, S, n, T.bit_length()), _candidates(D, S, dtype, lanes), launch))
    return grads, _weight_gradient(table, coefficients, n, S, T, D, dtype, lanes)


def _weight_gradient(
    table: Tensor, coefficients: Tensor, n: int, S: int, T: int, D: int, dtype: torch.dtype, lanes: int
) -> Tensor:
    config = _weight_config(dtype, S)
    compiled = _weight_constants(D, S, dtype, config, lanes)
    slices = triton.cdiv(D, compiled["WIDTH"])
    groups = min(n, SOURCES.value)
    tiles = triton.cdiv(T, config.tokens)
    parts = max(1, num_programs(tiles * slices * groups, coefficients.device, PROGRAMS) // (slices * groups))
    share = triton.cdiv(tiles, parts) * config.tokens
    partial = coefficients.new_empty(triton.cdiv(T, share) * groups, S, D)
    _weight_gradients[(slices, len(partial))](
        table, coefficients, partial, n, S, T, groups, share, **compiled,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partial.sum(0)


def variants(D: int, dtype: torch.dtype, lanes: int = 32) -> list[Variant]:
    """See :func:`attnres_compile.kernels.fused_inter.variants`."""
    found: list[Variant] = []
    for S in (8, 16, 24):
        for config in _candidates(D, S, dtype, lanes):
            values = _source_constants(D, S, config, lanes, many=False)
            found.append((f"inter_backward S={S}", _source_gradients, *signature(_source_gradients, values, dtype), config))
        config = _weight_config(dtype, S)
        values = _weight_constants(D, S, dtype, config, lanes)
        found.append((f"inter_weights S={S}", _weight_gradients, *signature(_weight_gradients, values, dtype), config))
    return found
