"""What the zoo measures of one model: the verdict, its exactness, its completeness, its time."""

import dataclasses
import json
import re
from typing import Any

import torch
from census import census_of
from differential import error_of_compiled, error_of_kernels, error_of_phases
from entry import Case, Entry
from promotion import as_double, default_float64, promote_casts, promoted, relative_error
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import attnres_compile as ac
from attnres_compile.capture import capture
from attnres_compile.convert import report_of
from attnres_compile.errors import AttnResError, CaptureError, ChainCutError
from attnres_compile.passes.base import Program, run_passes
from attnres_compile.passes.pipeline import DETECTION
from attnres_compile.report import Report

CONFIGS = {"full": ac.AttnResConfig(variant="full"), "block": ac.AttnResConfig(variant="block", num_blocks=2)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    ``problem`` says why there is no verdict: the model can't be built here, or not be captured in one graph.
    ``chains`` holds (kind, sublayers, sites) of each; ``refusal`` is the nearest miss of a model without chains.
    ``errors`` are the relative L2 errors of the outputs at zero queries in float64, by variant; ``idle`` counts queries
    that random queries leave without a gradient. ``phased`` is how much two phases change the outputs with these, ``compiled``
    what torch.compile does, and ``fused`` what the kernels do in float32 (see ``differential``).
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
    compiled: float = 0.0
    fused: float = 0.0
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


def measure(entry: Entry, kernels: bool = True) -> Row:
    """The row of ``entry``; errors of the model's own, and only those, become its ``problem``. ``kernels`` adds ``fused``."""
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
    return dataclasses.replace(row, **_rewritten(case, kernels))


def refusal_of(report: Report) -> str:
    """The reason of the nearest miss, in few words."""
    misses = report.near_misses(1) or report.refusals[:1]
    return _shortened(misses[0].reason) if misses else "no residual add"


def _detect(case: Case) -> tuple[Report, dict[str, dict[str, int]]]:
    captured = capture(case.model, case.args, case.kwargs)
    program = run_passes(Program(captured.graph_module, ac.AttnResConfig(), captured.parameters), DETECTION)
    return report_of(program, planned=False), census_of(program)


def _rewritten(case: Case, kernels: bool) -> dict[str, Any]:
    """Exactness at zero queries and reach of the gradients, Full and Block, all computed in float64."""
    errors, idle, phased, seconds = {}, 0, 0.0, 0.0
    rewritten: Any = None
    with default_float64():
        model = case.model.double()
        args, kwargs = tree_map(as_double, (case.args, case.kwargs))
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
            phased = max(phased, error_of_phases(rewritten, model, config, args, kwargs))
    fused = 0.0
    if kernels:
        fused = error_of_kernels(rewritten, case.model.float(), CONFIGS["block"], case.args, case.kwargs)
    with default_float64():
        compiled = error_of_compiled(rewritten, case.model.double(), CONFIGS["block"], args, kwargs)
    return {"errors": errors, "idle": idle, "phased": phased, "compiled": compiled, "fused": fused, "seconds": seconds}


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


def _one_line(error: BaseException) -> str:
    return _shortened(f"{type(error).__name__}: {error}" if not isinstance(error, AttnResError) else str(error))


def _shortened(text: str) -> str:
    """The first sentence or so, without places: they name files of this machine."""
    text = re.sub(r"\[[^\]]*(?:/|module )[^\]]*\]", "", " ".join(text.split()))
    text = re.sub(r"/\S*/", "", text)
    return text if len(text) <= 160 else text[:157] + "..."
