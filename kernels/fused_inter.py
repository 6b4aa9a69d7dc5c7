"""Phase 1 of Block AttnRes: every query of a block against the completed blocks, in one pass over them, and its backward.

Section "Two-phase computation" of arXiv 2603.15031. As plain multiply-adds this is bound by instructions, not by bytes, so
everything with a query in it is a product on tensor cores. Sources and gradients are exact operands there. The other operands
are float32 (weights, softmax weights, coefficients) and enter as two numbers of the storage dtype, high + low; float32 storage
takes products that keep float32's precision.

A program holds few tokens, at most 16 sources at a time, and sweeps over the features twice: first for the products that are
sums over the features (scores; gradient times source), then, backwards, for the rows that it writes. Each warp of the first
sweep has features of its own, and one sum over the warps ends it. Loops are pipelined by asynchronous copies, one or two blocks
ahead: at n = 8, S = 16 that is 8 KiB of rows for each program of the forward, of which three or four fit a multiprocessor, and
48 KiB for the backward's one. An H100 needs some 20 KiB under way on each (3.35 TB/s times 0.8 us, over 132).

What the second sweep reads again has to survive in L2, about half of it per token in flight: at D = 7168, n = 8, S = 16 that
is 57 KiB for the forward and 172 KiB for the backward, times tokens in flight, of 50 MiB. This asks for few tokens per
multiprocessor. The weights, ``4 S D`` bytes from L2 for every program, ask for many per program. Hence 1 to 4 of them, wide
rows with a limit on the programs, and a measurement decides. Going backwards makes the rows read last, still cached, the first
to be read again.
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

from attnres_compile.kernels.launch import TYPES, Config, Variant, addresses, lanes_of, num_programs, rows, tuned

SOURCES = tl.constexpr(16)  # in one tile: the least depth of a product on tensor cores
WIDE = 4096  # from here on, what the tokens in flight keep in L2 is worth a limit on the programs
MANY = Config(num_warps=4, num_stages=2, width=128)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# By the lanes of a warp: three TF32 products on NVIDIA, where float32 proper would be multiply-adds; AMD has matrix
# instructions for float32 itself.
PRECISIONS = {32: "tf32x3", 64: "ieee"}
UNSPECIALIZED = ["n", "S", "T"]  # one compiled kernel for all of them


# ---------------------------------------------------------------------------------------------------------- device code


@triton.jit
def pointers(table, i, there, dtype: tl.constexpr):
    """Where the rows begin; the tables hold addresses on 16-byte boundaries, which makes loads 128 bits wide."""
    return tl.multiple_of(tl.load(table + i, mask=there, other=0).to(tl.pointer_type(dtype)), 16)


@triton.jit
def power_of_two(largest):
    """The power of two that brings ``largest`` into [1, 2), and its inverse. Far from the ends of float32's range."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 32), 222)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(x, dtype: tl.constexpr):
    """float32 as high + low of a 16-bit dtype, to 2^-17 in bfloat16. Of float32 itself, high is all of it."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def product(high, low, exact, total, PRECISION: tl.constexpr):
    """``total + (high + low) @ exact``."""
    total = tl.dot(high, exact, total, input_precision=PRECISION)
    if exact.dtype != tl.float32:
        total = tl.dot(low, exact, total)
    return total


@triton.jit
def pick(x, j: tl.constexpr, TOKENS: tl.constexpr):
    """``x[j]`` of a block whose first dimension is the token."""
    token = tl.arange(0, TOKENS)
    for _ in tl.static_range(len(x.shape) - 1):
        token = tl.expand_dims(token, len(token.shape))
    return tl.sum(tl.where(token == j, x, 0.0), 0)


@triton.jit(do_not_specialize=["S"])
def _split_weights(weights, halves, factors, S, D: tl.constexpr, WIDTH: tl.constexpr):
    """halves [2, S, D] = high and low of the weights, each query scaled to magnitudes in [1, 2) by a power of two that
    factors [S] undo: float16 has neither the range of float32 nor, for the low half, the small numbers."""
    s = tl.program_id(0)
    largest = tl.zeros([WIDTH], tl.float32)
    for k in range(0, D, WIDTH):
        c = k + tl.arange(0, WIDTH)
        largest = tl.maximum(largest, tl.abs(tl.load(weights + s * D + c, mask=c < D, other=0.0)))
    down, up = power_of_two(tl.max(largest, 0))
    tl.store(factors + s, up)
    for k in range(0, D, WIDTH):
        c = k + tl.arange(0, WIDTH)
        high, low = split(tl.load(weights + s * D + c, mask=c < D, other=0.0) * down, halves.dtype.element_ty)
        tl.store(halves + s * D + c, high, mask=c < D)
        tl.store(halves + (S + s) * D + c, low, mask=c < D)


@triton.jit
def _score_tile(
    table, halves, factors, scores, inverse_rms, n, S, T, eps, first, token,
    D: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores the scores and inverse rms of 16 sources. Returns the scores, [TOKENS, SOURCES, QUERIES], -inf past the last."""
    dtype: tl.constexpr = halves.dtype.element_ty
    ROWS: tl.constexpr = TOKENS * SOURCES
    DEPTH: tl.constexpr = WIDTH // SLICES
    s = tl.arange(0, QUERIES)
    i = first + tl.arange(0, ROWS) % SOURCES
    t = token + tl.arange(0, ROWS) // SOURCES
    there = (i < n) & (t < T)
    source = pointers(table, i, there, dtype) + t * D
    columns = tl.arange(0, SLICES)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    score = tl.zeros([SLICES, ROWS, QUERIES], tl.float32)
    squares = tl.zeros([SLICES, ROWS], tl.float32)
    for k in tl.range(0, D, WIDTH, num_stages=STAGES):
        c = (k + columns)[:, None, :]
        v = tl.load(source[None, :, None] + c, mask=there[None, :, None] & (c < D), other=0.0, eviction_policy="evict_last")
        weight = halves + s[None, :, None] * D + c
        given = (s < S)[None, :, None] & (c < D)
        high = tl.load(weight, mask=given, other=0.0, eviction_policy="evict_last")
        score = tl.dot(v, tl.permute(high, (0, 2, 1)), score, input_precision=PRECISION)
        if dtype != tl.float32:
            low = tl.load(weight + S * D, mask=given, other=0.0, eviction_policy="evict_last")
            score = tl.dot(v, tl.permute(low, (0, 2, 1)), score)
        squares += tl.sum(v.to(tl.float32) * v.to(tl.float32), 2)
    r = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    z = tl.sum(score, 0) * r[:, None]
    if factors is not None:
        z *= tl.load(factors + s, mask=s < S, other=0.0)[None, :]
    tl.store(inverse_rms + i.to(tl.int64) * T + t, r, mask=there)
    at = (s[None, :] * n + i[:, None]).to(tl.int64) * T + t[:, None]
    tl.store(scores + at, z, mask=there[:, None] & (s < S)[None, :])
    return tl.reshape(tl.where((i < n)[:, None], z, float("-inf")), [TOKENS, SOURCES, QUERIES])


@triton.jit
def _tile(
    table, halves, factors, lse, scores, inverse_rms, n, S, T, eps, token,
    D: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    """All that :func:`_scores` does for the tokens from one on."""
    dtype: tl.constexpr = halves.dtype.element_ty
    s = tl.arange(0, QUERIES)
    t = token + tl.arange(0, TOKENS)
    top = tl.full([TOKENS, QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS, QUERIES], tl.float32)
    if MIX:
        z = _score_tile(
            table, halves, factors, scores, inverse_rms, n, S, T, eps, 0, token, D, QUERIES, TOKENS, WIDTH, SLICES,
            STAGES, PRECISION,
        )  # fmt: skip
        top = tl.max(z, 1)
        w = tl.exp(z - top[:, None, :])
        total = tl.sum(w, 1)
    else:
        for first in range(0, n, SOURCES):
            z = _score_tile(
                table, halves, factors, scores, inverse_rms, n, S, T, eps, first, token, D, QUERIES, TOKENS, WIDTH, SLICES,
                STAGES, PRECISION,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(z, 1))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None, :]), 1)
            top = higher
    at = s[None, :].to(tl.int64) * T + t[:, None]
    tl.store(lse + at, top + tl.log(total), mask=(t < T)[:, None] & (s < S)[None, :])
    if MIX:
        # float16 has small numbers only down to 2^-24, and weights are at most 1: scaled up, they keep their low half.
        SCALE: tl.constexpr = 2.0**14 if dtype == tl.float16 else 1.0
        w *= SCALE / total[:, None, :]
        operands = ()
        for j in tl.static_range(TOKENS):
            operands = operands + (split(tl.trans(pick(w, j, TOKENS)), dtype),)  # noqa: RUF005, Triton can't unpack
        i = tl.arange(0, SOURCES)
        source = pointers(table, i, i < n, dtype) + token * D
        output = pointers(table + n, s, s < S, dtype) + token * D
        LAST: tl.constexpr = (D - 1) // WIDTH * WIDTH
        for k in tl.range(0, D, WIDTH, num_stages=STAGES):
            c = (LAST - k + tl.arange(0, WIDTH))[None, :]
            for j in tl.static_range(TOKENS):
                there = (token + j < T) & (c < D)
                v = tl.load(source[:, None] + j * D + c, mask=(i < n)[:, None] & there, other=0.0, eviction_policy="evict_first")
                mixed = product(operands[j][0], operands[j][1], v, tl.zeros([QUERIES, WIDTH], tl.float32), PRECISION)
                to = output[:, None] + j * D + c
                tl.store(to, (mixed * (1.0 / SCALE)).to(dtype), mask=(s < S)[:, None] & there, eviction_policy="evict_first")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _scores(
    table, halves, factors, lse, scores, inverse_rms, n, S, T, eps,
    D: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, LOOP: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    """Scores, inverse rms and log-sum-exp of any number of sources; with MIX, for at most 16, the mixtures as well.

    table: addresses of the n sources and then of the S mixtures. Programs loop over tiles of TOKENS tokens.
    """
    if LOOP:
        # Without hoisting: what does not change would take the registers.
        for tile in tl.range(tl.program_id(0), tl.cdiv(T, TOKENS), tl.num_programs(0), disable_licm=True):
            _tile(
                table, halves, factors, lse, scores, inverse_rms, n, S, T, eps, tile * tl.full([], TOKENS, tl.int64),
                D, QUERIES, TOKENS, WIDTH, SLICES, STAGES, PRECISION, MIX,
            )  # fmt: skip
    else:
        _tile(
            table, halves, factors, lse, scores, inverse_rms, n, S, T, eps, tl.program_id(0).to(tl.int64) * TOKENS,
            D, QUERIES, TOKENS, WIDTH, SLICES, STAGES, PRECISION, MIX,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _mix_many(
    table, scores, lse, n, S, T,
    dtype: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The mixtures of any number of sources from their scores, 16 sources at a time."""
    SCALE: tl.constexpr = 2.0**14 if dtype == tl.float16 else 1.0
    t = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, QUERIES)
    level = tl.load(lse + s.to(tl.int64) * T + t, mask=s < S, other=0.0)
    output = pointers(table + n, s, s < S, dtype) + t * D
    for k in range(0, D, WIDTH):
        c = (k + tl.arange(0, WIDTH))[None, :]
        mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
        for first in tl.range(0, n, SOURCES, num_stages=STAGES):
            i = first + tl.arange(0, SOURCES)
            at = (s[:, None] * n + i[None, :]).to(tl.int64) * T + t
            z = tl.load(scores + at, mask=(s < S)[:, None] & (i < n)[None, :], other=float("-inf"))
            high, low = split(tl.exp(z - level[:, None]) * SCALE, dtype)
            source = pointers(table, i, i < n, dtype) + t * D
            v = tl.load(source[:, None] + c, mask=(i < n)[:, None] & (c < D), other=0.0)
            mixed = product(high, low, v, mixed, PRECISION)
        tl.store(output[:, None] + c, (mixed * (1.0 / SCALE)).to(dtype), mask=(s < S)[:, None] & (c < D))


# ---------------------------------------------------------------------------------------------------------------- host


def constants(D: int, S: int, config: Config, lanes: int) -> dict[str, Any]:
    """The compile-time arguments that all kernels of this phase share."""
    # No wider than the rows, and at least 16 features per warp.
    width = min(config.width, max(16 * config.num_warps, triton.next_power_of_2(D)))
    queries = max(16, triton.next_power_of_2(S))
    return {"D": D, "QUERIES": queries, "WIDTH": width, "STAGES": config.num_stages, "PRECISION": PRECISIONS[lanes]}


def tile_constants(D: int, S: int, config: Config, lanes: int) -> dict[str, Any]:
    """And those of the kernels whose programs hold all features of some tokens."""
    own = {"TOKENS": config.tokens, "SLICES": config.num_warps, "LOOP": config.programs > 0}
    return constants(D, S, config, lanes) | own


def grid(T: int, config: Config, device: torch.device) -> tuple[int]:
    """One program for each tile of tokens, or ``config.programs`` on each multiprocessor that loop over the tiles."""
    tiles = triton.cdiv(T, config.tokens)
    return (num_programs(tiles, device, config.programs) if config.programs else tiles,)


def split_weights(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weights ``[S, D]`` as the kernels take them: halves ``[2, S, D]`` and factors ``[S]``, or themselves for float32."""
    weights = weights.contiguous()
    if dtype == torch.float32:
        return weights, None
    S, D = weights.shape
    halves, factors = weights.new_empty(2, S, D, dtype=dtype), weights.new_empty(S)
    _split_weights[(S,)](weights, halves, factors, S, D=D, WIDTH=1024)
    return halves, factors


def _candidates(D: int, S: int, dtype: torch.dtype, lanes: int, mix: bool) -> list[Config]:
    """None spills, and all fit the smallest shared memory: 99 KiB on NVIDIA, 64 KiB on AMD, hence two stages there."""
    if dtype == torch.float32 or S > 32 or D % 8 != 0:  # twice the bytes, twice the queries, or loads of single numbers
        return [Config(num_warps=4, num_stages=2, tokens=1, width=128 if mix else 64)]
    if not mix:
        return [Config(num_warps=4, num_stages=2, tokens=1, width=256 if S <= 16 else 128)]
    if lanes == 64:
        return [Config(num_warps=4, num_stages=2, tokens=tokens, width=256) for tokens in (1, 2)]
    one = Config(num_warps=4, num_stages=3, tokens=1, width=256)
    two = Config(num_warps=8, num_stages=2, tokens=2, width=256)
    if D < WIDE:
        return [two, one, replace(two, tokens=4)] if S <= 16 else [one, two][: 1 if dtype == torch.float16 else 2]
    return [replace(one, tokens=2, programs=2), two, one] if S <= 16 else [one, replace(two, num_stages=3, programs=1), two]


def _scores_constants(D: int, S: int, config: Config, lanes: int, mix: bool) -> dict[str, Any]:
    return tile_constants(D, S, config, lanes) | {"MIX": mix}


def inter_forward(sources: Sequence[Tensor], weights: Tensor, eps: float) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """S queries against n sources: ``mixed_s = sum_i softmax_i(score_si) v_i``.

    ``score_si = (w_s . v_i) r_i`` with ``r_i = rsqrt(mean(v_i^2) + eps)``; section "Two-phase computation", phase 1.

    Args:
        sources: n >= 1 tensors ``[..., D]`` of one dtype: float32, bfloat16 or float16.
        weights: float32 ``[S, D]``, query times key-norm weight of each site.
        eps: added to the mean square of a key.

    Returns:
        The S mixtures ``[..., D]`` in the dtype of the sources, or no mixture where n is 1 and each is the source; and in
        float32 log-sum-exp ``[S, T]``, scores ``[S, n, T]`` and inverse rms ``[n, T]`` over the T tokens.
    """
    matrices = [rows(source) for source in sources]
    n, (S, D), (T, _), dtype = len(sources), weights.shape, matrices[0].shape, sources[0].dtype
    lse, scores, inverse_rms = weights.new_empty(S, T), weights.new_empty(S, n, T), weights.new_empty(n, T)
    mixed = [torch.empty(sources[0].shape, dtype=dtype, device=weights.device) for _ in range(S if n > 1 else 0)]
    if T == 0:
        return mixed, lse, scores, inverse_rms
    halves, factors = split_weights(weights, dtype)
    table = addresses([*matrices, *mixed])
    lanes = lanes_of(weights.device)
    mix = 1 < n <= SOURCES.value

    def launch(config: Config) -> None:
        _scores[grid(T, config, weights.device)](
            table, halves, factors, lse, scores, inverse_rms, n, S, T, eps,
            **_scores_constants(D, S, config, lanes, mix), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    launch(tuned("inter_forward", (D, dtype, S, n, T.bit_length()), _candidates(D, S, dtype, lanes, mix), launch))
    if n > SOURCES.value:
        _mix_many[(T,)](
            table, scores, lse, n, S, T, dtype=DTYPES[dtype], **constants(D, S, MANY, lanes),
            num_warps=MANY.num_warps, num_stages=MANY.num_stages,
        )  # fmt: skip
    return mixed, lse, scores, inverse_rms


def signature(kernel: Any, values: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of a kernel's arguments and its compile-time values; ``factors`` are of 16-bit storage alone."""
    values = values | ({"factors": None} if "factors" in kernel.arg_names and dtype == torch.float32 else {})
    integers = dict.fromkeys((*UNSPECIALIZED, "groups", "share"), "i32")
    types = {"table": "*i64", "halves": TYPES[dtype], "eps": "fp32", **integers}
    return {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in values}, values


def variants(D: int, dtype: torch.dtype, lanes: int = 32) -> list[Variant]:
    """What is launched for rows of a width, for S = 8, 16, 24 and at most 16 sources, to be compiled without a GPU.

    Args:
        lanes: of a warp, 64 on an AMD GPU.

    Returns:
        Tuples of a name, kernel, types of the arguments, compile-time arguments, and configuration.
    """
    found: list[Variant] = []
    for S in (8, 16, 24):
        for mix in (True, False):
            for config in _candidates(D, S, dtype, lanes, mix):
                values = _scores_constants(D, S, config, lanes, mix)
                name = f"inter_forward S={S}" + ("" if mix else " scores")
                found.append((name, _scores, *signature(_scores, values, dtype), config))
    return found
