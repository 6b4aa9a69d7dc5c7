"""Train LoRA adapters and the queries of a converted Llama with peft, save them, and load them onto the same base.

The text is the Python standard library's own source, byte by byte. ``modules_to_save=["attnres"]`` makes peft train and save the
queries with every adapter; an adapter that was saved without it has none.

    python examples/lora_train.py [--steps 40] [--out adapter]
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from demo_data import standard_library
from peft import LoraConfig, PeftModel, get_peft_model
from small_llama import small_llama
from transformers import LlamaForCausalLM

import attnres_compile as ac

LAYERS, HIDDEN, LENGTH, ROWS = 2, 64, 64, 8
RANK, LEARNING_RATE = 8, 3e-3


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 40,
    out: Annotated[Path, typer.Option(help="Where the adapter goes.")] = Path("adapter"),
) -> None:
    """Train an adapter with queries, save it, and load it."""
    adapters = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], modules_to_save=["attnres"], task_type="CAUSAL_LM")
    model = get_peft_model(converted_llama(), adapters)  # converted before peft wraps it
    model.print_trainable_parameters()
    compiled = torch.compile(model, backend="attnres")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE)
    text, generator = standard_library(), torch.Generator().manual_seed(0)
    for step in range(steps):
        ids = text.batch(generator, ROWS, LENGTH - 1)
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step + 1:3}: loss {loss.item():.4f}")
    model.save_pretrained(out)

    loaded = PeftModel.from_pretrained(converted_llama(), out)
    with torch.no_grad():
        difference = (torch.compile(loaded, backend="attnres")(ids).logits - compiled(ids).logits).abs().max()
        print(f"loaded again: logits differ by {difference.item():.1e} at most")
        merged = loaded.merge_and_unload()  # a converted Llama with trained queries, without peft
        difference = (torch.compile(merged, backend="attnres")(ids).logits - compiled(ids).logits).abs().max()
        print(f"merged: logits differ by {difference.item():.1e} at most")


def converted_llama() -> LlamaForCausalLM:
    """The base model: the same weights at every call. With real ones, ``ac.from_pretrained(converted directory)``."""
    torch.manual_seed(0)
    model = small_llama(LAYERS, HIDDEN, LENGTH, use_cache=False)
    ac.convert_(model, ac.AttnResConfig(num_blocks=2), args=(torch.zeros(ROWS, LENGTH, dtype=torch.long),))
    return model


if __name__ == "__main__":
    typer.run(main)
