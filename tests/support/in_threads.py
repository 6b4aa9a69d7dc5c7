"""Actions in threads that begin at once, and a compilation that pauses in the middle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from small_nets import BATCH, Net, converted, eager, expected_of
from torch import Tensor
from torch.fx import GraphModule

from attnres_compile.backend import compile_rewritten

PATIENCE = 30.0


def together(actions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the actions return, each in a thread of its own, all begun at once. Raises what the first of them raised."""
    barrier = threading.Barrier(len(actions))
    results: list[Any] = [None] * len(actions)
    raised: list[BaseException] = []

    def act(index: int) -> None:
        barrier.wait(PATIENCE)
        try:
            results[index] = actions[index]()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=act, args=(index,), daemon=True) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    if raised:
        raise raised[0]
    return results


def warm_up() -> None:
    """A compilation before the one that counts: Dynamo treats a process's first one differently."""
    torch.compile(converted(99), backend=eager)(BATCH)
    torch.compiler.reset()


class Another(Net):
    """With code of its own: Dynamo keeps graphs, and what it gave up on, per code object."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Pausing:
    """A backend that stops in the middle of its compilation until it is told to go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, gm: GraphModule, example_inputs: list[Any], **options: Any) -> Any:
        def compiler(graph: GraphModule, inputs: list[Any], mode: str | None) -> Any:
            self.begun.set()
            assert self.go_on.wait(PATIENCE)
            return graph.forward

        return compile_rewritten(gm, example_inputs, compiler, **options)

    def beside(self, action: Callable[[], Any]) -> Any:
        """``action`` while another thread is in the middle of compiling another model, and that model's result is right."""
        model = converted(77, Another())
        compiled = torch.compile(model, backend=self)
        other: list[Tensor] = []
        thread = threading.Thread(target=lambda: other.append(compiled(BATCH)), daemon=True)
        thread.start()
        assert self.begun.wait(PATIENCE)
        try:
            return action()
        finally:
            self.go_on.set()
            thread.join(PATIENCE)
            torch.testing.assert_close(other[0], expected_of(model))
