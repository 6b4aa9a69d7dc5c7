"""Other implementations of Attention Residuals, as sides of ``block.py``: flash-linear-attention, Liger, flash-attn-res.

Each is used the way that costs it least: sources in the layout that it wants, at no charge; fused norms and whatever else it
fuses; its own autotuning, outside of the time. What it lacks (the add, the norm) is a compiled function.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from unittest import mock

import torch
from block_case import Block, Implementation
from block_sides import EPS, again, per_site, rms_norm
from torch import Tensor

# By distribution, the versions whose interfaces these adapters were written for.
WRITTEN_FOR = {"flash-linear-attention": "0.6.0", "liger-kernel": "0.8.5", "flash-attn-res": "0.1.12"}


def fla(gluon: bool) -> Implementation:
    """``fla.ops.attnres``: one kernel per site over separate sources, with the reader's norm fused.

    In training it keeps the mixture (level 0), which costs a write and saves the backward kernel a pass over the sources.
    Its second set of kernels, in Gluon, is chosen by an environment variable that it reads at each call.
    """
    from fla.ops.attnres import fused_attnres

    def read(sources: list[Tensor], query: Tensor, key_norm: Tensor, norm_weight: Tensor) -> Tensor:
        level = 0 if torch.is_grad_enabled() else 1
        return fused_attnres(query, sources, key_norm, norm_weight, rms_eps=EPS, checkpoint_level=level)

    def prepare() -> Callable[[Block], list[Tensor]]:
        forward = per_site(read)

        def chosen(block: Block) -> list[Tensor]:
            with mock.patch.dict(os.environ, FLA_ATTNRES_GLUON="1" if gluon else "0"):
                return forward(block)

        return chosen

    return Implementation(prepare)


def liger() -> Implementation:
    """``LigerAttnResFunction``: one kernel per site over a stacked tensor.

    Without gradients the partial sum grows in the last place of one buffer. With them every site needs a stack of its own,
    since the backward pass reads it.
    """
    from liger_kernel.ops.attn_res import LigerAttnResFunction

    def prepare() -> Callable[[Block], list[Tensor]]:
        norm = torch.compile(rms_norm, dynamic=False)

        def stack_and_read(sources: list[Tensor], query: Tensor, key_norm: Tensor, norm_weight: Tensor) -> Tensor:
            return norm(LigerAttnResFunction.apply(torch.stack(sources), query, key_norm, EPS), norm_weight)

        with_gradients = per_site(stack_and_read)
        buffers: dict[Block, Tensor] = {}

        def forward(block: Block) -> list[Tensor]:
            if torch.is_grad_enabled():
                return with_gradients(block)
            n = block.size.sources
            if block not in buffers:
                buffers[block] = torch.cat([block.stacked, block.branches[0].unsqueeze(0)])
            buffer, reads = buffers[block], []
            partial = buffer[n].copy_(block.branches[0])
            for s, vectors in enumerate(zip(block.queries, block.key_norms, block.norm_weights, strict=True)):
                if s > 1:
                    partial.add_(block.branches[s - 1])
                values = buffer if s else buffer[:n]
                reads.append(norm(LigerAttnResFunction.apply(values, *vectors[:2], EPS), vectors[2]))
            return [*reads, partial + block.branches[-1] if len(reads) > 1 else partial.clone(), block.stacked]

        return forward

    return Implementation(prepare)


def flash_attn_res() -> Implementation:
    """``flash_attn_res``: two phases over stacked sources, without key-norm weights (they are part of the queries here)."""
    from flash_attn_res import phase_1_batched_attention_triton_op as phase_1
    from flash_attn_res import phase_2_online_softmax_merge_triton_op as phase_2

    def prepare() -> Callable[[Block], list[Tensor]]:
        norm = torch.compile(rms_norm, dynamic=False)

        def forward(block: Block) -> list[Tensor]:
            size = block.size
            if size.width & (size.width - 1) or size.dtype != torch.bfloat16:
                raise ValueError(f"flash-attn-res takes bfloat16 and powers of two as width, not {size}")
            queries = torch.stack(block.queries) * torch.stack(block.key_norms)
            mixed, lse = phase_1(block.stacked.unsqueeze(1), queries, EPS)
            # unbind, not indexing, whose backward would fill the whole of ``mixed`` with zeros for every read
            mixed, lse, partial = mixed.unbind(0), lse.unbind(0), block.branches[0].unsqueeze(0)
            reads = [norm(mixed[0][0], block.norm_weights[0])]
            for s in range(1, size.sublayers):
                if s > 1:
                    partial = partial + block.branches[s - 1]
                h = phase_2(partial, queries[s], mixed[s], lse[s], EPS)
                reads.append(norm(h[0], block.norm_weights[s]))
            end = partial[0] + block.branches[-1] if size.sublayers > 1 else partial[0]
            return [*reads, end, again(block.stacked)]

        return forward

    return Implementation(prepare, "stacked")


SIDES: dict[str, tuple[str, Callable[[], Implementation]]] = {
    "flash-linear-attention": ("flash-linear-attention", lambda: fla(gluon=False)),
    "flash-linear-attention, Gluon": ("flash-linear-attention", lambda: fla(gluon=True)),
    "liger-kernel": ("liger-kernel", liger),
    "flash-attn-res": ("flash-attn-res", flash_attn_res),
}


def find() -> tuple[dict[str, Implementation], dict[str, str]]:
    """The peers that are installed, by name and version, and why the others are missing."""
    found, missing = {}, {}
    for name, (distribution, make) in SIDES.items():
        try:
            label = f"{name} {version(distribution)}"
        except PackageNotFoundError:
            missing[name] = f"{distribution} is not installed (these adapters were written for {WRITTEN_FOR[distribution]})"
            continue
        try:
            found[label] = make()
        except ImportError as error:
            missing[label] = f"{type(error).__name__}: {error}"
    return found, missing
