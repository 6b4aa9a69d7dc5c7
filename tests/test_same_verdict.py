"""One model, one verdict: whatever mode, cache, dtype or tool the graph comes from, the same chains and refusals are found."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import _GROUPED, _TEXT, VOCABULARY, example_inputs, randomise, tiny
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnres_compile as ac
from attnres_compile.backend import compile_rewritten

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
_DINOV2 = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 16, "patch_size": 4, "mlp_ratio": 2}
_BERT = {**_TEXT, "intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_OLMO2 = {key: value for key, value in _GROUPED.items() if key != "head_dim"}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}
_PHI = {**_TEXT, "intermediate_size": 64, "resid_pdrop": 0.0}

# Families beyond those of models.tiny: model class, config class, config.
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", {**_T5, "decoder_start_token_id": 0}),  # relative positions, two stacks
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GROUPED),  # sandwich norms
    "phi": ("PhiForCausalLM", "PhiConfig", _PHI),  # parallel branches
    "dinov2": ("Dinov2Model", "Dinov2Config", _DINOV2),  # LayerScale
    "mamba": ("MambaForCausalLM", "MambaConfig", _MAMBA),  # no attention
    "bert": ("BertModel", "BertConfig", _BERT),  # post-norm
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _OLMO2),  # norms on the branches' outputs
}
TINY = ("llama", "gpt2", "opt", "mixtral", "vit", "nanogpt", "encoder")
NAMES = (*TINY, *MORE, "dit")


class DiTBlock(nn.Module):
    """Shift, scale and gate of both branches depend on the conditioning, as in diffusion transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, h, h, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Images ``[B, 3, 16, 16]`` and times ``[B, 1]`` to patches ``[B, 16, 48]``."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(DiTBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 48)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        x, condition = self.patches(image).flatten(2).transpose(1, 2), self.time(time)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(self.norm(x))


def build(name: str) -> Case:
    """A tiny model in eval mode, and the arguments of a call without a key-value cache."""
    if name in TINY:
        return tiny(name), *example_inputs(name)
    if name == "dit":
        return randomise(DiT(), 0).eval(), (torch.randn(2, 3, 16, 16), torch.rand(2, 1)), {}
    model_class, config_class, config = MORE[name]
    model = randomise(getattr(transformers, model_class)(getattr(transformers, config_class)(**config)), 0).eval()
    if name == "dinov2":
        return model, (), {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.randint(3, VOCABULARY, (2, 3 if name == "mamba" else 11))  # Mamba's scan is unrolled over the sequence
    decoder = {"decoder_input_ids": ids[:, :7].contiguous()} if name == "t5" else {}
    return model, (), {"input_ids": ids, **decoder, "use_cache": False}


def verdict(report: ac.Report) -> dict[str, list[Any]]:
    """What was decided, without names of graph nodes and counts in the reasons."""
    chains = [(c.kind, c.num_sublayers, c.hidden_size, [(s.modules, s.before) for s in c.sites]) for c in report.chains]
    refusals = sorted((r.subject, re.sub(r"'[^']*'|\d+", "_", r.reason), r.module) for r in report.refusals)
    return {"chains": chains, "refusals": refusals}


@functools.cache
def plain_verdict(name: str) -> dict[str, list[Any]]:
    return verdict(ac.detect(*build(name)))


# What plain detection says: kind, sublayers and sites of every chain, or how the refusal begins.
EXPECTED: dict[str, list[tuple[str, int, int]] | str] = {
    **{name: [("prenorm", 8, 8)] for name in (*TINY, "dinov2", "dit")},
    "t5": [("prenorm", 6, 6), ("prenorm", 9, 9)],
    "gemma2": [("sandwich", 8, 8)],
    "phi": [("parallel", 4, 4)],
    "mamba": [("prenorm", 4, 4)],
    "bert": "post-norm",
    "olmo2": "reordered norm",
}


@pytest.mark.parametrize("name", NAMES)
def test_plain_verdict(name: str) -> None:
    expected, found = EXPECTED[name], plain_verdict(name)
    if isinstance(expected, str):
        assert found["chains"] == []
        assert [reason.startswith(expected) for _, reason, _ in found["refusals"]] == [True]
    else:
        assert [(kind, sublayers, len(sites)) for kind, sublayers, _, sites in found["chains"]] == expected
        assert found["refusals"] == []


def in_training(model: nn.Module, args: Any, kwargs: Any) -> ac.Report:
    return ac.detect(model.train(), args, kwargs)


def with_checkpointing(model: Any, args: Any, kwargs: Any) -> ac.Report:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return ac.detect(model.train(), args, kwargs)


def with_cache(model: nn.Module, args: Any, kwargs: Any) -> ac.Report:
    return ac.detect(model, args, {**kwargs, "use_cache": True})


def with_given_cache(model: Any, args: Any, kwargs: Any) -> ac.Report:
    cache: Any = transformers.DynamicCache(config=model.config)
    if model.config.is_encoder_decoder:
        cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    return ac.detect(model, args, {**kwargs, "use_cache": True, "past_key_values": cache})


def under_autocast(model: nn.Module, args: Any, kwargs: Any) -> ac.Report:
    with torch.autocast("cpu", torch.bfloat16):
        return ac.detect(model, args, kwargs)


def with_marked_inputs(model: nn.Module, args: Any, kwargs: Any) -> ac.Report:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            for dim in range(value.dim() if not value.is_floating_point() else 1):
                torch._dynamo.mark_dynamic(value, dim)
    return ac.detect(model, args, kwargs)


def exported(model: nn.Module, args: Any, kwargs: Any) -> ac.Report:
    return ac.detect(torch.export.export(model, args, kwargs))


def exported_under_autocast(model: nn.Module, args: Any, kwargs: Any) -> ac.Report:
    with torch.autocast("cpu", torch.bfloat16):
        return ac.detect(torch.export.export(model, args, kwargs))


def decomposed(model: nn.Module, args: Any, kwargs: Any) -> ac.Report:
    with sdpa_kernel(SDPBackend.MATH):  # torch decomposes its fused CPU attention into views that transposed tensors don't have
        return ac.detect(torch.export.export(model, args, kwargs).run_decompositions())


WAYS: dict[str, Callable[..., ac.Report]] = {
    function.__name__: function
    for function in (
        in_training, with_checkpointing, with_cache, with_given_cache, under_autocast, with_marked_inputs, exported,
        exported_under_autocast, decomposed,
    )
}  # fmt: skip
PLAIN = ("nanogpt", "encoder", "dit")
# T5's own checkpointing breaks the graph (see below).
APPLIES = {
    "with_checkpointing": [name for name in NAMES if name not in (*PLAIN, "t5")],
    "with_cache": ["llama", "gpt2", "opt", "mixtral", "t5", "gemma2", "phi", "olmo2", "mamba"],
    "with_given_cache": ["llama", "gpt2", "opt", "mixtral", "t5", "gemma2", "phi", "olmo2"],
}
PAIRS = [(name, way) for way in WAYS for name in APPLIES.get(way, NAMES)]


@pytest.mark.parametrize(("name", "way"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_the_verdict_is_that_of_the_plain_capture(name: str, way: str) -> None:
    assert verdict(WAYS[way](*build(name))) == plain_verdict(name)


def test_a_checkpoint_that_breaks_the_graph_is_named() -> None:
    with pytest.raises(ac.ChainCutError, match=r"modeling_t5\.py:\d+: position_bias\.requires_grad"):
        with_checkpointing(*build("t5"))


@pytest.mark.parametrize("name", NAMES)
def test_the_backend_comes_to_the_same_verdict_with_dynamic_shapes(name: str) -> None:
    model, args, kwargs = build(name)
    compiled = torch.compile(model, backend=eager_backend, dynamic=True)
    refused = isinstance(EXPECTED[name], str)
    with pytest.raises(ac.NoResidualChainError, match=str(EXPECTED[name])) if refused else contextlib.nullcontext():
        compiled(*args, **kwargs)
    if not refused:
        readers = [modules[0] for _, _, _, sites in plain_verdict(name)["chains"] for modules, _ in sites]
        assert [site.module for site in model.attnres.layout] == readers


def eager_backend(gm: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
    return compile_rewritten(gm, inputs, lambda graph, example, mode: graph.forward, **options)
