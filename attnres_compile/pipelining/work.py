"""What one node of a graph does at the size of its capture: FLOPs, and bytes that it writes.

Matrix products are counted by torch's own counter on stand-ins without data, at the level of ATen, so their spelling in the graph
makes no difference. All other work is counted per element.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils.flop_counter import FlopCounterMode

from attnres_compile.patterns.operations import CASTS, METADATA_READS, PERMUTES, RESHAPES, SLICES, name_of, value_of

# What only moves elements computes nothing.
_MOVES = CASTS | RESHAPES | PERMUTES | SLICES | METADATA_READS | frozenset({
    "cat", "concat", "stack", "hstack", "vstack", "chunk", "split", "tensor_split", "unbind", "expand", "expand_as", "repeat",
    "repeat_interleave", "tile", "embedding", "gather", "take_along_dim", "index_select", "index", "pad", "roll", "flip",
    "unfold", "diagonal", "setitem", "copy_", "index_copy", "index_copy_", "scatter", "scatter_",
})  # fmt: skip
# A few per element where one operation does several things; statistics and scaling in norms.
_PER_ELEMENT = {
    "softmax": 5,
    "log_softmax": 5,
    "cross_entropy": 5,
    "layer_norm": 7,
    "group_norm": 7,
    "batch_norm": 7,
    "rms_norm": 5,
}
# Score, mean square and weighted sum of a source: three multiplications and additions each (kernels/naive.py).
_PER_SOURCE_ELEMENT = 6


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a node's forward pass, how many of them are matrix products', and the bytes of the tensors that it writes.

    ``linear_flops`` belong to products with weights inside an operation that also attends over a sequence.
    """

    flops: int = 0
    nbytes: int = 0
    product_flops: int = 0
    linear_flops: int = 0


class Meter:
    """Measures nodes, each kind of call once: layers repeat."""

    def __init__(self) -> None:
        self._known: dict[str, Work] = {}

    def measure(self, node: Node) -> Work:
        """What the call ``node`` does."""
        results = [_described(value) for value in tensors_in(node)]
        key = f"{node.target} {map_aggregate((node.args, node.kwargs), _described)} {results}"
        if key not in self._known:
            self._known[key] = _measure(node)
        return self._known[key]


def operands_of(node: Node) -> list[Node]:
    """The tensors that a call takes, in order; twice what it takes twice."""
    found: list[Node] = []
    map_aggregate((node.args, node.kwargs), lambda leaf: found.append(leaf) if isinstance(leaf, Node) else None)
    return [operand for operand in found if tensors_in(operand)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a node's example value, or in any nest of tuples and lists."""
    found: list[Tensor] = []
    map_aggregate(value_of(value), lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def _measure(node: Node) -> Work:
    results = tensors_in(node)
    operands = operands_of(node)
    if name_of(node) == "site":
        sources: Sequence[Any] = node.args[0]  # type: ignore[assignment]
        return Work(_PER_SOURCE_ELEMENT * len(sources) * results[0].numel(), _nbytes(results))
    product, is_new = _run(node, len(results)) if operands else (0, [True] * len(results))
    written = [value for value, new in zip(results, is_new, strict=True) if new]
    if product and name_of(node) == "multi_head_attention_forward":
        query, key = (tensors_in(operand)[0] for operand in operands[:2])  # [S, B, D] or [S, D]
        projected = 2 * (_nbytes([query]) + _nbytes([key]))  # query, key, value, and their mixture
        return Work(product, _nbytes(written) + projected, product, product - 4 * query.numel() * key.shape[0])
    if product:
        return Work(product, _nbytes(written), product)
    return Work(_element_work(node, operands, results, written), _nbytes(written))


def _element_work(node: Node, operands: list[Node], results: list[Tensor], written: list[Tensor]) -> int:
    """Per element of the largest tensor: of the result of a broadcast, of the operand of a sum."""
    name = name_of(node)
    writes = written or (name.endswith("_") and not name.startswith("_"))
    if name in _MOVES or not results or not writes:
        return 0
    largest = max(value.numel() for value in (*results, *(value for operand in operands for value in tensors_in(operand))))
    return _PER_ELEMENT.get(name, 1) * largest


# ------------------------------------------------------------------------------------------------- running on stand-ins


def _run(node: Node, results: int) -> tuple[int, list[bool]]:
    """FLOPs of the matrix products in a call, and which of its results are no views of its operands.

    What can't run without data, such as a look at a tensor's values, has no products.
    """
    if formula := _FORMULAS.get(name_of(node)):
        return formula(*(tensors_in(operand)[0] for operand in operands_of(node)[:3])), [True] * results
    for dtype in (None, torch.float32):  # under autocast the operands of a product may differ in dtype
        stand_ins = _StandIns(dtype)
        try:
            with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
                arguments, keywords = map_aggregate((node.args, dict(node.kwargs)), stand_ins)
                target: Any = getattr(arguments[0], str(node.target)) if node.op == "call_method" else node.target
                outcome = target(*arguments[node.op == "call_method" :], **keywords)
        except Exception:  # anything may go wrong in a model's own operators
            continue
        outcomes = tensors_in(outcome)
        if len(outcomes) == results:
            return counter.get_total_flops(), [not stand_ins.hold(value) for value in outcomes]
    return 0, [True] * results


class _StandIns:
    """Puts tensors without data in the place of nodes; knows which results share memory with them."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._made: dict[Any, Any] = {}

    def __call__(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("meta")
        if not isinstance(leaf, Node):
            return leaf
        if leaf not in self._made:
            self._made[leaf] = map_aggregate(value_of(leaf), self._without_data)
        return self._made[leaf]

    def hold(self, result: Tensor) -> bool:
        held = (value for made in self._made.values() for value in tensors_in(made))
        try:
            return any(result.untyped_storage() is value.untyped_storage() for value in held)
        except NotImplementedError:  # tensors inside vmap have no storage
            return False

    def _without_data(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = self._dtype if self._dtype is not None and value.is_floating_point() else value.dtype
        return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="meta")


def _described(leaf: Any) -> Any:
    """What a call's cost depends on, of one argument."""
    if isinstance(leaf, Node):
        return map_aggregate(value_of(leaf), _described)
    return (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _nbytes(values: Sequence[Tensor]) -> int:
    return sum(value.numel() * value.itemsize for value in values)


def _grouped_product(rows: Tensor, weights: Tensor, *_: Tensor) -> int:
    """Every row of ``[rows, K]`` times one of the matrices ``[G, K, N]``."""
    return 2 * rows.numel() * weights.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Scores and mixtures of ``[B, H, S, d]``; masks save nothing here, as in torch's counter."""
    return 2 * query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


# Products that don't run on stand-ins.
_FORMULAS: dict[str, Callable[..., int]] = {
    "flex_attention": _attention,
    "grouped_mm": _grouped_product,
    "grouped_mm_fallback": _grouped_product,
    "_grouped_mm": _grouped_product,
}
# Products that torch's counter leaves out; the formulas get shapes.
_UNCOUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: lambda matrix, vector, **_: 2 * math.prod(matrix),
    torch.ops.aten.addmv: lambda bias, matrix, vector, **_: 2 * math.prod(matrix),
    torch.ops.aten.dot: lambda first, second, **_: 2 * math.prod(first),
    torch.ops.aten.addbmm: lambda bias, first, second, **_: 2 * math.prod(first) * second[-1],
}
