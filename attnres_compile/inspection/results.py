"""What an inspection found on a chain: depth weights, the depth mixing matrix, magnitudes and entropies, as plain data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

ROOT = "embedding"
PARTIAL = "partial sum"


@dataclasses.dataclass(frozen=True, eq=False)
class ReadInspection:
    """One read of the residual stream by a norm. All means are over tokens; tensors are float64 and on the CPU.

    Attributes:
        name: short, such as "layer 3 attention": what the read feeds.
        module: qualified name of the norm that reads, "" where the first sublayer reads without one.
        before: number of sublayers before it. The read with none before it has one source and is no site.
        site: number of the site, None for that first read.
        magnitude: mean root-mean-square over features of what is read, the stream or the mixture.
        sources: names of the n sources; none in a model without AttnRes.
        weights: ``[n]``, mean weights over tokens and heads, by softmax adding up to one; None in a model without AttnRes.
        entropy: mean entropy of a token's weights in nats, at most log n; None likewise, and where they don't add up to one.
        token_weights: ``[n, ...tokens]``, the weights of every token, averaged over heads, where they were asked for.
    """

    name: str
    module: str
    before: int
    site: int | None
    magnitude: float
    sources: tuple[str, ...] = ()
    weights: Tensor | None = None
    entropy: float | None = None
    token_weights: Tensor | None = None

    @property
    def entropy_fraction(self) -> float | None:
        """``entropy`` over log n, its value for equal weights; None where there is but one source."""
        return None if self.entropy is None or len(self.sources) < 2 else self.entropy / math.log(len(self.sources))

    @property
    def entropy_of_mean(self) -> float | None:
        """Entropy of ``weights`` in nats. It exceeds ``entropy`` by how much tokens differ (Jensen-Shannon divergence)."""
        return None if self.weights is None or self.entropy is None else float(torch.special.entr(self.weights).sum())

    def heaviest(self, count: int) -> list[tuple[str, float]]:
        """Names and mean weights of the ``count`` heaviest sources, the heaviest first."""
        pairs = zip(self.sources, [] if self.weights is None else self.weights.tolist(), strict=True)
        return sorted(pairs, key=lambda pair: -pair[1])[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only: finite numbers or None."""
        derived = {"entropy_fraction": self.entropy_fraction, "entropy_of_mean": self.entropy_of_mean}
        return {**fields_of(self), **_plain(derived)}


@dataclasses.dataclass(frozen=True)
class SublayerInspection:
    """What one sublayer adds to the stream: ``magnitude`` is its mean root-mean-square over features.

    ``modules`` are the qualified names of those whose weights made it.
    """

    name: str
    modules: tuple[str, ...]
    magnitude: float


@dataclasses.dataclass(frozen=True, eq=False)
class ChainInspection:
    """One chain with L sublayers and R reads.

    Attributes:
        num_tokens: how many tokens the means are over: positions of the whole batch, padding among them.
        root_magnitude: that of the root v_0, as in :class:`SublayerInspection`.
        reads: in stream order, the first sublayer's own read first.
        mixing: ``[R, L + 1]``, float64, the depth mixing matrix M averaged over tokens: ``h = sum_i M[r, i] v_i`` is what
            read r sees, v_0 the root and v_i the output of sublayer i as it stands on the stream (casts, scalings and
            relayouts of the stream done). In AttnRes a block's weight counts for each of its sublayers, times the scale of
            the site (``AttnResConfig.scale``).
        block_sizes: sublayers per block; None in a model without AttnRes.
    """

    name: str
    kind: str
    hidden_size: int
    num_tokens: int
    root_magnitude: float
    sublayers: tuple[SublayerInspection, ...]
    reads: tuple[ReadInspection, ...]
    mixing: Tensor
    block_sizes: tuple[int, ...] | None = None

    @property
    def sites(self) -> tuple[ReadInspection, ...]:
        return tuple(read for read in self.reads if read.site is not None)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of all sources that some site has: the embedding, the blocks, the partial sum where there is one."""
        names = dict.fromkeys(name for read in self.reads for name in read.sources if name != PARTIAL)
        return (*names, PARTIAL) if any(PARTIAL in read.sources for read in self.reads) else tuple(names)

    @property
    def depth_attention(self) -> Tensor:
        """``[sites, sources]``, float64: mean weights, NaN where a site has no such source."""
        rows = [dict(site.heaviest(len(site.sources))) for site in self.sites]
        return torch.tensor([[row.get(name, math.nan) for name in self.sources] for row in rows], dtype=torch.float64)

    @property
    def standard_mixing(self) -> Tensor:
        """``[R, L + 1]``, float64: the standard residual's matrix, one for everything before a read."""
        befores = torch.tensor([read.before for read in self.reads])
        return (torch.arange(len(self.sublayers) + 1) <= befores[:, None]).double()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only: finite numbers or None."""
        return {**fields_of(self), "standard_mixing": _plain(self.standard_mixing)}


def fields_of(found: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON types."""
    return {field.name: _plain(getattr(found, field.name)) for field in dataclasses.fields(found)}


def _plain(value: Any) -> Any:
    """JSON types: nested lists and objects of finite numbers, None for what is NaN or infinite."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if dataclasses.is_dataclass(value):
        return value.to_dict() if hasattr(value, "to_dict") else fields_of(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
