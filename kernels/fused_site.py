"""One AttnRes read over any number of sources, forward and backward, as Triton kernels. The twins are in ``naive_site``.

A program holds one row of D features at a time, as parts of one 128-bit load per thread each, so D need not be a power of two
and no register is spent on padding unless the last part is incomplete. It walks over the sources through a table of their
addresses, so one compiled kernel serves every number of sources.
"""

# Kernels are typed by Triton; tuples of register blocks grow as they are built.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnres_compile.kernels.launch import (
    ALIGNMENT,
    TYPES,
    Config,
    Variant,
    addresses,
    lanes_of,
    num_programs,
    rows,
    tuned,
)  # fmt: skip

# How many 128-bit loads a thread makes for a row: with more, the registers leave room for too few programs.
PARTS = range(4, 8)
# The warps that a multiprocessor holds, times those parts: about 24 of its 2048 registers per lane go to each.
RESIDENT = 84
MOST_THREADS = 512  # of a program: with 1024, a thread has 64 registers


@triton.jit
def _add(square, product, other_square, other_product):
    return square + other_square, product + other_product


@triton.jit
def _row_of(table, i, offset, dtype: tl.constexpr):
    """The address of row ``offset`` of tensor ``i``; every tensor begins on a 16-byte boundary."""
    return tl.multiple_of(tl.load(table + i).to(tl.pointer_type(dtype)), 16) + offset


@triton.jit
def _load(row, start: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, given, eviction: tl.constexpr):
    feature = start + tl.arange(0, WIDTH)
    mask = given if start + WIDTH <= D else (feature < D) & given
    return tl.load(row + feature, mask=mask, other=0.0, eviction_policy=eviction)


@triton.jit
def _load_row(row, D: tl.constexpr, WIDTH: tl.constexpr, given, eviction: tl.constexpr):
    parts = ()
    for start in tl.static_range(0, D, WIDTH):
        parts += (_load(row, start, D, WIDTH, given, eviction),)
    return parts


@triton.jit
def _store(row, start: tl.constexpr, values, D: tl.constexpr, WIDTH: tl.constexpr):
    feature = start + tl.arange(0, WIDTH)
    if start + WIDTH <= D:
        tl.store(row + feature, values.to(row.dtype.element_ty))
    else:
        tl.store(row + feature, values.to(row.dtype.element_ty), mask=feature < D)


@triton.jit
def _dot(left, right, D: tl.constexpr, WIDTH: tl.constexpr):
    products = tl.zeros([WIDTH], tl.float32)
    for start in tl.static_range(0, D, WIDTH):
        products += left[start // WIDTH].to(tl.float32) * right[start // WIDTH].to(tl.float32)
    return tl.sum(products)


@triton.jit(do_not_specialize=["tokens", "n"])
def _forward(
    sources, weight, prior, prior_lse, h, lse, scores, inverse_rms, tokens, n, eps, scale,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token per program, one sweep, online softmax. The weight is read again for every source: it stays in the L1 cache,
    and its registers are worth more as further programs, whose rows are then in flight at the same time."""
    token = tl.program_id(0).to(tl.int64)
    offset = token * D
    mixed = ()
    if prior is not None:  # the sweep begins as if one source had been read
        top = tl.load(prior_lse + token)
        total = tl.full([], 1.0, tl.float32)
        for start in tl.static_range(0, D, WIDTH):
            mixed += (_load(prior + offset, start, D, WIDTH, True, "evict_first").to(tl.float32),)
    else:
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        for _ in tl.static_range(0, D, WIDTH):
            mixed += (tl.zeros([WIDTH], tl.float32),)
    for i in tl.range(0, n):
        source = _load_row(_row_of(sources, i, offset, h.dtype.element_ty), D, WIDTH, True, "evict_first")
        squares = tl.zeros([WIDTH], tl.float32)
        products = tl.zeros([WIDTH], tl.float32)
        for start in tl.static_range(0, D, WIDTH):
            v = source[start // WIDTH].to(tl.float32)
            squares += v * v
            products += v * _load(weight, start, D, WIDTH, True, "evict_last")
        square, product = tl.reduce((squares, products), 0, _add)
        inverse = tl.rsqrt(square / D + eps)
        score = product * inverse
        tl.store(inverse_rms + i * tokens.to(tl.int64) + token, inverse)
        tl.store(scores + i * tokens.to(tl.int64) + token, score)
        higher = tl.maximum(top, score)
        shrink = tl.exp(top - higher)
        alpha = tl.exp(score - higher)
        total = total * shrink + alpha
        top = higher
        updated = ()
        for start in tl.static_range(0, D, WIDTH):
            updated += (mixed[start // WIDTH] * shrink + alpha * source[start // WIDTH].to(tl.float32),)
        mixed = updated
    tl.store(lse + token, top + tl.log(total))
    for start in tl.static_range(0, D, WIDTH):
        _store(h + offset, start, mixed[start // WIDTH] * (scale / total), D, WIDTH)


@triton.jit(do_not_specialize=["tokens", "n"])
def _backward(
    table, grad_h, weight, prior, prior_lse, lse, scores, inverse_rms, grad_prior, grad_prior_lse, grad_weight, tokens, n, scale,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Two sweeps per token. ``table`` holds the addresses of n sources, of n incoming gradients and of n outputs; a gradient
    that is absent has the address of its output.

    With a_i = grad_h . v_i the derivative of score i is alpha_i (a_i - sum_j alpha_j a_j), so the first sweep needs no more than
    one dot product per source. The second runs backwards, because what the first read last is the most likely to be in cache.
    """
    accumulated = ()
    for _ in tl.static_range(0, D, WIDTH):
        accumulated += (tl.zeros([WIDTH], tl.float32),)
    stride = tokens.to(tl.int64)
    for index in tl.range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        offset = token * D
        top = tl.load(lse + token)
        expected = tl.full([], 0.0, tl.float32)
        d = _load_row(grad_h + offset, D, WIDTH, True, "evict_last")
        for i in tl.range(0, n):
            alpha = scale * tl.exp(tl.load(scores + i * stride + token) - top)
            source = _load_row(_row_of(table, i, offset, grad_h.dtype.element_ty), D, WIDTH, True, "evict_last")
            expected += alpha * _dot(d, source, D, WIDTH)
        if prior is not None:
            probability = tl.exp(tl.load(prior_lse + token) - top)
            alpha = scale * probability
            dot = _dot(d, _load_row(prior + offset, D, WIDTH, True, "evict_first"), D, WIDTH)
            expected += alpha * dot
            tl.store(grad_prior_lse + token, alpha * dot - probability * expected)
            for start in tl.static_range(0, D, WIDTH):
                _store(grad_prior + offset, start, alpha * d[start // WIDTH].to(tl.float32), D, WIDTH)
        for step in tl.range(0, n):
            i = n - 1 - step
            score = tl.load(scores + i * stride + token)
            inverse = tl.load(inverse_rms + i * stride + token)
            row = _row_of(table, i, offset, grad_h.dtype.element_ty)
            incoming = _row_of(table, n + i, offset, grad_h.dtype.element_ty)
            output = _row_of(table, 2 * n + i, offset, grad_h.dtype.element_ty)
            given = incoming.to(tl.int64) != output.to(tl.int64)
            # What comes from memory is fetched ahead of the sum that everything below waits for.
            source = _load_row(row, D, WIDTH, True, "evict_last")
            gradient = _load_row(incoming, D, WIDTH, given, "evict_first")
            products = tl.zeros([WIDTH], tl.float32)
            for start in tl.static_range(0, D, WIDTH):
                products += source[start // WIDTH].to(tl.float32) * _load(
                    grad_h + offset, start, D, WIDTH, True, "evict_last"
                ).to(tl.float32)
            dot = tl.sum(products)
            probability = tl.exp(score - top)
            alpha = scale * probability
            along = (alpha * dot - probability * expected) * inverse
            shrink = along * score * inverse / D
            # Two rows held in float32 beside the accumulators would leave room for two programs at D = 7168. Read again from
            # the L1 cache, part by part between the stores, they take a few registers, and a third program fits.
            updated = ()
            for start in tl.static_range(0, D, WIDTH):
                v = _load(row, start, D, WIDTH, True, "evict_first").to(tl.float32)
                d_part = _load(grad_h + offset, start, D, WIDTH, True, "evict_last").to(tl.float32)
                w = _load(weight, start, D, WIDTH, True, "evict_last")
                value = gradient[start // WIDTH].to(tl.float32) + alpha * d_part + along * w - shrink * v
                _store(output, start, value, D, WIDTH)
                updated += (accumulated[start // WIDTH] + along * v,)
            accumulated = updated
    for start in tl.static_range(0, D, WIDTH):
        _store(grad_weight + tl.program_id(0).to(tl.int64) * D, start, accumulated[start // WIDTH], D, WIDTH)


def _candidates(D: int, dtype: torch.dtype, lanes: int) -> list[Config]:
    """Every number of warps that gives a thread a good share of a row, the least padding first."""
    configs = []
    for num_warps in (1, 2, 4, 8, 16, 32):
        width = num_warps * lanes * ALIGNMENT // dtype.itemsize
        parts = triton.cdiv(D, width)
        short, long = parts < PARTS[0] and num_warps == 1, parts > PARTS[-1] and num_warps * lanes == MOST_THREADS
        if parts in PARTS or short or long:
            configs.append(Config(num_warps, width=width, programs=max(1, RESIDENT // parts // num_warps)))
        if num_warps * lanes == MOST_THREADS:
            break
    return sorted(configs, key=lambda config: -D % config.width)


def launch_options(config: Config, lanes: int) -> dict[str, int]:
    """Of NVIDIA's registers, 128 are for two programs of eight warps; left alone, ptxas spills to fit a third."""
    return {"num_warps": config.num_warps} | ({"maxnreg": 128} if config.num_warps >= 8 and lanes == 32 else {})


def variants(D: int, dtype: torch.dtype, lanes: int = 32) -> list[Variant]:
    """What can be launched at this width, for the offline compiler.

    Args:
        D: features.
        dtype: storage.
        lanes: threads of a warp, 64 on AMD.

    Returns:
        For every kernel, with and without a prior, and every number of warps: name, kernel, Triton types of its arguments,
        constants, configuration.
    """
    row = TYPES[dtype]
    types = dict.fromkeys(("sources", "table"), "*i64") | dict.fromkeys(("tokens", "n"), "i32")
    types |= dict.fromkeys(("eps", "scale"), "fp32") | dict.fromkeys(("prior", "h", "grad_h", "grad_prior"), row)
    found: list[Variant] = []
    for config in _candidates(D, dtype, lanes):
        for name, kernel in (("site forward", _forward), ("site backward", _backward)):
            constants: dict[str, Any] = {"D": D, "WIDTH": config.width}
            signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names if argument not in constants}
            found.append((f"{name} with prior", kernel, signature, constants, config))
            absent = dict.fromkeys((argument for argument in signature if "prior" in argument), None)
            given = {argument: kind for argument, kind in signature.items() if argument not in absent}
            found.append((name, kernel, given, constants | absent, config))
    return found


def _matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Rows of tensors that must agree: behind an address in a table nothing checks shape and dtype."""
    first = tensors[0]
    for other in tensors[1:]:
        if (other.shape, other.dtype, other.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"the tensors of one read must agree: {other.dtype} {list(other.shape)} on {other.device} "
                f"beside {first.dtype} {list(first.shape)} on {first.device}"
            )
    return [rows(tensor) for tensor in tensors]


def site_forward(
    sources: Sequence[Tensor], weight: Tensor, eps: float, scale: float, prior: Tensor | None, prior_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One read of the stream: ``h = scale * sum_i alpha_i v_i`` (section "Full AttnRes"), in one pass over the sources.

    Args:
        sources: n >= 1 tensors ``[..., D]`` of one shape and dtype: float32, bfloat16 or float16.
        weight: float32 ``[D]``, the query times the key-norm weight.
        eps: added to the mean square of a key.
        scale: the sum of the weights.
        prior: ``[..., D]``, a mixture made earlier that enters as one more term, or None.
        prior_lse: float32 ``[T]``, the score of ``prior``: the log-sum-exp of what it was made of.

    Returns:
        ``h`` ``[..., D]`` in the dtype of the sources; in float32 the log-sum-exp ``[T]`` over all terms, the scores ``[n, T]``
        and the inverse root mean squares ``[n, T]``.

    Raises:
        ValueError: the sources differ in shape, dtype or device.
    """
    matrices = _matrices(sources)
    tokens, width = matrices[0].shape
    h, lse = torch.empty_like(matrices[0]), weight.new_empty(tokens)
    scores, inverse_rms = weight.new_empty(len(sources), tokens), weight.new_empty(len(sources), tokens)
    if tokens:
        table, lanes = addresses(matrices), lanes_of(h.device)
        term = (None, None) if prior is None or prior_lse is None else (rows(prior), prior_lse.contiguous())

        def launch(config: Config) -> None:
            _forward[(tokens,)](
                table, weight, *term, h, lse, scores, inverse_rms, tokens, len(sources), eps, scale,
                D=width, WIDTH=config.width, **launch_options(config, lanes),
            )  # fmt: skip

        key = (width, h.dtype, prior is not None)
        launch(tuned("site_forward", key, _candidates(width, h.dtype, lanes), launch))
    return h.view(sources[0].shape), lse, scores, inverse_rms


def site_backward(
    grad_h: Tensor, grad_sources: Sequence[Tensor | None], sources: Sequence[Tensor], weight: Tensor, scale: float,
    prior: Tensor | None, prior_lse: Tensor | None, lse: Tensor, scores: Tensor, inverse_rms: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of :func:`site_forward`, added to what reaches the sources from elsewhere.

    Args:
        grad_h: ``[..., D]``, the gradient of ``h``.
        grad_sources: for every source a gradient ``[..., D]`` to which its own is added, or None.
        sources, weight, scale, prior, prior_lse: as in :func:`site_forward`.
        lse, scores, inverse_rms: what :func:`site_forward` returned.

    Returns:
        The gradients of the sources, ``[..., D]`` in their dtype; of ``weight``, float32 ``[D]``; of ``prior``, ``[..., D]``,
        and of ``prior_lse``, float32 ``[T]``, or None where there is no prior.

    Raises:
        ValueError: the sources, ``grad_h`` and what is given of ``grad_sources`` differ in shape, dtype or device.
    """
    n, shape = len(sources), sources[0].shape
    d, *matrices = _matrices([grad_h, *sources])
    tokens, width = d.shape
    grads = [torch.empty_like(matrix) for matrix in matrices]
    partial = weight.new_zeros(1, width)
    grad_prior = grad_prior_lse = None
    if prior is not None:
        grad_prior, grad_prior_lse = torch.empty_like(d), torch.empty_like(lse)
    if tokens:
        given = iter(_matrices([grad_h, *(gradient for gradient in grad_sources if gradient is not None)])[1:])
        incoming = [grads[i] if grad_sources[i] is None else next(given) for i in range(n)]
        table, lanes = addresses([*matrices, *incoming, *grads]), lanes_of(d.device)
        term = (None, None) if prior is None or prior_lse is None else (rows(prior), prior_lse.contiguous())

        def launch(config: Config) -> None:
            nonlocal partial
            partial = weight.new_empty(num_programs(tokens, d.device, config.programs), width)
            _backward[(len(partial),)](
                table, d, weight, *term, lse, scores, inverse_rms, grad_prior, grad_prior_lse, partial, tokens, n, scale,
                D=width, WIDTH=config.width, **launch_options(config, lanes),
            )  # fmt: skip

        # How many tokens are in work at a time decides whether their sources are still in cache in the second sweep.
        key = (width, d.dtype, prior is not None, n.bit_length())
        candidates = _candidates(width, d.dtype, lanes)
        candidates += [replace(config, programs=triton.cdiv(config.programs, 2)) for config in candidates]
        launch(tuned("site_backward", key, candidates, launch))
    if grad_prior is not None:
        grad_prior = grad_prior.view(shape)
    return [gradient.view(shape) for gradient in grads], partial.sum(0), grad_prior, grad_prior_lse
