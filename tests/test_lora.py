"""peft's adapters on a converted model: trained as the definition has it, in float64, and saved with the queries."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_nets import BATCH, Net, eager, expected_of, set_queries
from torch import Tensor

import attnres_compile as ac

TOLERANCE = 1e-12
CONFIG = ac.AttnResConfig(num_blocks=2)


def base(seed: int = 1, config: ac.AttnResConfig = CONFIG) -> Any:
    """A converted network; its weights depend on nothing, its queries on ``seed``."""
    torch.manual_seed(0)
    model = Net().double()
    ac.convert_(model, config, (BATCH,))
    set_queries(model, seed)
    return model


def adapted(model: Any, modules_to_save: list[str] | None) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["linear"], modules_to_save=modules_to_save, init_lora_weights=False)
    return get_peft_model(model, config)


def with_queries(model: Any) -> PeftModel:
    return adapted(model, ["attnres"])


def loss_of(output: Tensor) -> Tensor:
    return output.pow(3).mean() + (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).mean()


def train(model: PeftModel, compiled: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        loss_of(compiled(BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_equals_the_definition() -> None:
    model = with_queries(base())
    compiled = torch.compile(model, backend=eager)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum("query" in name for name in trained) == 4 and sum("lora" in name for name in trained) == 8
    loss_of(compiled(BATCH)).backward()
    found = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    loss_of(expected_of(model.base_model.model)).backward()
    for name, p in trained.items():
        assert (found[name] - p.grad).norm() <= TOLERANCE * p.grad.norm() and p.grad.norm() > 0, name
    train(model, compiled)
    torch.testing.assert_close(compiled(BATCH), expected_of(model.base_model.model), rtol=TOLERANCE, atol=TOLERANCE)


def test_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    model = with_queries(base())
    compiled = torch.compile(model, backend=eager)
    train(model, compiled)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(".attnres.sites." in name for name in saved) == 8
    loaded = PeftModel.from_pretrained(base(seed=2), tmp_path)
    assert torch.equal(torch.compile(loaded, backend=eager)(BATCH), compiled(BATCH))


def test_merging_keeps_the_queries() -> None:
    model = with_queries(base())
    compiled = torch.compile(model, backend=eager)
    train(model, compiled)
    expected = compiled(BATCH).detach()
    merged = model.merge_and_unload()
    assert type(merged) is Net and not isinstance(merged, PeftModel)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base().named_parameters()]
    found = torch.compile(merged, backend=eager)(BATCH)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(ac.NotRewrittenError):
        merged(BATCH)


def test_every_adapter_has_its_queries() -> None:
    model = with_queries(base())
    compiled = torch.compile(model, backend=eager)
    train(model, compiled)
    first = compiled(BATCH).detach()
    plain = torch.compile(base(), backend=eager)(BATCH)
    with model.disable_adapter():
        assert torch.equal(compiled(BATCH), plain)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["linear"], modules_to_save=["attnres"]))
    model.set_adapter("other")
    assert torch.equal(compiled(BATCH), plain)  # its B is zero, and its queries are copies of the base model's
    model.set_adapter("default")
    assert torch.equal(compiled(BATCH), first) and not torch.equal(first, plain)


def test_eagerly_it_raises() -> None:
    with pytest.raises(ac.NotRewrittenError, match="being run eagerly"):
        with_queries(base())(BATCH)


LOST = 'peft saves adapters of Net without its AttnRes parameters, although they are being trained.*modules_to_save=\\["attnres"'


@pytest.mark.parametrize("whole", [True, False], ids=["the wrapper compiled", "the model compiled"])
def test_queries_that_an_adapter_would_lose(whole: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = adapted(base(), None)
    inner = model.base_model.model
    inner.attnres.requires_grad_(True)
    train(model, torch.compile(model if whole else inner, backend=eager))
    caplog_matches(caplog, LOST)
    model.save_pretrained(tmp_path)
    assert not any("attnres" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    merged = model.merge_and_unload()
    assert not torch.equal(merged.attnres.sites[0].query, base().attnres.sites[0].query)  # but the whole model has them


def caplog_matches(caplog: pytest.LogCaptureFixture, pattern: str) -> None:
    assert any(re.match(pattern, record.getMessage()) for record in caplog.records), caplog.text


@pytest.mark.parametrize("modules_to_save", [None, ["attnres"]], ids=["queries frozen", "queries saved"])
def test_no_warning_where_nothing_is_lost(modules_to_save: list[str] | None, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(base(), modules_to_save)
    train(model, torch.compile(model, backend=eager))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "attnres" in record.name]


def test_converting_the_wrapper_is_refused() -> None:
    torch.manual_seed(0)
    model = adapted(Net(), None)
    for call in (lambda: ac.convert_(model, args=(BATCH,)), lambda: ac.rewrite(model, args=(BATCH,))):
        with pytest.raises(ac.ConfigError, match=r"PeftModel wraps a model.*call attnres_compile\.convert_.* before wrapping it"):
            call()
    with pytest.raises(ac.ConfigError, match="PeftModel wraps a model"):
        torch.compile(model, backend=eager)(BATCH)


def test_an_adapter_of_other_options_is_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """safetensors keeps no options, so that nothing can be compared; the log says what the tensors are taken to be."""
    with_queries(base()).save_pretrained(tmp_path)
    PeftModel.from_pretrained(base(config=ac.AttnResConfig(num_blocks=4)), tmp_path)
    caplog_matches(caplog, r"the tensors that are loaded as \S*attnres\S* do not say with which options.*num_blocks=4")
