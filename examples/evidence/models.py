"""The model of a row: a small Llama with the residual connection that the row asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rows import Row, Scale, Size
from small_llama import small_llama
from torch import Tensor, nn

import attnres_compile as ac


def plain_model(size: Size) -> nn.Module:
    """Weights are drawn wider than by default, 0.02, which suits widths of thousands."""
    return small_llama(size.layers, size.hidden, size.length, size.heads, initializer_range=0.5 * size.hidden**-0.5)


def connected(plain: nn.Module, row: Row, scale: Scale, ids: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
    """The model with the residual connection of ``row``, whose parameters are trained, and what is called instead of it.

    ``ids`` are an example of what it is called with, ``[batch, length]``.
    """
    config = row.config
    if not scale.compiled:
        model = plain if config is None else ac.rewrite(plain, config, args=(ids,), kwargs={"use_cache": False})
        return model, model
    model = plain.to(scale.device)
    if config is None:
        return model, torch.compile(model)
    with torch.autocast(scale.device, torch.bfloat16):
        ac.convert_(model, config, args=(ids.to(scale.device),), kwargs={"use_cache": False})
    return model, torch.compile(model, backend="attnres")
