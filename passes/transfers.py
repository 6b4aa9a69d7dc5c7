"""What stands in a stage's graph for a transfer: a reader of the printed graph sees what moves, from where and where to.

They pass their value on. What leaves a stage without being made there leaves autograd too: its gradient is the next reader's
affair and travels on its own.
"""

from __future__ import annotations

from torch import Tensor


def block_recv(value: Tensor, label: str, source: int) -> Tensor:
    """``value`` came over the hop from stage ``source``."""
    return value


def block_cache_get(value: Tensor, label: str) -> Tensor:
    """``value`` came from the rank's cache."""
    return value


def block_send(value: Tensor, label: str, target: int, relayed: bool = False) -> Tensor:
    """``value`` goes over the hop to stage ``target``."""
    return value.detach() if relayed else value


def block_cache_put(value: Tensor, label: str, alone: bool = False) -> Tensor:
    """``value`` goes to the rank's cache, for a later stage of the same rank; ``alone`` if it is made here and not sent.

    Then its gradient enters the stage here, else where the value is sent or received.
    """
    return value if alone else value.detach()
