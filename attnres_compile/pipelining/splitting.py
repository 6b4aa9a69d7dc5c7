"""Cut a rewritten graph at the ends of its blocks, for one process: what ``rewrite(..., split=True)`` does."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.fx import GraphModule

from attnres_compile.errors import PartitionError
from attnres_compile.layout import StoredConversion, layout_of
from attnres_compile.passes.cuts import Cuts, cut
from attnres_compile.passes.normalize import attribute
from attnres_compile.passes.partition import stage_graphs
from attnres_compile.passes.regions import TAGS
from attnres_compile.patterns.operations import value_of
from attnres_compile.pipelining.boundaries import boundaries_of
from attnres_compile.pipelining.crossing import cut_values
from attnres_compile.pipelining.stages import module_tree, stage_modules
from attnres_compile.rewritten import RewrittenModule
from attnres_compile.split import SplitModule
from attnres_compile.transport import CutValue, StageTransport


def split(rewritten: RewrittenModule) -> SplitModule:
    """``rewritten`` as one module per AttnRes block, with the same parameters.

    Raises:
        PartitionError: if the graph can't be cut at the ends of its blocks, or there is no such place.
    """
    config = rewritten.report.config
    assert config is not None
    if config.weights == "mhc":
        raise PartitionError("weights='mhc' computes the weights of all sites at once, which no block can do by itself.")
    starts = [boundary.node for boundary in boundaries_of(rewritten) if boundary.aligned]
    cuts = cut(rewritten, starts)
    values = cut_values(rewritten, cuts)
    transport = _in_one_process(values, len(starts) + 1)
    graphs = stage_graphs(rewritten, cuts, transport, {value.name: value.label for value in values})
    blocks = stage_modules(rewritten, cuts, graphs, two_phase=True)
    shared = _shared_names(rewritten, cuts)
    inputs = [_share(block, shared) for block in blocks]
    signature = rewritten.call_signature
    if signature.training is not None and rewritten.is_same_graph(not signature.training):
        signature = dataclasses.replace(signature, training=None)  # asked now: the split module keeps no hold of the model
    stored = StoredConversion(config, layout_of(rewritten.report))
    tree = module_tree(rewritten, sorted(shared))
    dtypes = {value.name: getattr(torch, value.dtype) for value in values}
    recomputed = frozenset(cuts.stage[node] for node in rewritten.graph.nodes if node in cuts.stage and TAGS[0] in node.meta)
    return SplitModule(
        blocks, tree, inputs, transport, dtypes, recomputed, signature, rewritten.report, stored, rewritten.training
    )


def _in_one_process(values: tuple[CutValue, ...], count: int) -> tuple[StageTransport, ...]:
    """Whatever a block makes is kept until its last reader is done; nothing is sent."""

    def names(chosen: list[CutValue]) -> tuple[str, ...]:
        return tuple(value.name for value in chosen)

    found = []
    for block in range(count):
        reads = names([value for value in values if block in value.consumers])
        makes = names([value for value in values if value.producer == block])
        frees = names([value for value in values if value.consumers[-1] == block])
        found.append(StageTransport(reads, makes, (), (), reads, makes, frees))
    return tuple(found)


def _shared_names(rewritten: RewrittenModule, cuts: Cuts) -> set[str]:
    """Parameters that several blocks read, under all their names."""
    where: dict[int, set[int]] = {}
    parameters = dict(rewritten.named_parameters(remove_duplicate=False))
    for name, blocks in cuts.homes.items():
        if name in parameters:
            where.setdefault(id(parameters[name]), set()).update(blocks)
    return {name for name, parameter in parameters.items() if len(where.get(id(parameter), ())) > 1}


def _share(block: GraphModule, shared: set[str]) -> tuple[str, ...]:
    """Let ``block`` take parameters named in ``shared`` as inputs, behind the others; their names, in that order."""
    reads = [node for node in block.graph.find_nodes(op="get_attr") if str(node.target) in shared]
    last = block.graph.find_nodes(op="placeholder")[-1]
    for node in reads:
        with block.graph.inserting_after(last):
            last = block.graph.placeholder(node.name)
        last.meta = {"example_value": value_of(node)}
        node.replace_all_uses_with(last)
        block.graph.erase_node(node)
    for name in shared & dict(block.named_parameters(remove_duplicate=False)).keys():
        owner, _, own = name.rpartition(".")
        holder = attribute(block, owner) if owner else block
        assert isinstance(holder, nn.Module)
        del holder._parameters[own]
    block.recompile()
    return tuple(str(node.target) for node in reads)
