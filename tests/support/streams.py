"""A small PreNorm stream for tests to change, and how they cut it into stages."""

from __future__ import annotations

from typing import Any

import torch
from pipelines import Norm
from torch import Tensor, nn

import attnres_compile as ac
from attnres_compile.pipelining.partition import cut_rewritten, stage_placement

WORDS, WIDTH, SHAPE = 23, 8, (2, 5)


class Stream(nn.Module):
    """Six sublayers ``x + branch(norm(x))``. What ``prepare`` makes of the tokens is read by all of them."""

    depth = 6

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.norms = nn.ModuleList(Norm(WIDTH) for _ in range(self.depth))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(self.depth))
        self.norm, self.head = Norm(WIDTH), nn.Linear(WIDTH, WORDS)

    def prepare(self, tokens: Tensor) -> Any:
        return None

    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        return torch.tanh(self.mixes[i](x))

    def forward(self, tokens: Tensor) -> Any:
        prepared = self.prepare(tokens)
        x = self.embedding(tokens)
        for i, norm in enumerate(self.norms):
            x = x + self.branch(norm(x), i, prepared)
        return self.head(self.norm(x))


def tokens() -> Tensor:
    """``[2, 5]``, with a few zeros."""
    return torch.randint(WORDS, SHAPE, generator=torch.Generator().manual_seed(3)) // 2


def whole_of(
    model: nn.Module, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None, block_size: int = 2
) -> ac.RewrittenModule:
    """``model``, in its own dtype, converted, with queries that are not zero, and rewritten."""
    args = (tokens(),) if args is None else args
    ac.convert_(model, ac.AttnResConfig(block_size=block_size), args, kwargs)
    for site in model.attnres.sites:  # type: ignore[union-attr]
        nn.init.normal_(site.query, std=0.3)
    return ac.rewrite(model, None, args, kwargs)


def plan_of(
    whole: ac.RewrittenModule, ranks: int = 2, virtual: int = 2, boundaries: list[int | str] | None = None,
    placement: str = "looped", cached: bool = True, two_phase: bool = False,
) -> ac.PipelinePlan:  # fmt: skip
    """What ``ac.partition`` makes of the model, without capturing it again."""
    order = stage_placement(ranks, virtual, placement)
    return cut_rewritten(whole, order, ranks, virtual, boundaries, cached, two_phase)
