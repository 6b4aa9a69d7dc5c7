"""The Triton kernels as opaque operators, behind the signatures of the naive twins.

Inductor calls an opaque operator as it stands and knows its outputs from the fake implementation. Operators may not return
what they were given, so lists leave out what would be an input again. Triton is imported when a kernel first runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from attnres_compile.kernels.naive_merge import STATISTICS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def available(device: torch.device | str, dtype: torch.dtype) -> str:
    """Why the fused kernels can't compute on this device and dtype; "" if they can."""
    if torch.device(device).type != "cuda":
        return f"there are fused kernels for CUDA and ROCm devices, not for {torch.device(device).type!r}"
    if dtype not in DTYPES:
        return f"the fused kernels compute in float32, which {dtype} would lose by"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return ""


@custom_op("attnres::fused_inter", mutates_args=())
def _inter(sources: Sequence[Tensor], weights: Tensor, eps: float) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    from attnres_compile.kernels import fused_inter

    return fused_inter.inter_forward(sources, weights, eps)


@_inter.register_fake
def _(sources: Sequence[Tensor], weights: Tensor, eps: float) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    n, (queries, width) = len(sources), weights.shape
    tokens = sources[0].numel() // width
    mixed = [sources[0].new_empty(sources[0].shape) for _ in range(queries)] if n > 1 else []
    lse, scores = weights.new_empty(queries, tokens), weights.new_empty(queries, n, tokens)
    return mixed, lse, scores, weights.new_empty(n, tokens)


@custom_op("attnres::fused_inter_backward", mutates_args=())
def _inter_backward(
    grad_mixed: Sequence[Tensor], grad_lse: Tensor, grad_sources: Sequence[Tensor | None], sources: Sequence[Tensor],
    weights: Tensor, lse: Tensor, scores: Tensor, inverse_rms: Tensor,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    from attnres_compile.kernels import fused_inter_backward

    return fused_inter_backward.inter_backward(grad_mixed, grad_lse, grad_sources, sources, weights, lse, scores, inverse_rms)


@_inter_backward.register_fake
def _(
    grad_mixed: Sequence[Tensor], grad_lse: Tensor, grad_sources: Sequence[Tensor | None], sources: Sequence[Tensor],
    weights: Tensor, lse: Tensor, scores: Tensor, inverse_rms: Tensor,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    return [source.new_empty(source.shape) for source in sources], torch.empty_like(weights)


@custom_op("attnres::fused_merge", mutates_args=())
def _merge(
    partial: Tensor, branch: Tensor | None, mixed: Tensor, lse: Tensor, weight: Tensor, eps: float, scale: float,
    norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float,
) -> list[Tensor]:  # fmt: skip
    """The norm's output and the statistics, and the total if a branch was added."""
    from attnres_compile.kernels import fused_merge

    total, y, stats = fused_merge.merge_forward(
        partial, branch, mixed, lse, weight, eps, scale, norm, norm_weight, norm_bias, norm_eps
    )
    return [y, stats] if branch is None else [y, stats, total]


@_merge.register_fake
def _(
    partial: Tensor, branch: Tensor | None, mixed: Tensor, lse: Tensor, weight: Tensor, eps: float, scale: float,
    norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float,
) -> list[Tensor]:  # fmt: skip
    outputs = [partial.new_empty(partial.shape), weight.new_empty(STATISTICS[norm], partial.numel() // partial.shape[-1])]
    return outputs if branch is None else [*outputs, partial.new_empty(partial.shape)]


@custom_op("attnres::fused_merge_backward", mutates_args=())
def _merge_backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, mixed: Tensor, weight: Tensor, scale: float,
    norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, stats: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The gradients, but for those of a norm's weight and bias that it does not have."""
    from attnres_compile.kernels import fused_merge

    found = fused_merge.merge_backward(grad_y, grad_total, total, mixed, weight, scale, norm, norm_weight, norm_bias, stats)
    return [grad for grad in found if grad is not None]


@_merge_backward.register_fake
def _(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, mixed: Tensor, weight: Tensor, scale: float,
    norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, stats: Tensor,
) -> list[Tensor]:  # fmt: skip
    grads = [total.new_empty(total.shape), mixed.new_empty(mixed.shape), weight.new_empty(stats.shape[1])]
    vectors = [weight, norm_weight, norm_bias]
    return [*grads, *(weight.new_empty(weight.shape) for vector in vectors if vector is not None)]


@custom_op("attnres::fused_site", mutates_args=())
def _site(
    sources: Sequence[Tensor], weight: Tensor, eps: float, scale: float, prior: Tensor | None, prior_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from attnres_compile.kernels import fused_site

    return fused_site.site_forward(sources, weight, eps, scale, prior, prior_lse)


@_site.register_fake
def _(
    sources: Sequence[Tensor], weight: Tensor, eps: float, scale: float, prior: Tensor | None, prior_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, tokens = len(sources), sources[0].numel() // weight.shape[0]
    h = sources[0].new_empty(sources[0].shape)
    return h, weight.new_empty(tokens), weight.new_empty(n, tokens), weight.new_empty(n, tokens)


@custom_op("attnres::fused_site_backward", mutates_args=())
def _site_backward(
    grad_h: Tensor, grad_sources: Sequence[Tensor | None], sources: Sequence[Tensor], weight: Tensor, scale: float,
    prior: Tensor | None, prior_lse: Tensor | None, lse: Tensor, scores: Tensor, inverse_rms: Tensor,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    """The gradients of the sources, of the weight, and of the prior term if there is one."""
    from attnres_compile.kernels import fused_site

    grads, grad_weight, grad_prior, grad_prior_lse = fused_site.site_backward(
        grad_h, grad_sources, sources, weight, scale, prior, prior_lse, lse, scores, inverse_rms
    )
    return grads, grad_weight, [] if grad_prior is None or grad_prior_lse is None else [grad_prior, grad_prior_lse]


@_site_backward.register_fake
def _(
    grad_h: Tensor, grad_sources: Sequence[Tensor | None], sources: Sequence[Tensor], weight: Tensor, scale: float,
    prior: Tensor | None, prior_lse: Tensor | None, lse: Tensor, scores: Tensor, inverse_rms: Tensor,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    of_prior = [] if prior is None else [prior.new_empty(prior.shape), lse.new_empty(lse.shape)]
    return [source.new_empty(source.shape) for source in sources], torch.empty_like(weight), of_prior


# ------------------------------------------------------------------------------------------- the twins' signatures


def inter_forward(sources: Sequence[Tensor], weights: Tensor, eps: float) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """See :func:`attnres_compile.kernels.naive_inter.inter_forward`."""
    found: tuple[list[Tensor], Tensor, Tensor, Tensor] = torch.ops.attnres.fused_inter(sources, weights, eps)
    return found


def inter_backward(*arguments: Any) -> tuple[list[Tensor], Tensor]:
    """See :func:`attnres_compile.kernels.naive_inter.inter_backward`."""
    found: tuple[list[Tensor], Tensor] = torch.ops.attnres.fused_inter_backward(*arguments)
    return found


def merge_forward(partial: Tensor, branch: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See :func:`attnres_compile.kernels.naive_merge.merge_forward`."""
    y, stats, *total = torch.ops.attnres.fused_merge(partial, branch, *arguments)
    return total[0] if total else partial, y, [stats]


def merge_backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, mixed: Tensor, weight: Tensor, scale: float,
    norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, stats: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See :func:`attnres_compile.kernels.naive_merge.merge_backward`."""
    of_total, of_mixed, of_lse, of_weight, *affine = torch.ops.attnres.fused_merge_backward(
        grad_y, grad_total, total, mixed, weight, scale, norm, norm_weight, norm_bias, *stats
    )
    of_norm_weight = affine.pop(0) if norm_weight is not None else None
    return of_total, of_mixed, of_lse, of_weight, of_norm_weight, affine.pop(0) if norm_bias is not None else None


def site_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`attnres_compile.kernels.naive_site.site_forward`."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.attnres.fused_site(*arguments)
    return found


def site_backward(*arguments: Any) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]:
    """See :func:`attnres_compile.kernels.naive_site.site_backward`."""
    grads, grad_weight, of_prior = torch.ops.attnres.fused_site_backward(*arguments)
    return grads, grad_weight, *(of_prior or (None, None))
