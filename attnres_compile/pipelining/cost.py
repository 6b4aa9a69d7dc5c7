"""What the segments of a rewritten graph cost: FLOPs and bytes as polynomials in the size of a microbatch.

A graph is captured at one size. Each node's cost is counted at that size, and grows with the microbatch in one of three ways:
with its tokens ``T``; with pairs of positions, ``T * S``, as attention does in sequences of ``S``; or not at all, as positions,
masks and rotary tables, which no input of the model enters. At the size of the capture the figures are exact in any case.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import sympy
from torch import nn
from torch.fx import Graph, Node

from attnres_compile.errors import ConfigError
from attnres_compile.patterns.operations import is_call
from attnres_compile.pipelining.growth import CONSTANT, PAIRS, TOKENS, Growth
from attnres_compile.pipelining.work import Meter, tensors_in

T, S, D, ITEMSIZE = sympy.symbols("T S D itemsize", integer=True, positive=True)
"""Tokens of a microbatch (batch times sequence), positions of a sequence, hidden size, bytes of an element."""


@dataclasses.dataclass(frozen=True)
class SegmentCost:
    """What a stretch of the graph costs in one microbatch: polynomials in ``T`` and ``S``.

    Attributes:
        flops: of the forward pass; a multiplication and an addition are two. Training takes three times as many: the backward
            pass of a matrix product is two products of the same size.
        activation_bytes: what the operations write and autograd may keep; neither views nor casts and copies that do nothing.
        parameter_bytes: of the parameters that no earlier segment uses.
    """

    flops: sympy.Expr
    activation_bytes: sympy.Expr
    parameter_bytes: sympy.Expr

    def __add__(self, other: SegmentCost) -> SegmentCost:
        return SegmentCost(
            self.flops + other.flops,
            self.activation_bytes + other.activation_bytes,
            self.parameter_bytes + other.parameter_bytes,
        )

    def at(self, tokens: int, sequence: int) -> dict[str, int]:
        """The figures by name, for microbatches of ``tokens`` in sequences of ``sequence``."""
        size = {T: tokens, S: sequence}
        half = sympy.Rational(1, 2)  # work per sequence or per expert makes fractions of a token's
        return {field.name: int(sympy.floor(getattr(self, field.name).subs(size) + half)) for field in dataclasses.fields(self)}


def segment_costs(graph: Graph, starts: Sequence[Node], tokens: int, sequence: int) -> tuple[SegmentCost, ...]:
    """The costs of all segments: before the first of ``starts``, and from every one of them to the next.

    Args:
        graph: in the order of execution, with parameters as ``get_attr`` nodes, as :func:`attnres_compile.rewrite` makes it.
        starts: the nodes that begin segments, in the order of the graph.
        tokens, sequence: the size of the arguments with which the graph was captured; ``tokens`` counts the whole batch.

    Raises:
        ConfigError: for sizes that contradict each other, or starts that are out of order or of another graph.
    """
    if sequence < 1 or tokens < 1 or tokens % sequence:
        raise ConfigError(f"{tokens} tokens are no batch of sequences of {sequence}; give the sizes of the example arguments.")
    units = {CONSTANT: sympy.Integer(1), TOKENS: T / tokens, PAIRS: T * S / (tokens * sequence)}
    growth, meter = Growth(sequence), Meter()
    flops, written, parameters = ([Counter[str]() for _ in range(len(starts) + 1)] for _ in range(3))
    used: set[str] = set()
    segment = 0
    for node in graph.nodes:
        if segment < len(starts) and node is starts[segment]:
            segment += 1
        if not is_call(node):
            continue
        work = meter.measure(node)
        kind = growth.of(node, is_product=work.product_flops > 0)
        linear = work.linear_flops if kind == PAIRS else 0
        flops[segment][kind] += work.flops - linear
        flops[segment][TOKENS] += linear
        written[segment][growth.of_result(node)] += work.nbytes
        for read in node.all_input_nodes:
            if read.op == "get_attr" and str(read.target) not in used and _is_parameter(graph, read):
                used.add(str(read.target))
                parameters[segment][CONSTANT] += sum(value.numel() * value.itemsize for value in tensors_in(read))
    if segment < len(starts):
        raise ConfigError(f"{starts[segment].name} does not begin a segment: the starts are not in the order of this graph.")
    return tuple(
        SegmentCost(*(sum((count[kind] * units[kind] for kind in count), sympy.Integer(0)) for count in counts))
        for counts in zip(flops, written, parameters, strict=True)
    )


def matrix_product_flops(graph: Graph) -> int:
    """FLOPs of a graph's matrix products alone, at the size of its capture."""
    meter = Meter()
    return sum(meter.measure(node).product_flops for node in graph.nodes if is_call(node))


def transfer_bytes(complete: int | sympy.Expr, partial: int | sympy.Expr = 0) -> sympy.Expr:
    """Bytes of a hop forward, in ``T``, ``D`` and ``ITEMSIZE``: ``complete`` blocks, the embedding among them, and partial sums.

    A number may be a symbol. Gradients go back in the same size.
    """
    return T * D * ITEMSIZE * (complete + partial)


def _is_parameter(graph: Graph, read: Node) -> bool:
    owner = graph.owning_module
    if owner is None:
        return True
    path, _, name = str(read.target).rpartition(".")
    return isinstance(getattr(owner.get_submodule(path), name), nn.Parameter)
