"""Transfers that know which hop they serve, so that one that fails can say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_compile.errors import TransferError
from attnres_compile.transport import CutValue


@dataclasses.dataclass(frozen=True)
class Route:
    """One direction of one hop, for one microbatch: what ``stage`` on ``rank`` exchanges with its neighbour."""

    stage: int
    rank: int
    neighbour: int
    neighbour_rank: int
    microbatch: int
    is_gradient: bool

    def describe(self, sends: bool, label: str) -> str:
        what = f"{'the gradient of ' if self.is_gradient else ''}{label}, microbatch {self.microbatch}"
        here, there = f"stage {self.stage} (rank {self.rank})", f"stage {self.neighbour} (rank {self.neighbour_rank})"
        return f"{here} could not send {what} to {there}" if sends else f"{here} did not get {what} from {there}"


def check(tensor: Tensor, value: CutValue, route: Route) -> Tensor:
    """``tensor``, contiguous, if it is what the plan says of ``value``.

    Raises:
        TransferError: for another shape or dtype, which the receiver would misread.
    """
    expected, found = (value.shape, value.dtype), (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if expected != found:
        raise TransferError(
            f"{route.describe(True, value.label)}: the plan has {value.dtype}{list(value.shape)}, the stage made "
            f"{found[1]}{list(found[0])}. Call partition under the autocast, and with the microbatch, that training uses."
        )
    return tensor.detach().contiguous()


class Transfer:
    """``dist.isend`` or ``dist.irecv``, for one tensor on one route; it compares equal to these, which P2POp asks for."""

    def __init__(self, operation: Callable[..., Any], route: Route, label: str, failed: Callable[[], None]) -> None:
        self.operation, self.route, self.label, self.failed = operation, route, label, failed
        self.work: PendingTransfer | None = None

    def __call__(self, tensor: Tensor, *, group: Any = None, tag: int = 0, **peer: int) -> PendingTransfer:
        sends = self.operation is dist.isend
        (rank,) = peer.values()
        text = self.route.describe(sends, self.label)
        try:
            work = self.operation(tensor, group=group, tag=tag, **{"group_dst" if sends else "group_src": rank})
        except BaseException as error:
            self.failed()
            if isinstance(error, RuntimeError):
                raise _lost(text, error) from error
            raise
        self.work = PendingTransfer(work, tensor, text, self.failed)
        return self.work

    def __eq__(self, other: object) -> bool:
        return other is self.operation or (isinstance(other, Transfer) and other.operation is self.operation)

    def __hash__(self) -> int:
        return hash(self.operation)


class PendingTransfer:
    """A transfer under way. Once waited for it holds no tensor any more."""

    def __init__(self, work: Any, tensor: Tensor, text: str, failed: Callable[[], None]) -> None:
        self._work, self._text, self._failed = work, text, failed
        self._tensor: Tensor | None = tensor

    def wait(self, *timeout: Any) -> bool:
        """Wait until the transfer is done.

        Raises:
            TransferError: if it fails or times out, naming the hop.
        """
        if self._work is None:
            return True
        try:
            self._work.wait(*timeout)
        except BaseException as error:  # an interrupt, too: it finds most ranks here
            self._failed()
            if isinstance(error, RuntimeError):
                raise _lost(self._text, error) from error
            raise
        self._work = self._tensor = None
        return True

    def is_completed(self) -> bool:
        return self._work is None or self._work.is_completed()


def _lost(text: str, error: Exception) -> TransferError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return TransferError(f"{text}: {reason}. The peer died, hangs, or runs another step; look at its log, and start again.")


def operations(
    kind: Callable[..., Any], tensors: Sequence[Tensor], values: Sequence[CutValue], route: Route, peer: int, group: Any,
    failed: Callable[[], None],
) -> list[dist.P2POp]:  # fmt: skip
    """What torch's schedules run: one operation per value, in the order of the plan."""
    return [
        dist.P2POp(Transfer(kind, route, value.label, failed), tensor, peer, group)
        for value, tensor in zip(values, tensors, strict=True)
    ]


def empty_like(value: CutValue, device: torch.device) -> Tensor:
    """A buffer for ``value``."""
    return torch.empty(value.shape, dtype=getattr(torch, value.dtype), device=device)
