"""The operators of the ``attnres::`` namespace that graphs hold between the passes.

``attnres::site`` is what rewriting puts into a graph, ``attnres::inter`` and ``attnres::merge`` what the two phases make of a
block of sites. ``attnres::site_variant`` is a site that weighs its sources otherwise, ``attnres::multi_stream_offsets`` what it
does so by. All of them run and differentiate as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, custom_op

from attnres_compile.kernels import differentiable, fused, naive, naive_variants
from attnres_compile.kernels.differentiable import KERNELS, NAIVE, kernels_for

_library = Library("attnres", "FRAGMENT")
_library.define("inter(Tensor[] sources, Tensor[] queries, Tensor[] key_norms, float eps) -> Tensor[]")
_library.define(
    "merge(Tensor partial, Tensor? branch, Tensor mixed, Tensor lse, Tensor query, Tensor? key_norm, float eps, float scale, "
    "str norm='', Tensor? norm_weight=None, Tensor? norm_bias=None, float norm_eps=0.) -> Tensor[]"
)
_library.define(
    "site_with_prior(Tensor[] sources, Tensor query, Tensor? key_norm, float eps, float scale, Tensor prior, Tensor prior_lse) "
    "-> Tensor"
)
_library.define(
    "site_variant(Tensor[] sources, Tensor? query, Tensor? key_norm, float eps, float scale, Tensor? projection=None, "
    "Tensor? offset=None, str weights='softmax', int heads=1, bool normalize_keys=True) -> Tensor"
)
_library.define("multi_stream_offsets(Tensor[] read, Tensor[] write, Tensor[] mix, int[] before) -> Tensor[]")
_library.impl("site_variant", naive_variants.site_variant, "CompositeImplicitAutograd")
_library.impl("multi_stream_offsets", naive_variants.multi_stream_offsets, "CompositeImplicitAutograd")
_library.impl("inter", differentiable.inter, "CompositeImplicitAutograd")
_library.impl("merge", differentiable.merge, "CompositeImplicitAutograd")
_library.impl("site_with_prior", lambda *arguments: differentiable.site(*arguments)[0], "CompositeImplicitAutograd")


@custom_op("attnres::site", mutates_args=())
def site(sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, scale: float) -> Tensor:
    """See :func:`attnres_compile.kernels.naive.site`. The result is contiguous, whatever layout the sources have."""
    if kernels_for(sources) == NAIVE:
        return naive.site(sources, query, key_norm, eps, scale).contiguous()
    weight = naive.weight_of(query, key_norm, torch.float32)
    return fused.site_forward(sources, weight, eps, scale, None, None)[0]


@site.register_fake
def _site_fake(sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, scale: float) -> Tensor:
    return sources[0].new_empty(sources[0].shape, dtype=naive.storage_dtype(sources))


@custom_op("attnres::site_backward", mutates_args=())
def site_backward(
    grad: Tensor, sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, scale: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of :func:`site` from its inputs alone; scores are computed anew, nothing else is stored.

    Returns:
        The gradients of the sources, of the query and of the key-norm weight (zero where there is none), each in the dtype of
        what it belongs to.
    """
    kernels = KERNELS[kernels_for(sources)]
    compute = naive.compute_dtype(naive.storage_dtype(sources))
    weight = naive.weight_of(query, key_norm, compute)
    _, *stats = kernels.site_forward(sources, weight, eps, scale, None, None)
    grads, d_weight, *_ = kernels.site_backward(grad, [None] * len(sources), sources, weight, scale, None, None, *stats)
    if key_norm is None:
        return grads, d_weight.to(query.dtype), torch.zeros_like(query)
    return grads, (d_weight * key_norm.to(compute)).to(query.dtype), (d_weight * query.to(compute)).to(key_norm.dtype)


@site_backward.register_fake
def _site_backward_fake(
    grad: Tensor, sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, scale: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    return (
        [source.new_empty(source.shape) for source in sources],
        torch.empty_like(query),
        torch.empty_like(query if key_norm is None else key_norm),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sources, query, key_norm, ctx.eps, ctx.scale = inputs
    ctx.has_key_norm = key_norm is not None
    ctx.save_for_backward(query, *([key_norm] if ctx.has_key_norm else []), *sources)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, *rest = ctx.saved_tensors
    key_norm, sources = (rest[0], rest[1:]) if ctx.has_key_norm else (None, rest)
    grads, d_query, d_key_norm = torch.ops.attnres.site_backward(grad, sources, query, key_norm, ctx.eps, ctx.scale)
    return grads, d_query, d_key_norm if ctx.has_key_norm else None, None, None


site.register_autograd(_backward, setup_context=_setup_context)
