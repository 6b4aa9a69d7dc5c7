"""A model in true float64, whatever casts it has, and how far two results are apart."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves


def relative_error(found: Any, expected: Any) -> float:
    """The largest relative L2 error among the floating-point leaves of two equal structures."""
    left, right = tree_leaves(found), tree_leaves(expected)
    assert len(left) == len(right), "the results have different structures"
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and b.numel():
            finite = torch.isfinite(b)
            assert bool((torch.isfinite(a) == finite).all()), "finite in one result, not in the other"
            a, b = a[finite].detach().double(), b[finite].detach().double()
            worst = max(worst, float((a - b).norm() / b.norm().clamp_min(1e-300)))
    return worst


@contextmanager
def default_float64() -> Iterator[None]:
    """Tensors that a model makes without naming a dtype are float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def promote_casts(graph_module: GraphModule) -> None:
    """Make float64 of every float32 that ``graph_module`` names: casts inside norms, softmaxes, rotary embeddings."""
    for node in graph_module.graph.nodes:
        node.args = map_aggregate(node.args, _float64_for_float32)
        node.kwargs = map_aggregate(node.kwargs, _float64_for_float32)
        if node.op == "call_method" and node.target == "float":
            node.target = "double"
    graph_module.recompile()


def _float64_for_float32(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def promoted(model: nn.Module) -> Callable[..., Any]:
    """``model`` as Dynamo captures it, with all float32 casts promoted, run eagerly."""

    def backend(graph_module: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        promote_casts(graph_module)
        return graph_module.forward

    compiled = torch.compile(_call_of(model), backend=backend, fullgraph=True, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return compiled(*args, **kwargs)

    return call


def _call_of(model: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: model(*args, **kwargs)


def as_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
