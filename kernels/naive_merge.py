"""Phase 2 of two-phase AttnRes in plain torch: add the branch, merge the partial sum by online softmax, apply the norm.

The twin of ``fused_merge``, and what is compiled where there are no fused kernels. Written so that Inductor makes one loop over
the rows of each direction: in the backward pass every reduction depends on the inputs alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_compile.kernels.naive import compute_dtype, rows, sum_over_tokens

STATISTICS = {"": 3, "rms": 4, "layer": 5}  # how many a merge keeps for its backward, by the norm behind it


def merge_forward(
    partial: Tensor, branch: Tensor | None, mixed: Tensor, lse: Tensor, weight: Tensor, eps: float, scale: float,
    norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, norm_eps: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """``h = scale * ((1 - m) mixed + m total)`` with ``m = sigmoid(s - lse)`` (section "Two-phase computation").

    Not ``mixed + m (total - mixed)``, in which a small total drowns beside a large mixture; ``1 - m`` is ``sigmoid(lse - s)`` for
    the same reason.

    Args:
        partial: ``[..., D]``, the partial sum of the block.
        branch: ``[..., D]``, what is added to it first, or None.
        mixed, lse: ``[..., D]`` and ``[T]``, the mixture of the complete blocks and its log-sum-exp, for T tokens.
        weight: ``[D]`` in the dtype of the arithmetic, query times key-norm weight; ``eps`` belongs to the keys.
        scale: the sum of the weights.
        norm: what is applied to h: "" for nothing, "rms" or "layer".
        norm_weight, norm_bias: ``[D]``, or None for ones and zeros.

    Returns:
        ``total = partial + branch`` (``partial`` itself without a branch), the norm of h, both ``[..., D]`` in the storage
        dtype, and what the backward pass wants to know again, ``[T]`` each: s - lse, s, the inverse rms of the total, then of the
        norm the mean ("layer") and the inverse deviation ("rms", "layer").
    """
    compute = compute_dtype(mixed.dtype)
    total = partial if branch is None else partial + branch
    x, o = rows(total).to(compute), rows(mixed).to(compute)
    inverse_rms = torch.rsqrt(x.square().mean(-1) + eps)
    score = (x * weight).sum(-1) * inverse_rms
    excess = score - lse
    m, rest = torch.sigmoid(excess).unsqueeze(-1), torch.sigmoid(-excess).unsqueeze(-1)
    h = scale * (rest * o + m * x)
    stats = [excess, score, inverse_rms]
    if norm == "layer":
        mean = h.mean(-1)
        h = h - mean.unsqueeze(-1)
        stats.append(mean)
    if norm:
        inverse = torch.rsqrt(h.square().mean(-1) + norm_eps)
        h = h * inverse.unsqueeze(-1)
        stats.append(inverse)
    if norm_weight is not None:
        h = h * norm_weight.to(compute)
    if norm_bias is not None:
        h = h + norm_bias.to(compute)
    return total, h.to(total.dtype).view(total.shape), stats


def merge_backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, mixed: Tensor, weight: Tensor, scale: float,
    norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, stats: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of :func:`merge_forward`.

    Args:
        grad_y: ``[..., D]``, the gradient of the norm's output.
        grad_total: ``[..., D]``, the gradient that reaches ``total`` from its later readers, or None.

    Returns:
        The gradients of ``total`` (hence of partial and branch; ``grad_total`` is in it), of ``mixed``, of ``lse``, of
        ``weight``, and of the norm's weight and bias where it has them.
    """
    compute = compute_dtype(mixed.dtype)
    width = total.shape[-1]
    excess, score, inverse_rms, *of_norm = stats
    x, o, grad = rows(total).to(compute), rows(mixed).to(compute), rows(grad_y).to(compute)
    share, remainder = torch.sigmoid(excess), torch.sigmoid(-excess)
    m, rest = share.unsqueeze(-1), remainder.unsqueeze(-1)
    step = scale * (x - o)  # dh / dm
    d = grad if norm_weight is None else grad * norm_weight.to(compute)
    grad_norm_weight = grad_norm_bias = None
    if norm:
        inverse = of_norm[-1]
        h = scale * (rest * o + m * x)
        normed = (h - of_norm[0].unsqueeze(-1) if norm == "layer" else h) * inverse.unsqueeze(-1)
        along = (normed * d).sum(-1) / width
        toward = (d * step).sum(-1) - along * (normed * step).sum(-1)
        dh = d - normed * along.unsqueeze(-1)
        if norm == "layer":
            mean = d.sum(-1) / width
            toward = toward - mean * step.sum(-1)
            dh = dh - mean.unsqueeze(-1)
        toward, dh = toward * inverse, dh * inverse.unsqueeze(-1)
        if norm_weight is not None:
            grad_norm_weight = sum_over_tokens(grad * normed).to(norm_weight.dtype)
        if norm_bias is not None:
            grad_norm_bias = sum_over_tokens(grad).to(norm_bias.dtype)
    else:
        toward, dh = (d * step).sum(-1), d
    grad_score = share * remainder * toward
    along_weight = grad_score * inverse_rms
    along_x = along_weight * score * inverse_rms / width
    grad_x = (scale * m) * dh + along_weight.unsqueeze(-1) * weight - along_x.unsqueeze(-1) * x
    if grad_total is not None:
        grad_x = grad_x + rows(grad_total).to(compute)
    grad_mixed = (scale * rest) * dh
    grad_weight = sum_over_tokens(along_weight.unsqueeze(-1) * x)
    return (
        grad_x.to(total.dtype).view(total.shape),
        grad_mixed.to(mixed.dtype).view(mixed.shape),
        -grad_score,
        grad_weight,
        grad_norm_weight,
        grad_norm_bias,
    )
