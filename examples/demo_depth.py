"""What a converted model attends to over depth: the softmax weights of every site, read off the rewritten graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Argument, Target

import attnres_compile as ac


@dataclasses.dataclass(frozen=True)
class Depth:
    """``weights[i, j]`` is what site i gives to source j, on average over tokens; NaN where it has no such source."""

    weights: Tensor
    sites: list[str]
    sources: list[str]

    def in_words(self, site: int, top: int = 2) -> tuple[str, float]:
        """The heaviest sources of a site, and the share that each of its sources would have if all were equal."""
        row = self.weights[site]
        order = [j for j in row.nan_to_num(-1.0).argsort(descending=True).tolist() if not row[j].isnan()]
        return ", ".join(f"{self.sources[j]} {row[j]:.0%}" for j in order[:top]), 1 / len(order)


class _SiteRecorder(fx.Interpreter):
    """Runs the rewritten graph and keeps, for each site, the softmax weights averaged over tokens."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.weights: list[Tensor] = []

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.attnres.site.default:
            sources, query, key_norm, eps = args[:4]
            self.weights.append(_softmax_weights(sources, query, key_norm, eps))
        return super().call_function(target, args, kwargs)


def _softmax_weights(sources: Any, query: Any, key_norm: Any, eps: Any) -> Tensor:
    values = torch.stack(list(sources)).float()
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    weight = query.float() if key_norm is None else query.float() * key_norm.float()
    return (keys @ weight).softmax(0).flatten(1).mean(1).detach()


def depth_attention(gm: fx.GraphModule, report: ac.Report, *inputs: Tensor) -> Depth:
    """Run ``gm`` on ``inputs`` and arrange each site's weights in columns: embedding, blocks, partial sum."""
    recorder = _SiteRecorder(gm)
    recorder.run(*inputs)
    (chain,) = report.chains
    blocks = chain.block_sizes or ()
    sources = ["embedding", *(f"block {n}" for n in range(1, len(blocks) + 1)), "partial sum"]
    table = torch.full((len(recorder.weights), len(sources)), float("nan"))
    for row, (weights, site) in enumerate(zip(recorder.weights, chain.sites, strict=True)):
        # Inside a block the last source is the sum of the block's sublayers so far. It has a column of its own.
        inside = site.before % blocks[0] != 0 and site.before < chain.num_sublayers
        complete = len(weights) - inside
        table[row, :complete] = weights[:complete]
        if inside:
            table[row, -1] = weights[-1]
    return Depth(table, [_spoken(site.module) for site in chain.sites], sources)


def _spoken(module: str) -> str:
    """``model.layers.3.post_attention_layernorm`` -> ``layer 3 MLP``."""
    *_, layer, norm = ["", *module.split(".")]
    kinds = {"input_layernorm": "attention", "post_attention_layernorm": "MLP"}
    return f"layer {layer} {kinds[norm]}" if norm in kinds else "output"
