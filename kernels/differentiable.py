"""Sites and the two phases as differentiable functions over a set of kernels: what the lowered graph calls.

A source that several calls read is handed on from one to the next: each returns its sources again, and the next reads those.
In the backward pass the gradient that the later calls have gathered thus arrives as an input of the earlier one, whose kernel
adds its own share; no gradient of the size of the stream is added up outside of a kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from attnres_compile.kernels import fused, naive_inter, naive_merge, naive_site
from attnres_compile.kernels.naive import compute_dtype, storage_dtype, weight_of, without_autocast


@dataclass(frozen=True)
class Kernels:
    """One implementation of every kernel, with the signatures of the naive twins."""

    inter_forward: Callable[..., tuple[list[Tensor], Tensor, Tensor, Tensor]]
    inter_backward: Callable[..., tuple[list[Tensor], Tensor]]
    merge_forward: Callable[..., tuple[Tensor, Tensor, list[Tensor]]]
    merge_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]
    site_forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    site_backward: Callable[..., tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]]


log = logging.getLogger(__name__)
NAIVE, FUSED = "naive", "fused"
KERNELS = {
    NAIVE: Kernels(
        naive_inter.inter_forward, naive_inter.inter_backward, naive_merge.merge_forward, naive_merge.merge_backward,
        naive_site.site_forward, naive_site.site_backward,
    ),
    FUSED: Kernels(
        fused.inter_forward, fused.inter_backward, fused.merge_forward, fused.merge_backward,
        fused.site_forward, fused.site_backward,
    ),
}  # fmt: skip


def kernels_for(tensors: Sequence[Tensor]) -> str:
    """NAIVE, or FUSED where there are fused kernels for the device and the one dtype of ``tensors``."""
    alike = len({tensor.dtype for tensor in tensors}) == 1
    reason = fused.available(tensors[0].device, tensors[0].dtype) if alike else "the tensors differ in dtype"
    if reason:
        log.debug("computed in plain torch: %s", reason)
    return NAIVE if reason else FUSED


def inter(
    sources: Sequence[Tensor], queries: Sequence[Tensor], key_norms: Sequence[Tensor], eps: float, kernels: str = NAIVE
) -> list[Tensor]:
    """Phase 1 for the S sites of a block, see :func:`attnres_compile.kernels.naive_inter.inter_forward`.

    Args:
        sources: n tensors ``[..., D]``, the complete blocks; T tokens.
        queries, key_norms: S vectors ``[D]`` each; no key norms at all where keys carry no weight.
        kernels: "naive" or "fused".

    Returns:
        S mixtures ``[..., D]``, S log-sum-exps ``[T]``, and the n sources for the next reader.
    """
    compute = compute_dtype(storage_dtype(sources))
    weights = [weight_of(q, key_norms[s] if key_norms else None, compute) for s, q in enumerate(queries)]
    return list(_Inter.apply(KERNELS[kernels], eps, torch.stack(weights), *sources))  # type: ignore[no-untyped-call]


def merge(
    partial: Tensor, branch: Tensor | None, mixed: Tensor, lse: Tensor, query: Tensor, key_norm: Tensor | None,
    eps: float, scale: float, norm: str = "", norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
    norm_eps: float = 0.0, kernels: str = NAIVE,
) -> list[Tensor]:  # fmt: skip
    """Phase 2 of one site, see :func:`attnres_compile.kernels.naive_merge.merge_forward`.

    Returns:
        The partial sum with the branch, and the norm of the site's output, both ``[..., D]``.
    """
    weight = weight_of(query, key_norm, compute_dtype(mixed.dtype))
    arguments = (KERNELS[kernels], eps, scale, norm, norm_eps, partial, branch, mixed, lse, weight, norm_weight, norm_bias)
    return list(_Merge.apply(*arguments))  # type: ignore[no-untyped-call]


def site(
    sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, scale: float,
    prior: Tensor | None = None, prior_lse: Tensor | None = None, kernels: str = NAIVE,
) -> list[Tensor]:  # fmt: skip
    """One site by itself, or merged with what phase 1 made of earlier sources; see ``naive_site.site_forward``.

    Returns:
        The site's output ``[..., D]``, and the sources for the next reader.
    """
    weight = weight_of(query, key_norm, compute_dtype(storage_dtype(sources)))
    return list(_Site.apply(KERNELS[kernels], eps, scale, weight, prior, prior_lse, *sources))  # type: ignore[no-untyped-call]


def _again(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


class _Inter(Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, eps: float, weights: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(weights):
            mixed, lse, *stats = kernels.inter_forward(sources, weights, eps)
        ctx.kernels, ctx.queries, ctx.num_sources = kernels, weights.shape[0], len(sources)
        ctx.save_for_backward(weights, lse, *sources, *stats)
        ctx.set_materialize_grads(False)
        mixed = mixed or [_again(sources[0]) for _ in range(ctx.queries)]
        return (*mixed, *lse.unbind(0), *map(_again, sources))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        weights, lse, *rest = ctx.saved_tensors
        sources, stats = rest[: ctx.num_sources], rest[ctx.num_sources :]
        of_mixed = [torch.zeros_like(sources[0]) if g is None else g for g in grads[: ctx.queries]]
        of_lse = [torch.zeros_like(lse[0]) if g is None else g for g in grads[ctx.queries : 2 * ctx.queries]]
        of_sources = grads[2 * ctx.queries :]
        with without_autocast(weights):
            found, of_weights = ctx.kernels.inter_backward(
                of_mixed, torch.stack(of_lse), of_sources, sources, weights, lse, *stats
            )
        return None, None, of_weights, *found


class _Merge(Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, eps: float, scale: float, norm: str, norm_eps: float, partial: Tensor, branch: Tensor | None,
        mixed: Tensor, lse: Tensor, weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with without_autocast(weight):
            total, y, stats = kernels.merge_forward(
                partial, branch, mixed, lse, weight, eps, scale, norm, norm_weight, norm_bias, norm_eps
            )
        ctx.kernels, ctx.scale, ctx.norm, ctx.has_branch = kernels, scale, norm, branch is not None
        ctx.affine = (norm_weight is not None, norm_bias is not None)
        affine = [tensor for tensor in (norm_weight, norm_bias) if tensor is not None]
        ctx.save_for_backward(total, mixed, weight, *affine, *stats)
        ctx.set_materialize_grads(False)
        return total if ctx.has_branch else _again(partial), y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_y: Tensor | None) -> tuple[Any, ...]:
        total, mixed, weight, *stats = ctx.saved_tensors
        norm_weight = stats.pop(0) if ctx.affine[0] else None
        norm_bias = stats.pop(0) if ctx.affine[1] else None
        if grad_y is None:
            grad_y = torch.zeros_like(total)
        with without_autocast(weight):
            of_total, *others = ctx.kernels.merge_backward(
                grad_y, grad_total, total, mixed, weight, ctx.scale, ctx.norm, norm_weight, norm_bias, stats
            )
        return None, None, None, None, None, of_total, of_total if ctx.has_branch else None, *others


class _Site(Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, eps: float, scale: float, weight: Tensor, prior: Tensor | None, prior_lse: Tensor | None,
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        with without_autocast(weight):
            h, *stats = kernels.site_forward(sources, weight, eps, scale, prior, prior_lse)
        ctx.kernels, ctx.scale, ctx.num_sources, ctx.has_prior = kernels, scale, len(sources), prior is not None
        ctx.save_for_backward(weight, *([prior, prior_lse] if ctx.has_prior else []), *sources, *stats)
        ctx.set_materialize_grads(False)
        return h, *map(_again, sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, *grad_sources: Tensor | None) -> tuple[Any, ...]:
        weight, *rest = ctx.saved_tensors
        prior, prior_lse = (rest.pop(0), rest.pop(0)) if ctx.has_prior else (None, None)
        sources, stats = rest[: ctx.num_sources], rest[ctx.num_sources :]
        if grad_h is None:
            grad_h = torch.zeros_like(sources[0])
        with without_autocast(weight):
            found, *others = ctx.kernels.site_backward(grad_h, grad_sources, sources, weight, ctx.scale, prior, prior_lse, *stats)
        return None, None, None, *others, *found
