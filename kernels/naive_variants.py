"""Sites that weigh their sources otherwise than by softmax attention with one learned query, in plain torch.

They are what the paper compares Attention Residuals with (arXiv 2603.15031, the ablation), and all of them are rows of a depth
mixing matrix: ``h = sum_i M_i v_i``. There are no fused kernels for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_compile.kernels.naive import compute_dtype, storage_dtype, without_autocast

SINKHORN_STEPS = 20
_IDENTITY_LOGIT = 5.0  # streams hardly mix at first


def depth_weights(
    values: Tensor, query: Tensor | None, key_norm: Tensor | None, eps: float, projection: Tensor | None, offset: Tensor | None,
    weights: str, heads: int, normalize_keys: bool,
) -> Tensor:  # fmt: skip
    """What every token and head gives to the n sources: ``[n, ..., H]``, or ``[n, 1, ...]`` where no input changes it.

    The weights are 1/n each where all parameters but ``key_norm`` are zero; with softmax they always add up to one.

    Args:
        values: the sources, ``[n, ..., D]``, in the dtype of the arithmetic.
        query, key_norm: ``[D]``; without a query every source gets ``(1 + offset) / n``.
        eps: added to the mean square of a key, if keys are normalised.
        projection: ``[D, D]``, of the latest source to what is added to the query.
        offset: ``[n]``, or None for zeros.
        weights: "softmax" or "sigmoid", where there is a query.
        heads: number H of heads.
    """
    count = values.shape[0]
    if query is None:
        equal = values.new_ones(count) if offset is None else 1 + offset.to(values.dtype)
        return (equal / count).view(count, *[1] * (values.dim() - 1))
    needs_norms = normalize_keys or projection is not None
    inverse_rms = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) if needs_norms else None
    asked = query.to(values.dtype)
    if projection is not None:
        assert inverse_rms is not None
        asked = asked + (values[-1] * inverse_rms[-1]) @ projection.to(values.dtype).mT
    if key_norm is not None:
        asked = asked * key_norm.to(values.dtype)
    scores = (values * asked).unflatten(-1, (heads, -1)).sum(-1)
    if normalize_keys:
        assert inverse_rms is not None
        scores = scores * inverse_rms
    return torch.softmax(scores, 0) if weights == "softmax" else 2 * torch.sigmoid(scores) / count


def site_variant(
    sources: Sequence[Tensor], query: Tensor | None, key_norm: Tensor | None, eps: float, scale: float,
    projection: Tensor | None = None, offset: Tensor | None = None, weights: str = "softmax", heads: int = 1,
    normalize_keys: bool = True,
) -> Tensor:  # fmt: skip
    """``h = scale * sum_i alpha_i v_i`` with the weights alpha of :func:`depth_weights`, head by head.

    Args:
        sources: n tensors ``[..., D]`` of one shape; their dtypes may differ.
        scale: the sum of the weights of a new site: 1, or n to keep the standard residual.

    Returns:
        ``[..., D]`` in the dtype to which the sources promote.
    """
    storage = storage_dtype(sources)
    compute = compute_dtype(storage)
    with without_autocast(sources[0]):
        values = torch.stack([source.to(compute) for source in sources])
        alpha = depth_weights(values, query, key_norm, eps, projection, offset, weights, heads, normalize_keys)
        mixed: Tensor = (alpha.unsqueeze(-1) * values.unflatten(-1, (alpha.shape[-1], -1))).sum(0).flatten(-2)
        return (mixed * scale).to(storage)


def multi_stream_offsets(
    read: Sequence[Tensor], write: Sequence[Tensor], mix: Sequence[Tensor], before: Sequence[int]
) -> list[Tensor]:
    """Several residual streams as weights of the sources: of each of K sites, ``offset`` of :func:`depth_weights`.

    S streams start as copies of the root. Before site k they are mixed by a doubly stochastic matrix A_k, then the sublayers
    since the last site are written to them, sublayer j mainly to stream ``(j - 1) mod S``; the site reads a weighted mean of the
    streams. A source's weight is what of it has reached the read, which depends on no input. With zero parameters it is one,
    whatever A does, since the columns of A add up to one.

    Args:
        read, write: K vectors ``[S]``, added to the mean and to the first choice of a stream.
        mix: K matrices ``[S, S]``: logits, added to those of nearly the identity.
        before: the number of sublayers before each site.

    Returns:
        K vectors ``[1 + before]``, in float32, or float64 for such parameters.
    """
    compute = compute_dtype(storage_dtype(read))
    with without_autocast(read[0]):
        streams = read[0].shape[0]
        identity = torch.eye(streams, dtype=compute, device=read[0].device)
        reads, writes = torch.stack(list(read)).to(compute) + 1 / streams, torch.stack(list(write)).to(compute)
        mixing = _doubly_stochastic(torch.stack(list(mix)).to(compute) + _IDENTITY_LOGIT * identity)
        reached = torch.ones_like(identity[:1])  # [sources, S]: how much of a source each stream holds
        found = []
        for k, count in enumerate(before):
            new = [streams * identity[(j - 1) % streams] + writes[k] for j in range(reached.shape[0], count + 1)]
            reached = torch.cat([reached @ mixing[k].mT, *(row.unsqueeze(0) for row in new)])
            found.append(reached @ reads[k] - 1)
        return found


def _doubly_stochastic(logits: Tensor) -> Tensor:
    """Sinkhorn's iteration on matrices ``[K, S, S]``; the last step makes the columns add up to one."""
    for _ in range(SINKHORN_STEPS):
        logits = logits.log_softmax(-1).log_softmax(-2)
    return logits.exp()
