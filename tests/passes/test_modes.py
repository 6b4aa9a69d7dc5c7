"""Autocast and gradient modes inside a model hold in the stages for the operations that they held for."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from staged import check_plan, difference_from
from streams import WIDTH, Stream, plan_of, tokens, whole_of
from torch import Tensor, nn

CUTS = {True: [1, 3, 5], False: [2, 3, 4]}  # by transport: cached, or naive


class Scaled(Stream):
    """A table is made, in a mode, of an input and of a parameter; every branch is multiplied by both."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def mode(self) -> Any:
        raise NotImplementedError

    def prepare(self, tokens: Tensor) -> Any:
        with self.mode():
            rows = torch.nn.functional.one_hot(tokens, 16).to(self.table.dtype)[..., :WIDTH]
            return rows @ torch.ones(WIDTH, WIDTH, dtype=rows.dtype) + 1, rows @ self.table + 1

    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        added = super().branch(x, i, None)
        return added * prepared[0].to(added.dtype) * prepared[1].to(added.dtype)


class NoAutocast(Scaled):
    def mode(self) -> Any:
        return torch.autocast("cpu", enabled=False)


class Autocast(Scaled):
    def mode(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)


class NoGradient(Scaled):
    def mode(self) -> Any:
        return torch.no_grad()


class Surrounded(Stream):
    """Sublayers 2 to 4 lie in a mode; 3 in one that undoes it."""

    def outer(self) -> Any:
        raise NotImplementedError

    def inner(self) -> Any:
        return contextlib.nullcontext()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for i in (0, 1):
            x = x + self.branch(self.norms[i](x), i, None)
        with self.outer():
            x = x + self.branch(self.norms[2](x), 2, None).to(x.dtype)
            with self.inner():
                x = x + self.branch(self.norms[3](x), 3, None).to(x.dtype)
            x = x + self.branch(self.norms[4](x), 4, None).to(x.dtype)
        return self.head(self.norm(x + self.branch(self.norms[5](x), 5, None)))


class SublayersUnderAutocast(Surrounded):
    def outer(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def inner(self) -> Any:
        return torch.autocast("cpu", enabled=False)


class SublayersWithoutAutocast(Surrounded):
    def outer(self) -> Any:
        return torch.autocast("cpu", enabled=False)


class FrozenBranch(Stream):
    """Branches 2 and 3 give no gradients to their weights; within 3, a part of the work does again."""

    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        if i not in (2, 3):
            return super().branch(x, i, None)
        with torch.no_grad():
            y = self.mixes[i](x)
            with torch.enable_grad() if i == 3 else contextlib.nullcontext():
                y = y + self.mixes[i].bias
        return torch.tanh(y)


class FrozenStart(Stream):
    """The embedding and the first three sublayers run without gradients."""

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.embedding(tokens)
            for i in range(3):
                x = x + self.branch(self.norms[i](x), i, None)
        for i in range(3, 6):
            x = x + self.branch(self.norms[i](x), i, None)
        return self.head(self.norm(x))


@pytest.mark.parametrize("autocast", [False, True], ids=["alone", "under autocast"])
@pytest.mark.parametrize(
    "model_class",
    [NoAutocast, Autocast, NoGradient, SublayersUnderAutocast, SublayersWithoutAutocast, FrozenBranch, FrozenStart],
)
def test_modes_hold_in_stages(model_class: type[nn.Module], autocast: bool) -> None:
    """Bit for bit, as rounding tells the precision; and a parameter has a gradient where it had one."""
    model = model_class()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        whole = whole_of(model)
        for cached, boundaries in CUTS.items():
            plan = plan_of(whole, boundaries=boundaries, cached=cached)
            check_plan(plan, whole)
            difference = difference_from(whole, plan, (tokens(),))
            assert (difference.output, difference.gradient) == (0.0, 0.0)
            assert torch.is_autocast_enabled("cpu") == autocast
            assert torch.is_grad_enabled()


@pytest.mark.parametrize(("model_class", "flows"), [(NoGradient, False), (NoAutocast, True)])
def test_what_is_made_without_gradients_sends_none_back(model_class: type[nn.Module], flows: bool) -> None:
    plan = plan_of(whole_of(model_class()))
    assert [value.differentiable for value in plan.values if value.dtype == "float32" and value.kind == "other"] == [flows]
    assert all(value.differentiable for value in plan.values if value.kind != "other")
