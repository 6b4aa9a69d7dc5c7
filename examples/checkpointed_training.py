"""Train a small Llama with Attention Residuals as one trains large ones: activation checkpoints that keep the matrix products
and recompute the rest, bfloat16 autocast, gradients accumulated over microbatches, no weight decay on norms and queries; then
save it, load it, and go on.

    python examples/checkpointed_training.py

The text is the Python standard library's own source, byte by byte.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from demo_data import Text, standard_library
from small_llama import small_llama
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import attnres_compile as ac

LENGTH, ROWS, MICROBATCHES, STEPS = 64, 2, 4, 5
KEEP_PRODUCTS = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
Run = Callable[..., Any]


def batches(text: Text, seed: int) -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield text.batch(generator, MICROBATCHES * ROWS, LENGTH - 1).split(ROWS)


def prepared(model: nn.Module, backend: str | Run) -> tuple[nn.Module, Run, torch.optim.Optimizer]:
    """A converted model ready to train."""
    model.train().gradient_checkpointing_enable({"use_reentrant": False, "context_fn": KEEP_PRODUCTS})
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    kept = [parameter for parameter in model.parameters() if parameter.ndim <= 1]  # biases, norms, queries
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    return model, torch.compile(model, backend=backend), torch.optim.AdamW(groups, lr=1e-3)


def train(run: Run, optimizer: torch.optim.Optimizer, data: Iterator[tuple[Tensor, ...]]) -> list[float]:
    losses = []
    for _ in range(STEPS):
        total = 0.0
        for ids in next(data):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = run(ids, labels=ids, use_cache=False).loss / MICROBATCHES
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses


def main(backend: str | Run = "attnres") -> tuple[list[float], list[float]]:
    """The losses of the steps after saving: with everything loaded anew, and without."""
    torch.manual_seed(0)
    model, text = small_llama(layers=3, hidden=64, length=LENGTH), standard_library()
    print(ac.convert_(model, ac.AttnResConfig(num_blocks=2), args=(next(batches(text, 0))[0],), kwargs={"use_cache": False}))
    model, run, optimizer = prepared(model, backend)
    print("trained:    ", *(f"{loss:.4f}" for loss in train(run, optimizer, batches(text, 1))))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.save(optimizer.state_dict(), Path(folder) / "optimizer.pt")
        _, run_loaded, new_optimizer = prepared(ac.from_pretrained(folder), backend)
        new_optimizer.load_state_dict(torch.load(Path(folder) / "optimizer.pt"))
    resumed = train(run_loaded, new_optimizer, batches(text, 2))
    print("resumed:    ", *(f"{loss:.4f}" for loss in resumed))
    uninterrupted = train(run, optimizer, batches(text, 2))
    print("not stopped:", *(f"{loss:.4f}" for loss in uninterrupted))
    print("the same to the bit" if resumed == uninterrupted else "they differ")
    return resumed, uninterrupted


if __name__ == "__main__":
    main()
