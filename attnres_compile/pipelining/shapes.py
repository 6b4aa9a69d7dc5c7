"""Plans from a model's published shape: no code of the model and no weights are needed, only a handful of numbers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attnres_compile.checkpoint.files import problem, quoted, read_object
from attnres_compile.checkpoint.new_tensors import DTYPES, dtype_named
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import AttnResError, ConfigError
from attnres_compile.pipelining.partition import stage_placement
from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.transport import CutValue

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_NUMBERS = ("num_layers", "hidden_size", "sublayers_per_layer", "active_parameters", "block_size", "block_layers")


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know of a model with one residual stream and Block AttnRes.

    Args:
        name: what readers of the plan see.
        num_layers: layers of ``sublayers_per_layer`` sublayers each: two, attention and MLP, in a Transformer.
        hidden_size: width D of the stream.
        block_size: sublayers per block; the last block may be shorter.
        active_parameters: parameters of all layers that a token passes through; 6 D^2 per sublayer, those of a dense
            Transformer, where they are not known.

    Raises:
        ConfigError: for numbers below one, or blocks larger than the model.
    """

    name: str
    num_layers: int
    hidden_size: int
    block_size: int
    sublayers_per_layer: int = 2
    active_parameters: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "block_size", "sublayers_per_layer"):
            _require_count(name, getattr(self, name))
        if self.active_parameters is not None:
            _require_count("active_parameters", self.active_parameters)
        if self.block_size > self.num_sublayers:
            raise ConfigError(f"block_size={self.block_size} exceeds the {self.num_sublayers} sublayers of {self.name}.")

    @property
    def num_sublayers(self) -> int:
        return self.num_layers * self.sublayers_per_layer

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Sublayers per block."""
        starts = range(0, self.num_sublayers, self.block_size)
        return tuple(min(self.block_size, self.num_sublayers - start) for start in starts)

    def forward_flops(self, sublayers: int, tokens: int) -> int:
        """Of ``sublayers`` sublayers on ``tokens`` tokens: two per parameter and token, attention over the sequence left out."""
        if self.active_parameters is None:
            return 12 * sublayers * tokens * self.hidden_size**2
        return 2 * tokens * self.active_parameters * sublayers // self.num_sublayers


def plan_from_shape(
    shape: ModelShape,
    ranks: int,
    virtual: int,
    tokens: int,
    dtype: str = "bfloat16",
    placement: str = "looped",
    boundaries: Sequence[int | str] | None = None,
) -> PipelinePlan:
    """The plan of a model that is known by its shape, without stage modules.

    Args:
        tokens: tokens of one microbatch; a cut value has the shape (tokens, hidden_size).
        dtype: of the stream: float32, bfloat16, float16 or, for short, fp32, bf16, fp16.
        placement: "looped" or "folded", as in :func:`attnres_compile.pipelining.partition.partition`.
        boundaries: sublayers before stages 1, 2, ...; by default stage i of C begins after ``round(i * n / C)`` of n layers,
            or of n sublayers where there are more stages than layers.

    Raises:
        ConfigError: for more stages than sublayers, an unknown dtype or placement, numbers below one, bad boundaries.
    """
    order = stage_placement(ranks, virtual, placement)
    _require_count("tokens", tokens)
    of_stream = dtype_called(dtype)
    ends = _boundaries(shape, len(order), boundaries)
    nbytes = tokens * shape.hidden_size * of_stream.itemsize
    name = str(of_stream).removeprefix("torch.")
    values = tuple(
        CutValue(label, label, kind, producer, consumers, (tokens, shape.hidden_size), name, nbytes)
        for label, kind, producer, consumers in _cuts(shape, ends)
    )
    costs = tuple({"flops": shape.forward_flops(stop - start, tokens)} for start, stop in itertools.pairwise(ends))
    return PipelinePlan(ranks, virtual, order, ends, shape.block_sizes, values, costs=costs, notes=(_note_on_costs(shape),))


def read_shape(path: Path) -> ModelShape:
    """A shape from JSON: name, num_layers, hidden_size, and block_size in sublayers or block_layers in layers.

    ``sublayers_per_layer`` (2) and ``active_parameters`` may be there, too.

    Raises:
        CheckpointError: if the file can't be read or holds no JSON object.
        ConfigError: for an entry that is missing, unknown, or no number above zero.
    """
    return _shape_of(read_object(path), path)


def with_blocks(shape: ModelShape, config: AttnResConfig | None) -> ModelShape:
    """``shape`` with the blocks that ``config`` gives, or with its own."""
    if config is None:
        return shape
    return dataclasses.replace(shape, block_size=config.resolved_block_size(shape.num_sublayers))


def dtype_called(name: str) -> torch.dtype:
    """The dtype of a full or a short name.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in DTYPES and name not in _SHORT:
        raise ConfigError(f"unknown dtype {name!r}; the dtypes are: {', '.join((*DTYPES, *_SHORT))}.")
    found = dtype_named(_SHORT.get(name, name))
    assert found is not None
    return found


def _cuts(shape: ModelShape, ends: Sequence[int]) -> Iterator[tuple[str, str, int, tuple[int, ...]]]:
    """Label, kind, producer and consumers of what crosses stage boundaries, in the order of the graph.

    Every stage has a sublayer, whose site attends to all blocks complete before it, so all later stages read a block. A
    partial sum is read by the next stage alone, which goes on adding to it.
    """
    last = len(ends) - 2
    if last > 0:
        yield "b0", "block", 0, tuple(range(1, last + 1))
    for stage in range(last):
        start, stop = ends[stage], ends[stage + 1]
        for block in range(start // shape.block_size + 1, stop // shape.block_size + 1):
            yield f"b{block}", "block", stage, tuple(range(stage + 1, last + 1))
        if stop % shape.block_size:
            yield f"p{stage}", "partial", stage, (stage + 1,)


def _boundaries(shape: ModelShape, num_stages: int, boundaries: Sequence[int | str] | None) -> tuple[int, ...]:
    count = shape.num_sublayers
    if num_stages > count:
        raise ConfigError(
            f"{shape.name} has {count} sublayers, too few for {num_stages} stages; ask for fewer ranks or virtual stages."
        )
    if boundaries is None:
        unit = shape.sublayers_per_layer if num_stages <= shape.num_layers else 1
        return tuple(unit * round(i * count / unit / num_stages) for i in range(num_stages + 1))
    if len(boundaries) != num_stages - 1:
        raise ConfigError(
            f"{len(boundaries)} boundaries make {len(boundaries) + 1} stages, not {num_stages}; give the sublayers before stages "
            f"1 to {num_stages - 1}."
        )
    counts = [before for before in boundaries if isinstance(before, int)]
    if names := [name for name in boundaries if isinstance(name, str)]:
        raise ConfigError(
            f"a shape has no module {quoted(names[0])} to begin a stage with; give boundaries as numbers from 1 to {count - 1}."
        )
    ends = (0, *counts, count)
    for before, after in itertools.pairwise(ends):
        if before >= after:
            raise ConfigError(f"boundaries must go up from 1 to at most {count - 1}; {after} comes after {before}.")
    return ends


def _shape_of(entries: Mapping[str, Any], path: Path) -> ModelShape:
    unknown = [key for key in entries if key not in ("name", *_NUMBERS)]
    if unknown:
        raise ConfigError(f"{path}: unknown entry {quoted(unknown[0])}; a shape has: name, {', '.join(_NUMBERS)}.")
    for key, value in entries.items():
        if not (isinstance(value, str) if key == "name" else _is_count(value)):
            what = "a text" if key == "name" else "a number above zero"
            raise ConfigError(f"{path}: {key} is {quoted(value)}; it must be {what}.")
    missing = [key for key in ("name", "num_layers", "hidden_size") if key not in entries]
    if missing:
        raise ConfigError(f"{path}: the shape lacks {missing[0]}.")
    if ("block_size" in entries) == ("block_layers" in entries):
        raise ConfigError(f"{path}: a shape has either block_size, in sublayers, or block_layers, in layers.")
    fields = dict(entries)
    if (layers := fields.pop("block_layers", None)) is not None:
        fields["block_size"] = layers * fields.get("sublayers_per_layer", 2)
    try:
        return ModelShape(**fields)
    except AttnResError as error:
        raise ConfigError(str(problem(path, str(error)))) from None


def _note_on_costs(shape: ModelShape) -> str:
    known = shape.active_parameters is not None
    each = f"{shape.active_parameters:,} active parameters in all" if known else "the 6 hidden_size^2 parameters of a dense model"
    return f"FLOPs per stage: two per token and parameter; its sublayers have {each}{', evenly' if known else ' each'}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require_count(name: str, value: object) -> None:
    if not _is_count(value):
        raise ConfigError(f"{name} must be a whole number above zero, not {value!r}.")
