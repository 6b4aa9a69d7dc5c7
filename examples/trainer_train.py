"""Train a small Llama with Block Attention Residuals in the Transformers Trainer, stop, resume, and load what it saved.

The text is the Python standard library's own source, byte by byte. The model is converted and compiled before the
Trainer gets it. ``TrainingArguments(torch_compile_backend="attnres")`` is no way: accelerate knows its own backends alone.

    python examples/trainer_train.py [--steps 40] [--out trainer-run]
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from demo_data import standard_library
from small_llama import small_llama
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import attnres_compile as ac

LAYERS, HIDDEN, LENGTH, ROWS = 2, 64, 64, 8


class Windows(Dataset[dict[str, Tensor]]):
    """``LENGTH`` bytes from random places in the training text; the model shifts the labels itself."""

    def __init__(self, count: int) -> None:
        windows = standard_library().batch(torch.Generator().manual_seed(0), count, LENGTH - 1)
        self.windows = list(windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=2)] = 40,
    out: Annotated[Path, typer.Option(help="Where checkpoints go.")] = Path("trainer-run"),
) -> None:
    """Train, train again from the checkpoint in the middle, and load the last one."""
    half = steps // 2
    arguments = TrainingArguments(
        output_dir=str(out), use_cpu=True, max_steps=steps, save_steps=half, logging_steps=half, per_device_train_batch_size=ROWS,
        learning_rate=1e-3, bf16=True, gradient_checkpointing=True, report_to=[], seed=0,
    )  # fmt: skip
    trainer = Trainer(model=compiled_llama(), args=arguments, train_dataset=Windows(ROWS * steps))
    trainer.train()
    resumed = Trainer(model=compiled_llama(), args=arguments, train_dataset=Windows(ROWS * steps))
    resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{half}"))
    for name, run in (("in one go", trainer), ("resumed", resumed)):
        print(f"{name}: losses {[entry['loss'] for entry in run.state.log_history if 'loss' in entry]}")
    model = ac.from_pretrained(out / f"checkpoint-{max(steps // half * half, steps)}")
    fast = torch.compile(model, backend="attnres")
    with torch.no_grad():
        print(f"loaded again: loss {fast(**batch(Windows(ROWS))).loss.item():.4f} on the first {ROWS} windows")


def compiled_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = small_llama(LAYERS, HIDDEN, LENGTH, use_cache=False)
    ac.convert_(model, ac.AttnResConfig(num_blocks=2), args=(torch.zeros(ROWS, LENGTH, dtype=torch.long),))
    model.compile(backend="attnres")  # what save_pretrained and generate belong to stays the model itself
    return model


def batch(windows: Windows) -> dict[str, Tensor]:
    return {name: torch.stack([window[name] for window in windows]) for name in ("input_ids", "labels")}


if __name__ == "__main__":
    typer.run(main)
