"""Every use of torch's private API, behind our own names. tests/test_capture.py says which assumption broke when torch moves.

The module captures a model's graph ahead of time, tells a backend what Dynamo is compiling for it, ties extra parameters
to Dynamo's guards, and hands graphs to Inductor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, cast

import torch
import torch.utils._pytree
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, DictGetItemSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Source
from torch.fx import Graph, GraphModule, Node

from attnres_compile.errors import AttnResError, CaptureError, ChainCutError, ConfigError
from attnres_compile.passes.normalize import remove_markers
from attnres_compile.places import caller_of_kind, first_line, forward_ranges, is_inside, user_place

_DYNAMIC_MARKS = ("_dynamo_propagated_dynamic_indices", "_dynamo_weak_dynamic_indices")  # the second up to torch 2.12
# What Dynamo raises, where it must not break the graph, about Python code that branches on a number out of a tensor.
_BRANCHES_ON_DATA = (torch._dynamo.exc.UserErrorType.ANTI_PATTERN, torch._dynamo.exc.UserErrorType.DYNAMIC_CONTROL_FLOW)
# The second spelling is that of modules that were written to in the code being compiled.
_ROOT = re.compile(
    r"^(?P<root>[LG]\[(?:'[^']*'|\"[^\"]*\")\].*?)"
    r"(?:\._(?:modules|parameters|buffers)\[|\.__dict__\['_(?:modules|parameters|buffers)'\]\[)"
)


# ---------------------------------------------------------------------------------------------------------- graphs


def copy_graph(graph_module: GraphModule) -> GraphModule:
    """A copy that shares parameters and submodules. Dynamo asserts on the graph that it handed over, so that stays as it was."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in graph_module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source
    copied = GraphModule(graph_module, graph)
    copied.meta = dict(graph_module.meta)
    return copied


def source_name(placeholder: Node) -> str:
    """Where Dynamo fetches a graph input from, such as ``L['self']._modules['norm']._parameters['weight']``; else ""."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        argument = placeholder.meta.get("grapharg")
        source = getattr(argument, "source", None)
    if source is None:
        return ""
    return str(source.name() if callable(source.name) else source.name)  # a method up to torch 2.11


def parameter_placeholders(graph_module: GraphModule) -> frozenset[str]:
    """Names of the placeholders that hold parameters and buffers of modules."""
    found = set()
    for node in graph_module.graph.find_nodes(op="placeholder"):
        name = source_name(node)
        if "._parameters[" in name or "._buffers[" in name or isinstance(node.meta.get("example_value"), nn.Parameter):
            found.add(node.name)
    return frozenset(found)


def lies_inside_an_argument(placeholder: Node) -> bool:
    """Whether a tensor of a captured graph was reached through an argument of the model, not through the model."""
    return source_name(placeholder).startswith(("L['args']", "L['kwargs']"))


def prepare_for_compiler(graph_module: GraphModule, extra: Sequence[tuple[Node, Source]]) -> None:
    """Give the placeholders that we added what AOTAutograd expects of a Dynamo graph: a source for each."""
    for node, source in extra:
        node._dynamo_source = source


# For CPUs: Inductor puts at most 16 reductions into one loop. The backward pass of phase 1 has n x S of them over the same few
# rows, and each further loop reads these rows from memory again.
INDUCTOR_OPTIONS: dict[str, Any] = {"cpp.max_horizontal_fusion_size": 64}


def compile_with_inductor(graph_module: GraphModule, inputs: list[Any], mode: str | None) -> Callable[..., Any]:
    """Inductor, with the options of a ``torch.compile`` mode such as "reduce-overhead".

    Raises:
        ConfigError: for a mode that Inductor does not know.
    """
    from torch._inductor import list_mode_options  # here, since importing Inductor takes more than a second
    from torch._inductor.compile_fx import compile_fx

    patches = dict(INDUCTOR_OPTIONS)
    if mode is not None and mode != "default":
        known = list_mode_options()
        if mode not in known:
            raise ConfigError(f"unknown mode {mode!r}; the modes are: default, {', '.join(known)}.")
        patches |= known[mode]
    compiled: Any = compile_fx(graph_module, inputs, config_patches=patches)
    return cast(Callable[..., Any], compiled)


# ---------------------------------------------------------------------------------------------- what Dynamo compiles


@dataclasses.dataclass(frozen=True)
class Frame:
    """What Dynamo is compiling while it calls a backend.

    ``roots`` maps expressions such as ``L['self']`` to the modules from which the graph takes parameters. ``cut`` says
    how a model was cut, with the place; it is "" where models are whole. ``is_partial`` says that a graph break, inside or
    outside a model, ended or began the graph.
    """

    roots: dict[str, nn.Module]
    cut: str
    has_parameters: bool
    is_partial: bool

    def root(self) -> tuple[str, nn.Module] | None:
        """The one root module, or None where the graph has no module's parameters."""
        if len(self.roots) > 1:
            names = ", ".join(f"{type(module).__name__} at {name}" for name, module in self.roots.items())
            raise ConfigError(
                f"one compiled graph takes parameters from several models ({names}); compile each model by itself with "
                'backend="attnres".'
            )
        return next(iter(self.roots.items()), None)


def current_frame(graph_module: GraphModule) -> Frame:
    """The frame that Dynamo is compiling right now. Call it inside a backend."""
    translator = InstructionTranslator.current_tx()
    output = translator.output
    scope = {"L": output.local_scope, "G": output.global_scope}
    roots: dict[str, nn.Module] = {}
    has_parameters = False
    for node in graph_module.graph.find_nodes(op="placeholder"):
        match = _ROOT.match(source_name(node))
        if match is None:
            continue
        has_parameters = True
        expression = match["root"]
        if expression not in roots:
            module = eval(expression, {}, scope)
            if isinstance(module, nn.Module):
                roots[expression] = module
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    is_partial = translator.f_code.co_name.startswith("torch_dynamo_resume_in_") or (reason is not None and reason.graph_break)
    return Frame(roots, _describe_cut(translator, reason, graph_module, roots.values()), has_parameters, is_partial)


def dynamo_is_active() -> bool:
    """Whether the code that runs right now was called from compiled code, so that Dynamo looks at every frame.

    Under the stance "eager_on_recompile" it looks for what it compiled before, and compiles nothing: the callback is False.
    """
    return get_eval_frame_callback() is not None


def never_compile_alone(function: Any) -> None:
    """Let Dynamo trace ``function`` where other code calls it, but not compile it as a frame of its own."""
    skip_code(function.__code__)


skip_code(dynamo_is_active.__code__)


def _describe_cut(translator: Any, reason: Any, graph_module: GraphModule, roots: Iterable[nn.Module]) -> str:
    """How a break inside a module's forward cut the graph. Breaks in code around the models leave their chains whole."""
    ranges = [found for root in roots for found in forward_ranges(root)]
    if reason is not None and reason.graph_break:
        for frame in reversed(reason.user_stack or ()):
            if is_inside(frame.filename, frame.lineno, ranges):
                return f"a graph break at {frame.filename}:{frame.lineno}: {frame.line} ({first_line(reason.reason)})"
    resumed = re.fullmatch(r"torch_dynamo_resume_in_(.*)_at_(\d+)", translator.f_code.co_name)
    if resumed and is_inside(translator.f_code.co_filename, int(resumed[2]), ranges):
        return f"a graph break in {resumed[1]!r} at {translator.f_code.co_filename}:{resumed[2]}"
    whole = {node.name for node in translator.output.placeholders}
    if active_ddp() is not None and {node.name for node in graph_module.graph.find_nodes(op="placeholder")} != whole:
        return (
            "DDP's graph splitting, which hands the model over in buckets: set torch._dynamo.config.optimize_ddp = False before "
            "compiling, or wrap attnres_compile.rewrite(model, ...), whose graph may be split"
        )
    return ""


def last_graph_break() -> str:
    """The first line of the last graph break's reason that Dynamo counted in this process, or ""."""
    reasons = list(torch._dynamo.utils.counters["graph_break"])
    return first_line(reasons[-1]) if reasons else ""


def active_ddp() -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel that is running its model right now, if any."""
    active: nn.parallel.DistributedDataParallel | None = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return active


def ddp_around(root: nn.Module, host: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel around ``host`` in whose forward call ``root``, which may be it, is being compiled.

    With Python's reducer it does not say that it is active, but it still stands on the stack.
    """
    kind = nn.parallel.DistributedDataParallel
    found = (root if isinstance(root, kind) else None) or active_ddp() or caller_of_kind(kind)
    return found if found is not None and any(module is host for module in found.modules()) else None


def parameters_of_ddp(ddp: nn.parallel.DistributedDataParallel) -> list[nn.Parameter]:
    """The parameters that ``ddp`` found in its model when it was made: those that it synchronises."""
    return list(ddp._module_parameters)


def parameter_sources(root: str, path: str, sites: Iterable[nn.Module], names: Sequence[str]) -> list[Source]:
    """Sources of ``sites[i].<name>``, site after site, of the parameters at ``path`` below the expression ``root``.

    Where something computes a weight from others (a parametrisation, a functional call), it is an attribute of the site.
    """
    output = InstructionTranslator.current_tx().output
    parameters = _submodule_source(_source_of_root(output, root), path)
    found: list[Source] = []
    for i, module in enumerate(sites):
        site = _submodule_source(parameters, f"sites.{i}")
        for name in names:
            found.append(
                DictGetItemSource(AttrSource(site, "_parameters"), name)
                if name in module._parameters
                else AttrSource(site, name)
            )
    return found


def _source_of_root(output: Any, root: str) -> Source:
    """The Source object whose expression is ``root``, found at the bottom of some graph input's source."""
    for argument in output.graphargs:
        source: Source | None = argument.source
        while source is not None:
            name = source.name() if callable(source.name) else source.name
            if name == root:
                return source
            source = getattr(source, "base", None)
    raise CaptureError(f"Dynamo has no source named {root}; this torch version is not supported.")


def _submodule_source(source: Source, path: str) -> Source:
    """The source of the submodule at the qualified name ``path``, which is "" for the module itself."""
    for part in filter(None, path.split(".")):
        source = DictGetItemSource(AttrSource(source, "_modules"), part)
    return source


def guard_on(root: str, host_path: str) -> None:
    """Tie the graph being compiled to this very host module: another instance of its class gets a graph of its own."""
    output = InstructionTranslator.current_tx().output
    host = _submodule_source(_source_of_root(output, root), host_path)
    install_guard(host.make_guard(GuardBuilder.ID_MATCH))


def guard_on_tensors(sources: Sequence[Source]) -> None:
    """Recompile when one of our parameters is frozen or thawed."""
    for source in sources:
        install_guard(AttrSource(source, "requires_grad").make_guard(GuardBuilder.CONSTANT_MATCH))


def raise_through_dynamo(error: AttnResError) -> NoReturn:
    """Raise ``error`` inside a backend so that the caller of the compiled model sees it, and not a wrapper around it."""
    kind = type(error)
    through = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__, "__init__": _init_through})
    raise through(str(error)) from error.__cause__


def _init_through(self: Any, message: str) -> None:
    Exception.__init__(self, message)
    self.first_useful_frame = None


# ------------------------------------------------------------------------------------------------ ahead-of-time capture


@dataclasses.dataclass(frozen=True)
class Captured:
    """A model's graph, captured on example arguments.

    ``inputs`` and ``outputs`` are the values with which the graph ran, where it ran; ``result`` is what the model returned.
    """

    graph_module: GraphModule
    parameters: frozenset[str]
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    result: Any = None


class _Captured(ShortenTraceback):
    """Ends a capture before anything runs."""

    def __init__(self) -> None:
        super().__init__(first_useful_frame=None)


class _CapturingBackend:
    def __init__(self, run: bool) -> None:
        self.run = run
        self.graph_module: GraphModule | None = None
        self.inputs: tuple[Any, ...] = ()
        self.outputs: tuple[Any, ...] = ()

    def __call__(self, graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graph_module = copy_graph(graph_module)
        if not self.run:
            raise _Captured
        return self._execute

    def _execute(self, *inputs: Any) -> tuple[Any, ...]:
        assert self.graph_module is not None
        plain = copy_graph(self.graph_module)
        remove_markers(plain.graph)
        for switch in plain.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
            plain.graph.erase_node(switch)  # models turn gradients on again behind code that they turn them off for
        plain.recompile()
        self.inputs = inputs
        with torch.no_grad():
            self.outputs = tuple(plain(*inputs))
        return self.outputs


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: bool = False) -> Captured:
    """Capture ``model(*args, **kwargs)`` in one graph. With ``run`` the graph runs once, without gradients.

    Raises:
        ChainCutError: if the model can't be captured in one graph; the message names the break.
        CaptureError: if the model fails on the example arguments, or computes nothing.
    """
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__} can't be called with the example arguments: {error}.") from None
    backend = _CapturingBackend(run)
    compiled = torch.compile(_fresh_function(model), backend=backend, fullgraph=True, dynamic=False)
    result = None
    try:
        with _capturing(tree_flatten((args, kwargs))[0]), _uncompiled(model):
            result = compiled(*args, **kwargs)
    except torch._dynamo.exc.Unsupported as error:
        raise ChainCutError(_explain_break(type(model).__name__, error)) from None
    except _Captured:
        pass
    except AttnResError:
        raise
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            raise cause from None
        if getattr(error, "error_type", None) in _BRANCHES_ON_DATA:
            raise ChainCutError(_explain_break(type(model).__name__, error)) from None
        raise CaptureError(
            f"{type(model).__name__} failed on the example arguments: {_innermost(cause)}. Give args and kwargs with which the "
            "model can be called."
        ) from error
    if backend.graph_module is None:
        raise CaptureError(f"{type(model).__name__} computes nothing on tensors: there is no graph to capture.")
    graph_module = backend.graph_module
    captured = Captured(graph_module, parameter_placeholders(graph_module), backend.inputs, backend.outputs, result)
    backend.graph_module, backend.inputs, backend.outputs = None, (), ()  # Dynamo keeps backends, and with them all weights
    return captured


def _fresh_function(model: nn.Module) -> Callable[..., Any]:
    """A function with a code object of its own: Dynamo's cache is kept per code object, so a capture leaves nothing behind."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = call.__code__.replace(co_name="attnres_capture")
    return types.FunctionType(code, call.__globals__, "attnres_capture", call.__defaults__, call.__closure__)


@contextlib.contextmanager
def _capturing(leaves: Iterable[Any]) -> Iterator[None]:
    """Captures are no compilations of the user's: no falling back to eager execution, no shapes made dynamic by earlier ones,
    no stance.

    Compiled code leaves marks on tensors that it ran with dynamic shapes; they are set aside meanwhile.
    """
    found = [(leaf, mark) for leaf in leaves for mark in _DYNAMIC_MARKS if mark in getattr(leaf, "__dict__", ())]
    marks = [(leaf, mark, leaf.__dict__.pop(mark)) for leaf, mark in found]
    try:
        with (
            torch._dynamo.config.patch(suppress_errors=False, automatic_dynamic_shapes=False, assume_static_by_default=True),
            _default_stance(),
        ):
            yield
    finally:
        for leaf, mark, value in marks:
            setattr(leaf, mark, value)


def _default_stance() -> contextlib.AbstractContextManager[Any]:
    stance = torch._dynamo.eval_frame._stance
    if stance.stance == "default" and stance.backend is None and not stance.skip_guard_eval_unsafe:
        return contextlib.nullcontext()  # a stance is one for all threads, so it is not even set anew
    default: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("default")
    return default


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Set aside what ``module.compile()`` left on the model: Dynamo would name modules after the detour through it."""
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _innermost(error: Exception) -> str:
    """What went wrong in the model's own code, out of Dynamo's explanation around it."""
    text = str(error)
    quoted = re.search(r"got (\w+)\((['\"])(.*?)\2\)", text)
    what = f"{quoted[1]}: {quoted[3]}" if quoted else f"{type(error).__name__}: {first_line(text)}"
    return what.rstrip(".") + user_place(text)


def _explain_break(name: str, error: Exception) -> str:
    text = str(error)
    return (
        f"{name} can't be captured in one graph: a graph break{user_place(text)} ({first_line(text)}). A residual chain "
        "must lie in one graph; remove the break, or convert the submodule that holds the chain."
    )


# ------------------------------------------------------------------------------------------ calling a graph like a model


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    return torch.utils._pytree.tree_flatten(tree)


def tree_unflatten(leaves: list[Any], structure: Any) -> Any:
    return torch.utils._pytree.tree_unflatten(leaves, structure)
