"""Errors in the middle of a step, of a compilation or of a capture: they pass through, and what comes next is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_nets import BATCH, Net, assert_untouched, assert_whole, converted, eager, expected_of, ids_of
from torch import Tensor
from torch.fx import GraphModule

import attnres_compile as ac
from attnres_compile import backend as backend_module
from attnres_compile import capture as capture_module
from attnres_compile import convert as convert_module
from attnres_compile.backend import compile_rewritten
from attnres_compile.passes.pipeline import DETECTION, LOWERING, PHASING, PLANNING, REWRITING

ERRORS = [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, SystemExit, RuntimeError]
PASSES = [one.name for one in (*DETECTION, *PLANNING, *REWRITING, *PHASING, *LOWERING)]


def holds(error: BaseException, kind: type[BaseException]) -> bool:
    """Whether ``error`` is of ``kind``, or says so: Dynamo wraps what a backend raises, and keeps the original as its cause."""
    if isinstance(error, kind):
        return True
    cause = error.__cause__ or getattr(error, "inner_exception", None)
    return cause is not None and holds(cause, kind)


class Failing:
    """A backend whose inner compiler raises as often as it is told to, and then works."""

    def __init__(self, error: type[BaseException], times: int = 1) -> None:
        self.error, self.times = error, times

    def __call__(self, gm: GraphModule, example_inputs: list[Any], **options: Any) -> Any:
        def compiler(graph: GraphModule, inputs: list[Any], mode: str | None) -> Any:
            if self.times:
                self.times -= 1
                raise self.error("injected")
            return graph.forward

        return compile_rewritten(gm, example_inputs, compiler, **options)


@pytest.mark.parametrize("is_converted", [True, False], ids=["converted", "plain"])
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_in_the_inner_compiler(error: type[BaseException], is_converted: bool) -> None:
    model = converted() if is_converted else Net()
    expected = expected_of(model).detach()
    compiled = torch.compile(model, backend=Failing(error, times=2))
    for _ in range(2):
        with pytest.raises(BaseException, match="injected") as caught:
            compiled(BATCH)
        assert holds(caught.value, error)
    for _ in range(2):
        torch.testing.assert_close(compiled(BATCH), expected)
    assert_whole(model)


def test_a_plain_model_is_left_as_it_was_when_the_compiler_fails() -> None:
    """Converted on its first call, which failed: then it was never converted, and other uses of it go on."""
    model = Net()
    expected = model(BATCH)
    with pytest.raises(Exception, match="injected"):
        torch.compile(model, backend=Failing(RuntimeError))(BATCH)
    assert_untouched(model)
    torch.testing.assert_close(model(BATCH), expected)


class Fuse:
    """Stands in for ``run_passes``: raises when the pass of this name has run, until it is spent."""

    def __init__(self, original: Callable[..., Any], name: str, error: type[BaseException]) -> None:
        self.original, self.name, self.error, self.is_spent = original, name, error, False

    def __call__(self, program: Any, passes: Any, *args: Any, **kwargs: Any) -> Any:
        for one in passes:
            program = self.original(program, (one,), *args, **kwargs)
            if one.name == self.name and not self.is_spent:
                self.is_spent = True
                raise self.error("injected")
        return program


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("is_converted", [True, False], ids=["converted", "plain"])
def test_an_error_after_a_pass_of_the_backend(
    is_converted: bool, name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted() if is_converted else Net()
    expected = expected_of(model).detach()
    fuse = Fuse(backend_module.run_passes, name, error)
    monkeypatch.setattr(backend_module, "run_passes", fuse)
    compiled = torch.compile(model, backend=eager)
    with pytest.raises(BaseException, match="injected") as caught:
        compiled(BATCH)
    assert holds(caught.value, error)
    assert fuse.is_spent
    if is_converted:
        assert_whole(model)
    else:
        assert_untouched(model)
    torch.testing.assert_close(compiled(BATCH), expected)
    assert_whole(model)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("function", [ac.convert_, ac.rewrite])
def test_an_error_after_a_pass_of_a_conversion(
    function: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    expected = model(BATCH)
    monkeypatch.setattr(convert_module, "run_passes", Fuse(convert_module.run_passes, "rewrite", error))
    with pytest.raises(error, match="injected"):
        function(model, args=(BATCH,))
    assert_untouched(model)
    result = function(model, args=(BATCH,))
    torch.testing.assert_close((result if function is ac.rewrite else torch.compile(model, backend=eager))(BATCH), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, SystemExit])
@pytest.mark.parametrize("function", [ac.detect, ac.convert_, ac.rewrite])
def test_an_error_in_a_capture(function: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, or interrupted, while Dynamo hands the graph over: nobody's arguments are to blame."""
    model, original, is_spent = Net(), capture_module.copy_graph, []

    def fail_once(graph_module: GraphModule) -> GraphModule:
        if not is_spent:
            is_spent.append(True)
            raise error("injected")
        return original(graph_module)

    monkeypatch.setattr(capture_module, "copy_graph", fail_once)
    with pytest.raises(BaseException, match="injected") as caught:
        function(model, args=(BATCH,))
    assert holds(caught.value, error)
    assert "Give args and kwargs" not in str(caught.value)
    assert_untouched(model)
    function(model, args=(BATCH,))


def test_memory_that_runs_out_while_the_captured_graph_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``rewrite`` runs the graph once, for the structure of the result."""
    model = Net()
    capturing: Any = capture_module._CapturingBackend

    def fail(self: Any, *inputs: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(capturing, "_execute", fail)
    with pytest.raises(Exception, match="injected") as caught:
        ac.rewrite(model, args=(BATCH,))
    assert holds(caught.value, torch.OutOfMemoryError)
    assert "Give args and kwargs" not in str(caught.value)
    assert_untouched(model)


# --------------------------------------------------------------------------------------------------------------- in a step


class Fails(torch.autograd.Function):
    """The identity; its backward raises where ``armed``."""

    armed = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if Fails.armed:
            raise RuntimeError("injected")
        return grad


def gradients(model: torch.nn.Module) -> list[Tensor]:
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
    return found


def step(model: torch.nn.Module, call: Callable[[Tensor], Tensor], ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    Fails.apply(call(ids)).square().sum().backward()
    return gradients(model)


@pytest.mark.parametrize("place", ["before", "hook", "loss", "backward"])
def test_the_step_after_a_failed_one_is_right(place: str) -> None:
    """A hook that raises leaves the call's record behind; the next call must not be taken for a part of it."""
    model = converted()
    is_armed = [False]

    def hook(*_: Any) -> None:
        if is_armed[0]:
            raise RuntimeError("injected")

    if place == "before":
        model.register_forward_pre_hook(torch.compiler.disable(hook))
    elif place == "hook":
        model.register_forward_hook(torch.compiler.disable(hook), prepend=True)
    model.forward = torch.compile(model.forward, backend=eager)
    twin = converted().double()
    model.double()
    step(model, model, BATCH)
    for ids in (BATCH, ids_of(3, 5)):
        is_armed[0], Fails.armed = place in ("before", "hook"), place == "backward"
        with pytest.raises(RuntimeError, match="injected"):
            if place == "loss":
                raise RuntimeError("injected", model(ids).sum())
            step(model, model, ids)
        is_armed[0] = Fails.armed = False
        found = step(model, model, ids)
        torch.testing.assert_close(found, step(twin, lambda ids: expected_of(twin, ids), ids))
    with pytest.raises(ac.NotRewrittenError):
        converted(2)(BATCH)


def test_a_failed_run_does_not_vouch_for_an_unrewritten_one() -> None:
    """The rewritten graph ran, then a hook raised. The model's next, un-rewritten call must not profit from that."""
    model = converted()
    is_armed = [True]

    def hook(*_: Any) -> None:
        if is_armed[0]:
            raise RuntimeError("injected")

    model.register_forward_hook(torch.compiler.disable(hook), prepend=True)
    forward = type(model).forward.__get__(model)
    model.forward = torch.compile(forward, backend=eager)
    with pytest.raises(RuntimeError, match="injected"):
        model(BATCH)
    is_armed[0] = False
    model.forward = forward
    with pytest.raises(ac.NotRewrittenError):
        model(BATCH)
