"""What crosses the cuts of a rewritten graph: sources, partial sums and other values, by name and size."""

from __future__ import annotations

from torch.fx import Node

from attnres_compile.passes.base import site_number
from attnres_compile.passes.cuts import Cuts, boundary_nodes
from attnres_compile.patterns.operations import value_of
from attnres_compile.plan import plan_site
from attnres_compile.report import block_size_of
from attnres_compile.rewritten import RewrittenModule
from attnres_compile.transport import CutValue


def cut_values(rewritten: RewrittenModule, cuts: Cuts) -> tuple[CutValue, ...]:
    """What crosses from stage to stage, with the names that sites give to it."""
    labels = _source_labels(rewritten)
    values = []
    for node, consumers in cuts.crossing.items():
        example = value_of(node)
        kind, label = labels.get(node, ("other", node.name))
        if kind == "partial":
            label = f"{label}{cuts.stage[node]}"
        nbytes = example.numel() * example.element_size()
        dtype = str(example.dtype).removeprefix("torch.")
        shape, differentiable = tuple(example.shape), node in cuts.differentiable
        made = (node.name, label, kind, cuts.stage[node], consumers, shape, dtype, nbytes, differentiable)
        values.append(CutValue(*made))
    return tuple(values)


def _source_labels(rewritten: RewrittenModule) -> dict[Node, tuple[str, str]]:
    """The kind and the name of what sites attend over: b0, b1, ... and p; with the chain's number where there are several."""
    sites = {site_number(node): node for node in boundary_nodes(rewritten.graph)}
    labels: dict[Node, tuple[str, str]] = {}
    number = 0
    for i, chain in enumerate(rewritten.report.chains):
        prefix = f"chain{i}." if len(rewritten.report.chains) > 1 else ""
        for site in chain.sites:
            plan = plan_site(site.before, block_size_of(rewritten.report, chain), chain.num_sublayers)
            sources = sites[number].args[0]
            assert isinstance(sources, (list, tuple))
            for k, source in enumerate(sources):
                partial = k == 1 + plan.complete
                labels.setdefault(source, ("partial", f"{prefix}p") if partial else ("block", f"{prefix}b{k}"))
            number += 1
    return labels
