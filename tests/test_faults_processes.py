"""Data loaders with workers beside a compiled model, and converted models that travel to other processes."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from typing import Any

import pytest
import torch
from other_process import Ids, IdsOfAModel, run_there
from small_nets import BATCH, assert_whole, converted, eager, expected_of, set_queries
from torch.utils.data import DataLoader

import attnres_compile as ac

PATIENCE = 60.0


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_loader_with_workers_beside_training(start: str) -> None:
    model = converted()
    compiled = torch.compile(model, backend=eager)
    compiled(BATCH).sum().backward()  # the parent has run autograd, and holds compiled code, before workers begin
    data = IdsOfAModel(model) if start == "spawn" else Ids()
    loader = DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context=start)
    seen = 0
    for ids in loader:
        torch.testing.assert_close(compiled(ids), expected_of(model, ids))
        compiled(ids).square().sum().backward()
        seen += len(ids)
    assert seen == 12
    assert_whole(model)


@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_a_converted_model_runs_in_another_process(start: str) -> None:
    """Compiled here before it goes; what is compiled stays here, and what it is does not."""
    model = converted()
    compiled = torch.compile(model, backend=eager)
    with torch.no_grad():
        compiled(BATCH)
    context = multiprocessing.get_context(start)
    answers = context.Queue()
    process = context.Process(target=run_there, args=(model, BATCH, answers))
    process.start()
    found = answers.get(timeout=PATIENCE)
    process.join(PATIENCE)
    assert process.exitcode == 0
    expected = [expected_of(model).detach(), expected_of(model, BATCH.flip(0)).detach()]
    torch.testing.assert_close([torch.from_numpy(array) for array in found], expected)
    torch.testing.assert_close(compiled(BATCH), expected[0])


@pytest.mark.parametrize("is_compiled", [False, True], ids=["converted", "run before"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(how: str, is_compiled: bool) -> None:
    model = converted()
    if is_compiled:
        torch.compile(model, backend=eager)(BATCH)
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_whole(copied)
    set_queries(copied, 9)
    for net in (model, copied, model):
        torch.testing.assert_close(torch.compile(net, backend=eager)(BATCH), expected_of(net))
    assert not torch.allclose(expected_of(model), expected_of(copied))
    del copied.attnres
    torch.testing.assert_close(torch.compile(model, backend=eager)(BATCH), expected_of(model))


def test_a_copy_of_the_compiled_wrapper() -> None:
    """``copy.deepcopy(torch.compile(model))``, as for an average of weights."""
    model = converted()
    compiled = torch.compile(model, backend=eager)
    compiled(BATCH)
    copied: Any = copy.deepcopy(compiled)
    assert copied._orig_mod is not model
    set_queries(copied._orig_mod, 9)
    for call, net in ((compiled, model), (copied, copied._orig_mod)):
        torch.testing.assert_close(call(BATCH), expected_of(net))


def test_a_model_that_compiles_itself_can_be_copied() -> None:
    model = converted()
    model.compile(backend=eager)
    model(BATCH)
    copied = copy.deepcopy(model)
    set_queries(copied, 9)
    copied.compile(backend=eager)
    for net in (model, copied):
        torch.testing.assert_close(net(BATCH), expected_of(net))


def test_an_average_of_weights() -> None:
    from torch.optim.swa_utils import AveragedModel

    model = converted()
    compiled = torch.compile(model, backend=eager)
    average = AveragedModel(model)
    for seed in (3, 4):
        compiled(BATCH)
        set_queries(model, seed)
        average.update_parameters(model)
    with pytest.raises(ac.NotRewrittenError):
        average(BATCH)
    torch.testing.assert_close(torch.compile(average, backend=eager)(BATCH), expected_of(average.module))
    assert not torch.allclose(expected_of(average.module), expected_of(model))
