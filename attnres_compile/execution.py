"""Keeps a converted model from running un-rewritten: eagerly, under another backend, exported, or when Dynamo gives up."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op

from attnres_compile.capture import dynamo_is_active, never_compile_alone
from attnres_compile.errors import NotRewrittenError

# What ``attnres::only_rewritten`` is given: graphs keep an operation that claims to write to one of their inputs, and unlike the
# model's own inputs, which may lie in containers of any kind, this one is always at hand.
_MARK = torch.zeros(0, dtype=torch.float32, device="cpu")


@custom_op("attnres::only_rewritten", mutates_args=("mark",))
def _only_rewritten(mark: Tensor) -> None:
    """Marks the graph of a converted model; rewriting removes it.

    Raises:
        NotRewrittenError: whenever it is executed.
    """
    raise NotRewrittenError(
        "this model carries AttnRes parameters, but the graph that just ran was not rewritten: it was compiled or exported by "
        'another backend. Use torch.compile(model, backend="attnres"), or attnres_compile.rewrite(model, ...).'
    )


@_only_rewritten.register_fake
def _only_rewritten_fake(mark: Tensor) -> None:
    pass


def refuse_unrewritten(model: nn.Module) -> None:
    """From now on, calls of ``model`` whose graph was not rewritten raise :class:`NotRewrittenError`."""
    model.register_forward_pre_hook(_before_forward)
    model.register_forward_hook(_after_forward)


# Forward calls of converted models that run outside a compiled graph, innermost last; one list per thread.
_local = threading.local()


@dataclasses.dataclass
class _Call:
    """The record of a call whose forward raised stays until the model's next call, and must not keep the model alive."""

    host: weakref.ref[nn.Module]
    rewritten: bool = False


def _calls() -> list[_Call]:
    if not hasattr(_local, "calls"):
        _local.calls = []
    calls: list[_Call] = _local.calls
    return calls


def eager_hosts() -> Iterator[nn.Module]:
    """Converted modules whose forward call runs eagerly in this thread right now."""
    return (host for call in _calls() if (host := call.host()) is not None)


def note_execution(host: nn.Module) -> None:
    """To be called whenever the rewritten graph of ``host`` runs."""
    for call in _calls():
        if call.host() is host:
            call.rewritten = True


def _before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    # Not is_compiling(), which is true in every thread while one of them compiles.
    if torch.compiler.is_dynamo_compiling():
        # Whatever backend compiles this: unless the graph is rewritten, the marker raises when it runs.
        torch.ops.attnres.only_rewritten.default(_MARK)
    else:
        _enter(module, is_compiled="forward" in module.__dict__ or dynamo_is_active())


def _after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_dynamo_compiling():
        _leave(module)


# Dynamo runs the hooks of the module that was compiled outside of its graph, or traces them as a part of a larger frame.
# It must not compile them as frames of their own.
never_compile_alone(_before_forward)
never_compile_alone(_after_forward)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _enter(module: nn.Module, is_compiled: bool) -> None:
    if not is_compiled:
        raise NotRewrittenError(
            f"{type(module).__name__} was converted to Attention Residuals but is being run eagerly, with its standard residual "
            'stream. Run it as torch.compile(model, backend="attnres") or after model.compile(backend="attnres"), or use '
            "attnres_compile.rewrite(model, ...)."
        )
    calls = _calls()
    calls[:] = [call for call in calls if call.host() not in (None, module)]
    calls.append(_Call(weakref.ref(module)))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _leave(module: nn.Module) -> None:
    calls = _calls()
    mine = [call for call in calls if call.host() is module]
    calls[:] = [call for call in calls if call.host() is not module]
    # No record at all: the model was converted in the middle of this very call, by the backend that rewrote it.
    if mine and not any(call.rewritten for call in mine):
        raise NotRewrittenError(
            f"{type(module).__name__} was converted to Attention Residuals, but its forward call ran with the standard residual "
            "stream: another backend compiled it, or Dynamo gave up on it (TORCH_LOGS=recompiles,graph_breaks shows why). Run it "
            'as torch.compile(model, backend="attnres").'
        )
