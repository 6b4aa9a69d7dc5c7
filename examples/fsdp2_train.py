"""Train a small Llama with Block Attention Residuals under FSDP2, block by block, and hold it against one process.

The text is the Python standard library's own source, byte by byte. The rewritten graph is split into one module per block;
each is sharded by itself, and compiled by itself with --compile. Rank 0 then trains the whole model alone on the same batches.

    torchrun --nproc-per-node 2 examples/fsdp2_train.py [--steps 20] [--compile] [--checkpoint FOLDER]
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

# Threads that wait by spinning stall each other where other programs use the cores too. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import typer
from demo_data import standard_library
from leaving import leave
from rich.console import Console
from rich.table import Table
from small_llama import small_llama
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import attnres_compile as ac

LAYERS, HIDDEN, LENGTH, ROWS, BLOCKS = 6, 96, 64, 4, 4  # ROWS sequences per rank
LEARNING_RATE = 1e-3


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 20,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile every block by itself.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Save the sharded model here when done.")] = None,
) -> None:
    """Train a small Llama with Block AttnRes under FSDP2, and the same in one process."""
    dist.init_process_group("gloo")
    try:
        rank, world = dist.get_rank(), dist.get_world_size()
        split = sharded(compiled)
        losses = torch.tensor(train(split, ac.rank_module(split), steps, world, rank))
        dist.all_reduce(losses)
        if checkpoint is not None:
            dcp.save({"model": split.state_dict()}, checkpoint_id=checkpoint)
        held = sum(parameter.to_local().numel() for parameter in split.parameters())
        if rank == 0:
            report(losses / world, train_alone(steps, world), len(split.blocks), held)
    finally:
        dist.destroy_process_group()
    leave()


def converted() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    model = small_llama(LAYERS, HIDDEN, LENGTH, use_cache=False)
    ac.convert_(model, ac.AttnResConfig(num_blocks=BLOCKS), (torch.zeros(ROWS, LENGTH, dtype=torch.long),))
    return model


def sharded(compiled: bool) -> ac.SplitModule:
    split = ac.rewrite(converted(), args=(torch.zeros(ROWS, LENGTH, dtype=torch.long),), split=True)
    for block in split.blocks:
        if compiled:
            block.compile()
        fully_shard(block)
    fully_shard(split)
    return split


def train(model: nn.Module, parameters: nn.Module, steps: int, world: int, rank: int | None) -> list[float]:
    """The losses of ``rank``'s part of every batch, or of all of it."""
    optimizer = torch.optim.AdamW(parameters.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for _, batch in zip(range(steps), batches(world), strict=False):
        mine = batch if rank is None else batch[ROWS * rank :][:ROWS]
        loss = loss_of(model(mine[:, :-1]).logits, mine[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_alone(steps: int, world: int) -> Tensor:
    model = converted()
    whole = ac.rewrite(model, args=(torch.zeros(ROWS * world, LENGTH, dtype=torch.long),))
    return torch.tensor(train(whole, model, steps, world, None))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batches(world: int) -> Iterator[Tensor]:
    """``[ROWS * world, LENGTH + 1]``, the same on every rank."""
    text, generator = standard_library(), torch.Generator().manual_seed(0)
    while True:
        yield text.batch(generator, ROWS * world, LENGTH)


def report(losses: Tensor, alone: Tensor, blocks: int, held: int) -> None:
    table = Table(title=f"{blocks} modules, {held:,} parameters on rank 0 of {dist.get_world_size()}", title_justify="left")
    for header in ("step", "loss, FSDP2", "loss, one process"):
        table.add_column(header, justify="right")
    shown = sorted({0, len(losses) // 2, len(losses) - 1})
    for step in shown:
        table.add_row(str(step + 1), f"{losses[step]:.6f}", f"{alone[step]:.6f}")
    Console().print(table)
    print(f"Largest difference: {(losses - alone).abs().max():.1e}")


if __name__ == "__main__":
    typer.run(main)
