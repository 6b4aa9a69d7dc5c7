"""Phase 1 of two-phase AttnRes in plain torch: all queries of a block against the complete blocks.

The twin of ``fused_inter``, and what is compiled where there are no fused kernels. Scores are matrix products. What is kept
per token lies in memory token by token, as ``[T, n, S]``: with T innermost, the n x S weights of one token would come from as
many cache lines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_compile.kernels.naive import compute_dtype, rows, storage_dtype


def inter_forward(sources: Sequence[Tensor], weights: Tensor, eps: float) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The mixtures of n sources for S queries (section "Two-phase computation"): ``mixed_s = sum_i softmax_i(score_si) v_i``.

    Args:
        sources: n tensors ``[..., D]`` of one shape and dtype; T tokens in all.
        weights: ``[S, D]`` in the dtype of the arithmetic, queries times key-norm weights.
        eps: added to the mean square of a key.

    Returns:
        S tensors ``[..., D]`` (none where n is 1: every mixture is the source itself), the log-sum-exps ``[S, T]``, the scores
        ``[S, n, T]`` and the inverse rms of the sources ``[n, T]``.
    """
    storage = storage_dtype(sources)
    values = [rows(source).to(compute_dtype(storage)) for source in sources]
    inverse_rms = torch.rsqrt(torch.stack([v.square().mean(-1) for v in values], -1) + eps)
    scores = torch.stack([v @ weights.t() for v in values], 1) * inverse_rms.unsqueeze(-1)
    stats = scores.permute(2, 1, 0), inverse_rms.t()
    if len(values) == 1:
        return [], scores.squeeze(1).t(), *stats
    # Not torch.logsumexp: Inductor's loops for it are not vectorised over the queries.
    largest = scores.amax(1, keepdim=True)
    alpha = (scores - largest).exp()
    total = alpha.sum(1, keepdim=True)
    alpha = alpha / total
    mixed = []
    for s in range(weights.shape[0]):
        h = alpha[:, 0, s, None] * values[0]
        for i in range(1, len(values)):
            h = h + alpha[:, i, s, None] * values[i]
        mixed.append(h.to(storage).view(sources[0].shape))
    return mixed, (largest + total.log()).squeeze(1).t(), *stats


def inter_backward(
    grad_mixed: Sequence[Tensor], grad_lse: Tensor, grad_sources: Sequence[Tensor | None], sources: Sequence[Tensor],
    weights: Tensor, lse: Tensor, scores: Tensor, inverse_rms: Tensor,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Gradients of :func:`inter_forward`.

    Args:
        grad_mixed, grad_lse: S tensors ``[..., D]``, and ``[S, T]``.
        grad_sources: for every source the gradient ``[..., D]`` that reaches it from later readers, or None: a block's
            gradient is accumulated here, once per block.

    Returns:
        The gradients of the sources, ``grad_sources`` included, and of the weights.
    """
    storage = storage_dtype(sources)
    compute = compute_dtype(storage)
    scores, inverse_rms = scores.permute(2, 1, 0), inverse_rms.t()
    tokens, n, queries = scores.shape
    values = [rows(source).to(compute) for source in sources]
    grads = [rows(grad).to(compute) for grad in grad_mixed]
    width = values[0].shape[-1]
    alpha = (scores - lse.t().unsqueeze(1)).exp()
    toward = torch.stack([(grad * v).sum(-1) for grad in grads for v in values], -1).view(tokens, queries, n).transpose(1, 2)
    d_scores = alpha * (toward - (alpha * toward).sum(1, keepdim=True) + grad_lse.t().unsqueeze(1))
    # The sum over few queries as a product: as a reduction over the innermost dimension it would not be vectorised. Nothing is
    # left to do on the result, since Inductor would do it anew for every feature.
    along_sources = d_scores * scores * (inverse_rms.square() / width).unsqueeze(-1)
    shrink = (along_sources @ scores.new_ones(queries, 1)).squeeze(-1)
    coefficients = d_scores * inverse_rms.unsqueeze(-1)
    found = []
    grad_weights = torch.zeros_like(weights)
    for i, v in enumerate(values):
        # No product coefficients @ weights: writing and reading it back takes longer than these sums in a loop that runs anyway.
        grad = alpha[:, i, 0, None] * grads[0] + coefficients[:, i, 0, None] * weights[0]
        for s in range(1, queries):
            grad = grad + alpha[:, i, s, None] * grads[s] + coefficients[:, i, s, None] * weights[s]
        grad = grad - shrink[:, i, None] * v
        incoming = grad_sources[i]
        if incoming is not None:
            grad = grad + rows(incoming).to(compute)
        found.append(grad.to(sources[i].dtype).view(sources[i].shape))
        grad_weights = grad_weights + coefficients[:, i].t() @ v
    return found, grad_weights
