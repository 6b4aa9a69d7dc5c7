"""With trained (random) queries the rewritten model is Attention Residuals: logits and every gradient against an
independent evaluation of the definition on the models' own submodules, in float64."""

from collections.abc import Callable

import pytest
import torch
from gradients import gradients, loss_of, relative_error
from models import example_inputs, tiny
from reference import gpt2_logits, llama_logits, promote_to_float64
from torch import Tensor, nn

import attnres_compile as ac

ORACLES: dict[str, Callable[..., Tensor]] = {"llama": llama_logits, "gpt2": gpt2_logits}
CONFIGS = {
    "full": ac.AttnResConfig(variant="full"),
    "block-3": ac.AttnResConfig(num_blocks=3),
    "block-3-paper": ac.AttnResConfig(num_blocks=3, scale="paper"),
    "size-2-no-key-norm": ac.AttnResConfig(block_size=2, key_norm=False),
    "full-eps": ac.AttnResConfig(variant="full", eps=0.3),
}
TOLERANCE = 1e-10


def randomise_sites(parameters: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in parameters.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if name.endswith("key_norm") else noise)


def expected_of(name: str, model: nn.Module, ids: Tensor, config: ac.AttnResConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of the converted ``model`` by the definition."""
    sites = model.attnres.sites
    queries = [site.query for site in sites]
    key_norms = [site.key_norm for site in sites] if config.key_norm else None
    logits = ORACLES[name](model, ids, queries, key_norms, config.resolved_block_size(len(sites)), config.scale, eps=config.eps)
    return logits.detach(), gradients(model, loss_of(logits))


def check(found_logits: Tensor, found: dict[str, Tensor], expected_logits: Tensor, expected: dict[str, Tensor]) -> None:
    assert found_logits.dtype == torch.float64
    assert relative_error(found_logits, expected_logits) <= TOLERANCE
    assert found.keys() == expected.keys()
    for key in expected:
        assert expected[key].abs().max() > 0, key
        assert relative_error(found[key], expected[key]) <= TOLERANCE, key


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_rewrite_is_the_definition(name: str, config: ac.AttnResConfig) -> None:
    model = tiny(name).train()
    (ids,), kwargs = example_inputs(name)
    with promote_to_float64(model):
        ac.convert_(model, config, (ids,), kwargs)
        randomise_sites(model.attnres)
        expected_logits, expected = expected_of(name, model, ids, config)
        rewritten = ac.rewrite(model, args=(ids,), kwargs=kwargs)
        logits = rewritten(ids, **kwargs).logits
        check(logits, gradients(rewritten, loss_of(logits)), expected_logits, expected)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("config", [CONFIGS["full"], CONFIGS["block-3"]], ids=["full", "block-3"])
def test_inductor_is_the_definition(name: str, config: ac.AttnResConfig) -> None:
    model = tiny(name, attn_implementation="eager").train()  # torch 2.11 fails on SDPA's float64 backward
    (ids,), kwargs = example_inputs(name)
    with promote_to_float64(model):
        ac.convert_(model, config, (ids,), kwargs)
        randomise_sites(model.attnres)
        expected_logits, expected = expected_of(name, model, ids, config)
        logits = torch.compile(model, backend="attnres")(ids, **kwargs).logits
        check(logits, gradients(model, loss_of(logits)), expected_logits, expected)


def test_the_compiled_rewrite_is_the_rewrite() -> None:
    """A rewritten module is a graph that torch.compile takes whole; the operator stays, with its own backward."""
    model = tiny("llama", attn_implementation="eager").train()
    (ids,), kwargs = example_inputs("llama")
    with promote_to_float64(model):
        rewritten = ac.rewrite(model, CONFIGS["block-3"], (ids,), kwargs)
        randomise_sites(rewritten.attnres)
        logits = rewritten(ids, **kwargs).logits
        expected = gradients(rewritten, loss_of(logits))
        compiled = torch.compile(rewritten, fullgraph=True)(ids, **kwargs).logits
        check(compiled, gradients(rewritten, loss_of(compiled)), logits, expected)
