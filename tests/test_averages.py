"""Copies of converted models: averages of weights, deep copies, pickles. Each has its own queries, and none runs un-rewritten."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_nets import BATCH, Block, Net, assert_whole, converted, eager, expected_of, ids_of, set_queries
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import attnres_compile as ac

TOLERANCE = 1e-12


def double(seed: int = 1, model: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    return converted(seed, (Net() if model is None else model).double())


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


AVERAGES: dict[str, tuple[dict[str, Any], Callable[[list[Tensor]], Tensor]]] = {
    "mean": ({}, lambda values: torch.stack(values[1:]).mean(0)),
    "mean with buffers": ({"use_buffers": True}, lambda values: torch.stack(values[1:]).mean(0)),
    "EMA": (
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},  # the first update copies
        lambda values: 0.9 * (0.9 * values[1] + 0.1 * values[2]) + 0.1 * values[3],
    ),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages(kind: str) -> None:
    options, combined = AVERAGES[kind]
    model = double()
    averaged = AveragedModel(model, **options)
    seen = [[p.detach().clone() for p in model.parameters()]]
    compiled, optimizer = torch.compile(model, backend=eager), torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        compiled(ids_of(2, 3 + step)).pow(3).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        seen.append([p.detach().clone() for p in model.parameters()])
    for (name, found), *values in zip(averaged.module.named_parameters(), *seen, strict=True):
        assert_equal(found, combined(values))
        assert "query" not in name or (values[0] - values[3]).abs().max() > 1e-3
    with pytest.raises(ac.NotRewrittenError, match="being run eagerly"):
        averaged(BATCH)
    average = torch.compile(averaged, backend=eager)
    assert_equal(average(BATCH), expected_of(averaged.module))
    averaged.update_parameters(model)  # and compiled code follows
    assert_equal(average(BATCH), expected_of(averaged.module))


def test_average_of_a_compiled_model() -> None:
    model = double()
    compiled = torch.compile(model, backend=eager)
    compiled(BATCH)
    averaged = AveragedModel(compiled)
    set_queries(model, 5)
    for _ in range(2):
        averaged.update_parameters(compiled)
        set_queries(model, 6)
    average = averaged.module._orig_mod
    assert average is not model
    assert_equal(averaged(BATCH), expected_of(average))
    assert_equal(compiled(BATCH), expected_of(model))
    assert not torch.equal(averaged(BATCH), compiled(BATCH))


class WithBatchNorm(Block):
    """A batch norm in the branch, behind the norm that reads the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(self.linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.batch_norm(self.linear(self.norm(x)).transpose(1, 2)).transpose(1, 2)


def test_statistics_of_batch_norms_are_refused() -> None:
    """``update_bn`` lets them divide by a number out of a tensor, which breaks the graph. Without batch norms it runs nothing."""
    averaged = AveragedModel(double())
    update_bn([BATCH], averaged)
    model = Net()
    model.blocks = nn.ModuleList(WithBatchNorm() for _ in range(4))
    averaged = AveragedModel(double(model=model))
    with pytest.raises(ac.ChainCutError, match=r"a graph break in 'forward' at .*batchnorm\.py|a graph break at .*batchnorm\.py"):
        update_bn([BATCH], torch.compile(averaged, backend=eager))
    with pytest.raises(ac.NotRewrittenError, match="being run eagerly"):
        update_bn([BATCH], averaged)


def deep(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [deep, pickled, saved])
def test_copies_are_converted_models_of_their_own(copied: Callable[[Any], Any]) -> None:
    model = double()
    other = copied(model)
    assert_whole(other)
    set_queries(model, 5)
    assert_equal(torch.compile(other, backend=eager)(BATCH), expected_of(double()))
    assert_equal(torch.compile(model, backend=eager)(BATCH), expected_of(model))


@pytest.mark.parametrize("copied", [deep, pickled, saved])
def test_what_the_compile_method_did_is_not_copied(copied: Callable[[Any], Any]) -> None:
    """torch drops it from every copy, which then raises instead of running eagerly."""
    model = double()
    model.compile(backend=eager)
    model(BATCH)
    other = copied(model)
    assert_whole(other)
    other.compile(backend=eager)
    assert_equal(other(BATCH), expected_of(model))


def test_a_copy_of_what_torch_compile_returned_is_compiled() -> None:
    model = double()
    compiled = torch.compile(model, backend=eager)
    compiled(BATCH)
    other = copy.deepcopy(compiled)
    set_queries(model, 5)
    assert other._orig_mod is not model
    assert_equal(other(BATCH), expected_of(other._orig_mod))
    assert_equal(compiled(BATCH), expected_of(model))
    assert not torch.equal(other(BATCH), compiled(BATCH))


def test_a_wrapper_made_before_conversion_is_refused() -> None:
    model = Net()
    averaged = AveragedModel(model)  # its copy has no queries, so that it would average none
    with pytest.raises(ac.ConfigError, match=r"AveragedModel wraps a model, which had no AttnRes parameters"):
        ac.convert_(averaged, args=(BATCH,))
    with pytest.raises(ac.ConfigError, match=r"AveragedModel wraps a model, which had no AttnRes parameters"):
        torch.compile(averaged, backend=eager)(BATCH)
