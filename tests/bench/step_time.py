"""A training step with Block AttnRes against the standard residual, both under Inductor, in one process, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_compile as ac

LAYERS, HIDDEN, SEQUENCE, ROUNDS = 6, 256, 256, 12
CONFIGS = {"block, N=4": ac.AttnResConfig(num_blocks=4), "full": ac.AttnResConfig(variant="full")}


def run() -> Table:
    title = f"training step, {LAYERS} layers, D={HIDDEN}, sequence {SEQUENCE}, float32: median of {ROUNDS}, ratio by pairs"
    table = Table(title=title, title_justify="left")
    for header in ("residual", "ms", "ratio to standard (min, median, max)"):
        table.add_column(header, justify="right")
    steps = {"standard": step_of(None), **{name: step_of(config) for name, config in CONFIGS.items()}}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    for name, taken in times.items():
        ratios = sorted(a / b for a, b in zip(taken, times["standard"], strict=True))
        spread = f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f}"
        table.add_row(name, f"{statistics.median(taken):.0f}", spread)
    return table


def step_of(config: ac.AttnResConfig | None) -> Callable[[], None]:
    """A compiled, warmed-up training step without the optimizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
        )
    )  # fmt: skip
    ids = torch.randint(1, 256, (4, SEQUENCE))
    if config is not None:
        ac.convert_(model, config, (ids,), {"use_cache": False})
    compiled = torch.compile(model, backend="attnres" if config else "inductor")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        compiled(ids, labels=ids, use_cache=False).loss.backward()

    for _ in range(2):
        step()
    return step
