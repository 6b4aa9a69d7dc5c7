"""Models to plan for: by their published shape, or by a Transformers configuration, of which the graph itself is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from attnres_compile.checkpoint.files import read_object
from attnres_compile.checkpoint.structure import build_on_meta
from attnres_compile.config import AttnResConfig
from attnres_compile.convert import rewrite
from attnres_compile.inputs import random_inputs
from attnres_compile.pipelining.partition import cut_rewritten, stage_placement
from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.pipelining.shapes import dtype_called, plan_from_shape, read_shape, with_blocks

Planner = Callable[[int, int, str, Sequence[int | str] | None], PipelinePlan]
"""A plan for numbers of ranks and of stages per rank, a placement, and boundaries."""


def planner_of(
    source: Path, config: AttnResConfig | None, tokens: int, dtype: str, trust_remote_code: bool
) -> tuple[str, Planner]:
    """The name of the model at ``source``, and what plans it.

    Args:
        source: a JSON file with a shape (:func:`attnres_compile.pipelining.shapes.read_shape`), or a Transformers directory or
            config.json, whose model is captured on the meta device.
        config: the blocks; those of the shape, or the default ones, if None.
        tokens: of one microbatch; ``[1, tokens]`` for a model of text. Other models keep their example inputs.

    Raises:
        CheckpointError, ConfigError: for a source that can't be read or built, or an unknown dtype.
        NoResidualChainError: if the model has no chain that can be rewritten.
    """
    of_stream = dtype_called(dtype)
    if source.is_file() and "model_type" not in read_object(source):
        shape = with_blocks(read_shape(source), config)

        def from_shape(ranks: int, virtual: int, placement: str, boundaries: Sequence[int | str] | None) -> PipelinePlan:
            return plan_from_shape(shape, ranks, virtual, tokens, dtype, placement, boundaries)

        return shape.name, from_shape
    model = build_on_meta(source, trust_remote_code).to(of_stream)
    rewritten = rewrite(model, config, kwargs=random_inputs(model, tokens, seed=0))

    def from_graph(ranks: int, virtual: int, placement: str, boundaries: Sequence[int | str] | None) -> PipelinePlan:
        order = stage_placement(ranks, virtual, placement)
        return cut_rewritten(rewritten, order, ranks, virtual, boundaries, with_stages=False)

    return type(model).__name__, from_graph
