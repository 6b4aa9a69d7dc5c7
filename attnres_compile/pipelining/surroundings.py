"""What a stage's graph took for granted when it was captured: autocast, and the mode of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from attnres_compile.errors import CaptureError, PartitionError, TransferError
from attnres_compile.transport import CutValue

_KEY = "surroundings"
_AUTOCAST = ("cpu", "cuda", "xpu")


def record_surroundings(stage: GraphModule, device: str) -> None:
    """Keep with ``stage``, captured on a type of device, the autocast that is on there now and the stage's mode.

    Raises:
        PartitionError: if autocast is on, and the model on the meta device, where it has no effect.
    """
    if device == "meta" and any(map(torch.is_autocast_enabled, _AUTOCAST)):
        raise PartitionError(
            "autocast has no effect on the meta device, so the stages would not be those of the training; call partition on a "
            "real device, or outside autocast on a model in 16 bits."
        )
    stage.meta[_KEY] = autocast_dtype(device), stage.training


def check_surroundings(index: int, stage: GraphModule, running: nn.Module, device: str, values: Iterable[CutValue]) -> None:
    """Compare with what is now. Every rank can do so by itself, before it waits for others.

    Args:
        running: what runs for ``stage``, number ``index``, on a type of device.
        values: what it exchanges with others.

    Raises:
        TransferError: if autocast differs.
        CaptureError: if ``running`` is in another mode.
    """
    autocast, training = stage.meta[_KEY]
    now = autocast_dtype(device)
    if now != autocast:
        value = next(value for value in values if value.differentiable)
        raise TransferError(
            f"stage {index} runs {_under(now)}; its plan was made {_under(autocast)} and has {value.label} in {value.dtype}. "
            "Call partition under the autocast that training uses."
        )
    if running.training != training:
        raise CaptureError(
            f"stage {index} was captured in {_mode(training)} mode, which its graph keeps, and is set to "
            f"{_mode(running.training)} mode. Call partition on the model in {_mode(running.training)} mode, too: the stages of "
            "both plans share their parameters."
        )


def check_autocast(recorded: dict[str, Any], inputs: Iterable[Any]) -> None:
    """Compare the autocast that :func:`record_surroundings` kept with that on the device of ``inputs`` now.

    Raises:
        CaptureError: if autocast differs.
    """
    device = next((value.device.type for value in inputs if isinstance(value, Tensor)), "meta")
    captured, now = recorded[_KEY][0], autocast_dtype(device)
    if now != captured:
        raise CaptureError(
            f"this graph was rewritten {_under(captured)} and is called {_under(now)}; call rewrite under the autocast that it "
            "runs under."
        )


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast turns the operands of matrix products into on a type of device; None where it is off."""
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def _under(autocast: torch.dtype | None) -> str:
    return "without autocast" if autocast is None else f"under autocast to {str(autocast).removeprefix('torch.')}"


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"
