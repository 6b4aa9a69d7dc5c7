"""Llamas with the standard residual, with ours, and with Block AttnRes written by hand, on the same weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_compile as ac
from attnres_compile.backend import attnres


@dataclass(frozen=True)
class Size:
    """A Llama and its inputs; ``context`` is what the cache holds before a token is decoded."""

    layers: int = 12
    width: int = 768
    intermediate: int = 2048
    heads: int = 12
    kv_heads: int = 12
    vocabulary: int = 8192
    sequence: int = 512
    batch: int = 1
    context: int = 512
    blocks: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rounds: int = 10

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Llama of {self.layers} layers, D={self.width}, {dtype}"

    def tokens(self, sequence: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, self.vocabulary, (self.batch, sequence), generator=generator).to(self.device)


def llama(size: Size) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=2 * max(size.sequence, size.context), tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    with torch.device(size.device):
        return LlamaForCausalLM(config).to(size.dtype)


@dataclass
class Variant:
    """A model to compile with ``backend``. ``queries`` are its AttnRes parameters; ``environment`` holds while it is compiled."""

    model: nn.Module
    backend: str | Callable[..., Any]
    queries: list[Tensor]
    environment: dict[str, str]
    same_as: str = ""  # the variant that computes the same with equal queries

    def randomize(self) -> None:
        """Queries that give scores of about one, the same for every variant."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for query in self.queries:
                query.copy_(torch.randn(query.shape, generator=generator) * query.shape[0] ** -0.5)


STANDARD, BLOCK, FULL, PER_SITE, STACKED = "standard", "block", "full", "block, per site", "block, stacked"


def variant(name: str, size: Size, base: LlamaForCausalLM) -> Variant:
    """The variant ``name`` on a copy of ``base``."""
    model = copy.deepcopy(base)
    if name == STANDARD:
        return Variant(model, "inductor", [], {})
    if name == STACKED:
        stacked = StackedLlama(model, size.blocks)
        return Variant(stacked, "inductor", list(stacked.queries), {}, BLOCK)
    config = ac.AttnResConfig(variant="full") if name == FULL else ac.AttnResConfig(num_blocks=size.blocks)
    ac.convert_(model, config, (size.tokens(8),), {"use_cache": False})
    environment = {"ATTNRES_DISABLE_PASSES": "two_phase"} if name == PER_SITE else {}
    same_as = BLOCK if name == PER_SITE else ""
    return Variant(model, attnres, [site.query for site in model.attnres.sites], environment, same_as)


class StackedLlama(nn.Module):
    """A Transformers Llama whose residual is Block AttnRes as one writes it: stack, norm, score, softmax, sum.

    The weights of a site's n sources sum to n, as our default has it.
    """

    def __init__(self, llama: LlamaForCausalLM, blocks: int) -> None:
        super().__init__()
        self.llama = llama
        sublayers = 2 * llama.config.num_hidden_layers
        self.block_size = -(-sublayers // blocks)
        self.eps = llama.config.rms_norm_eps
        like = llama.model.norm.weight
        self.queries = nn.ParameterList(torch.zeros_like(like) for _ in range(sublayers))
        self.key_norms = nn.ParameterList(torch.ones_like(like) for _ in range(sublayers))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, logits_to_keep: int = 0, **_: Any) -> SimpleNamespace:
        body = self.llama.model
        x = body.embed_tokens(input_ids)
        rotary = body.rotary_emb(x, position_ids=torch.arange(input_ids.shape[1], device=x.device).unsqueeze(0))
        sublayers: list[Callable[[Tensor], Tensor]] = []
        for layer in body.layers:
            sublayers += [functools.partial(_attention, layer, rotary), functools.partial(_mlp, layer)]
        blocks, partial = [x], None
        for number, sublayer in enumerate(sublayers):
            sources = blocks if partial is None else [*blocks, partial]
            branch = sublayer(self.site(sources, number - 1) if number else x)
            partial = branch if partial is None else partial + branch
            if (number + 1) % self.block_size == 0:
                blocks, partial = [*blocks, partial], None
        x = body.norm(self.site(blocks if partial is None else [*blocks, partial], -1))
        logits = self.llama.lm_head(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.llama.loss_function(logits=logits, labels=labels, vocab_size=self.llama.config.vocab_size)
        return SimpleNamespace(loss=loss, logits=logits)

    def site(self, sources: list[Tensor], number: int) -> Tensor:
        values = torch.stack(sources)
        keys = values.float() * torch.rsqrt(values.float().square().mean(-1, keepdim=True) + self.eps)
        keys = self.key_norms[number] * keys.to(values.dtype)
        weights = len(sources) * (keys * self.queries[number]).sum(-1).softmax(0)
        return (weights.unsqueeze(-1) * values).sum(0)


def _attention(layer: nn.Module, rotary: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    output: Tensor = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
    return output


def _mlp(layer: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = layer.mlp(layer.post_attention_layernorm(x))
    return output
