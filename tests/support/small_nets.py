"""A residual network that compiles in a tenth of a second, and what a converted one must give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import ReferenceStream
from torch import Tensor, nn
from torch.fx import GraphModule

import attnres_compile as ac
from attnres_compile.backend import compile_rewritten

WIDTH, VOCABULARY = 8, 16


def eager(gm: GraphModule, example_inputs: list[Any], **options: Any) -> Any:
    """The rewriting backend without a compiler behind it."""
    return compile_rewritten(gm, example_inputs, lambda graph, inputs, mode: graph.forward, **options)


class Block(nn.Module):
    """One sublayer, ``[..., D]`` to ``[..., D]``: token-wise."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Net(nn.Module):
    """Ids ``[B, T]`` to ``[B, T, D]``; four sublayers, four sites."""

    def __init__(self, layers: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def ids_of(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).view(batch, length) % VOCABULARY


BATCH = ids_of(2, 3)


def set_queries(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in model.get_submodule("attnres.sites").children():
            query = site.get_parameter("query")
            query.copy_(torch.randn(query.shape, generator=generator))


def converted(seed: int = 1, model: nn.Module | None = None, config: ac.AttnResConfig | None = None) -> Any:
    """A converted network with random queries; ``model`` instead of a ``Net`` where one is given."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net() if model is None else model
    ac.convert_(model, config, (BATCH,))
    set_queries(model, seed)
    return model


def expected_of(model: Any, ids: Tensor = BATCH) -> Tensor:
    """What a converted ``Net`` must give, by the written-out definition; a plain one runs as it is."""
    if not hasattr(model, "attnres"):
        return model(ids)
    sites, config = model.attnres.sites, model.attnres.config
    queries, norms = [site.query for site in sites], [site.key_norm for site in sites]
    stream = ReferenceStream(
        model.embed(ids), config.resolved_block_size(len(model.blocks)), config.scale, model.norm.eps, queries, norms
    )
    for block in model.blocks:
        stream.add(block.linear(block.norm(stream.read())))
    return model.norm(stream.read())


def assert_whole(model: nn.Module, sites: int = 4) -> None:
    """Converted once and completely: parameters of every site, and the hooks that protect them."""
    assert len(model.get_submodule("attnres.sites")._modules) == sites
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)
    with pytest.raises(ac.NotRewrittenError):
        model(BATCH)


def assert_untouched(model: nn.Module) -> None:
    """Never converted: no parameters, no hooks, runs as it is."""
    assert not hasattr(model, "attnres")
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (0, 0)
    assert model(BATCH).isfinite().all()
