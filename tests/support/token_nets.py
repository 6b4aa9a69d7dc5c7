"""A residual network whose branches treat every token by itself, and its definition in float64."""

from __future__ import annotations

from typing import Any

import torch
from reference import ReferenceStream
from small_nets import eager, set_queries
from torch import Tensor, nn

import attnres_compile as ac

LAYERS = 6
PATHS = ["ahead of time", "full", "two blocks"]
_CONFIGS = {
    "ahead of time": ac.AttnResConfig(num_blocks=2),
    "full": ac.AttnResConfig(variant="full"),
    "two blocks": ac.AttnResConfig(num_blocks=2),
}


class TokenNet(nn.Module):
    """``[..., D]`` to ``[..., D]``: six sublayers, six sites.

    ``gain`` times the input is the first source; ``branch_gain`` scales the others.
    """

    def __init__(self, width: int = 16, norm: type[nn.Module] = nn.RMSNorm, eps: float = 1e-5, branch_gain: float = 1.0) -> None:
        super().__init__()
        self.gain, self.branch_gain = nn.Parameter(torch.ones(())), branch_gain
        self.norms = nn.ModuleList(norm(width, eps=eps) for _ in range(LAYERS + 1))
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gain
        for norm, linear in zip(self.norms, self.linears, strict=False):
            x = x + linear(norm(x)) * self.branch_gain
        return self.norms[-1](x)


def rewritten(model: Any, x: Tensor, path: str, seed: int | None = None, size: float = 1.0) -> Any:
    """``model`` converted, with queries of the given size from ``seed`` or zero, callable like it: one of ``PATHS``."""
    ac.convert_(model, _CONFIGS[path], (x,))
    if seed is not None:
        set_queries(model, seed)
        with torch.no_grad():
            for site in model.attnres.sites:
                site.query.mul_(size)
    return ac.rewrite(model, args=(x,)) if path == "ahead of time" else torch.compile(model, backend=eager, dynamic=False)


def definition(model: Any, x: Tensor) -> Tensor:
    """What a converted ``model`` is to give, every step in the dtype of the model and of ``x``."""
    sites, config = model.attnres.sites, model.attnres.config
    stream = ReferenceStream(
        x * model.gain, config.resolved_block_size(LAYERS), config.scale, model.norms[0].eps,
        [site.query for site in sites], [site.key_norm for site in sites],
    )  # fmt: skip
    for norm, linear in zip(model.norms, model.linears, strict=False):
        stream.add(linear(norm(stream.read())) * model.branch_gain)
    return model.norms[-1](stream.read())
