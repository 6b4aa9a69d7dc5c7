"""The definition of one AttnRes read, in plain torch. Every fused kernel has its twin here.

Symbols as in arXiv 2603.15031: sources v_i, pseudo-query w, key-norm weight g, weights alpha.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def storage_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    """The dtype that adding the sources up would give."""
    return functools.reduce(torch.promote_types, [source.dtype for source in sources])


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """Arithmetic is float32 for 16- and 32-bit storage and float64 for float64."""
    return torch.float64 if storage == torch.float64 else torch.float32


def site(sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, scale: float) -> Tensor:
    """Softmax attention over depth: ``h = scale * sum_i alpha_i v_i`` (section "Full AttnRes").

    Args:
        sources: n tensors ``[..., D]`` of one shape; their dtypes may differ.
        query: ``[D]``, the pseudo-query.
        key_norm: ``[D]``, the RMSNorm weight of the keys, or None for a weight of one.
        eps: added to the mean square of a key.
        scale: the sum of the weights: 1 in the paper, n to keep the standard residual at zero queries.

    Returns:
        ``[..., D]`` in the dtype to which the sources promote.
    """
    storage = storage_dtype(sources)
    compute = compute_dtype(storage)
    weight = query.to(compute) if key_norm is None else query.to(compute) * key_norm.to(compute)
    values = [source.to(compute) for source in sources]
    # Products and sums, no matmul: autocast must not round the scores to 16 bits.
    scores = [(v * weight).sum(-1) * torch.rsqrt(v.square().mean(-1) + eps) for v in values]
    alpha = torch.softmax(torch.stack(scores), 0) * scale
    mixed = alpha[0].unsqueeze(-1) * values[0]
    for i in range(1, len(values)):
        mixed = mixed + alpha[i].unsqueeze(-1) * values[i]
    return mixed.to(storage)


def site_backward(
    grad: Tensor, sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, scale: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of :func:`site` from its inputs alone; scores are recomputed, nothing else is stored.

    Args:
        grad: ``[..., D]``, the gradient of the output; the other arguments are those of :func:`site`.

    Returns:
        The gradients of the sources, of the query and of the key-norm weight (zero where there is none), each in
        the dtype of what it belongs to.
    """
    compute = compute_dtype(storage_dtype(sources))
    q = query.to(compute)
    g = torch.ones_like(q) if key_norm is None else key_norm.to(compute)
    weight = q * g
    values = [source.to(compute) for source in sources]
    d = grad.to(compute)
    inverse_rms = [torch.rsqrt(v.square().mean(-1) + eps) for v in values]
    scores = torch.stack([(v * weight).sum(-1) * r for v, r in zip(values, inverse_rms, strict=True)])
    alpha = torch.softmax(scores, 0) * scale
    toward = torch.stack([(d * v).sum(-1) for v in values])
    # Softmax backward: alpha carries the scale, so the expectation under the weights divides it out again.
    ds = alpha * (toward - (alpha * toward).sum(0) / scale)
    grads = []
    d_weight = torch.zeros_like(weight)
    for i, (v, r) in enumerate(zip(values, inverse_rms, strict=True)):
        coefficient = ds[i] * r
        shrink = ds[i] * scores[i] * r * r / v.shape[-1]
        grads.append(
            (alpha[i].unsqueeze(-1) * d + coefficient.unsqueeze(-1) * weight - shrink.unsqueeze(-1) * v).to(sources[i].dtype)
        )
        d_weight = d_weight + (coefficient.unsqueeze(-1) * v).reshape(-1, v.shape[-1]).sum(0)
    d_key_norm = (d_weight * q).to(key_norm.dtype) if key_norm is not None else torch.zeros_like(query)
    return grads, (d_weight * g).to(query.dtype), d_key_norm
