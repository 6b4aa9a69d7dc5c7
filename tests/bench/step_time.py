"""A whole Llama under Inductor: training step, prefill and decoding with the standard residual and with AttnRes.

The sides share their weights, run in one process, interleaved, and are compared before they are timed: with zero queries each
computes what the standard residual does, with random ones all that are the same variant compute the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from models import BLOCK, FULL, PER_SITE, STACKED, STANDARD, Size, Variant, llama, variant
from rich.table import Table
from timing import Spread, first_call, gate, interleaved, ratios
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache

Call = Callable[[], list[Tensor]]  # one call of a compiled model: tensors that tell whether it computed the right thing
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1}  # of gradients, through the whole depth
MODES = ("default", "reduce-overhead")


@dataclass(frozen=True)
class Compared:
    """Milliseconds of every call by side, the standard residual first, and seconds of each side's first call."""

    title: str
    times: dict[str, list[float]]
    first_calls: dict[str, float]

    def table(self) -> Table:
        standard, rounds = next(iter(self.times)), len(next(iter(self.times.values())))
        made = Table(title=f"{self.title}: median (least to most) of {rounds}", title_justify="left")
        made.add_column("side")
        for header in ("ms", f"ratio to {standard}", "first call, compiling (s)"):
            made.add_column(header, justify="right")
        for name, taken in self.times.items():
            ratio = "" if name == standard else str(ratios(self.times, name, standard))
            made.add_row(name, str(Spread.of(taken)), ratio, f"{self.first_calls[name]:.1f}")
        return made


def training(size: Size, sides: Sequence[str] = (STANDARD, BLOCK, FULL, PER_SITE, STACKED)) -> Compared:
    """Forward and backward, without an optimizer."""
    tokens = size.tokens(size.sequence)

    def calls(chosen: Variant, compiled: Callable[..., object]) -> Call:
        parameters = dict(chosen.model.named_parameters())
        watched = next(p for name, p in parameters.items() if name.endswith("layers.0.mlp.down_proj.weight"))

        def step() -> list[Tensor]:
            chosen.model.zero_grad(set_to_none=True)
            loss = compiled(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            return [loss.detach(), watched.grad]

        return step

    title = f"training step, {size}, {size.batch} x {size.sequence} tokens"
    return compare(title, size, sides, calls)


def prefill(size: Size, sides: Sequence[str] = (STANDARD, BLOCK, FULL, PER_SITE, STACKED)) -> Compared:
    """The logits of the last token of a prompt, without gradients and without a cache."""
    tokens = size.tokens(size.sequence)

    def calls(chosen: Variant, compiled: Callable[..., object]) -> Call:
        def call() -> list[Tensor]:
            with torch.no_grad():
                return [compiled(tokens, use_cache=False, logits_to_keep=1).logits]

        return call

    return compare(f"prefill, {size}, {size.batch} x {size.sequence} tokens", size, sides, calls)


def decode(size: Size, sides: Sequence[str] = (STANDARD, BLOCK, FULL), mode: str = MODES[0]) -> Compared:
    """One token per sequence with a static cache, which begins with the context as the standard model fills it."""
    base, token, context = llama(size).eval(), size.tokens(1), size.tokens(size.context)

    def calls(chosen: Variant, compiled: Callable[..., object]) -> Call:
        # Every call adds a token; all of them attend over the cache as a whole, so their work is the same.
        room = size.context + 4 * size.rounds + 32
        cache = StaticCache(config=base.config, max_cache_len=room)
        with torch.no_grad():
            base(context, past_key_values=cache, use_cache=True)

        def call() -> list[Tensor]:
            with torch.no_grad():
                return [compiled(token, past_key_values=cache, use_cache=True).logits.clone()]

        return call

    title = f"decode, {size}, {size.batch} x 1 token behind {size.context}, mode={mode!r}"
    return compare(title, size, sides, calls, mode, base)


def compare(
    title: str, size: Size, sides: Sequence[str], calls: Callable[[Variant, Callable[..., object]], Call],
    mode: str = MODES[0], base: LlamaForCausalLM | None = None,
) -> Compared:  # fmt: skip
    """Compile every side, hold its results against the others', and time it."""
    base = base or llama(size)
    torch.compiler.reset()
    ready: dict[str, Call] = {}
    variants: dict[str, Variant] = {}
    seconds: dict[str, float] = {}
    expected: list[Tensor] = []
    tolerance = TOLERANCES[size.dtype]
    for name in sides:
        variants[name] = chosen = variant(name, size, base)
        chosen.model.train(base.training)
        compiled = torch.compile(chosen.model, backend=chosen.backend, mode=None if mode == MODES[0] else mode, dynamic=False)
        ready[name] = calls(chosen, compiled)
        with mock.patch.dict(os.environ, chosen.environment):
            seconds[name] = first_call(ready[name])
            found = copied(ready[name]())
        expected = expected or found
        gate(f"{title}: {name} with zero queries against {sides[0]}", found, expected, tolerance)
    for chosen in variants.values():
        chosen.randomize()
    results = {name: copied(call()) for name, call in ready.items()}
    for name, chosen in variants.items():
        if chosen.same_as in results:
            gate(f"{title}: {name} against {chosen.same_as}", results[name], results[chosen.same_as], tolerance)
    return Compared(title, interleaved(ready, size.rounds, torch.device(size.device)), seconds)


def copied(found: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in found]


def run() -> Table:
    return training(Size()).table()


def run_prefill() -> Table:
    return prefill(Size()).table()


def run_decode() -> Table:
    return decode(Size(rounds=30)).table()
