"""The explicit way: detect, convert in place, or rewrite ahead of time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

import attnres_compile.kernels.ops  # noqa: F401  (registers the attnres:: operators)
from attnres_compile.capture import Captured, capture, lies_inside_an_argument, tree_flatten
from attnres_compile.config import AttnResConfig
from attnres_compile.dummies import dummy_inputs
from attnres_compile.errors import ConfigError, ModelTypeError, NoResidualChainError
from attnres_compile.exported import captured_from
from attnres_compile.layout import layout_of
from attnres_compile.parameters import ATTRIBUTE, AttnResParameters, attach, attached_to, hosts_in
from attnres_compile.passes.base import Program, run_passes
from attnres_compile.passes.pipeline import DETECTION, PHASING, PLANNING, REWRITING
from attnres_compile.passes.shard_sequence import ShardSequence
from attnres_compile.patterns.operations import source_line_of
from attnres_compile.patterns.placements import is_device_mesh
from attnres_compile.report import Report, describe_chains
from attnres_compile.rewritten import (
    RewrittenModule,
    bind_parameters,
    hold_constants,
    parameter_tree,
    qualified_names,
    signature_of,
)
from attnres_compile.split import SplitModule
from attnres_compile.wrappers import check_no_wrapper, check_not_sharded

log = logging.getLogger(__name__)


def detect(model: nn.Module | ExportedProgram, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Report:
    """Find the residual chains of ``model`` without changing or running it; works on the meta device.

    Args:
        model: any module, or what ``torch.export.export`` made of one, decomposed or not. A Transformers model needs no
            arguments: it is captured with its dummy inputs.
        args, kwargs: example arguments of a call; none for an exported program, which has its graph already.

    Returns:
        The chains that can be rewritten, and the refusals. No chain is no error here.

    Raises:
        CaptureError, ChainCutError: if the model can't be called so, or not be captured in one graph.
    """
    if isinstance(model, ExportedProgram):
        if args or kwargs:
            raise ConfigError("an exported program holds its graph already; call detect on it without args and kwargs.")
        captured = captured_from(model)
    else:
        model, args, kwargs = checked_call(model, args, kwargs)
        _check_original(model)
        captured = capture(model, args, kwargs)
    return report_of(run_passes(_program(captured, AttnResConfig()), DETECTION), planned=False)


def convert_(
    model: nn.Module, config: AttnResConfig | None = None, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Report:
    """Give ``model`` AttnRes parameters, in place: ``model.attnres``, with zero queries and key-norm weights of one.

    The model must then run under ``torch.compile(model, backend="attnres")``; run otherwise it raises. Until the queries
    are trained it computes what it computed before (exactly with ``scale="preserve"``).

    Raises:
        NoResidualChainError: if nothing can be rewritten, with the nearest misses.
        ConfigError: if the model was converted before, or if the config does not fit its chains.
    """
    model, args, kwargs = checked_call(model, args, kwargs)
    program = _dry_run(model, config, args, kwargs)
    report = report_of(program)
    attach(model, AttnResParameters(program.config, layout_of(report), *device_and_dtype(model, program)))
    return report


def planned(
    model: nn.Module, config: AttnResConfig | None = None, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Report:
    """What :func:`convert_` would report, without changing ``model``; works on the meta device. Raises what it raises."""
    model, args, kwargs = checked_call(model, args, kwargs)
    return report_of(_dry_run(model, config, args, kwargs))


def _dry_run(model: nn.Module, config: AttnResConfig | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Rewrite a graph that is then thrown away: what can be rewritten, and how, is known before the first step."""
    config = _checked_config(config)
    _check_original(model)
    if hosts_in(model):
        raise ConfigError(f"{type(model).__name__} was converted before; converting twice would rewrite the rewritten.")
    check_no_wrapper(model)
    return run_passes(plan(capture(model, args, kwargs), config, type(model).__name__), REWRITING + PHASING)


@overload
def rewrite(
    model: nn.Module, config: AttnResConfig | None = ..., args: tuple[Any, ...] = ..., kwargs: dict[str, Any] | None = ..., *,
    split: Literal[False] = ..., shard_sequence: bool = ...,
) -> RewrittenModule: ...  # fmt: skip


@overload
def rewrite(
    model: nn.Module, config: AttnResConfig | None = ..., args: tuple[Any, ...] = ..., kwargs: dict[str, Any] | None = ..., *,
    split: Literal[True], shard_sequence: bool = ...,
) -> SplitModule: ...  # fmt: skip


def rewrite(
    model: nn.Module, config: AttnResConfig | None = None, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *,
    split: bool = False, shard_sequence: bool = False,
) -> RewrittenModule | SplitModule:  # fmt: skip
    """The rewritten graph of ``model`` ahead of time, as a module that is called like the model and runs eagerly.

    The result shares the model's parameters under their names, and holds the new ones under ``attnres``; a model that
    was converted before lends its own. ``model`` itself stays as it is. It is called once on the example arguments, without
    gradients; the result accepts arguments of the same shapes and structure, in the same mode.

    Args:
        split: return a module of modules, one for every AttnRes block, each of which FSDP's ``fully_shard`` can wrap and
            torch.compile compile by itself: see :class:`attnres_compile.SplitModule`.
        shard_sequence: for a tensor-parallel model whose ranks all hold the whole residual stream: let every rank keep the
            blocks of its part of the sequence alone (``passes/shard_sequence.py``). ``model`` and the result compute the same.

    Raises:
        PartitionError: if ``split`` is asked for and the graph can't be cut at the ends of its blocks.
        NoResidualChainError: if nothing can be rewritten, with the nearest misses.
        PlacementError: if the model is distributed so that its stream can't be attended to, or not be split.
        ConfigError: if the config does not fit the chains, or contradicts the one that the model was converted with.
    """
    model, args, kwargs = checked_call(model, args, kwargs)
    _check_original(model)
    existing = attached_to(model)
    if existing is not None:
        if config is not None and config != existing.config:
            raise ConfigError(f"the model was converted with {existing.config}; rewrite it with that, or without a config.")
        config = existing.config
    elif hosts := hosts_in(model):
        raise ConfigError(f"a part of the model, {type(hosts[0]).__name__}, was converted before; rewrite that part.")
    else:
        check_no_wrapper(model)
    captured = capture(model, args, kwargs, run=True)
    text = str(captured.graph_module.graph)
    program = plan(captured, _checked_config(config), type(model).__name__)
    if not split:
        _warn_of_checkpoints(program, type(model).__name__)
    report = report_of(program)
    if existing is not None:
        existing.check(report)
        parameters = existing
    else:
        device, dtype = device_and_dtype(model, program)
        assert report.config is not None
        parameters = AttnResParameters(report.config, layout_of(report), device, dtype)

    passes = (*REWRITING, ShardSequence()) if shard_sequence else REWRITING

    def is_same_graph(training: bool) -> bool:
        with _in_mode(model, training):
            return str(capture(model, args, kwargs).graph_module.graph) == text

    rewritten = _as_module(model, args, kwargs, captured, run_passes(program, passes), parameters, is_same_graph)
    if not split:
        return rewritten
    from attnres_compile.pipelining import splitting  # here, since it is one more user of rewritten modules

    return splitting.split(rewritten)


def _warn_of_checkpoints(program: Program, name: str) -> None:
    """Recomputation is the work of a compiler, which reads the tags in a graph; a graph that runs eagerly keeps everything."""
    tagged = next((node for node in program.graph_module.graph.nodes if "ac_graph_id" in node.meta), None)
    if tagged is not None:
        log.warning(
            "%s checkpoints activations (at %s), which a graph rewritten ahead of time does not: it keeps them all for the "
            'backward pass. Use convert_ and torch.compile(model, backend="attnres"), which recomputes them.',
            name,
            source_line_of(tagged),
        )


@contextlib.contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def plan(captured: Captured, config: AttnResConfig, name: str) -> Program:
    """Detection and planning on a captured graph.

    Raises:
        NoResidualChainError: if there is no chain to rewrite.
    """
    program = run_passes(_program(captured, config), DETECTION)
    if not program.chains:
        raise NoResidualChainError(explain_no_chain(name, report_of(program, planned=False)))
    return run_passes(program, PLANNING)


def explain_no_chain(name: str, report: Report) -> str:
    """Why nothing was rewritten: the nearest misses, one a line."""
    listed = "".join(f"\n  - {refusal}" for refusal in report.near_misses())
    return f"{name} has no residual chain that can be rewritten." + (
        f" The nearest misses:{listed}" if listed else " No residual add carries a stream from one sublayer to the next."
    )


def report_of(program: Program, planned: bool = True) -> Report:
    chains = describe_chains(program.chains, program.plans)
    return Report(chains, program.refusals, program.history, program.config if planned else None, program.notes)


def _check_original(model: nn.Module) -> None:
    """Raises:
        ConfigError: if ``model`` was rewritten or sharded before.
    """
    if is_rewritten(model):
        raise ConfigError(f"{type(model).__name__} was rewritten before; start from the original model.")
    check_not_sharded(model)


def is_rewritten(model: nn.Module) -> bool:
    return any(isinstance(module, (RewrittenModule, SplitModule)) for module in model.modules())


def _program(captured: Captured, config: AttnResConfig) -> Program:
    return Program(captured.graph_module, config, captured.parameters)


def _as_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], captured: Captured, program: Program,
    parameters: AttnResParameters, is_same_graph: Callable[[bool], bool],
) -> RewrittenModule:  # fmt: skip
    graph = program.graph_module.graph
    tree = parameter_tree(model, parameters)
    hold_constants(tree, program.graph_module)
    name_of = qualified_names(model)
    arguments = set(map(id, tree_flatten((args, kwargs))[0]))
    own = {node for site in program.sites for node in site.parameters.values()}
    bound: dict[Node, str] = {}
    inputs: list[Any] = []
    placeholders = [node for node in graph.find_nodes(op="placeholder") if node not in own]
    for node, value in zip(placeholders, captured.inputs, strict=True):
        name = name_of(value)
        if name is not None:
            bound[node] = name
        elif id(value) in arguments:
            inputs.append(value)
        elif is_device_mesh(value):
            bound[node] = f"constant_{node.name}"
            setattr(tree, bound[node], value)
        elif isinstance(value, Tensor) and lies_inside_an_argument(node):
            raise ConfigError(
                f"the graph reads {node.name!r}, a tensor inside an argument whose class this can't look into, so that the graph "
                "would hold on to that of the example. Pass tensors by themselves or in tuples, lists and dicts, or use "
                'torch.compile(model, backend="attnres").'
            )
        elif isinstance(value, Tensor) and not node.users:
            graph.erase_node(node)  # the mark of converted models
        elif isinstance(value, Tensor):  # a tensor that the model holds outside its parameters and buffers
            bound[node] = f"constant_{node.name}"
            tree.register_buffer(bound[node], value, persistent=False)
        else:
            raise ConfigError(
                f"the graph depends on {node.name!r} = {value!r}, which is no argument of the model: a size marked as dynamic, "
                'or a number that changes. Leave mark_dynamic out, or use torch.compile(model, backend="attnres"), '
                "which takes dynamic sizes."
            )
    for i, site in enumerate(program.sites):
        bound |= {node: f"{ATTRIBUTE}.sites.{i}.{name}" for name, node in site.parameters.items()}
    bind_parameters(graph, bound)
    signature = signature_of(model, args, kwargs, captured.result, inputs, captured.outputs)
    return RewrittenModule.build(tree, graph, type(model).__name__, signature, report_of(program), is_same_graph)


def device_and_dtype(model: nn.Module, program: Program) -> tuple[torch.device | None, torch.dtype | None]:
    """Where the new parameters live: like the model's first floating-point parameter, or like the stream."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize >= 2:
            return parameter.device, parameter.dtype
    value = program.chains[0].root.meta["example_value"]
    return value.device, value.dtype


def _checked_config(config: AttnResConfig | None) -> AttnResConfig:
    if config is None:
        return AttnResConfig()
    if not isinstance(config, AttnResConfig):
        raise ConfigError(f"config must be an AttnResConfig, not {type(config).__name__}; build it as AttnResConfig(...).")
    return config


def checked_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    if isinstance(model, ExportedProgram):
        raise ModelTypeError(
            "a torch.export.ExportedProgram can be given to detect alone; convert or rewrite the module that it was exported "
            "from."
        )
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"expected a torch.nn.Module, not {type(model).__name__}.")
    original = getattr(model, "_orig_mod", None)  # what torch.compile(model) returned
    if isinstance(original, nn.Module):
        model = original
    if isinstance(args, Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs or {}, dict):
        raise ConfigError("args must be a tuple of the model's positional arguments, and kwargs a dict of the others.")
    args, kwargs = tuple(args), dict(kwargs or {})
    if not args and not kwargs:
        kwargs = dummy_inputs(model)
    return model, args, kwargs
