"""Switches of autocast and of the gradient mode, which surround operations instead of being read by them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from attnres_compile.patterns.operations import is_call, name_of

_GRADIENT = frozenset({"_set_grad_enabled", "set_grad_enabled"})
_ENTERING = frozenset({"_enter_autocast", "_enter_inference_mode"})
_LEAVING = frozenset({"_exit_autocast", "_exit_inference_mode"})


def is_switch(node: Node) -> bool:
    return is_call(node) and name_of(node) in _GRADIENT | _ENTERING | _LEAVING


class Modes:
    """The switches that are open at every node of a graph, outermost first.

    A gradient mode is open from the switch that leaves the surrounding mode to the one that returns to it.
    """

    def __init__(self, graph: Graph) -> None:
        self.exits: dict[Node, Any] = {}
        self._open: dict[Node, tuple[Node, ...]] = {}
        stack: tuple[Node, ...] = ()
        for node in graph.nodes:
            name = name_of(node)
            if name in _ENTERING:
                stack = (*stack, node)
            elif name in _LEAVING:
                entered = node.args[0]
                assert isinstance(entered, Node)
                self.exits[entered] = node.target
                stack = tuple(other for other in stack if other is not entered)
            elif name in _GRADIENT:
                last = stack[-1] if stack else None
                returns = last is not None and name_of(last) in _GRADIENT and last.args != node.args
                stack = stack[:-1] if returns else (*stack, node)
            self._open[node] = stack

    def __getitem__(self, node: Node) -> tuple[Node, ...]:
        return self._open[node]

    def is_without_gradients(self, node: Node) -> bool:
        """Whether ``node`` runs where gradients were switched off, inside the model."""
        modes = [switch for switch in self._open[node] if "autocast" not in name_of(switch)]
        return bool(modes) and (modes[-1].args[0] is False or name_of(modes[-1]) not in _GRADIENT)


class ModeWriter:
    """Opens and closes switches in a graph that takes over some nodes of another, so that each finds its own."""

    def __init__(self, modes: Modes, graph: Graph) -> None:
        self.modes, self.graph = modes, graph
        self.stack: list[tuple[Node, Node]] = []

    def switch(self, wanted: tuple[Node, ...]) -> None:
        """Make ``wanted``, switches of the original graph, the open ones."""
        keep = 0
        while keep < min(len(self.stack), len(wanted)) and self.stack[keep][0] is wanted[keep]:
            keep += 1
        while len(self.stack) > keep:
            self._close(*self.stack.pop())
        for original in wanted[keep:]:
            self.stack.append((original, self._open(original)))

    def _open(self, original: Node) -> Node:
        if original in self.modes.exits:
            return self.graph.node_copy(original)
        before = self.graph.call_function(torch.is_grad_enabled)
        self.graph.node_copy(original)
        return before

    def _close(self, original: Node, opened: Node) -> None:
        self.graph.call_function(self.modes.exits.get(original, original.target), (opened,))
