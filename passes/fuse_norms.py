"""Let the second phase of a site apply the norm that reads it: the mixture is then never written to memory."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch.fx import Node

from attnres_compile.passes.base import Program
from attnres_compile.passes.regions import GradientRegions
from attnres_compile.patterns.norm_forms import NormForm, match_norm
from attnres_compile.patterns.operations import CASTS, is_call, name_of

# What models do to a norm's weight before they use it.
_MOVABLE = CASTS | {"add", "sub", "mul", "neg"}


@dataclasses.dataclass(frozen=True)
class FuseNorms:
    """Moves the RMSNorm or LayerNorm that alone reads an ``attnres::merge`` into it. Other readers get the merged stream."""

    name: str = "fuse_norms"

    def run(self, program: Program) -> tuple[Program, int]:
        graph = program.graph_module.graph
        regions = GradientRegions(graph)
        merged = {i: site.call for i, site in enumerate(program.sites) if _is_merged(site.call)}
        fused = {i: _fuse(read, regions) for i, read in merged.items()}
        program.graph_module.recompile()
        return program, sum(fused.values())


def _is_merged(read: Node) -> bool:
    merge = read.args[0] if read.target is operator.getitem else None
    return isinstance(merge, Node) and merge.target is torch.ops.attnres.merge.default


def _fuse(read: Node, regions: GradientRegions) -> bool:
    merge = read.args[0]
    assert isinstance(merge, Node)
    form = match_norm(read)
    if form is None or any(regions[node] != regions[merge] for node in form.nodes):
        return False
    affine = [node for node in (form.weight, form.bias) if node is not None]
    if not all(_can_precede(node, merge) for node in affine):
        return False
    for node in affine:
        _put_before(node, merge)
    merge.args = (*merge.args, form.kind, form.weight, form.bias, form.eps)
    _replace(read, form)
    return True


def _can_precede(node: Node, place: Node) -> bool:
    """Whether ``node`` stands before ``place``, or is made of what does, such as a weight to which one is added."""
    if node < place:
        return True
    return is_call(node) and name_of(node) in _MOVABLE and all(_can_precede(source, place) for source in node.all_input_nodes)


def _put_before(node: Node, place: Node) -> None:
    if place < node:
        for source in node.all_input_nodes:
            _put_before(source, place)
        place.prepend(node)


def _replace(read: Node, form: NormForm) -> None:
    """From here on ``read`` is the norm's output; who asked it for its shape alone still can."""
    read.meta["stack_trace"] = form.output.meta.get("stack_trace", "")
    form.output.replace_all_uses_with(read)
    for node in sorted(form.nodes, reverse=True):
        read.graph.erase_node(node)
