"""The stages of a plan run one after the other in one process, the transport played by hand, and what must hold of any plan."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map_only

import attnres_compile as ac
from attnres_compile.passes.transfers import block_cache_get, block_cache_put, block_recv, block_send

TRANSFERS = (block_recv, block_cache_get, block_send, block_cache_put)
_SWITCHES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


def run_stages(plan: ac.PipelinePlan, *args: Any, **kwargs: Any) -> Any:
    """What the model returns, from the plan's stages in order.

    A value leaves its stage as it was made and enters the others so: autograd sees one graph, except where the plan says that a
    value has no gradient. What the plan's wires and caches do not hold can't be read.
    """
    assert plan.signature is not None
    inputs = plan.signature.flatten(args, kwargs)
    made: dict[str, Tensor] = {}
    wire: set[str] = set()
    caches: list[set[str]] = [set() for _ in range(plan.ranks)]
    for index, (stage, moves) in enumerate(zip(plan.stages, plan.transport, strict=True)):
        cache = caches[plan.placement[index]]
        assert wire == set(moves.receives)
        assert cache >= set(moves.fetches)
        entering = [_entering(plan, name, made[name]) for name in (*moves.receives, *moves.fetches)]
        result = stage(*(entering if index else inputs))
        if index == plan.num_stages - 1:
            assert not moves.sends
            assert not moves.keeps
            outputs = result
        else:
            sent = dict(zip(moves.sends, result[0], strict=True))
            kept = dict(zip(moves.keeps, result[1], strict=True))
            for name, value in (kept | sent).items():
                if name in moves.makes:
                    made[name] = value
                else:
                    assert not value.requires_grad
                assert torch.equal(made[name], value)
                _check_value(plan, name, value)
            wire = set(moves.sends)
            cache |= set(moves.keeps)
        cache -= set(moves.frees)
    assert not any(caches)
    return plan.signature.rebuild(outputs, inputs)


def _entering(plan: ac.PipelinePlan, name: str, value: Tensor) -> Tensor:
    return value if plan.value(name).differentiable else value.detach()


def _check_value(plan: ac.PipelinePlan, name: str, value: Tensor) -> None:
    described = plan.value(name)
    assert tuple(value.shape) == described.shape
    assert str(value.dtype) == f"torch.{described.dtype}"
    assert value.numel() * value.element_size() == described.nbytes


# ---------------------------------------------------------------------------------------------------- held against the whole


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest errors of outputs and gradients, relative to the largest element of each tensor.

    Gradients that are zero but for rounding, as those of biases of keys, are measured against the model's largest.
    """

    output: float
    gradient: float


def difference_from(
    whole: nn.Module, plan: ac.PipelinePlan, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, seed: int = 0
) -> Difference:
    """Run ``whole`` and the stages from the same random state; both hold the same parameters, with buffers as they are now."""
    kwargs = kwargs or {}
    buffers = {name: value.clone() for name, value in whole.named_buffers()}
    found = []
    for run in (whole, lambda *args, **kwargs: run_stages(plan, *args, **kwargs)):
        with torch.no_grad():
            for name, value in whole.named_buffers():
                value.copy_(buffers[name])
        found.append(_outcome(run, whole, args, kwargs, seed))
    (expected, wanted, state), (outputs, gradients, staged_state) = found
    assert gradients.keys() == wanted.keys(), gradients.keys() ^ wanted.keys()
    assert [type(leaf) for leaf in outputs] == [type(leaf) for leaf in expected]
    assert state.keys() == staged_state.keys()
    errors = [_error(a, b) for a, b in zip(outputs, expected, strict=True) if isinstance(a, Tensor)]
    errors += [_error(staged_state[name], state[name]) for name in state]
    smallest = 1e-3 * max((value.abs().max().item() for value in wanted.values()), default=0.0)
    return Difference(max(errors), max((_error(gradients[name], wanted[name], smallest) for name in wanted), default=0.0))


def _outcome(
    run: Callable[..., Any], whole: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> tuple[list[Any], dict[str, Tensor], dict[str, Tensor]]:
    for parameter in whole.parameters():
        parameter.grad = None
    torch.manual_seed(seed)
    args, kwargs = tree_map_only(Tensor, lambda value: value.detach().clone().requires_grad_(value.requires_grad), (args, kwargs))
    inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.requires_grad]
    outputs = tree_leaves(run(*args, **kwargs))
    trained = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
    if trained:
        sum((_loss(value) for value in trained), torch.zeros(())).backward()
    gradients = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
    gradients |= {f"input {i}": value.grad for i, value in enumerate(inputs) if value.grad is not None}
    return outputs, gradients, {name: value.clone() for name, value in whole.named_buffers()}


def _loss(value: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    return (value * weights).sum() + value.square().mean()


def _error(found: Tensor, expected: Tensor, smallest: float = 1e-30) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if torch.equal(found, expected):
        return 0.0
    if not expected.is_floating_point():
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(smallest)).item()


# ------------------------------------------------------------------------------------------------------------ invariants


def check_plan(plan: ac.PipelinePlan, whole: ac.RewrittenModule) -> None:
    """What must hold of any plan of the rewritten model ``whole``; of operations, for ``two_phase=False`` alone."""
    stages = [stage for stage in plan.stages if isinstance(stage, GraphModule)]
    assert len(stages) == plan.num_stages == len(plan.placement)
    for stage, moves, index in zip(stages, plan.transport, range(len(stages)), strict=True):
        stage.graph.lint()
        assert _labels(stage.graph, block_recv) == [plan.value(name).label for name in moves.receives]
        assert _labels(stage.graph, block_cache_get) == [plan.value(name).label for name in moves.fetches]
        assert _labels(stage.graph, block_send) == [plan.value(name).label for name in moves.sends]
        assert _labels(stage.graph, block_cache_put) == [plan.value(name).label for name in moves.keeps]
        text = str(stage.graph)
        assert all(f"{index - 1})" in line for line in text.splitlines() if "block_recv](" in line)
        assert stage.training == whole.training
    _check_tensors(plan, stages, whole)
    if not plan.two_phase:
        _check_operations(stages, whole)


def _labels(graph: Graph, kind: Any) -> list[Any]:
    return [node.args[1] for node in graph.find_nodes(op="call_function", target=kind)]


def _check_tensors(plan: ac.PipelinePlan, stages: list[GraphModule], whole: nn.Module) -> None:
    parameters = dict(whole.named_parameters(remove_duplicate=False))
    homes = Counter(name for stage in stages for name in dict(stage.named_parameters(remove_duplicate=False)))
    assert homes.keys() == parameters.keys()
    shared = {id(parameters[note.split(" is read in stages ")[0]]) for note in plan.notes}
    assert {id(parameters[name]) for name, count in homes.items() if count > 1} == shared
    buffers = dict(whole.named_buffers(remove_duplicate=False))
    for stage in stages:
        assert all(parameters[name] is value for name, value in stage.named_parameters(remove_duplicate=False))
        assert all(buffers[name] is value for name, value in stage.named_buffers(remove_duplicate=False))
    persistent = set(whole.state_dict())
    assert set().union(*(stage.state_dict() for stage in stages)) == persistent
    assert {name for stage in stages for name in dict(stage.named_buffers(remove_duplicate=False))} == set(buffers)


def _check_operations(stages: list[GraphModule], whole: GraphModule) -> None:
    """Operations are in one stage each, but those that follow from the model's inputs and buffers alone."""
    copies = Counter(node.name for stage in stages for node in stage.graph.nodes if _computes(node))
    trained = dict(whole.named_parameters(remove_duplicate=False))
    for node in whole.graph.nodes:
        if _computes(node):
            assert copies[node.name] >= 1, f"{node.name} is in no stage"
            assert copies[node.name] == 1 or not any(str(read.target) in trained for read in _ancestors(node)), node.name


def _computes(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and getattr(node.target, "__name__", "") not in _SWITCHES


def _ancestors(node: Node) -> Iterator[Node]:
    waiting, seen = [node], set()
    while waiting:
        found = waiting.pop()
        if found not in seen:
            seen.add(found)
            yield found
            waiting.extend(found.all_input_nodes)
