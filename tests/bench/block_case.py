"""The tensors of one block of Block AttnRes, and what a way to compute its reads is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Size:
    """T tokens of D features, n complete blocks as sources, S sublayers."""

    tokens: int = 2048
    width: int = 1024
    sources: int = 8
    sublayers: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rounds: int = 12

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"T={self.tokens}, D={self.width}, n={self.sources}, S={self.sublayers}, {dtype}"


class Block:
    """The tensors of a size: sources and branches ``[T, D]``; per read a query, a key-norm and a norm weight ``[D]``; gradients.

    ``stacked``, ``[n, T, D]``, is the same memory as the sources, for implementations that want one tensor.
    """

    def __init__(self, size: Size, seed: int = 0) -> None:
        generator = torch.Generator(size.device).manual_seed(seed)

        def random(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=size.device)
            return (drawn * std + mean).to(size.dtype)

        T, D, n, S = size.tokens, size.width, size.sources, size.sublayers
        self.size = size
        self.stacked = random(n, T, D)
        self.sources = list(self.stacked.unbind(0))
        self.branches = [random(T, D, std=0.5) for _ in range(S)]
        self.queries = [random(D, std=D**-0.5) for _ in range(S)]  # scores of about one
        self.key_norms = [random(D, std=0.1, mean=1.0) for _ in range(S)]
        self.norm_weights = [random(D, std=0.1, mean=1.0) for _ in range(S)]
        self.grad_reads = [random(T, D) for _ in range(S)]
        self.grad_end = random(T, D)
        self.grad_stacked = random(n, T, D)
        self._make_leaves()

    def converted(self, dtype: torch.dtype) -> Block:
        """The same numbers in another dtype."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(other, name, value.detach().to(dtype))
            elif isinstance(value, list):
                setattr(other, name, [tensor.detach().to(dtype) for tensor in value])
        other._make_leaves()
        return other

    def _make_leaves(self) -> None:
        self.stacked.requires_grad_()
        self.sources = list(self.stacked.detach().unbind(0))
        for leaf in (*self.sources, *self.branches, *self.queries, *self.key_norms, *self.norm_weights):
            leaf.requires_grad_()


@dataclass(frozen=True)
class Implementation:
    """A way to compute a block's reads.

    Args:
        prepare: makes ``forward``, freshly compiled: from a :class:`Block` to its reads, its end, and the sources once more.
        layout: what the sources are: "separate" tensors, one "stacked" tensor, or the "stream" of the standard residual, which
            has the last source as its beginning.
    """

    prepare: Callable[[], Callable[[Block], list[Tensor]]]
    layout: str = "separate"

    def inputs(self, block: Block) -> list[Tensor]:
        affine = block.norm_weights if self.layout == "stream" else [*block.queries, *block.key_norms, *block.norm_weights]
        return [*self.sources(block), *block.branches, *affine]

    def sources(self, block: Block) -> list[Tensor]:
        if self.layout == "stream":
            return block.sources[-1:]
        return [block.stacked] if self.layout == "stacked" else block.sources

    def gradients(self, block: Block) -> list[Tensor]:
        """Those of the outputs."""
        later = {"separate": list(block.grad_stacked.unbind(0)), "stacked": [block.grad_stacked], "stream": []}
        return [*block.grad_reads, block.grad_end, *later[self.layout]]

    def side(self, forward: Callable[[Block], list[Tensor]], block: Block, mode: str) -> Callable[[], list[Tensor]]:
        def forward_only() -> list[Tensor]:
            with torch.no_grad():
                return forward(block)[: block.size.sublayers + 1]

        def with_backward() -> list[Tensor]:
            return list(torch.autograd.grad(forward(block), self.inputs(block), self.gradients(block)))

        return forward_only if mode == "forward" else with_backward

    def separately(self, block: Block, found: list[Tensor], mode: str) -> list[Tensor]:
        """Results of a side in the same form for "separate" and "stacked"."""
        unstack = mode != "forward" and self.layout == "stacked"
        return [*found[0].unbind(0), *found[1:]] if unstack else found
