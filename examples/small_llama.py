"""A Llama of Transformers with sizes that suit a processor; its vocabulary is the bytes."""

from __future__ import annotations

from typing import Any

from demo_data import VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(layers: int, hidden: int, length: int, heads: int = 4, **options: Any) -> LlamaForCausalLM:
    """Build it with random weights, for sequences of ``length`` bytes. ``options`` are further fields of its config."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=hidden * 5 // 2,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=length,
            **options,
        )
    )
