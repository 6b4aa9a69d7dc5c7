"""Activation checkpointing: what a checkpoint recomputes, and what a policy keeps, is the same in the rewritten model."""

import functools
import logging
from collections import Counter
from typing import Any

import pytest
import torch
from models import VOCABULARY, NanoGPT, example_inputs, randomise, tiny
from saved_tensors import Saved, step
from small_nets import set_queries
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attnres_compile as ac

aten = torch.ops.aten
LAYERS = 2
BLOCK = ac.AttnResConfig(num_blocks=2)
IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
PRODUCTS = ("aten.mm.default", "aten.addmm.default")
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"
RECOMPUTE = CheckpointPolicy.PREFER_RECOMPUTE


def selective(policy: Any) -> dict[str, Any]:
    return {"use_reentrant": False, "context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}


def keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation) == ATTENTION else RECOMPUTE


def every_second_product() -> tuple[Any, Any]:
    """A policy that counts, as torchtitan's does: anew in every region."""
    count = 0

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        nonlocal count
        count += str(operation) in PRODUCTS
        return CheckpointPolicy.PREFER_SAVE if str(operation) in PRODUCTS and count % 2 else RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


# Arguments of torch.utils.checkpoint; None is training without it.
KINDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "full": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "products": selective([aten.mm.default, aten.addmm.default]),
    "attention": selective(keep_attention),
    "every second product": {"use_reentrant": False, "context_fn": every_second_product},
}


class GPT(NanoGPT):
    """One checkpoint per block of attention and MLP, with dropout behind the MLP."""

    checkpointing: dict[str, Any] | None = None
    dropout = 0.1

    def block(self, x: Tensor, i: int) -> Tensor:
        block = self.blocks[i]
        x = x + block.attention(block.ln_1(x))
        return x + F.dropout(block.mlp(block.ln_2(x)), self.dropout, self.training)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for i in range(len(self.blocks)):
            x = self.block(x, i) if self.checkpointing is None else checkpoint(self.block, x, i, **self.checkpointing)
        return self.head(self.norm(x))


@functools.cache
def gpt_step(kind: str, rewritten: bool) -> Saved:
    """In float64; the same dropout for all kinds."""
    model = randomise(GPT(num_layers=LAYERS), seed=0).double().train()
    model.checkpointing = KINDS[kind]
    if rewritten:
        ac.convert_(model, BLOCK, (IDS,))
        set_queries(model, 3)
    torch.manual_seed(5)
    return step(model, lambda compiled: compiled(IDS).square().mean())


def products(counts: Counter[str]) -> int:
    return sum(counts[name] for name in PRODUCTS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_a_rewritten_model_keeps_and_recomputes_what_the_standard_one_does(kind: str) -> None:
    """Products and attention are the model's own operations; sites keep the same few bytes for themselves under any policy."""
    standard, rewritten = gpt_step(kind, False), gpt_step(kind, True)
    assert products(rewritten.operations) == products(standard.operations)
    assert rewritten.operations[ATTENTION] == standard.operations[ATTENTION]
    assert rewritten.backward[ATTENTION] == standard.backward[ATTENTION]
    assert rewritten.bytes - standard.bytes == gpt_step("full", True).bytes - gpt_step("full", False).bytes


def test_every_policy_acts() -> None:
    """A block has four products, of which the backward pass needs all but the last one's output."""
    kept = {kind: products(gpt_step(kind, True).operations) for kind in KINDS}
    assert kept["products"] - kept["full"] == 4 * LAYERS - 1
    assert kept["every second product"] - kept["full"] == 2 * LAYERS
    assert kept["full"] == kept["reentrant"] == kept["attention"]
    for rewritten in (False, True):
        in_backward = {kind: products(gpt_step(kind, rewritten).backward) for kind in KINDS}
        assert in_backward["full"] - in_backward["products"] == 4 * LAYERS - 1
    assert in_backward["products"] - in_backward["plain"] == 2  # those of the sites, which are recomputed under every policy
    attention = {kind: gpt_step(kind, True).backward[ATTENTION] for kind in KINDS}
    assert attention == {kind: 0 if kind in ("plain", "attention") else LAYERS for kind in KINDS}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_gradients_are_those_of_plain_training(kind: str) -> None:
    """Dropout is drawn anew in the recomputed part as it was in the forward pass."""
    found, expected = gpt_step(kind, True).gradients, gpt_step("plain", True).gradients
    assert found.keys() == expected.keys() and sum("query" in name for name in found) == 2 * LAYERS
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert ((found[name] - gradient).norm() / gradient.norm()).item() <= 1e-12, name


def llama_step(checkpointing: dict[str, Any] | None, config: ac.AttnResConfig | None) -> Saved:
    model = tiny("llama", num_hidden_layers=LAYERS).train()
    if config is not None:
        ac.convert_(model, config, (IDS,), {"use_cache": False})
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    return step(model, lambda compiled: compiled(IDS, use_cache=False).logits.sum())


def test_checkpointing_of_transformers() -> None:
    standard, block = ({kind: llama_step(KINDS[kind], config) for kind in ("full", "products")} for config in (None, BLOCK))
    for kind in standard:
        assert products(block[kind].operations) == products(standard[kind].operations)
    assert products(block["products"].operations) - products(block["full"].operations) == 7 * LAYERS - 1
    assert block["products"].bytes - standard["products"].bytes == block["full"].bytes - standard["full"].bytes
    assert block["full"].bytes < 0.5 * llama_step(None, BLOCK).bytes


def test_full_keeps_the_sources_that_later_checkpoints_read() -> None:
    """All outputs of linear layers but the last. If they were recomputed, all layers would be, as the backward pass begins."""
    assert products(llama_step(KINDS["full"], ac.AttnResConfig(variant="full")).operations) == 2 * LAYERS - 1


def test_a_policy_through_inductor() -> None:
    model = randomise(GPT(num_layers=1, hidden_size=16), seed=0).train()
    model.dropout = 0.0
    ac.convert_(model, args=(IDS,))
    set_queries(model, 3)
    ac.rewrite(model, args=(IDS,))(IDS).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.checkpointing = KINDS["products"]
    torch.compile(model, backend="attnres")(IDS).square().mean().backward()
    for name, gradient in expected.items():
        assert ((model.get_parameter(name).grad - gradient).norm() / gradient.norm()).item() <= 1e-5, name


def test_a_context_that_is_no_policy_is_refused_with_the_place() -> None:
    model = GPT(num_layers=LAYERS).train()
    ac.convert_(model, args=(IDS,))
    model.checkpointing = {"use_reentrant": False, "context_fn": lambda: (torch.no_grad(), torch.enable_grad())}
    with pytest.raises(ac.ConfigError, match=r"checkpoint at .*\.py:\d+: .* gives \(no_grad, enable_grad\)"):
        torch.compile(model, backend="attnres")(IDS)


def test_a_graph_ahead_of_time_says_that_it_does_not_recompute(caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        ours = [record for record in caplog.records if record.name.startswith("attnres_compile")]
        return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]

    (args, kwargs), model = example_inputs("llama"), tiny("llama", num_hidden_layers=LAYERS).train()
    plain = ac.rewrite(model, args=args, kwargs=kwargs)
    assert not warnings()
    model.gradient_checkpointing_enable()
    rewritten = ac.rewrite(model, args=args, kwargs=kwargs)
    (warning,) = warnings()
    assert "LlamaForCausalLM checkpoints activations (at " in warning and "keeps them all" in warning
    assert torch.equal(rewritten(*args, **kwargs).logits, plain(*args, **kwargs).logits)
