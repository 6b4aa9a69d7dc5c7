"""Train a small Llama with Block Attention Residuals under DistributedDataParallel, and hold it against one process.

The text is the Python standard library's own source, byte by byte. Rank 0 then trains the same model by itself on the whole
batches and prints both losses. On one machine everything stays on its loopback interface.

    torchrun --nproc-per-node 2 examples/ddp_train.py [--steps 20]

``python -m torch.distributed.run`` is the same as ``torchrun``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any

# Threads that wait by spinning stall each other where other programs use the cores too. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from demo_data import standard_library
from small_llama import small_llama
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

import attnres_compile as ac

LAYERS, HIDDEN, LENGTH, ROWS = 2, 64, 64, 4  # ROWS sequences per rank
LEARNING_RATE = 1e-3


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the data.")] = 0,
) -> None:
    """Train a small Llama with Block AttnRes on several ranks, and the same in one process."""
    # DDP would hand the model over in pieces, none of which holds the residual stream as a whole.
    torch._dynamo.config.optimize_ddp = False
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        model = converted_llama(seed)  # before it is wrapped, so that DDP synchronises the queries
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        parallel = torch.compile(DistributedDataParallel(model), backend="attnres")
        losses = []
        for batch in batches(seed, steps, ROWS * world):
            loss = train_step(parallel, optimizer, batch.chunk(world)[rank])
            dist.all_reduce(loss)
            losses.append(loss.item() / world)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        model = converted_llama(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        compiled = torch.compile(model, backend="attnres")
        print(f"step   {world} ranks   one process")
        for step, batch in enumerate(batches(seed, steps, ROWS * world)):
            print(f"{step + 1:4}   {losses[step]:.5f}   {train_step(compiled, optimizer, batch).item():.5f}")


def converted_llama(seed: int) -> LlamaForCausalLM:
    """The same weights on every rank."""
    torch.manual_seed(seed)
    model = small_llama(LAYERS, HIDDEN, LENGTH, use_cache=False)
    ac.convert_(model, ac.AttnResConfig(num_blocks=2), args=(torch.zeros(ROWS, LENGTH, dtype=torch.long),))
    return model


def batches(seed: int, steps: int, rows: int) -> Iterator[Tensor]:
    """The same on every rank: ``[rows, LENGTH + 1]`` bytes, inputs and, one further, targets."""
    text = standard_library()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield text.batch(generator, rows, LENGTH)


def train_step(compiled: Any, optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
    """The loss in nats per byte, before the step."""
    loss = F.cross_entropy(compiled(batch[:, :-1]).logits.transpose(1, 2), batch[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


if __name__ == "__main__":
    typer.run(main)
