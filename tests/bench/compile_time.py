"""What detection and rewriting cost in a whole ``torch.compile`` of a 32-layer Llama, forward and backward."""

from __future__ import annotations

import tempfile
import time
from unittest import mock

import torch
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from attnres_compile.backend import compile_rewritten
from attnres_compile.capture import compile_with_inductor

LAYERS = 32


def llama(layers: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def run() -> Table:
    table = Table(title=f"torch.compile of a {LAYERS}-layer Llama, first training step, empty caches", title_justify="left")
    for header in ("backend", "whole (s)", "detect and rewrite (s)", "share"):
        table.add_column(header, justify="right")
    whole, ours = first_step("attnres")
    table.add_row("attnres", f"{whole:.1f}", f"{ours:.2f}", f"{ours / whole:.2%}")
    plain, _ = first_step("inductor")
    table.add_row("inductor", f"{plain:.1f}", "", "")
    table.add_row("ratio", f"{whole / plain:.2f}", "", "")
    return table


def first_step(backend: str) -> tuple[float, float]:
    """Seconds of the first training step, and the part of it that our backend spends outside Inductor."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, ids = llama(LAYERS), torch.randint(1, 256, (2, 32))
    inside: list[float] = []

    def timed_inductor(graph_module, inputs, mode):
        start = time.perf_counter()
        compiled = compile_with_inductor(graph_module, inputs, mode)
        inside.append(time.perf_counter() - start)
        return compiled

    spent: list[float] = []

    def rewriting(graph_module, example_inputs):
        start = time.perf_counter()
        compiled = compile_rewritten(graph_module, example_inputs, timed_inductor)
        spent.append(time.perf_counter() - start)
        return compiled

    with tempfile.TemporaryDirectory() as cache, mock.patch.dict("os.environ", TORCHINDUCTOR_CACHE_DIR=cache):
        compiled = torch.compile(model, backend=rewriting if backend == "attnres" else backend)
        start = time.perf_counter()
        compiled(ids, labels=ids, use_cache=False).loss.backward()
        return time.perf_counter() - start, sum(spent) - sum(inside)
