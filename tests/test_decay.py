"""Weight decay and optimizer grouping: the usual rules take queries for what they resemble, norms, and leave them alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from models import example_inputs, tiny
from torch import nn

import attnres_compile as ac

LEARNING_RATE, DECAY, STEPS = 0.1, 0.5, 3


def by_trainer(model: nn.Module, folder: Path) -> list[torch.optim.Optimizer]:
    """By names and classes of modules, as the Transformers Trainer does."""
    arguments = transformers.TrainingArguments(
        str(folder), learning_rate=LEARNING_RATE, weight_decay=DECAY, optim="adamw_torch", use_cpu=True, report_to="none"
    )
    return [transformers.Trainer(model, arguments).create_optimizer()]


def by_dimension(model: nn.Module, folder: Path) -> list[torch.optim.Optimizer]:
    """As nanoGPT does: what has two dimensions or more decays."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, lr=LEARNING_RATE)]


def by_vectors_and_biases(model: nn.Module, folder: Path) -> list[torch.optim.Optimizer]:
    """As timm's param_groups_weight_decay does: vectors and biases don't decay."""
    free = {name: p.ndim <= 1 or name.endswith(".bias") for name, p in model.named_parameters()}
    groups = [
        {"params": [p for name, p in model.named_parameters() if free[name]], "weight_decay": 0.0},
        {"params": [p for name, p in model.named_parameters() if not free[name]], "weight_decay": DECAY},
    ]
    return [torch.optim.AdamW(groups, lr=LEARNING_RATE)]


def is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed_tokens", "wte", "wpe"))


def by_muon(model: nn.Module, folder: Path) -> list[torch.optim.Optimizer]:
    """Matrices to Muon, which takes nothing else; embeddings, norms and biases to AdamW without decay."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and not is_embedding(name)]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or is_embedding(name)]
    muon = torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=DECAY)
    return [muon, torch.optim.AdamW(rest, lr=LEARNING_RATE, weight_decay=0.0)]


HELPERS = [by_trainer, by_dimension, by_vectors_and_biases, by_muon]


def converted(name: str, ahead_of_time: bool) -> nn.Module:
    model, (args, kwargs) = tiny(name, num_hidden_layers=2), example_inputs(name)
    config = ac.AttnResConfig(num_blocks=2)
    if ahead_of_time:
        model = ac.rewrite(model, config, args, kwargs)
    else:
        ac.convert_(model, config, args, kwargs)
    with torch.no_grad():
        for site in model.attnres.sites:
            site.query.normal_()
    return model


@pytest.mark.parametrize("ahead_of_time", [False, True], ids=["converted", "rewritten"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("helper", HELPERS, ids=lambda helper: helper.__name__)
def test_decoupled_decay_does_not_pull_queries(
    helper: Callable[..., list[torch.optim.Optimizer]], name: str, ahead_of_time: bool, tmp_path: Path
) -> None:
    """With gradients of zero nothing but the decay moves a parameter."""
    model = converted(name, ahead_of_time)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizers = helper(model, tmp_path)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    matrices = {key for key, value in before.items() if value.dim() == 2}
    assert sum(key.endswith(".query") for key in before) == len(model.attnres.sites) == 4
    assert not {key for key in moved if key.startswith("attnres.")}
    assert not moved - matrices  # a site is with the model's own norms and biases
    assert moved == {key for key in matrices if helper is not by_muon or not is_embedding(key)}
    for key in moved:
        torch.testing.assert_close(model.get_parameter(key), before[key] * (1 - LEARNING_RATE * DECAY) ** STEPS)


def test_decay_over_all_parameters_is_told_from_it() -> None:
    """Without a rule everything decays, norms and queries alike: the test above would see it."""
    model = converted("llama", ahead_of_time=False)
    before = [site.query.detach().clone() for site in model.attnres.sites]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for site, value in zip(model.attnres.sites, before, strict=True):
        torch.testing.assert_close(site.query.detach(), value * (1 - LEARNING_RATE * DECAY))


def test_sites_go_back_to_zero_queries_after_a_start_on_the_meta_device() -> None:
    model = converted("llama", ahead_of_time=False)
    model.attnres.to("meta").to_empty(device="cpu")
    for site in model.attnres.sites:
        site.query.data.fill_(torch.nan)
        site.reset_parameters()
        assert torch.equal(site.query, torch.zeros(32)) and torch.equal(site.key_norm, torch.ones(32))
