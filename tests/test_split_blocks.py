"""Blocks of a split model by themselves: compiled, recomputed, in other dtypes, sharded. About 40 seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import fsdp_blocks
import pytest
import torch
from gradients import gradients, loss_of, relative_error
from models import NanoGPT, example_inputs, randomise, tiny
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnres_compile as ac

CONFIG = ac.AttnResConfig(block_size=2)
IDS = example_inputs("nanogpt")[0][0]


def converted(model: nn.Module, **kwargs: Any) -> nn.Module:
    ac.convert_(model.train(), CONFIG, (IDS,), kwargs)
    for site in model.attnres.sites:
        nn.init.normal_(site.query, std=0.3)
    return model


@contextlib.contextmanager
def saved_by(model: nn.Module) -> Iterator[dict[int, int]]:
    """The bytes of every storage that autograd saves, without parameters and without the inputs of what is recomputed."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@sdpa_kernel(SDPBackend.MATH)  # torch 2.11's Inductor takes the statistics of flash attention in float64 for float32
def test_blocks_compile_by_inductor_once() -> None:
    """In float64, with tied embeddings; three steps and an evaluation without gradients compile each block twice."""
    model = converted(randomise(NanoGPT(num_layers=2), 0).double())
    whole, split = ac.rewrite(model, args=(IDS,)), ac.rewrite(model, args=(IDS,), split=True)
    expected = gradients(model, loss_of(whole(IDS)))
    torch._dynamo.utils.counters.clear()
    for block in split.blocks:
        block.compile(fullgraph=True)
    found = gradients(model, loss_of(split(IDS)))
    with torch.no_grad():
        assert relative_error(split(IDS), whole(IDS)) <= 1e-13
    assert all(relative_error(found[name], expected[name]) <= 1e-12 for name in expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9)
            found, expected = (gradients(model, loss_of(module((IDS + step) % 97))) for module in (split, whole))
        assert all(relative_error(found[name], expected[name]) <= 1e-12 for name in expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 * len(split.blocks)
    assert not counters["graph_break"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_was_checkpointed_is_recomputed_block_by_block(compiled: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Blocks that hold checkpointed layers keep nothing but their inputs."""
    model = converted(tiny("llama", num_hidden_layers=2, use_cache=False).double())
    kept, found = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        split = ac.rewrite(model, args=(IDS,), split=True)
        for block in split.blocks if compiled else ():
            block.compile(backend="aot_eager")
        split(IDS)  # compiled before the count
        with saved_by(model) as saved:
            loss = loss_of(split(IDS).logits)
        kept.append(sum(saved.values()))
        found.append(gradients(model, loss))
    plain, recomputed = found
    assert all(relative_error(recomputed[name], plain[name]) <= 1e-13 for name in plain)
    assert "keeps them all" not in caplog.text
    assert kept[1] < 0.3 * kept[0]  # the last block, the norm and the head, holds no such layer


def test_dropout_is_the_same_when_a_block_is_recomputed() -> None:
    model = tiny("gpt2", num_hidden_layers=2, use_cache=False, resid_pdrop=0.3).double().train()
    model.gradient_checkpointing_enable()
    split = ac.rewrite(converted(model), args=(IDS,), split=True)
    direction = torch.randn_like(model.transformer.h[0].mlp.c_fc.bias)

    def loss(step: float) -> torch.Tensor:
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.bias.add_(direction, alpha=step)
        torch.manual_seed(5)
        return loss_of(split(IDS).logits)

    slope = (gradients(model, loss(0.0))["transformer.h.0.mlp.c_fc.bias"] * direction).sum()
    assert abs((loss(1e-5) - loss(-2e-5)) / 2e-5 - slope) <= 1e-6 * abs(slope)  # a central difference


def test_other_dtypes_and_another_autocast_are_refused() -> None:
    model = converted(tiny("llama", num_hidden_layers=2, use_cache=False))
    split = ac.rewrite(model, args=(IDS,), split=True)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ac.CaptureError, match="rewritten without autocast and is called under autocast to bfloat16; call rewrite"),
    ):
        split(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        under = ac.rewrite(model, args=(IDS,), split=True)
        whole = ac.rewrite(model, args=(IDS,))
        assert relative_error(under(IDS).logits.float(), whole(IDS).logits.float()) <= 1e-2
    with pytest.raises(ac.CaptureError, match="under autocast to bfloat16 and is called without autocast"):
        under(IDS)
    with pytest.raises(ac.CaptureError, match=r"block 0 reads .* in bfloat16, which was float32 .*model\.to\(torch\.bfloat16\)"):
        split.bfloat16()(IDS)
    with pytest.raises(ac.ConfigError, match="SplitModule was rewritten before; start from the original model"):
        ac.rewrite(split, args=(IDS,))
    with pytest.raises(ac.ConfigError, match='SplitModule was rewritten before; compile it without backend="attnres"'):
        torch.compile(split.float(), backend="attnres")(IDS)


def test_no_dtype_is_taken_for_another_in_silence() -> None:
    """A model without casts would run in any dtype: what crosses between blocks tells."""
    split = ac.rewrite(converted(NanoGPT(num_layers=2)), args=(IDS,), split=True)
    with pytest.raises(ac.CaptureError, match=r"block 0 gives .* in float64, which was float32 when the model was rewritten"):
        split.double()(IDS)


def test_sharded() -> None:
    """Gradients of compiled, recomputed, sharded blocks equal one process to 1e-12 in float64; the rest is refused by name."""
    way_out = "split = attnres_compile.rewrite(model, ..., split=True), fully_shard each of split.blocks, then split."
    for found in run_ranks(fsdp_blocks.all_of, 2):
        assert found["recomputed"] <= 1e-12
        for message in found["layers"]:
            assert message.startswith("ChainCutError: FSDP shards 2 modules inside Llama")
            assert way_out in message
        for message in found["before"]:
            assert message.startswith("ConfigError: FSDP shards FSDPLlamaForCausalLM") and message.endswith(way_out)
        assert found["cast"].startswith("CaptureError: block 0 reads model.")
        assert "in bfloat16, which was float32 when the model was rewritten" in found["cast"]
        assert "attnres_compile.rank_module(split) has all of them" in found["state"]
