"""How the work of a graph's nodes grows with the microbatch: with tokens, with pairs of positions, or not at all.

The graph holds sizes, no symbols. So pairs are what came about as such, when a product of two activations or a broadcast of
rows and columns made two dimensions of the sequence's size. A width that happens to be that size makes none.
"""

from __future__ import annotations

import itertools

from torch import Tensor
from torch.fx import Node

from attnres_compile.patterns.operations import METADATA_READS, name_of
from attnres_compile.pipelining.work import operands_of, tensors_in

CONSTANT, TOKENS, PAIRS = "constant", "tokens", "pairs"
# Where queries and keys have their positions: [B, H, S, d], and [S, B, D] or [S, D].
_ATTENTION = {"scaled_dot_product_attention": -2, "flex_attention": -2, "multi_head_attention_forward": 0}


class Growth:
    """Tells how node after node grows; ask in the order of the graph. ``sequence`` is the number of positions."""

    def __init__(self, sequence: int) -> None:
        self._sequence = sequence
        self._varying: set[Node] = set()  # depends on an input of the model
        self._learned: set[Node] = set()  # made of parameters and buffers alone
        self._over_pairs: set[Node] = set()  # holds a dimension of the sequence for queries and one for keys

    def of(self, node: Node, is_product: bool) -> str:
        """The growth of a call's work; ``is_product`` says that it multiplies matrices."""
        operands = operands_of(node)
        if name_of(node) not in METADATA_READS and any(self._varies(operand) for operand in operands):
            self._varying.add(node)
        if operands and all(map(self._is_learned, operands)):
            self._learned.add(node)
        reads_pairs = any(operand in self._over_pairs for operand in operands)
        if is_product:
            # A product over pairs sums over the keys, so its result is none.
            makes_pairs = not reads_pairs and self._multiplies_positions(node, operands)
            keeps_pairs = makes_pairs and name_of(node) not in _ATTENTION
        else:
            makes_pairs = keeps_pairs = self._is_square(node) and (reads_pairs or self._crosses_positions(node, operands))
        if keeps_pairs:
            self._over_pairs.add(node)
        return self._named(node, reads_pairs or makes_pairs)

    def of_result(self, node: Node) -> str:
        """The growth of what a call that :meth:`of` was asked about writes."""
        return self._named(node, node in self._over_pairs)

    def _named(self, node: Node, of_pairs: bool) -> str:
        return CONSTANT if node not in self._varying else PAIRS if of_pairs else TOKENS

    def _varies(self, node: Node) -> bool:
        return node.op == "placeholder" or node in self._varying

    def _is_learned(self, node: Node) -> bool:
        return node.op == "get_attr" or node in self._learned

    def _multiplies_positions(self, node: Node, operands: list[Node]) -> bool:
        """Whether each position of a sequence meets each: in attention over other sequences, keys don't grow with this one."""
        if (positions := _ATTENTION.get(name_of(node))) is not None:
            return all(tensors_in(operand)[0].shape[positions] == self._sequence for operand in operands[:2])
        return self._is_square(node) and sum(bool(self._places(operand)) for operand in operands) >= 2

    def _crosses_positions(self, node: Node, operands: list[Node]) -> bool:
        """Whether a broadcast makes a table of positions by positions: one operand has the rows and another the columns."""
        places = [found for operand in operands if (found := self._places(operand))]
        return any(one.isdisjoint(other) for one, other in itertools.combinations(places, 2))

    def _places(self, node: Node) -> frozenset[int]:
        """The dimensions of the sequence's size, from the last one; learned tensors have none, whatever their sizes."""
        if self._is_learned(node):
            return frozenset()
        return frozenset(place for value in tensors_in(node) for place in self._of_size(value))

    def _is_square(self, node: Node) -> bool:
        return self._sequence > 1 and any(len(self._of_size(value)) >= 2 for value in tensors_in(node))

    def _of_size(self, value: Tensor) -> list[int]:
        return [place for place in range(-value.dim(), 0) if value.shape[place] == self._sequence]
