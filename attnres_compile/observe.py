"""Run a model's captured graph, rewritten or not, and hand over what stands on its residual streams."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import attnres_compile.kernels.ops  # noqa: F401  (registers the attnres:: operators)
from attnres_compile.capture import capture
from attnres_compile.chain import ResidualChain
from attnres_compile.config import AttnResConfig
from attnres_compile.convert import checked_call, plan, report_of
from attnres_compile.errors import ConfigError
from attnres_compile.kernels import naive, naive_variants
from attnres_compile.parameters import attached_to, hosts_in
from attnres_compile.passes.base import Program, is_site, run_passes
from attnres_compile.passes.pipeline import REWRITING
from attnres_compile.patterns.operations import module_of, value_of
from attnres_compile.report import Report
from attnres_compile.rewritten import RewrittenModule


class Observer:
    """What :func:`observe` calls while the graph runs, in the order of execution. Override what is wanted.

    Tensors are the graph's own: copy what is kept. Chains and sites are numbered as in the report.
    """

    def source(self, chain: int, index: int, value: Tensor) -> None:
        """``value``, ``[..., D]``: the root of the stream for index 0, what sublayer ``index`` adds to it from 1 on."""

    def read(self, chain: int, site: int, value: Tensor) -> None:
        """``value``, ``[..., D]``: what the readers of a site read, the stream itself or the mixture instead of it."""

    def weights(self, chain: int, site: int, value: Tensor) -> None:
        """``value``, ``[n, ..., H]``: what every token and head gives to the site's n sources, by softmax adding up to one; times
        the site's scale it is a row of the depth mixing matrix. Rewritten graphs alone.
        """


@dataclasses.dataclass(frozen=True)
class Modules:
    """Qualified names along one chain.

    ``first_reader`` is the norm that reads the root, "" where none does. ``sublayers[i]`` are the modules whose weights made
    what sublayer ``i + 1`` adds, the last ones on the way to the residual add.
    """

    first_reader: str
    sublayers: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Observed:
    """What ran: the planned ``report``, the ``graph_module`` as it ran, and the flat ``outputs`` of the graph.

    ``reads`` names, for every site, the node whose value its readers read. ``rewritten`` says whether the graph was.
    ``modules`` says for every chain who reads its root and who adds to it.
    """

    report: Report
    graph_module: GraphModule
    outputs: tuple[Any, ...]
    reads: tuple[str, ...]
    rewritten: bool
    modules: tuple[Modules, ...]


def observe(
    model: nn.Module, observer: Observer, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None,
    config: AttnResConfig | None = None,
) -> Observed:  # fmt: skip
    """Capture ``model``, run its graph without gradients, and show ``observer`` its residual streams.

    A converted model's graph is rewritten, with one ``attnres::site`` per site; any other model's runs as it is. ``config``
    then serves to plan the report alone.

    Raises:
        ConfigError: if a part of the model was converted, or if the model was rewritten ahead of time.
        NoResidualChainError: if the model has no chain that can be rewritten.
        CaptureError, ChainCutError: if the model can't be captured.
        ParameterMismatchError: if a converted model's sites are not those of its graph.
    """
    model, args, kwargs = checked_call(model, args, kwargs)
    parameters = attached_to(model)
    if any(isinstance(module, RewrittenModule) for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} was rewritten ahead of time; observe the model that it was made from.")
    if parameters is None and (hosts := hosts_in(model)):
        raise ConfigError(f"a part of the model, {type(hosts[0]).__name__}, was converted before; observe that part.")
    captured = capture(model, args, kwargs, run=True)
    inputs = list(captured.inputs)
    program = plan(captured, parameters.config if parameters is not None else config or AttnResConfig(), type(model).__name__)
    modules = tuple(_modules_of(chain, program.parameters) for chain in program.chains)  # of the graph as the model wrote it
    if parameters is not None:
        parameters.check(report_of(program))
        program = run_passes(program, REWRITING)
        inputs += parameters.tensors()
        reads = [site.call for site in program.sites]
    else:
        reads = [read.stream for chain in program.chains for read, _ in chain.sites]
    outputs = _Runner(program, reads, observer).run(*inputs)
    names = tuple(node.name for node in reads)
    return Observed(report_of(program), program.graph_module, tuple(outputs), names, bool(program.sites), modules)


def _modules_of(chain: ResidualChain, parameters: frozenset[str]) -> Modules:
    first = [read.modules[0] for read, before in chain.reads if before == 0]
    stream = {chain.root, *(add.node for add in chain.adds), *(read.stream for read, _ in chain.reads)}
    sublayers = (_makers([add.branch for add in sublayer], stream, parameters) for sublayer in chain.sublayers)
    return Modules(first[0] if first else "", tuple(sublayers))


def _makers(branches: list[Node], stream: set[Node], parameters: frozenset[str]) -> tuple[str, ...]:
    """Modules of the first nodes with weight matrices on every way back from ``branches``, which ends at the stream.

    Vectors (scales, biases, norms) count only where there is no matrix: they say little about what kind of module it is.
    """
    waiting, seen = deque(branches), set(stream)
    matrices, vectors = dict[str, None](), dict[str, None]()
    while waiting:
        node = waiting.popleft()
        if node in seen:
            continue
        seen.add(node)
        weights = [source for source in node.all_input_nodes if source.name in parameters]
        if any(value_of(weight).dim() > 1 for weight in weights):
            matrices[module_of(node)] = None
            continue
        if weights:
            vectors[module_of(node)] = None
        waiting.extend(node.all_input_nodes)
    return tuple(matrices or vectors)


class _Runner(Interpreter):
    """Runs a graph and tells an observer."""

    def __init__(self, program: Program, reads: list[Node], observer: Observer) -> None:
        super().__init__(program.graph_module)
        self.observer = observer
        self.width = [chain.hidden_size for chain in program.chains]
        self.roots: dict[Node, list[int]] = {}
        self.terms: dict[Node, list[tuple[int, int, float]]] = {}  # branch -> (chain, sublayer, scale), once for every add
        self.left: dict[tuple[int, int], int] = {}
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.reads: dict[Node, list[tuple[int, int]]] = {}
        chain_of_site = [i for i, chain in enumerate(program.chains) for _ in chain.sites]
        for i, chain in enumerate(program.chains):
            self.roots.setdefault(chain.root, []).append(i)
            for j, sublayer in enumerate(chain.sublayers, start=1):
                self.left[i, j] = len(sublayer)
                for add in sublayer:
                    self.terms.setdefault(add.branch, []).append((i, j, add.scale))
        for site, node in enumerate(reads):
            self.reads.setdefault(node, []).append((chain_of_site[site], site))

    @torch.no_grad()  # around every node by itself: a graph may hold calls that switch gradients on
    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        for chain in self.roots.get(node, ()):
            self.observer.source(chain, 0, _features_last(value, self.width[chain]))
        for chain, sublayer, scale in self.terms.get(node, ()):
            self._add(chain, sublayer, value if scale == 1.0 else scale * value)
        for chain, site in self.reads.get(node, ()):
            if is_site(node):
                self.observer.weights(chain, site, _depth_weights(*self.fetch_args_kwargs_from_env(node)[0]))
            self.observer.read(chain, site, value)
        return value

    def _add(self, chain: int, sublayer: int, term: Tensor) -> None:
        key = (chain, sublayer)
        self.sums[key] = self.sums[key] + term if key in self.sums else term
        self.left[key] -= 1
        if not self.left[key]:
            self.observer.source(chain, sublayer, _features_last(self.sums.pop(key), self.width[chain]))


def _depth_weights(
    sources: Sequence[Tensor], query: Tensor | None, key_norm: Tensor | None, eps: float, _: float,
    projection: Tensor | None = None, offset: Tensor | None = None, weights: str = "softmax", heads: int = 1,
    normalize_keys: bool = True,
) -> Tensor:  # fmt: skip
    """The weights, ``[n, ..., H]``, of a site with these arguments."""
    values = torch.stack([source.to(naive.compute_dtype(naive.storage_dtype(sources))) for source in sources])
    found = naive_variants.depth_weights(values, query, key_norm, eps, projection, offset, weights, heads, normalize_keys)
    return found.expand(*values.shape[:-1], heads)


def _features_last(value: Tensor, width: int) -> Tensor:
    """A stream of images may hold its features in another dimension, the first that has their number."""
    return value if value.shape[-1] == width or width not in value.shape else value.movedim(value.shape.index(width), -1)
