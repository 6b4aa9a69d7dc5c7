"""Bytes that a training step keeps for its backward pass, per sublayer: standard residual, Block and Full, under three kinds of
activation checkpointing.

Tensors are counted where autograd packs them, every storage once and without the parameters, behind AOTAutograd's min-cut
partitioner with Inductor's decompositions. A decoder without its head is measured, so that logits don't count. ``fused`` runs
the Triton kernels, in the interpreter where there is no GPU; bytes are the same there.
"""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from models import Size, llama
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import attnres_compile as ac
from attnres_compile.kernels import differentiable

sys.path.append(str(Path(__file__).resolve().parent.parent / "support"))

from saved_tensors import step

SIZE = Size(layers=8, width=256, intermediate=688, heads=4, kv_heads=4, vocabulary=512, sequence=256)
CONFIGS: dict[str, ac.AttnResConfig | None] = {
    "standard": None,
    "Block, 4 blocks": ac.AttnResConfig(num_blocks=4),
    "Block, 8 blocks": ac.AttnResConfig(num_blocks=8),
    "Full": ac.AttnResConfig(variant="full"),
}
PRODUCTS = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
# The arguments of Transformers' gradient checkpointing, a checkpoint per layer, by the name of the column.
CHECKPOINTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "full checkpoints": {"use_reentrant": False},
    "products kept": {"use_reentrant": False, "context_fn": PRODUCTS},
}


def run(size: Size = SIZE, kernels: tuple[str, ...] = ("naive",)) -> Table:
    unit = size.sequence * size.width * size.dtype.itemsize
    table = Table(
        title=f"{size}, {size.sequence} tokens: kept per sublayer, in tensors of the stream's size (KiB); more than standard",
        title_justify="left",
    )
    table.add_column("residual")
    table.add_column("kernels")
    for name in CHECKPOINTS:
        table.add_column(name, justify="right")
        table.add_column("added", justify="right")
    base, sublayers = llama(size).model.train(), 2 * size.layers
    for residual, config in CONFIGS.items():
        for kind in kernels if config is not None else ("",):
            cells = [residual, kind]
            for checkpointing in CHECKPOINTS.values():
                kept = saved_bytes(base, config, checkpointing, size, kind)
                standard = saved_bytes(base, None, checkpointing, size, "")
                cells += [f"{kept / sublayers / unit:.2f} ({kept / sublayers / 1024:.0f})", f"{kept / standard - 1:+.1%}"]
            table.add_row(*cells)
    return table


_KNOWN: dict[tuple[Any, ...], int] = {}


def saved_bytes(
    base: nn.Module, config: ac.AttnResConfig | None, checkpointing: dict[str, Any] | None, size: Size, kernels: str
) -> int:
    key = (str(config), str(checkpointing), size, kernels)
    if key not in _KNOWN:
        model, ids = copy.deepcopy(base), size.tokens(size.sequence)

        def loss(compiled: nn.Module) -> Tensor:
            return compiled(ids, use_cache=False).last_hidden_state.square().mean()

        if config is not None:
            ac.convert_(model, config, (ids,), {"use_cache": False})
        if checkpointing is not None:
            model.gradient_checkpointing_enable(checkpointing)
        choose = (lambda tensors: kernels) if kernels else differentiable.kernels_for
        with mock.patch.object(differentiable, "kernels_for", choose):
            _KNOWN[key] = step(model, loss).bytes
    return _KNOWN[key]
