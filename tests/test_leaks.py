"""Memory of the process: hundreds of steps hold as many tensors as the first few, and what is dropped is freed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_nets import BATCH, Net, converted, eager, ids_of
from torch import Tensor

import attnres_compile as ac
from attnres_compile import execution

SHAPES = [(2, 3), (4, 5), (3, 7)]


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


def train(model: Any, call: Callable[[Tensor], Tensor], batches: list[Tensor], steps: int) -> list[int]:
    """Live tensors after 20 steps, and after all of them: a few less, where models of earlier tests go meanwhile."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    counts = []
    for step in range(steps):
        call(batches[step % len(batches)]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (19, steps - 1):
            counts.append(live_tensors())
    return counts


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        pytest.param(SHAPES[:1], {}, id="one shape"),
        pytest.param(SHAPES, {"dynamic": False}, id="static"),
        pytest.param(SHAPES, {"dynamic": True}, id="dynamic"),
        pytest.param(SHAPES, {}, id="automatic"),
    ],
)
def test_two_hundred_steps_of_a_compiled_model(shapes: list[tuple[int, int]], options: dict[str, Any]) -> None:
    model = converted()
    first, last = train(model, torch.compile(model, backend=eager, **options), [ids_of(*shape) for shape in shapes], 200)
    assert last <= first
    assert execution._calls() == []


def test_two_hundred_steps_of_a_rewritten_module() -> None:
    module = ac.rewrite(converted(), args=(BATCH,))
    first, last = train(module, module, [BATCH], 200)
    assert last <= first


def test_a_hundred_steps_of_inductor_s_code() -> None:
    model = converted(model=Net(layers=2))
    first, last = train(model, torch.compile(model, backend="attnres"), [BATCH], 100)
    assert last <= first


def test_a_hundred_failed_calls() -> None:
    """Each leaves neither a record of the call nor a tensor behind."""
    model = converted()
    compiled = torch.compile(model, backend=eager)
    counts = []
    for call in range(120):
        with pytest.raises(IndexError):
            compiled(BATCH + 100)
        with pytest.raises(ac.NotRewrittenError):
            model(BATCH)
        if call in (19, 119):
            counts.append(live_tensors())
    assert counts[1] <= counts[0]
    assert len(execution._calls()) <= 1


def test_threads_take_their_records_with_them() -> None:
    model = converted()
    compiled = torch.compile(model, backend=eager)
    compiled(BATCH)
    before = live_tensors()
    for _ in range(20):
        thread = threading.Thread(target=compiled, args=(BATCH,))
        thread.start()
        thread.join()
    assert live_tensors() <= before


def dropped(make: Callable[[], Any], count: int) -> int:
    """How many of ``count`` models that ``make`` made and let go of are still there."""
    references = [weakref.ref(make()) for _ in range(count)]
    gc.collect()
    return sum(reference() is not None for reference in references)


def detected() -> Any:
    model = Net()
    ac.detect(model, (BATCH,))
    return model


def refused() -> Any:
    model = Net()
    with pytest.raises(ac.ConfigError):
        ac.convert_(model, ac.AttnResConfig(num_blocks=9), (BATCH,))
    return model


def ran_eagerly() -> Any:
    model = converted()
    with pytest.raises(ac.NotRewrittenError):
        model(BATCH)
    return model


MAKERS: dict[str, Callable[[], Any]] = {
    "converted": converted,
    "detected": detected,
    "refused": refused,
    "ran eagerly": ran_eagerly,
    "rewritten": lambda: ac.rewrite(Net(), args=(BATCH,)),
    "rewritten and run": lambda: run_once(ac.rewrite(Net(), args=(BATCH,))),
}


def run_once(module: Any) -> Any:
    module(BATCH).sum().backward()
    return module


@pytest.mark.parametrize("name", MAKERS)
def test_models_are_freed_without_a_reset(name: str) -> None:
    assert dropped(MAKERS[name], 50 if name == "converted" else 5) == 0


def test_the_original_of_a_rewritten_module_is_freed_with_it() -> None:
    originals = []

    def make() -> Any:
        originals.append(weakref.ref(model := Net()))
        return ac.rewrite(model, args=(BATCH,))

    assert dropped(make, 5) == 0
    assert [reference for reference in originals if reference() is not None] == []


@pytest.mark.parametrize("is_converted", [True, False], ids=["converted", "plain"])
def test_compiled_models_are_freed(is_converted: bool) -> None:
    """As torch frees its own: Dynamo drops the code of a model that is gone, and resetting it leaves nothing at all."""

    def make(backend: Any) -> Any:
        torch.compiler.reset()
        model = converted() if is_converted and backend is eager else Net()
        torch.compile(model, backend=backend)(BATCH).sum().backward()
        return model

    ours, torch_s = dropped(lambda: make(eager), 8), dropped(lambda: make("eager"), 8)
    assert ours <= torch_s
    models = [weakref.ref(make(eager)) for _ in range(5)]
    torch.compiler.reset()
    gc.collect()
    assert [model for model in models if model() is not None] == []


def test_a_failed_compilation_holds_no_model() -> None:
    def make() -> Any:
        torch.compiler.reset()
        model = converted()
        model.blocks.append(Net().blocks[0])
        with pytest.raises(ac.ParameterMismatchError):
            torch.compile(model, backend=eager)(BATCH)
        return model

    remaining = dropped(make, 5)
    assert remaining == 0
