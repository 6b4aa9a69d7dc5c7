"""Instances of printed modules, and inputs for them."""

from __future__ import annotations

import itertools
import linecache
import sys
import types

import torch
from networks import Network
from torch import Tensor, nn

_numbers = itertools.count()


def inputs_of(network: Network) -> tuple[Tensor, ...]:
    """ids, patches, entry, side and mask; the mask leaves some tokens out."""
    generator = torch.Generator().manual_seed(network.seed + 1)
    shape = network.shape[:-1]

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    mask = (torch.rand((*shape, 1), generator=generator) < 0.8).double()
    return (
        torch.randint(11, shape, generator=generator), normal(*shape, 3), normal(*network.shape), normal(*network.shape), mask,
    )  # fmt: skip


def build(source: str, seed: int, training: bool) -> nn.Module:
    """An instance of the ``Net`` that ``source`` defines, in float64; its lines can be found by tracebacks and Dynamo."""
    name = f"<network {next(_numbers)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    module = types.ModuleType("printed_network")
    sys.modules[module.__name__] = module  # Dynamo looks globals up by the name of their module
    exec(compile(source, name, "exec"), module.__dict__)
    torch.manual_seed(seed)
    made: nn.Module = module.Net().double().train(training)
    return made
