"""One of the checkpoints that are compared: what its model is made of, and what it computes on given inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

from attnres_compile.capture import Captured, capture, tree_flatten
from attnres_compile.comparison.graphs import Operation, ReplacedRead, operations_of, stream_nodes
from attnres_compile.comparison.report import Checkpoint
from attnres_compile.comparison.streams import Stream, sources_in_words, streams_of
from attnres_compile.config import AttnResConfig
from attnres_compile.convert import plan, report_of
from attnres_compile.errors import CheckpointError
from attnres_compile.layout import SiteLayout, layout_of
from attnres_compile.observe import Observer, observe
from attnres_compile.parameters import attached_to, hosts_in
from attnres_compile.passes.base import Program


@dataclasses.dataclass(frozen=True)
class ComparedModel:
    """A model without its tensors. ``operations`` are those of its graph before rewriting.

    ``replaced`` are the reads that rewriting it replaces. ``output_index`` counts the outputs of its graph.
    """

    checkpoint: Checkpoint
    streams: tuple[Stream, ...]
    layout: tuple[SiteLayout, ...]
    operations: tuple[Operation, ...]
    stream_nodes: frozenset[str]
    replaced: tuple[ReplacedRead, ...]
    output_name: str
    output_index: int
    is_distribution: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """What a model computed: its ``output``, the ``graph`` that ran, the mean depth weights of its sites, if it has any.

    ``dtypes`` are those of what the sites' readers read.
    """

    output: Tensor
    graph: Graph
    weights: dict[int, tuple[float, ...]]
    dtypes: frozenset[torch.dtype]


def describe(folder: Path, model: nn.Module, inputs: dict[str, Any]) -> ComparedModel:
    """Capture the model that was loaded from ``folder``, as it is without AttnRes, and find its residual streams.

    Raises:
        CheckpointError: if only a part of it is converted, or if it gives nothing that can be compared.
        NoResidualChainError, CaptureError, ChainCutError: if it has no residual stream, or can't be captured.
    """
    parameters = attached_to(model)
    config = None if parameters is None else parameters.config
    if config is None and (hosts := hosts_in(model)):
        raise CheckpointError(
            f"{folder}: a part of {type(model).__name__} alone, {type(hosts[0]).__name__}, is converted; only models that are "
            "converted as a whole can be compared"
        )
    captured = capture(model, (), inputs, run=True)
    name, index = _output_of(captured, folder)
    operations = operations_of(captured.graph_module.graph)  # the passes below change the graph
    program = plan(captured, config or AttnResConfig(), type(model).__name__)
    report = report_of(program)
    dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point())
    return ComparedModel(
        checkpoint=Checkpoint(
            path=str(folder),
            model=type(model).__name__,
            dtype=", ".join(dtypes),
            config=config,
            block_sizes=tuple(chain.block_sizes or () for chain in report.chains) if config else None,
        ),
        streams=streams_of(program),
        layout=layout_of(report),
        operations=operations,
        stream_nodes=stream_nodes(program.chains),
        replaced=_replaced(program),
        output_name=name,
        output_index=index,
        is_distribution=name == "logits" and captured.outputs[index].shape[-1] in _class_counts(model),
    )


def run(described: ComparedModel, model: nn.Module, inputs: dict[str, Any], receive: Callable[[int, Tensor], None]) -> Run:
    """Run the model; ``receive`` gets the number of a site and what its readers read, which it copies if it keeps it."""
    config = described.checkpoint.config
    is_mean = config is not None and config.scale == "paper"
    observer = _Reads([site.num_sources if is_mean else 1 for site in described.layout], receive)
    observed = observe(model, observer, (), inputs)
    graph = observed.graph_module.graph
    for node in graph.nodes:
        node.meta.pop("grapharg", None)  # which holds the model's tensors
    return Run(observed.outputs[described.output_index], graph, observer.mean_weights, frozenset(observer.dtypes))


class _Reads(Observer):
    """Hands on what the readers of every site read, times a factor, and keeps the mean depth weights."""

    def __init__(self, factors: list[int], receive: Callable[[int, Tensor], None]) -> None:
        self.factors, self.receive = factors, receive
        self.mean_weights: dict[int, tuple[float, ...]] = {}
        self.dtypes: set[torch.dtype] = set()

    def read(self, chain: int, site: int, value: Tensor) -> None:
        self.dtypes.add(value.dtype)
        self.receive(site, value if self.factors[site] == 1 else value * self.factors[site])

    def weights(self, chain: int, site: int, value: Tensor) -> None:
        self.mean_weights[site] = tuple(value.flatten(1).mean(1).tolist())


def _output_of(captured: Captured, folder: Path) -> tuple[str, int]:
    """The output to compare, ``logits`` or else the first floating-point one: its name, and its place among the graph's."""
    result = captured.result
    named = list(result.items()) if hasattr(result, "items") else [("output", result)]
    for name, value in sorted(named, key=lambda item: item[0] != "logits"):
        for leaf in tree_flatten(value)[0]:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                places = [i for i, output in enumerate(captured.outputs) if output is leaf]
                if places:
                    return name, places[0]
    raise CheckpointError(f"{folder}: the model computes no floating-point output that could be compared")


def _class_counts(model: nn.Module) -> set[int]:
    config: Any = model.config
    counts = (getattr(config.get_text_config(), "vocab_size", None), getattr(config, "num_labels", None))
    return {count for count in counts if isinstance(count, int) and count > 1}


def _replaced(program: Program) -> tuple[ReplacedRead, ...]:
    found: list[ReplacedRead] = []
    for chain, planned in zip(program.chains, program.plans, strict=True):
        for (read, _), site in zip(chain.sites, planned.sites, strict=True):
            words = sources_in_words(site, planned.blocks)
            found.append(ReplacedRead(len(found), read.modules, read.stream.name, words))
    return tuple(found)
