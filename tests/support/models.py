"""Tiny models with random weights, real Transformers classes and plain torch, and inputs for each."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 97
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_TEXT, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}  # grouped-query attention
_GPT2 = {**_TEXT, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

# the default, grouped_mm, has no eager float64 kernel
_MIXTRAL = {**_GROUPED, "num_local_experts": 4, "experts_implementation": "batched_mm"}
_GPT_NEOX = {**_TEXT, "intermediate_size": 64, "use_parallel_residual": False}  # Pythia's parallel form is an override
_OPT = {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 7,
}

# name -> model class, config class, config. Eight sublayers each.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _GPT_NEOX),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _MIXTRAL),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT),
}


class NanoGPTBlock(nn.Module):
    """A PreNorm block, ``[B, T, D]`` to ``[B, T, D]``."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_1 = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.ln_2 = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.GELU(), nn.Linear(2 * hidden_size, hidden_size))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """A small GPT in plain torch: ids ``[B, T]`` to logits ``[B, T, V]``."""

    def __init__(
        self, vocab_size: int = VOCABULARY, hidden_size: int = 32, num_layers: int = 4, num_heads: int = 4, tied: bool = True
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(32, hidden_size)
        self.blocks = nn.ModuleList([NanoGPTBlock(hidden_size, num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """torch's own PreNorm encoder: ids ``[B, T]`` to logits ``[B, T, V]``."""

    def __init__(self, vocab_size: int = VOCABULARY, hidden_size: int = 32, num_layers: int = 4, num_heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        layer = nn.TransformerEncoderLayer(
            hidden_size, num_heads, dim_feedforward=2 * hidden_size, dropout=0.0, norm_first=True, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(hidden_size), enable_nested_tensor=False)
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(ids)))


PLAIN: dict[str, type[nn.Module]] = {"nanogpt": NanoGPT, "encoder": Encoder}
NAMES = (*TRANSFORMERS, *PLAIN)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter anew, in place, so that no weight is neutral and every branch is as large as the stream.

    Norm weights lie within 0.3 of the identity, biases within 0.1 of zero; a matrix has a variance of 1 / fan-in.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            identity = 0.0 if type(module).__name__ == "GemmaRMSNorm" else 1.0  # Gemma multiplies by 1 + weight
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    fan_in = parameter[0].numel() if isinstance(module, nn.Conv2d) else parameter.shape[-1]
                    new = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
                elif name.endswith("bias"):
                    new = 0.2 * torch.rand(parameter.shape, generator=generator) - 0.1
                else:
                    new = identity + 0.6 * torch.rand(parameter.shape, generator=generator) - 0.3
                parameter.copy_(new)
    return model


def tiny(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A small model of the given name, in eval mode and float32: 4 layers, width 32, no dropout, all weights random.

    Overrides are fields of the Transformers configuration (``attn_implementation`` is one) or arguments of the class.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in PLAIN:
            model = PLAIN[name](**overrides)
        else:
            model_class, config_class, config = TRANSFORMERS[name]
            model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**config, **overrides}))
    return randomise(model, seed).eval()


def example_inputs(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of a call: ids ``[2, 11]`` (no special ones), or pixel values ``[2, 3, 16, 16]``."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return (), {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (2, 11), generator=generator)
    return (ids,), {} if name in PLAIN else {"use_cache": False}
