"""Stage modules: the graphs of stages with the parameters that they read."""

from __future__ import annotations

import dataclasses

from torch import nn
from torch.fx import GraphModule, Node

from attnres_compile.passes.base import Program, SiteNodes, run_passes
from attnres_compile.passes.cuts import Cuts
from attnres_compile.passes.normalize import attribute
from attnres_compile.passes.partition import StageGraph
from attnres_compile.passes.pipeline import PHASING
from attnres_compile.pipelining.devices import captured_on, follow_inputs
from attnres_compile.pipelining.surroundings import record_surroundings
from attnres_compile.plan import AttnResPlan, plan_chain
from attnres_compile.report import Report
from attnres_compile.rewritten import RewrittenModule


def stage_modules(
    rewritten: RewrittenModule, cuts: Cuts, graphs: tuple[StageGraph, ...], two_phase: bool
) -> tuple[GraphModule, ...]:
    """A module for every stage, with the model's own parameters under their qualified names."""
    names = _homes(rewritten, cuts, len(graphs))
    return tuple(_stage_module(rewritten, graph, i, names[i], two_phase) for i, graph in enumerate(graphs))


def _homes(rewritten: RewrittenModule, cuts: Cuts, num_stages: int) -> list[list[str]]:
    """The parameters, buffers and bodies of control flow of every stage, tied ones under all their names.

    What nothing reads is kept in the first stage, so that checkpoints have all.
    """
    stages: dict[int, set[int]] = {}
    for name, where in cuts.homes.items():
        stages.setdefault(id(attribute(rewritten, name)), set()).update(where)
    tensors = [*dict(rewritten.named_parameters(remove_duplicate=False)), *dict(rewritten.named_buffers(remove_duplicate=False))]
    bodies = [name for name in cuts.homes if isinstance(attribute(rewritten, name), nn.Module)]
    names: list[list[str]] = [[] for _ in range(num_stages)]
    for name in (*tensors, *bodies):
        for stage in stages.get(id(attribute(rewritten, name)), (0,)):
            names[stage].append(name)
    return names


def _stage_module(rewritten: RewrittenModule, stage: StageGraph, index: int, names: list[str], two_phase: bool) -> GraphModule:
    module = GraphModule(rewritten, stage.graph, class_name=f"Stage{index}")
    tree = module_tree(rewritten, names)
    module._parameters, module._buffers, module._modules = tree._parameters, tree._buffers, tree._modules
    module._non_persistent_buffers_set = tree._non_persistent_buffers_set
    module.train(rewritten.training)
    report = rewritten.report
    assert report.config is not None
    if two_phase:
        run_passes(Program(module, report.config, plans=_plans_of(report, stage), sites=_sites_of(stage)), PHASING)
    follow_inputs(module.graph)
    module.recompile()
    record_surroundings(module, captured_on(module.graph))
    return module


def _plans_of(report: Report, stage: StageGraph) -> tuple[AttnResPlan, ...]:
    """The plan of every chain that has sites in the stage, with these sites alone."""
    assert report.config is not None
    inside = {number for number, _ in stage.sites}
    plans, number = [], 0
    for chain in report.chains:
        whole = plan_chain(chain.num_sublayers, [site.before for site in chain.sites], report.config)
        kept = tuple(site for i, site in enumerate(whole.sites, start=number) if i in inside)
        plans.append(dataclasses.replace(whole, sites=kept))
        number += len(chain.sites)
    return tuple(plans)


def _sites_of(stage: StageGraph) -> tuple[SiteNodes, ...]:
    sites = []
    for _, call in sorted(stage.sites, key=lambda entry: entry[0]):
        parameters = zip(("query", "key_norm"), call.args[1:3], strict=True)
        sites.append(SiteNodes(call, {name: node for name, node in parameters if isinstance(node, Node)}, call))
    return tuple(sites)


def module_tree(rewritten: RewrittenModule, names: list[str]) -> nn.Module:
    """Plain modules that hold the tensors at ``names`` and nothing else: the same tensors, persistent where they were."""
    tree = nn.Module()
    for name in names:
        owner_name, _, own = name.rpartition(".")
        owner, place = rewritten.get_submodule(owner_name), tree
        for part in filter(None, owner_name.split(".")):
            if part not in place._modules:
                place._modules[part] = nn.Module()
            place = place._modules[part]  # type: ignore[assignment]
        if own in owner._parameters:
            place._parameters[own] = owner._parameters[own]
        elif own in owner._modules:
            place._modules[own] = owner._modules[own]
        else:
            place._buffers[own] = owner._buffers[own]
            if own in owner._non_persistent_buffers_set:
                place._non_persistent_buffers_set.add(own)
    return tree
