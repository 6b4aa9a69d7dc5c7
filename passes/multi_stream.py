"""Weights of a chain's sites from the parameters of all of them: several residual streams as a depth mixing matrix."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from attnres_compile.passes.base import SiteNodes, describe


def weigh_by_streams(graph: Graph, sites: list[SiteNodes], before: list[int]) -> None:
    """Compute ``attnres::multi_stream_offsets`` first thing in the graph; site k, after ``before[k]`` sublayers, uses row k."""
    parameters = tuple([site.parameters[name] for site in sites] for name in ("read", "write", "mix"))
    first = next(node for node in graph.nodes if node.op != "placeholder")
    origin, target = sites[0].call, torch.ops.attnres.multi_stream_offsets.default
    like = parameters[0][0].meta["example_value"]
    with torch.no_grad():
        values = [like.new_empty((count + 1,), dtype=torch.promote_types(like.dtype, torch.float32)) for count in before]
    with graph.inserting_before(first):
        rows = graph.create_node("call_function", target, (*parameters, before), name="attnres_streams")
        describe(rows, origin, "rewrite", values)
        for k, site in enumerate(sites):
            row: Node = graph.create_node("call_function", operator.getitem, (rows, k), name=f"attnres_streams_{k}")
            describe(row, origin, "rewrite", values[k])
            arguments = list(site.call.args)
            arguments[6] = row
            site.call.args = tuple(arguments)
