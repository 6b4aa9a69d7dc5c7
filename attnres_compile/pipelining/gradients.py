"""Gradients of one rank's parameters over a step: what was there before stays apart until the step's own are complete."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class StepGradients:
    """Scales what a step adds to ``.grad``, once, whatever was there before and however many stages share a parameter.

    torch's schedules divide ``.grad`` by the number of microbatches at the end of a stage's step: all of it, with what earlier
    steps added, and once per stage that holds the parameter. Here earlier gradients are set aside when a step begins; when the
    last stage of the rank is done, the step's own are divided and added to them.
    """

    def __init__(self) -> None:
        self._before: dict[nn.Parameter, Tensor] = {}
        self._stages: dict[int, tuple[nn.Parameter, ...]] = {}
        self._factors: dict[int, int] = {}

    def begin(self, stage: int, parameters: Iterable[nn.Parameter]) -> None:
        """A step of ``stage`` begins. If the one before did not end, gradients become what they were before it."""
        if stage in self._stages:
            self.abandon()
        self._stages[stage] = tuple(parameters)
        for parameter in self._stages[stage]:
            if parameter.grad is not None:
                self._before[parameter] = parameter.grad
                parameter.grad = None

    def finish(self, stage: int, factor: int) -> None:
        """All gradients of ``stage`` are there, to be divided by ``factor``."""
        self._factors[stage] = factor
        if self._factors.keys() < self._stages.keys():
            return
        scales = {parameter: self._factors[i] for i, parameters in self._stages.items() for parameter in parameters}
        for parameter, scale in scales.items():
            if parameter.grad is not None and scale != 1:
                parameter.grad.div_(scale)
            before = self._before.pop(parameter, None)
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        self._clear()

    def abandon(self) -> None:
        """The step failed: leave gradients as they were before it."""
        for parameters in self._stages.values():
            for parameter in parameters:
                parameter.grad = self._before.get(parameter)
        self._clear()

    def _clear(self) -> None:
        for held in (self._before, self._stages, self._factors):
            held.clear()
