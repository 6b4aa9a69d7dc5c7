"""A program of its own: flash-linear-attention's Transformer reads a checkpoint in its names and gives logits, on a CPU.

Its operators for GPUs are replaced by its own references, AttnRes among them. It runs in a process of its own, since
Transformers would use the library for other models of the tests as soon as it can be imported.

    fla_transformer.py FOLDER IDS LOGITS      a converted Llama, token ids [B, T] and where to put logits [B, T, V]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from fla.layers import attn as fla_attention
from fla.models.transformer import TransformerConfig, TransformerForCausalLM, modeling_transformer
from fla.modules import mlp as fla_mlp
from fla.modules.rotary.ops import rotary_embedding_ref
from fla.ops.attnres import naive_attnres
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

# A Llama's modules, and what this Transformer calls them.
RENAMED = {
    "embed_tokens": "embeddings", "self_attn": "attn", "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
}  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """What flash-attn computes of ``[B, T, H, d]``."""
    assert window_size == (-1, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


class Rotary(nn.Module):
    """Rotary positions by the library's own reference, in place of its kernel."""

    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        self.frequencies = base ** (-torch.arange(0, dim, 2).float() / dim)

    def forward(self, q: Tensor, k: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        angles = torch.arange(q.shape[1]).float().outer(self.frequencies)
        first, second = (rotary_embedding_ref(x, angles.cos(), angles.sin()) for x in (q, k))
        return first, second


def tensors_in(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            for ours, theirs in RENAMED.items():
                name = name.replace(ours, theirs)
            tensors[name] = tensor
    return tensors


def main(folder: Path, ids: Path, logits: Path) -> None:
    fla_attention.flash_attn_func = attention
    fla_attention.RotaryEmbedding = Rotary
    fla_mlp.swiglu = lambda gate, y: F.silu(gate) * y
    modeling_transformer.fused_attnres = naive_attnres
    config = json.loads((folder / "config.json").read_text())
    same = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "attnres_block_size")
    model = TransformerForCausalLM(TransformerConfig(
        **{name: config[name] for name in same}, num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"], norm_eps=config["rms_norm_eps"], rope_theta=10000.0,
        fuse_norm=False, fuse_swiglu=False, fuse_cross_entropy=False,
    )).eval()  # fmt: skip
    model.load_state_dict(tensors_in(folder))  # strict: neither a name more nor one less
    with torch.no_grad():
        save_file({"logits": model(load_file(ids)["ids"]).logits.contiguous()}, logits)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
