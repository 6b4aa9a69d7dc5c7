"""The operators of the ``attnres::`` namespace, with fake and autograd.

``attnres::site`` is what the rewritten graph holds. ``attnres::only_rewritten`` marks the input of a converted model:
rewriting removes it, and a graph that was not rewritten raises when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from attnres_compile.kernels import naive

NOT_REWRITTEN = (
    "this model carries AttnRes parameters, but the graph that just ran was not rewritten: it was compiled or exported by "
    'another backend. Use torch.compile(model, backend="attnres"), or attnres_compile.rewrite(model, ...).'
)


@custom_op("attnres::site", mutates_args=())
def site(sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, scale: float) -> Tensor:
    """See :func:`attnres_compile.kernels.naive.site`. The result is contiguous, whatever layout the sources have."""
    return naive.site(sources, query, key_norm, eps, scale).contiguous()


@site.register_fake
def _site_fake(sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, scale: float) -> Tensor:
    return sources[0].new_empty(sources[0].shape, dtype=naive.storage_dtype(sources))


@custom_op("attnres::site_backward", mutates_args=())
def site_backward(
    grad: Tensor, sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, scale: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """See :func:`attnres_compile.kernels.naive.site_backward`."""
    return naive.site_backward(grad, sources, query, key_norm, eps, scale)


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


@custom_op("attnres::only_rewritten", mutates_args=())
def only_rewritten(x: Tensor) -> Tensor:
    """Stands for ``x`` in graphs that are still to be rewritten.

    Raises:
        RuntimeError: whenever it is executed.
    """
    raise RuntimeError(NOT_REWRITTEN)


@only_rewritten.register_fake
def _only_rewritten_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)
