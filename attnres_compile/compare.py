"""The original model against the rewritten one: the numbers that they give, and the operations that differ."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from attnres_compile.capture import capture, tree_flatten
from attnres_compile.convert import checked_call, rewrite
from attnres_compile.errors import ModelTypeError
from attnres_compile.parameters import hosts_in
from attnres_compile.passes.normalize import markers_in
from attnres_compile.patterns.operations import is_call, module_of, name_of
from attnres_compile.rewritten import RewrittenModule


@dataclasses.dataclass(frozen=True)
class GraphDiff:
    """Operations by node name: ``removed`` from the original graph, ``added`` by rewriting, and the number ``kept``.

    ``kinds`` counts those kept by the name of their operation, the most frequent first.
    """

    removed: tuple[str, ...]
    added: tuple[str, ...]
    kept: int
    kinds: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        lines = [f"- {operation}" for operation in self.removed] + [f"+ {operation}" for operation in self.added]
        return "\n".join([f"{self.kept} operations kept, {len(self.removed)} removed, {len(self.added)} added", *lines])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far the rewritten model's floating-point outputs are from the original's.

    ``max_abs_error`` is the largest difference of two elements; ``max_rel_error`` the largest, over output tensors, of
    that difference over the largest magnitude in the original tensor. ``outputs`` counts the tensors compared.
    """

    max_abs_error: float
    max_rel_error: float
    outputs: int
    graph_diff: GraphDiff

    def __str__(self) -> str:
        return (
            f"{self.outputs} output tensors: largest absolute difference {self.max_abs_error:.3g}, relative "
            f"{self.max_rel_error:.3g}\n{self.graph_diff}"
        )


def compare(
    model: nn.Module, rewritten: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Comparison:
    """Run both on the same arguments, without gradients and with the same random numbers, and compare graphs.

    Args:
        model: the original; a converted model stands for what it was before.
        rewritten: what :func:`attnres_compile.rewrite` returned, or a converted model.

    Raises:
        ModelTypeError: if ``rewritten`` was not rewritten.
    """
    model, args, kwargs = checked_call(model, args, kwargs)
    rewritten = checked_call(rewritten, args, kwargs)[0]
    if not isinstance(rewritten, RewrittenModule):
        if not hosts_in(rewritten):
            raise ModelTypeError(f"{type(rewritten).__name__} was neither rewritten nor converted; there is nothing to compare.")
        rewritten = rewrite(rewritten, args=args, kwargs=kwargs)
    with torch.random.fork_rng():
        original = capture(model, args, kwargs, run=True)
    with torch.random.fork_rng(), torch.no_grad():
        result = rewritten(*args, **kwargs)
    absolute, relative, count = _errors(original.result, result)
    return Comparison(absolute, relative, count, diff_graphs(original.graph_module.graph, rewritten.graph))


def _errors(expected: Any, found: Any) -> tuple[float, float, int]:
    absolute = relative = 0.0
    pairs = [(a, b) for a, b in zip(_tensors(expected), _tensors(found), strict=True) if a.is_floating_point() and a.numel()]
    for a, b in pairs:
        reference = a.to(torch.float64)
        difference = (b.to(torch.float64) - reference).abs().max().item()
        largest = reference.abs().max().item()
        absolute = _worse(absolute, difference)
        relative = _worse(relative, difference / largest if largest else difference)
    return absolute, relative, len(pairs)


def _worse(a: float, b: float) -> float:
    return b if b != b or b > a else a  # NaN is the worst


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]


def diff_graphs(original: Graph, rewritten: Graph) -> GraphDiff:
    """Compare two graphs by node name: rewriting keeps the names of what it keeps."""
    kept, removed, added = match_operations(original, rewritten)
    kinds = Counter(name_of(node).rstrip("_") for node in kept)
    return GraphDiff(tuple(map(_line, removed)), tuple(map(_line, added)), len(kept), tuple(kinds.most_common()))


def match_operations(original: Graph, rewritten: Graph) -> tuple[list[Node], list[Node], list[Node]]:
    """The original's operations that ``rewritten`` has too and those that it lacks, and ``rewritten``'s that are new."""
    markers = markers_in(original)
    before = {node.name: node for node in original.nodes if is_call(node) and node not in markers}
    after = {node.name: node for node in rewritten.nodes if is_call(node)}
    kept = {
        name for name, node in before.items() if name in after and name_of(after[name]).rstrip("_") == name_of(node).rstrip("_")
    }
    return (
        [node for name, node in before.items() if name in kept],
        [node for name, node in before.items() if name not in kept],
        [node for name, node in after.items() if name not in kept],
    )


def _line(node: Node) -> str:
    sources = node.args[0] if node.args and isinstance(node.args[0], (list, tuple)) else node.all_input_nodes
    inputs = ", ".join(str(source) for source in sources)
    place = module_of(node)
    return f"{node.name} = {name_of(node)}({inputs})" + (f"  [{place}]" if place else "")
