"""What the zoo measures of one model: the verdict, its exactness, its completeness, its time."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from census import census_of
from entry import Case, Entry
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves, tree_map

import attnres_compile as ac
from attnres_compile import convert
from attnres_compile.capture import capture
from attnres_compile.convert import report_of
from attnres_compile.errors import AttnResError, CaptureError, ChainCutError
from attnres_compile.passes.base import Program, run_passes
from attnres_compile.passes.pipeline import DETECTION, LOWERING, PHASING, REWRITING
from attnres_compile.report import Report

CONFIGS = {"full": ac.AttnResConfig(variant="full"), "block": ac.AttnResConfig(variant="block", num_blocks=2)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    ``problem`` says why there is no verdict: the model can't be built here, or not be captured in one graph.
    ``chains`` holds (kind, sublayers, sites) of each; ``refusal`` is the nearest miss of a model without chains.
    ``errors`` are the relative L2 errors of the outputs at zero queries in float64, by variant; ``idle`` counts queries
    that random queries leave without a gradient, and ``phased`` is how much two phases change the outputs with these.
    ``norms`` says where the norms as wide as a stream stand (see ``census``). ``seconds`` is the time of all passes, from
    captured graph to rewritten graph.
    """

    name: str
    group: str
    problem: str = ""
    chains: tuple[tuple[str, int, int], ...] = ()
    refusal: str = ""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    idle: int = 0
    phased: float = 0.0
    norms: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> tuple[Any, ...]:
        """What must not change unnoticed."""
        kind = self.problem.partition(":")[0]
        return kind, tuple(map(tuple, self.chains)), self.refusal, {where: sum(n.values()) for where, n in self.norms.items()}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Row":
        return cls(**{**fields, "chains": tuple((kind, sublayers, sites) for kind, sublayers, sites in fields["chains"])})


def measure(entry: Entry) -> Row:
    """The row of ``entry``; errors of the model's own, and only those, become its ``problem``."""
    torch.compiler.reset()
    row = Row(entry.name, entry.group)
    try:
        case = entry.build()
        with torch.no_grad():  # some classes log or fill caches at their first call, which breaks the graph
            case.model(*case.args, **case.kwargs)
    except Exception as error:  # whatever a library raises about a model that it can't build here
        return dataclasses.replace(row, problem=f"not built: {_one_line(error)}")
    try:
        report, norms = _detect(case)
    except (CaptureError, ChainCutError) as error:
        return dataclasses.replace(row, problem=f"not captured: {_one_line(error)}")
    row = dataclasses.replace(row, seconds=sum(step.seconds for step in report.passes))
    if not report.chains:
        return dataclasses.replace(row, refusal=refusal_of(report))
    row = dataclasses.replace(
        row, chains=tuple((chain.kind, chain.num_sublayers, chain.num_sites) for chain in report.chains), norms=norms
    )
    return dataclasses.replace(row, **_rewritten(case))


def refusal_of(report: Report) -> str:
    """The reason of the nearest miss, in few words."""
    misses = report.near_misses(1) or report.refusals[:1]
    return _shortened(misses[0].reason) if misses else "no residual add"


def _detect(case: Case) -> tuple[Report, dict[str, dict[str, int]]]:
    captured = capture(case.model, case.args, case.kwargs)
    program = run_passes(Program(captured.graph_module, ac.AttnResConfig(), captured.parameters), DETECTION)
    return report_of(program, planned=False), census_of(program)


def _rewritten(case: Case) -> dict[str, Any]:
    """Exactness at zero queries and reach of the gradients, Full and Block, all computed in float64."""
    errors, idle, phased, seconds = {}, 0, 0.0, 0.0
    with default_float64():
        model = case.model.double()
        args, kwargs = tree_map(_double, (case.args, case.kwargs))
        torch.manual_seed(0)  # masked autoencoders draw their masks
        standard = promoted(model)(*args, **kwargs)
        for name, config in CONFIGS.items():
            try:
                rewritten = ac.rewrite(model, config, args, kwargs)
            except AttnResError as error:
                raise AssertionError(f"{name}: rewriting failed after detection: {error}") from error
            seconds = max(seconds, sum(step.seconds for step in rewritten.report.passes))
            promote_casts(rewritten)
            torch.manual_seed(0)
            with torch.no_grad():
                errors[name] = relative_error(rewritten(*args, **kwargs), standard)
            idle += idle_queries(rewritten, args, kwargs)
            phased = max(phased, _error_of_phases(rewritten, model, config, args, kwargs))
    return {"errors": errors, "idle": idle, "phased": phased, "seconds": seconds}


def _error_of_phases(rewritten: Any, model: nn.Module, config: ac.AttnResConfig, args: Any, kwargs: Any) -> float:
    """Relative L2 error of the graph that a compiler gets, sites in two phases, against ``rewritten`` with its queries."""
    with mock.patch.object(convert, "REWRITING", REWRITING + PHASING + LOWERING):
        in_phases = ac.rewrite(model, config, args, kwargs)
    in_phases.attnres.load_state_dict(rewritten.attnres.state_dict())
    promote_casts(in_phases)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = rewritten(*args, **kwargs)
        torch.manual_seed(0)
        return relative_error(in_phases(*args, **kwargs), expected)


def idle_queries(rewritten: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many queries of ``rewritten`` get no gradient from a random projection of all outputs, once all are random."""
    generator = torch.Generator().manual_seed(0)
    queries = [site.query for site in rewritten.attnres.sites]
    with torch.no_grad():
        for query in queries:
            query.copy_(torch.randn(query.shape, generator=generator, dtype=query.dtype))
    outputs = [leaf for leaf in tree_leaves(rewritten(*args, **kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    loss = sum((leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).sum() for leaf in outputs)
    assert isinstance(loss, Tensor), "no output carries a gradient"
    loss.backward()
    idle = [i for i, query in enumerate(queries) if query.grad is None or not bool(query.grad.abs().max() > 0)]
    sites = [site for chain in rewritten.report.chains for site in chain.sites]
    return sum(not _is_cut_off(rewritten, sites[i].modules) for i in idle)


def _is_cut_off(rewritten: Any, modules: tuple[str, ...]) -> bool:
    """Whether the readers' own parameters get no gradient either: the model itself uses the result for decisions alone."""
    parameters = [parameter for name in modules for parameter in rewritten.get_submodule(name).parameters()]
    return bool(parameters) and all(parameter.grad is None for parameter in parameters)


def relative_error(found: Any, expected: Any) -> float:
    """The largest relative L2 error among the floating-point leaves of two equal structures."""
    left, right = tree_leaves(found), tree_leaves(expected)
    assert len(left) == len(right), "the results have different structures"
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and b.numel():
            finite = torch.isfinite(b)
            assert bool((torch.isfinite(a) == finite).all()), "finite in one result, not in the other"
            a, b = a[finite].double(), b[finite].double()
            worst = max(worst, float((a - b).norm() / b.norm().clamp_min(1e-300)))
    return worst


# ------------------------------------------------------------------------------------------------------ true float64


@contextmanager
def default_float64() -> Iterator[None]:
    """Tensors that a model makes without naming a dtype are float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def promote_casts(graph_module: GraphModule) -> None:
    """Make float64 of every float32 that ``graph_module`` names: casts inside norms, softmaxes, rotary embeddings."""
    for node in graph_module.graph.nodes:
        node.args = map_aggregate(node.args, _float64_for_float32)
        node.kwargs = map_aggregate(node.kwargs, _float64_for_float32)
        if node.op == "call_method" and node.target == "float":
            node.target = "double"
    graph_module.recompile()


def _float64_for_float32(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def promoted(model: nn.Module) -> Callable[..., Any]:
    """``model`` as Dynamo captures it, with all float32 casts promoted, run eagerly."""

    def backend(graph_module: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        promote_casts(graph_module)
        return graph_module.forward

    compiled = torch.compile(_call_of(model), backend=backend, fullgraph=True, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return compiled(*args, **kwargs)

    return call


def _call_of(model: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: model(*args, **kwargs)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _one_line(error: BaseException) -> str:
    return _shortened(f"{type(error).__name__}: {error}" if not isinstance(error, AttnResError) else str(error))


def _shortened(text: str) -> str:
    """The first sentence or so, without places: they name files of this machine."""
    text = re.sub(r"\[[^\]]*(?:/|module )[^\]]*\]", "", " ".join(text.split()))
    text = re.sub(r"/\S*/", "", text)
    return text if len(text) <= 160 else text[:157] + "..."
