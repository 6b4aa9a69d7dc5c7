"""One read over any number of sources in plain torch: the twin of ``fused_site``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_compile.kernels.naive import compute_dtype, rows, storage_dtype, sum_over_tokens


def site_forward(
    sources: Sequence[Tensor], weight: Tensor, eps: float, scale: float, prior: Tensor | None, prior_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``h = scale * sum_i alpha_i v_i`` over the sources and, where given, the mixture that phase 1 made of others.

    Args:
        sources: n tensors ``[..., D]`` of one shape; T tokens in all.
        weight: ``[D]`` in the dtype of the arithmetic, query times key-norm weight.
        eps: added to the mean square of a key.
        scale: the sum of the weights.
        prior, prior_lse: ``[..., D]`` and ``[T]``: one more term, whose score is its log-sum-exp.

    Returns:
        h, ``[..., D]`` in the dtype to which the sources promote, the log-sum-exp ``[T]`` over all terms, the scores and the
        inverse rms of the sources, ``[n, T]``.
    """
    storage = storage_dtype(sources)
    values = [rows(source).to(compute_dtype(storage)) for source in sources]
    inverse_rms = torch.rsqrt(torch.stack([v.square().mean(-1) for v in values]) + eps)
    # Products and sums, no matmul: one score per row and source costs less than another pass over the source.
    scores = torch.stack([(v * weight).sum(-1) for v in values]) * inverse_rms
    terms = scores if prior_lse is None else torch.cat([scores, prior_lse.unsqueeze(0)])
    lse = torch.logsumexp(terms, 0)
    alpha = (terms - lse).exp() * scale
    if prior is not None:
        values.append(rows(prior).to(values[0].dtype))
    h = alpha[0].unsqueeze(-1) * values[0]
    for i in range(1, len(values)):
        h = h + alpha[i].unsqueeze(-1) * values[i]
    return h.to(storage).view(sources[0].shape), lse, scores, inverse_rms


def site_backward(
    grad_h: Tensor, grad_sources: Sequence[Tensor | None], sources: Sequence[Tensor], weight: Tensor, scale: float,
    prior: Tensor | None, prior_lse: Tensor | None, lse: Tensor, scores: Tensor, inverse_rms: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of :func:`site_forward`.

    Args:
        grad_sources: for every source the gradient ``[..., D]`` that reaches it from later readers, or None.

    Returns:
        The gradients of the sources, ``grad_sources`` included, of the weight, of ``prior`` and of ``prior_lse``.
    """
    storage = storage_dtype(sources)
    compute = compute_dtype(storage)
    values = [rows(source).to(compute) for source in sources]
    d = rows(grad_h).to(compute)
    alpha = (scores - lse).exp() * scale
    toward = torch.stack([(d * v).sum(-1) for v in values])
    # alpha carries the scale, so the expectation under the weights divides it out again.
    expected = (alpha * toward).sum(0) / scale
    grad_prior = grad_prior_lse = None
    if prior is not None and prior_lse is not None:
        share = (prior_lse - lse).exp() * scale
        toward_prior = (d * rows(prior).to(compute)).sum(-1)
        expected = expected + share * toward_prior / scale
        grad_prior = (share.unsqueeze(-1) * d).to(prior.dtype).view(prior.shape)
        grad_prior_lse = share * (toward_prior - expected)
    d_scores = alpha * (toward - expected)
    coefficients = d_scores * inverse_rms
    shrink = coefficients * scores * inverse_rms / d.shape[-1]
    found = []
    grad_weight = torch.zeros_like(weight)
    for i, v in enumerate(values):
        grad = alpha[i].unsqueeze(-1) * d + coefficients[i].unsqueeze(-1) * weight - shrink[i].unsqueeze(-1) * v
        incoming = grad_sources[i]
        if incoming is not None:
            grad = grad + rows(incoming).to(compute)
        found.append(grad.to(sources[i].dtype).view(sources[i].shape))
        grad_weight = grad_weight + sum_over_tokens(coefficients[i].unsqueeze(-1) * v)
    return found, grad_weight, grad_prior, grad_prior_lse
