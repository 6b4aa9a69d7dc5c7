"""Models called, compiled and converted by several threads at once: what one thread does is nothing to another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from in_threads import PATIENCE, Pausing, together, warm_up
from small_nets import BATCH, Net, assert_whole, converted, eager, expected_of, ids_of, set_queries
from torch import Tensor

import attnres_compile as ac


@pytest.mark.parametrize("is_converted", [True, False], ids=["converted", "plain"])
@pytest.mark.parametrize("alike", [True, False], ids=["one shape", "several shapes"])
def test_one_model_from_its_first_call_on(is_converted: bool, alike: bool) -> None:
    warm_up()
    for seed in range(3):
        torch.compiler.reset()
        model = converted(seed) if is_converted else Net()
        batches = [BATCH if alike else ids_of(1 + i % 3, 2 + i) for i in range(6)]
        expected = [expected_of(model, ids).detach() for ids in batches]
        compiled = torch.compile(model, backend=eager)
        for _ in range(2):
            results = together([lambda call=compiled, ids=ids: [call(ids) for _ in range(5)][-1] for ids in batches])
            torch.testing.assert_close(results, expected)
        assert_whole(model)


def test_different_models() -> None:
    warm_up()
    for seed in range(3):
        torch.compiler.reset()
        models = [converted(10 * seed + i) for i in range(5)]
        results = together([lambda model=model: torch.compile(model, backend=eager)(BATCH) for model in models])
        torch.testing.assert_close(results, [expected_of(model) for model in models])


def test_models_that_are_converted_meanwhile() -> None:
    warm_up()
    running = converted(0)
    compiled = torch.compile(running, backend=eager)
    compiled(BATCH)
    models = [Net() for _ in range(4)]
    plain = [model(BATCH).detach() for model in models]

    def convert_and_run(model: Net) -> Tensor:
        ac.convert_(model, args=(BATCH,))
        return torch.compile(model, backend=eager)(BATCH)

    def run_often() -> Tensor:
        expected = expected_of(running)
        for _ in range(100):
            found = compiled(BATCH)
            torch.testing.assert_close(found, expected)
        return found

    actions = [lambda model=model: convert_and_run(model) for model in models]
    results = together([run_often, *actions])
    torch.testing.assert_close(results[1:], plain)
    for model in models:
        assert_whole(model)


def test_one_model_is_converted_by_one_thread_alone() -> None:
    model = Net()
    expected = model(BATCH).detach()

    def convert() -> str:
        try:
            ac.convert_(model, args=(BATCH,))
        except ac.ConfigError:
            return "refused"
        return "converted"

    assert sorted(together([convert] * 5)) == ["converted", *["refused"] * 4]
    assert_whole(model)
    torch.testing.assert_close(torch.compile(model, backend=eager)(BATCH), expected)


def test_rewriting_ahead_of_time() -> None:
    model = converted(3)
    expected = expected_of(model).detach()
    rewritten = together([lambda: ac.rewrite(model, args=(BATCH,))] * 4)
    results = together([lambda module=module: module(BATCH) for module in [*rewritten, rewritten[0], rewritten[0]]])
    for result in results:
        torch.testing.assert_close(result, expected)


def test_training_steps() -> None:
    """Forward and backward of models of their own, step by step."""

    def train(model: Any, call: Callable[[Tensor], Tensor]) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            call(BATCH).square().sum().backward()
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    warm_up()
    models, twins = ([converted(seed) for seed in range(4)] for _ in range(2))
    found = together([lambda model=model: train(model, torch.compile(model, backend=eager)) for model in models])
    expected = [train(twin, lambda ids, twin=twin: expected_of(twin, ids)) for twin in twins]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- while another thread is compiling


def test_a_compiled_model_runs() -> None:
    model = converted()
    compiled = torch.compile(model, backend=eager)
    compiled(BATCH)
    torch.testing.assert_close(Pausing().beside(lambda: compiled(BATCH)), expected_of(model))
    torch.testing.assert_close(compiled(BATCH), expected_of(model))


def test_an_eager_run_raises() -> None:
    model = converted()

    def run() -> None:
        with pytest.raises(ac.NotRewrittenError, match="eagerly"):
            model(BATCH)

    Pausing().beside(run)


def test_a_run_that_another_backend_compiled_raises() -> None:
    model = converted()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ac.NotRewrittenError):
        compiled(BATCH)

    def run() -> None:
        with pytest.raises(ac.NotRewrittenError):
            compiled(BATCH)

    Pausing().beside(run)


def test_a_run_beyond_the_recompile_limit_raises() -> None:
    model = converted()
    compiled = torch.compile(model, backend=eager, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(BATCH)
        with pytest.raises(ac.NotRewrittenError):
            compiled(ids_of(4, 5))

        def run() -> None:
            with pytest.raises(ac.NotRewrittenError):
                compiled(ids_of(4, 5))

        Pausing().beside(run)


def test_an_unrewritten_run_that_ends_meanwhile_raises() -> None:
    """The compilation begins after the run's first hook and ends after its last one."""
    model, backend = converted(), Pausing()
    set_queries(model, 5)

    class Hook:
        reached, leave = threading.Event(), threading.Event()

        def __call__(self, module: Any, args: Any, output: Any) -> None:
            if not torch.compiler.is_dynamo_compiling() and threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.leave.wait(PATIENCE)

    model.blocks[0].register_forward_hook(torch.compiler.disable(Hook()))
    caught: list[Exception] = []

    def run() -> None:
        try:
            torch.compile(model, backend="eager")(BATCH)
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert Hook.reached.wait(PATIENCE)

    def finish() -> None:
        Hook.leave.set()
        thread.join(PATIENCE)

    backend.beside(finish)
    assert [type(error) for error in caught] == [ac.NotRewrittenError]
