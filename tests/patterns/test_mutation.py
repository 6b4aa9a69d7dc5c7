"""Which operations write to their operands, by example."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph

from attnres_compile.patterns.mutation import written_tensors


@pytest.mark.parametrize(
    ("target", "writes"),
    [
        (torch.add, False), (torch.Tensor.add_, True), (torch.relu_, True), (operator.iadd, True), (operator.setitem, True),
        # Python's own words end in an underscore, too.
        (operator.and_, False), (operator.or_, False), (operator.not_, False), (operator.iand, True),
        (torch.ops.aten.add_.Tensor, True), (torch.ops.aten.add.Tensor, False), (torch.Tensor.__add__, False),
    ],
)  # fmt: skip
def test_functions(target: Callable[..., Any], writes: bool) -> None:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    node = graph.call_function(target, (x,) if target in (operator.not_, torch.relu_) else (x, y))
    assert written_tensors(node) == ((x,) if writes else ())


@pytest.mark.parametrize(("name", "writes"), [("mul_", True), ("mul", False), ("masked_fill_", True), ("__getitem__", False)])
def test_methods(name: str, writes: bool) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    assert written_tensors(graph.call_method(name, (x, 2))) == ((x,) if writes else ())


def test_keywords() -> None:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert written_tensors(graph.call_function(torch.add, (x, x), {"out": y})) == (y,)
    assert written_tensors(graph.call_function(torch.nn.functional.relu, (x,), {"inplace": True})) == (x,)
