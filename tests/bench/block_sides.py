"""Ways to compute the reads of a block: the standard residual, two phases, per site as one writes it, and the definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from block_case import Block, Implementation
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnres_compile  # noqa: F401  (finds its subpackages in a checkout)
from attnres_compile.capture import INDUCTOR_OPTIONS
from attnres_compile.kernels import differentiable, naive

EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(naive.compute_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.to(wide.dtype)).to(x.dtype)


def add_norm(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, rms_norm(total, weight)


def stacked_site(sources: list[Tensor], query: Tensor, key_norm: Tensor, norm_weight: Tensor) -> Tensor:
    """AttnRes as one writes it: stack, norm, score, softmax, sum."""
    values = torch.stack(sources)
    weights = (rms_norm(values, key_norm) * query).sum(-1).softmax(0)
    return rms_norm((weights.unsqueeze(-1) * values).sum(0), norm_weight)


def naive_site(sources: list[Tensor], query: Tensor, key_norm: Tensor, norm_weight: Tensor) -> Tensor:
    return rms_norm(naive.site(sources, query, key_norm, EPS, 1.0), norm_weight)


# Dynamo would trace into the autograd functions; in a rewritten graph they are calls that AOTAutograd traces.
@torch.compiler.allow_in_graph
def _inter(sources: list[Tensor], queries: list[Tensor], key_norms: list[Tensor], kernels: str) -> list[Tensor]:
    return differentiable.inter(sources, queries, key_norms, EPS, kernels)


@torch.compiler.allow_in_graph
def _merge(
    partial: Tensor, branch: Tensor | None, mixed: Tensor, lse: Tensor, query: Tensor, key_norm: Tensor, weight: Tensor,
    kernels: str,
) -> list[Tensor]:  # fmt: skip
    return differentiable.merge(
        partial, branch, mixed, lse, query, key_norm, EPS, 1.0, "rms", weight, norm_eps=EPS, kernels=kernels
    )


def standard(compile_: bool = True) -> Implementation:
    """An add and a norm per sublayer."""

    def prepare() -> Callable[[Block], list[Tensor]]:
        read = torch.compile(add_norm, dynamic=False) if compile_ else add_norm

        def forward(block: Block) -> list[Tensor]:
            x, reads = block.sources[-1], []
            for branch, weight in zip(block.branches, block.norm_weights, strict=True):
                x, y = read(x, branch, weight)
                reads.append(y)
            return [*reads, x]

        return forward

    return Implementation(prepare, "stream")


def per_site(read: Callable[..., Tensor]) -> Callable[[Block], list[Tensor]]:
    """The forward of every way that computes each read by itself, ``read(sources, query, key_norm, norm_weight)``."""

    def forward(block: Block) -> list[Tensor]:
        affine = list(zip(block.queries, block.key_norms, block.norm_weights, strict=True))
        reads, partial = [read(block.sources, *affine[0])], block.branches[0]
        for branch, vectors in zip(block.branches[1:], affine[1:], strict=True):
            reads.append(read([*block.sources, partial], *vectors))
            partial = partial + branch
        return [*reads, partial, *map(again, block.sources)]

    return forward


def again(tensor: Tensor) -> Tensor:
    """What later blocks read, and send a gradient back to."""
    return tensor.view_as(tensor)


def stacked() -> Implementation:
    return Implementation(lambda: per_site(torch.compile(stacked_site, dynamic=False)))


def reference() -> Implementation:
    """The definition, with what autograd would keep of it computed anew."""
    return Implementation(lambda: per_site(lambda *arguments: checkpoint(naive_site, *arguments, use_reentrant=False)))


def two_phase(kernels: str = differentiable.NAIVE) -> Implementation:
    """Phase 1 once, phase 2 with add and norm per sublayer. The first read is a norm, the second has nothing to add yet."""

    def prepare() -> Callable[[Block], list[Tensor]]:
        inter = torch.compile(lambda *arguments: _inter(*arguments, kernels), dynamic=False, options=INDUCTOR_OPTIONS)
        merge = torch.compile(lambda *arguments: _merge(*arguments, kernels), dynamic=False, options=INDUCTOR_OPTIONS)
        norm = torch.compile(rms_norm, dynamic=False)

        def forward(block: Block) -> list[Tensor]:
            S = block.size.sublayers
            phase1 = inter(block.sources, block.queries, block.key_norms)
            mixed, lse, sources = phase1[:S], phase1[S : 2 * S], phase1[2 * S :]
            reads, partial = [norm(mixed[0], block.norm_weights[0])], block.branches[0]
            for s in range(1, S):
                branch = block.branches[s - 1] if s > 1 else None
                partial, y = merge(partial, branch, mixed[s], lse[s], block.queries[s], block.key_norms[s], block.norm_weights[s])
                reads.append(y)
            return [*reads, partial + block.branches[-1] if S > 1 else partial, *sources]

        return forward

    return Implementation(prepare)
