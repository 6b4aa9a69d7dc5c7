"""``torch.compile(model, backend="attnres")``: rewrite Dynamo's graph, and hand it to Inductor."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

import attnres_compile.kernels.ops  # noqa: F401  (registers the attnres:: operators)
from attnres_compile import capture
from attnres_compile.config import AttnResConfig
from attnres_compile.convert import device_and_dtype, explain_no_chain, is_rewritten, report_of
from attnres_compile.errors import AttnResError, ChainCutError, ConfigError, NoResidualChainError, ParameterMismatchError
from attnres_compile.execution import eager_hosts, note_execution
from attnres_compile.layout import layout_of
from attnres_compile.parameters import (
    ATTRIBUTE,
    AttnResParameters,
    attach,
    attached_to,
    check_unconverted,
    hosts_in,
    parameters_of,
)  # fmt: skip
from attnres_compile.passes.base import Program, run_passes
from attnres_compile.passes.pipeline import DETECTION, LOWERING, PHASING, PLANNING, REWRITING
from attnres_compile.passes.shard_sequence import ShardSequence
from attnres_compile.patterns.operations import clean_path
from attnres_compile.places import caller_of, modules_that_run
from attnres_compile.report import ChainReport, Report, SiteReport
from attnres_compile.wrappers import (
    SHARD_BLOCKS,
    check_no_wrapper,
    check_not_sharded_in_parts,
    check_synchronised,
    fsdp_modules,
    unsynchronised,
    warn_of_adapters,
)  # fmt: skip

log = logging.getLogger(__name__)

SHARD_SEQUENCE = "shard_sequence"
InnerCompiler = Callable[[GraphModule, list[Any], str | None], Callable[..., Any]]


def attnres(
    gm: GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend that torch finds under the name "attnres".

    Args:
        gm, example_inputs: Dynamo's graph and its inputs.
        mode: a ``torch.compile`` mode, passed on to Inductor.
        options: AttnResConfig fields. A model that was converted before has its config already. Besides, ``shard_sequence``:
            True lets every rank of a tensor-parallel model keep its part of the blocks alone (``passes/shard_sequence.py``).

    Raises:
        AttnResError: whenever the graph can't be rewritten as a whole; no graph of a model with parameters is ever compiled
            un-rewritten.
    """
    return compile_rewritten(gm, example_inputs, capture.compile_with_inductor, mode=mode, options=options)


def compile_rewritten(
    gm: GraphModule, example_inputs: list[Any], compiler: InnerCompiler, *, mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Rewrite ``gm`` and compile the result with ``compiler(graph_module, inputs, mode)``."""
    try:
        return _compile(gm, example_inputs, compiler, mode, options)
    except AttnResError as error:
        capture.raise_through_dynamo(_because_of_fsdp(error) or error)


def _because_of_fsdp(error: AttnResError) -> AttnResError | None:
    """What FSDP shards in parts is handed over in pieces. Which comes first, and what it lacks, depends on the model."""
    if isinstance(error, (ChainCutError, NoResidualChainError)):
        for model in modules_that_run():
            try:
                check_not_sharded_in_parts(model)
            except ChainCutError as found:
                return found
    return None


def _compile(
    gm: GraphModule, example_inputs: list[Any], compiler: InnerCompiler, mode: str | None, options: dict[str, Any] | None
) -> Callable[..., Any]:
    options = dict(options or {})
    shard_sequence = _flag(options, SHARD_SEQUENCE)
    requested = AttnResConfig.from_options(options) if options else None
    frame = capture.current_frame(gm)
    root = frame.root()
    for model in modules_that_run() if root is None else (root[1],):
        check_not_sharded_in_parts(model)
    if root is None and not frame.has_parameters and frame.is_partial:
        return compiler(gm, example_inputs, mode)  # plain tensor code around a model, between two graph breaks
    if root is None:
        raise NoResidualChainError("the compiled code uses no module's parameters: there is no model to rewrite.")
    if frame.cut:
        raise ChainCutError(f"{type(root[1]).__name__} was cut by {frame.cut}. A residual chain must lie in one graph.")
    host, path = _host(*root)
    existing = attached_to(host)
    _check_wrappers(root[1], host, existing)
    config = _config(requested, existing)
    graph_module = capture.copy_graph(gm)
    program = Program(graph_module, config, capture.parameter_placeholders(gm))
    program = run_passes(program, DETECTION)
    if not program.chains:
        raise _no_chain(root[1], report_of(program, planned=False))
    program = run_passes(program, PLANNING)
    report = relative_to(report_of(program), ".".join(filter(None, (clean_path(root[0]), path))))
    if existing is not None:
        existing.check(report)
    sharding = (ShardSequence(),) if shard_sequence else ()
    program = run_passes(program, REWRITING + sharding + PHASING + LOWERING)
    for note in program.notes:
        log.info("site %d is computed by itself: %s", note.site, note.reason)
    parameters = _new_parameters(host, report, program) if existing is None else existing
    tensors = parameters.tensors()
    _tie_to_dynamo(root[0], path, _path_of(parameters, host), program, parameters)
    compiled = compiler(graph_module, [*example_inputs, *tensors], mode)
    if parameters is not existing:  # only now: where compilation fails, the model stays what it was
        _attach_late(host, parameters)
    return RewrittenCall(compiled, weakref.ref(host), tuple(map(_kind, tensors)))


def _flag(options: dict[str, Any], name: str) -> bool:
    """Take an option out that is no field of AttnResConfig: it changes where values are, and not what is computed."""
    value = options.pop(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {value!r}.")
    return value


def _no_chain(root: nn.Module, report: Report) -> AttnResError:
    """No chain in the module that Dynamo compiles: the model has none, or a graph break left Dynamo with a part of it."""
    if is_rewritten(root):
        return ConfigError(f'{type(root).__name__} was rewritten before; compile it without backend="attnres".')
    caller = caller_of(root)
    if not caller:
        return NoResidualChainError(explain_no_chain(type(root).__name__, report))
    return ChainCutError(_explain_part(root, caller))


def _explain_part(root: nn.Module, caller: str) -> str:
    reason = capture.last_graph_break()
    return (
        f"{type(root).__name__} was compiled alone, called by {caller}. Either a graph break made Dynamo give up on the model "
        f"around it{f' (the last of all was: {reason})' if reason else ''}, which TORCH_LOGS=graph_breaks shows, or only this "
        "part was given to torch.compile. A residual chain must lie in one graph: remove the break, and compile the whole model."
        + (f" FSDP shards it, and gathers it outside of any graph. {SHARD_BLOCKS}" if root in fsdp_modules(root) else "")
    )


def _host(expression: str, root: nn.Module) -> tuple[nn.Module, str]:
    """The module that carries, or is to carry, the parameters, and its qualified name below ``root``."""
    hosts = hosts_in(root)
    if len(hosts) > 1:
        names = ", ".join(type(host).__name__ for host in hosts)
        raise ConfigError(f"{type(root).__name__} holds several converted models ({names}); compile each by itself.")
    if not hosts:
        for host in eager_hosts():
            if host is root:
                raise ParameterMismatchError(
                    f"{type(root).__name__}.attnres was removed after conversion; convert the model anew."
                )
            if any(module is root for module in host.modules()):
                raise ChainCutError(_explain_part(root, caller_of(root) or type(host).__name__))
        return root, ""
    return hosts[0], next(name for name, module in root.named_modules() if module is hosts[0])


def _check_wrappers(root: nn.Module, host: nn.Module, existing: AttnResParameters | None) -> None:
    """What wraps the model, DDP or peft, must have found the parameters in it."""
    ddp = capture.ddp_around(root, host)
    if existing is None:
        check_no_wrapper(host)
        if ddp is not None or fsdp_modules(host):
            raise unsynchronised(host)
        return
    if ddp is not None:
        check_synchronised(host, existing.tensors(), capture.parameters_of_ddp(ddp))
    warn_of_adapters(root, host, host._modules[ATTRIBUTE] is not existing, existing.tensors())


def _config(requested: AttnResConfig | None, existing: AttnResParameters | None) -> AttnResConfig:
    if existing is None:
        return requested or AttnResConfig()
    if requested is not None and requested != existing.config:
        raise ConfigError(
            f"the model was converted with {existing.config}, and torch.compile's options ask for {requested}; leave the options "
            "out."
        )
    return existing.config


def _new_parameters(host: nn.Module, report: Report, program: Program) -> AttnResParameters:
    """Those of a model that nobody converted, on its first compilation."""
    check_unconverted(host)
    return AttnResParameters(program.config, layout_of(report), *device_and_dtype(host, program))


def _attach_late(host: nn.Module, parameters: AttnResParameters) -> None:
    attach(host, parameters)
    log.warning(
        "%s was not converted yet: its %d sites got their parameters on this first call, as model.attnres. To have them before "
        "the optimizer is built, call attnres_compile.convert_(model, ...) first.",
        type(host).__name__,
        len(parameters.sites),
    )


def relative_to(report: Report, path: str) -> Report:
    """The report with reader names below the module at ``path`` instead of below the compiled root."""
    if not path:
        return report
    prefix = path + "."

    def site(entry: SiteReport) -> SiteReport:
        modules = tuple(module.removeprefix(prefix) for module in entry.modules)
        return dataclasses.replace(entry, module=modules[0], modules=modules)

    def chain(entry: ChainReport) -> ChainReport:
        return dataclasses.replace(entry, sites=tuple(map(site, entry.sites)))

    return dataclasses.replace(report, chains=tuple(map(chain, report.chains)))


def _path_of(parameters: AttnResParameters, host: nn.Module) -> str:
    """Their name below ``host``, which may not have them yet; peft keeps those of an adapter further below."""
    return next((name for name, module in host.named_modules() if module is parameters), ATTRIBUTE)


def _tie_to_dynamo(root: str, path: str, own_path: str, program: Program, parameters: AttnResParameters) -> None:
    sources = capture.parameter_sources(root, ".".join(filter(None, (path, own_path))), parameters.sites, parameters.names)
    nodes = [node for site in program.sites for node in site.parameters.values()]
    capture.prepare_for_compiler(program.graph_module, list(zip(nodes, sources, strict=True)))
    capture.guard_on(root, path)
    capture.guard_on_tensors(sources)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad


class RewrittenCall:
    """A compiled rewritten graph that takes the AttnRes parameters from the model anew at every call.

    Loading, casting and reassigning parameters therefore take effect without recompiling.
    """

    def __init__(self, compiled: Callable[..., Any], host: weakref.ref[nn.Module], kinds: Sequence[tuple[Any, ...]]) -> None:
        self.compiled, self.host, self.kinds = compiled, host, kinds
        self.synchronised_by: weakref.ref[nn.Module] | None = None

    def __call__(self, *args: Any) -> Any:
        host = self.host()
        if host is None:
            raise ParameterMismatchError("the model that this graph was compiled for is gone.")
        tensors = parameters_of(host).tensors()
        for i, (tensor, kind) in enumerate(zip(tensors, self.kinds, strict=True)):
            if _kind(tensor) != kind:
                raise ParameterMismatchError(
                    f"AttnRes parameter {i} of {type(host).__name__} was compiled as {kind} and is now {_kind(tensor)}; move or "
                    "cast the whole model, or call torch.compiler.reset() to compile it anew."
                )
        self._check_ddp(host, tensors)
        note_execution(host)
        return self.compiled(*args, *tensors)

    def _check_ddp(self, host: nn.Module, tensors: Sequence[Tensor]) -> None:
        """The graph may have been compiled outside of DDP, so that nobody has held DDP's parameters against these yet."""
        active = capture.active_ddp()
        if active is not None and (self.synchronised_by is None or self.synchronised_by() is not active):
            if (ddp := capture.ddp_around(host, host)) is not None:
                check_synchronised(host, tensors, capture.parameters_of_ddp(ddp))
            self.synchronised_by = weakref.ref(active)
