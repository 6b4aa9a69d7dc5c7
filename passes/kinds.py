"""The kind of a residual chain: sequential PreNorm, parallel residual, sandwich norms."""

from __future__ import annotations

from torch.fx import Node

from attnres_compile.passes.candidates import Candidate, Facts
from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.patterns.operations import name_of, same_shape, shape_of
from attnres_compile.patterns.residual import match_sum

_ATTENTION = frozenset({"scaled_dot_product_attention", "flex_attention", "self_attention", "conv1d"})


def kind_of(index: GraphIndex, candidate: Candidate, facts: Facts) -> str:
    """ "sandwich" where norms follow sublayers too, "parallel" where one read feeds two branches, else "prenorm"."""
    count = len(candidate.trunk.adds)
    if 5 * facts.normed_branches >= 2 * count:
        return "sandwich"
    read = {reads.stream for reads in candidate.reads if reads.groups}
    values, root = candidate.trunk.values, index.bit(candidate.trunk.root)
    # Adds of what the stream has no part in, such as positions or biases, and of one vector for many tokens are neither.
    pairs = [(v, add) for v, add in zip(values, candidate.trunk.adds, strict=False) if same_shape(add.branch, add.node)]
    computed = [(before, add) for before, add in pairs if index.ancestors[add.branch] & root]
    parallel = 0
    for before, add in computed:
        is_unread = before is not candidate.trunk.root and before not in read and before in {a.node for _, a in computed}
        parallel += is_unread or _adds_attention_to_mlp(index, add.branch, before)
    return "parallel" if 5 * parallel >= 2 * len(computed) else "prenorm"


def writes_several_streams(index: GraphIndex, branch: Node) -> bool:
    """Whether the branch is an outer product: a weight for each stream times one vector."""
    product = index.peel(branch)[0]
    shapes = [shape_of(source) for source in product.all_input_nodes] if name_of(product) == "mul" else []
    ranks = [len(shape or ()) for shape in shapes]
    if len(shapes) != 2 or min(ranks) < 2 or max(ranks) < 4:
        return False
    ends = {(str(shape[-2]) == "1", str(shape[-1]) == "1") for shape in shapes if shape}
    return ends == {(True, False), (False, True)}


def _adds_attention_to_mlp(index: GraphIndex, branch: Node, before: Node) -> bool:
    """Whether the branch is itself a sum with attention in one of its terms, and none in the other, which sees the stream too."""
    total = match_sum(index.peel(branch)[0])
    if total is None or not all(index.ancestors[term] & index.bit(before) for term in (total.left, total.right)):
        return False
    left, right = index.peel(total.left)[0], index.peel(total.right)[0]
    if index.ancestors[left] & index.bit(right) or index.ancestors[right] & index.bit(left):
        return False  # one goes through the other: y + f(y)
    return _mixes_tokens_since(index, left, before) != _mixes_tokens_since(index, right, before)


def _mixes_tokens_since(index: GraphIndex, value: Node, before: Node) -> bool:
    inside = index.ancestors[value] & ~index.ancestors[before]
    between = index.nodes[index.position[before] : index.position[value] + 1]
    return any(inside & index.bit(node) and _mixes_tokens(node) for node in between)


def _mixes_tokens(node: Node) -> bool:
    shape = shape_of(node)
    name = name_of(node)
    return (
        name in _ATTENTION
        or name.startswith("_scaled_dot_product")  # the kernels that a decomposed graph names
        or (name == "convolution" and shape is not None and len(shape) == 3)
        or (name in ("matmul", "einsum", "softmax") and shape is not None and len(shape) >= 4)
    )
