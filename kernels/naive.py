"""The definition of one AttnRes read in plain torch, and what its computations by phases share.

``naive_site``, ``naive_inter`` and ``naive_merge`` are the twins of the fused kernels; this is what all of them compute.

Symbols as in arXiv 2603.15031: sources v_i, pseudo-query w, key-norm weight g, weights alpha.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def storage_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    """The dtype that adding the sources up would give."""
    return functools.reduce(torch.promote_types, [source.dtype for source in sources])


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """Arithmetic is float32 for 16- and 32-bit storage and float64 for float64."""
    return torch.float64 if storage == torch.float64 else torch.float32


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round scores that are matrix products to 16 bits."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()


def rows(x: Tensor) -> Tensor:
    """``x``, ``[..., D]``, as a matrix of tokens ``[T, D]``."""
    return x.reshape(-1, x.shape[-1])


def sum_over_tokens(x: Tensor) -> Tensor:
    """``x``, ``[T, D]``, summed to ``[D]``, over a few rows at a time first.

    Inductor sums over an outer dimension column by column, and one column of 8 rows lies in cache where one of T rows does not:
    a third of the time for the gradients of a norm's weight and of a query.
    """
    tokens = x.shape[0]
    if isinstance(tokens, int) and tokens % 8 == 0:
        x = x.view(tokens // 8, 8, x.shape[1]).sum(1)
    return x.sum(0)


def weight_of(query: Tensor, key_norm: Tensor | None, compute: torch.dtype) -> Tensor:
    """Query times key-norm weight, ``[D]``: all that a score needs of the two."""
    return query.to(compute) if key_norm is None else query.to(compute) * key_norm.to(compute)


def depth_weights(values: Sequence[Tensor], weight: Tensor, eps: float) -> Tensor:
    """The weights alpha that a token gives to its n sources: ``[n, ...]``, adding up to one.

    Args:
        values: the sources, ``[..., D]`` each, in the dtype of the arithmetic.
        weight: ``[D]``, see :func:`weight_of`.
        eps: added to the mean square of a key.
    """
    # Products and sums, no matmul: autocast must not round the scores to 16 bits.
    scores = [(v * weight).sum(-1) * torch.rsqrt(v.square().mean(-1) + eps) for v in values]
    return torch.softmax(torch.stack(scores), 0)


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
    weight = weight_of(query, key_norm, compute)
    values = [source.to(compute) for source in sources]
    alpha = depth_weights(values, weight, eps) * scale
    mixed = alpha[0].unsqueeze(-1) * values[0]
    for i in range(1, len(values)):
        mixed = mixed + alpha[i].unsqueeze(-1) * values[i]
    return mixed.to(storage)
