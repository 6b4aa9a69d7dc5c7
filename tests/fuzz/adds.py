"""What a spelling of the residual add takes of the branch: the definition's side of ``spellings.ADDS``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FACTORS = {"alpha": 0.5, "x - b": -1.0, "x -= b": -1.0, "lerp": 0.5, "lerp to the sum": 0.5, "add_ with alpha": 2.0}


def contribution(spelling: str, b: Tensor, mask: Tensor, parameter: Callable[[str], Tensor]) -> Tensor:
    """What is added to the stream where the branch gives ``b``."""
    b = b * FACTORS.get(spelling, 1.0)
    if spelling in ("addcmul", "addcmul_", "einsum"):
        return b * parameter("mix")
    if spelling == "gate scalar":
        return b * parameter("alpha")
    if spelling == "where":
        return torch.where(mask > 0, b, torch.zeros_like(b))
    if spelling == "where reversed":
        return torch.where(mask > 0, torch.zeros_like(b), b)
    if spelling == "split off":
        return torch.cat([torch.zeros_like(b[:, :1]), b[:, 1:]], dim=1)
    if spelling == "masked after":
        return b * mask
    return 0.5 * b * b if spelling == "squared" else b
