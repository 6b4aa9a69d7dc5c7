"""What a rank keeps for its later stages, and the gradients that these owe to the stage that keeps it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from attnres_compile.errors import TransferError


class BlockCache:
    """The block cache of one rank, shared by its stages.

    In the forward pass a stage puts a value, later stages get it, and the last of them drops it. In the backward pass each of
    them deposits its gradient, and the stage that put the value collects their sum once.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], Tensor] = {}
        self._deposits: dict[tuple[int, str], dict[int, Tensor | None]] = {}
        self.peak_nbytes = 0
        self.plans_agree = False

    def put(self, microbatch: int, name: str, value: Tensor) -> None:
        """Keep ``value``.

        Raises:
            TransferError: if it is there already.
        """
        if (microbatch, name) in self._values:
            raise TransferError(f"{name} of microbatch {microbatch} was put into the block cache twice.")
        self._values[microbatch, name] = value
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def get(self, microbatch: int, name: str) -> Tensor:
        """A value that was put and not yet dropped.

        Raises:
            TransferError: if it is not there.
        """
        try:
            return self._values[microbatch, name]
        except KeyError:
            raise TransferError(
                f"{name} of microbatch {microbatch} is not in the block cache: the stages of this rank ran out of order."
            ) from None

    def drop(self, microbatch: int, name: str) -> None:
        self.get(microbatch, name)
        del self._values[microbatch, name]

    def deposit(self, microbatch: int, name: str, stage: int, gradient: Tensor | None) -> None:
        """Leave what ``stage`` owes for a value that it got; None where it made no difference.

        Raises:
            TransferError: if the stage did so before.
        """
        owed = self._deposits.setdefault((microbatch, name), {})
        if stage in owed:
            raise TransferError(f"stage {stage} deposited the gradient of {name}, microbatch {microbatch}, twice.")
        owed[stage] = gradient
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def collect(self, microbatch: int, name: str, stages: Collection[int]) -> Tensor | None:
        """The sum of what ``stages`` deposited for a value; None if it made no difference to any of them.

        Raises:
            TransferError: if a stage has not deposited, or one has that never got the value.
        """
        owed = self._deposits.pop((microbatch, name), {})
        if set(owed) != set(stages):
            lost, foreign = sorted(set(stages) - set(owed)), sorted(set(owed) - set(stages))
            what = f"stage {lost[0]} lost its" if lost else f"stage {foreign[0]} deposited a foreign"
            raise TransferError(f"{what} gradient of {name}, microbatch {microbatch}: the step's gradients would be wrong.")
        gradients = [gradient for gradient in owed.values() if gradient is not None]
        return torch.stack(gradients).sum(0) if len(gradients) > 2 else sum(gradients[1:], gradients[0]) if gradients else None

    def clear(self) -> None:
        self._values.clear()
        self._deposits.clear()

    def __len__(self) -> int:
        """Values and deposits that are held now: none between steps."""
        return len(self._values) + sum(map(len, self._deposits.values()))

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        held = [*self._values.values(), *(g for owed in self._deposits.values() for g in owed.values() if g is not None)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
