"""The oracle of the ablation's variants: streams that weigh their sources otherwise, written by hand, token sums and all."""

from collections.abc import Sequence

import torch
from reference import ReferenceStream
from torch import Tensor, nn


class VariantStream(ReferenceStream):
    """A stream whose reads weigh the sources by ``weights``: "softmax", "sigmoid", "static" or "standard".

    ``sites`` hold the parameters, each under its name. Other arguments as in ``AttnResConfig``.
    """

    def __init__(
        self, root: Tensor, block_size: int, eps: float, sites: Sequence[nn.Module], weights: str, heads: int,
        normalize_keys: bool,
    ) -> None:  # fmt: skip
        super().__init__(root, block_size, "preserve", eps, [root] * len(sites), None)
        self.sites, self.weights, self.heads, self.normalize_keys = list(sites), weights, heads, normalize_keys

    def read(self) -> Tensor:
        if not self.outputs:
            return self.root
        self.unused.pop(0)
        site, sources = self.sites.pop(0), self.sources()
        if self.weights in ("static", "standard"):
            numbers = [1.0] * len(sources) if self.weights == "standard" else [1 + offset for offset in site.offset]
            return sum(number * source for number, source in zip(numbers, sources, strict=True))
        return torch.cat([self._head(h, site, sources) for h in range(self.heads)], -1)

    def _head(self, head: int, site: nn.Module, sources: Sequence[Tensor]) -> Tensor:
        width = self.root.shape[-1] // self.heads
        mine = slice(head * width, (head + 1) * width)
        query = site.query
        if hasattr(site, "projection"):
            query = query + self._normalised(sources[-1]) @ site.projection.T
        scores = []
        for source in sources:
            key = self._normalised(source) if self.normalize_keys else source
            if site.key_norm is not None:
                key = key * site.key_norm
            scores.append((query * key)[..., mine].sum(-1, keepdim=True))
        total = sum(score.exp() for score in scores)
        if self.weights == "softmax":
            shares = [score.exp() / total for score in scores]
        else:
            shares = [2 / (1 + (-score).exp()) / len(sources) for score in scores]
        return len(sources) * sum(share * source[..., mine] for share, source in zip(shares, sources, strict=True))

    def _normalised(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class SeveralStreams(ReferenceStream):
    """Four residual streams, kept as four tensors: mixed before every read, each sublayer's output written to all of them."""

    def __init__(self, root: Tensor, sites: Sequence[nn.Module]) -> None:
        super().__init__(root, 1, "preserve", 0.0, [root] * len(sites), None)
        self.sites = list(sites)
        self.streams = [root] * 4
        self.written = 0

    def read(self) -> Tensor:
        if not self.outputs:
            return self.root
        self.unused.pop(0)
        site = self.sites.pop(0)
        mixing = _sinkhorn(5 * torch.eye(4, dtype=torch.float64) + site.mix)
        self.streams = [sum(mixing[s, t] * self.streams[t] for t in range(4)) for s in range(4)]
        for j in range(self.written, len(self.outputs)):
            shares = [4.0 * (s == j % 4) + site.write[s] for s in range(4)]
            self.streams = [x + share * self.outputs[j] for x, share in zip(self.streams, shares, strict=True)]
        self.written = len(self.outputs)
        return sum((0.25 + site.read[s]) * self.streams[s] for s in range(4))


def _sinkhorn(logits: Tensor) -> Tensor:
    matrix = logits.exp()
    for _ in range(20):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(0, keepdim=True)
    return matrix
