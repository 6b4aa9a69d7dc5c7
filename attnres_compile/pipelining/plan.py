"""The plan of a pipeline: stages, cut values, and both transports side by side."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule

from attnres_compile.rewritten import CallSignature
from attnres_compile.transport import CutValue, Hop, StageTransport, hops_of, plan_transport

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class PipelinePlan:
    """How a rewritten model is spread over ``ranks`` with ``virtual`` stages each.

    ``placement`` is the rank of every stage. ``boundaries`` counts the sublayers before every stage and, last, all of them;
    ``block_sizes`` are the sublayers of every block, chain after chain. ``values`` cross stage boundaries, in the order of the
    graph. ``cached`` tells which transport the stage modules in ``stages`` are made for, and ``two_phase`` whether they compute
    sites block by block; a plan that was made from a shape alone has no modules. ``costs`` holds each stage's forward FLOPs,
    activation bytes and parameter bytes for one microbatch, where they are known. ``signature`` is how the model, and hence the
    first stage, is called.
    """

    ranks: int
    virtual: int
    placement: tuple[int, ...]
    boundaries: tuple[int, ...]
    block_sizes: tuple[int, ...]
    values: tuple[CutValue, ...]
    cached: bool = True
    two_phase: bool = True
    stages: tuple[nn.Module, ...] = ()
    costs: tuple[Mapping[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    signature: CallSignature | None = None

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @functools.cached_property
    def transport(self) -> tuple[StageTransport, ...]:
        """What every stage sends, receives and keeps, in the transport that the stages are made for."""
        return plan_transport(self.values, self.placement, self.cached)

    def hops(self, cached: bool | None = None) -> tuple[Hop, ...]:
        """The hops of the plan's own transport, or of the one asked for."""
        cached = self.cached if cached is None else cached
        transport = self.transport if cached == self.cached else plan_transport(self.values, self.placement, cached)
        return hops_of(self.values, self.placement, transport)

    def value(self, name: str) -> CutValue:
        return self._named[name]

    @functools.cached_property
    def _named(self) -> dict[str, CutValue]:
        return {value.name: value for value in self.values}

    def step_nbytes(self, microbatches: int, cached: bool | None = None) -> int:
        """Bytes between ranks in one training step: every hop forward, and its gradients back."""
        return microbatches * sum(hop.nbytes + hop.gradient_nbytes for hop in self.hops(cached))

    @property
    def digest(self) -> str:
        """What ranks compare before the first transfer: plans of equal digest move the same between the same operations."""
        graphs = [str(stage.graph) for stage in self.stages if isinstance(stage, GraphModule)]
        return hashlib.sha256(json.dumps([self.to_dict(), graphs], sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only; ``hops`` and ``stages`` in the transport that the plan is for, the other's bytes beside it."""
        naive, cached = self.hops(False), self.hops(True)
        return {
            "format_version": FORMAT_VERSION,
            "ranks": self.ranks,
            "virtual": self.virtual,
            "placement": list(self.placement),
            "boundaries": list(self.boundaries),
            "block_sizes": list(self.block_sizes),
            "transport": "cached" if self.cached else "naive",
            "two_phase": self.two_phase,
            "values": [dataclasses.asdict(value) for value in self.values],
            "stages": [dataclasses.asdict(stage) for stage in self.transport],
            "hops": [
                {
                    "source": a.source,
                    "ranks": list(a.ranks),
                    "naive": [value.label for value in a.values],
                    "cached": [value.label for value in b.values],
                    "naive_nbytes": a.nbytes,
                    "cached_nbytes": b.nbytes,
                    "naive_gradient_nbytes": a.gradient_nbytes,
                    "cached_gradient_nbytes": b.gradient_nbytes,
                }
                for a, b in zip(naive, cached, strict=True)
            ],
            "nbytes": {"naive": self.step_nbytes(1, False), "cached": self.step_nbytes(1, True)},
            "costs": [dict(cost) for cost in self.costs],
            "notes": list(self.notes),
        }

    def explain(self) -> str:
        """The plan as tables: per hop the blocks carried and the bytes, naive and cached; per stage the cache; totals, peaks."""
        from attnres_compile.pipelining.tables import explain

        return explain(self)
