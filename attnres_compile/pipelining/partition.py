"""``ac.partition``: the rewritten graph of a model, cut into pipeline stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule

from attnres_compile.config import AttnResConfig
from attnres_compile.convert import checked_call, rewrite
from attnres_compile.errors import ConfigError, PartitionError
from attnres_compile.passes.cuts import Cuts, cut
from attnres_compile.passes.partition import stage_graphs
from attnres_compile.patterns.placements import is_distributed
from attnres_compile.pipelining.boundaries import boundaries_of, choose, costs_of
from attnres_compile.pipelining.crossing import cut_values
from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.pipelining.stages import stage_modules
from attnres_compile.rewritten import RewrittenModule
from attnres_compile.transport import folded, looped, plan_transport

PLACEMENTS = ("looped", "folded")
_MOST_STAGES = 2**16  # that are counted out before the model is looked at
TRANSPORTS = ("cached", "naive")


def partition(
    model: nn.Module,
    ranks: int,
    virtual: int = 1,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    config: AttnResConfig | None = None,
    *,
    boundaries: Sequence[int | str] | None = None,
    placement: str = "looped",
    transport: str = "cached",
    two_phase: bool = True,
) -> PipelinePlan:
    """Rewrite ``model`` and cut it into ``ranks * virtual`` stages.

    Args:
        args, kwargs: an example call with one microbatch; stages run microbatches of these shapes, in the model's present mode,
            and under the autocast that is on now.
        boundaries: where stages 1, 2, ... begin: the number of sublayers before each, or the name of the module whose norm is
            the first to read the stream there. By default stages are balanced by their FLOPs, at block boundaries where that
            costs little.
        placement: "looped" puts stage i on rank ``i % ranks``, as torch's schedules but ZBVZeroBubble and DualPipeV want it;
            "folded", for these two, goes down the ranks and up again (``virtual`` is 2).
        transport: "cached" sends a rank every value once; "naive" sends all that a later stage reads over every hop.
        two_phase: compute the sites of a block together. Zero-bubble schedules need False: torch's separate weight gradients
            want every parameter read by one operation.

    Returns:
        The plan, with the stage modules: they share the model's parameters under their qualified names, each in exactly one
        stage. A converted model lends its queries; for another the plan makes new ones, under ``attnres.*``.

    Raises:
        PartitionError: if the graph can't be cut so: too few sublayers, weights tied across stages, a value that can't be sent.
        NoResidualChainError, ConfigError, CaptureError: as :func:`attnres_compile.rewrite`.
    """
    model, args, kwargs = checked_call(model, args, kwargs)
    order = stage_placement(ranks, virtual, placement)
    if transport not in TRANSPORTS:
        raise ConfigError(f"transport must be one of {', '.join(TRANSPORTS)}, not {transport!r}.")
    if any(is_distributed(parameter) for parameter in model.parameters()):
        raise PartitionError(
            f"{type(model).__name__} holds DTensors: stages are cut from a model that is not distributed yet. Call partition "
            "before fully_shard, and fully_shard on each stage; pipelines of tensor-parallel stages are not supported."
        )
    with _without_key_value_cache(model):
        rewritten = rewrite(model, config, args, kwargs)
    return cut_rewritten(rewritten, order, ranks, virtual, boundaries, transport == "cached", two_phase)


def stage_placement(ranks: int, virtual: int, placement: str) -> tuple[int, ...]:
    """The rank of every stage.

    Raises:
        ConfigError: for numbers below one, an unknown placement, or a folded one with other than two stages per rank.
    """
    for name, number in (("ranks", ranks), ("virtual", virtual)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigError(f"{name} must be a whole number above zero, not {number!r}.")
    if ranks * virtual > _MOST_STAGES:
        raise ConfigError(f"{ranks} ranks with {virtual} stages each are more stages than any model has sublayers.")
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement must be one of {', '.join(PLACEMENTS)}, not {placement!r}.")
    if placement == "folded" and virtual != 2:
        raise ConfigError(f"a folded placement has two stages per rank, so virtual must be 2, not {virtual}.")
    return folded(ranks) if placement == "folded" else looped(ranks, virtual)


@contextlib.contextmanager
def _without_key_value_cache(model: nn.Module) -> Iterator[None]:
    """A key-value cache in a model's output would carry every layer's keys and values to the last stage."""
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", None) is not True:
        yield
        return
    config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.use_cache = True  # type: ignore[union-attr]


def cut_rewritten(
    rewritten: RewrittenModule,
    placement: tuple[int, ...],
    ranks: int,
    virtual: int,
    boundaries: Sequence[int | str] | None = None,
    cached: bool = True,
    two_phase: bool = True,
    with_stages: bool = True,
) -> PipelinePlan:
    """Cut a rewritten module into ``len(placement)`` stages; works on the meta device.

    Without the stage modules it is a plan to look at: weights that are tied across stages are only noted.
    """
    if not rewritten.graph.find_nodes(op="placeholder"):
        raise PartitionError("the model takes no tensor, so there are no microbatches to split its input into; give it one.")
    config = rewritten.report.config
    if config is not None and config.weights == "mhc":
        raise PartitionError("weights='mhc' computes the weights of all sites at once, which no stage can do by itself.")
    possible = boundaries_of(rewritten)
    costs = costs_of(rewritten, possible)
    starts = choose(possible, costs, len(placement), boundaries)
    chosen = [possible[start - 1] for start in starts]
    cuts = cut(rewritten, [boundary.node for boundary in chosen])
    notes = _check_parameters(rewritten, cuts, placement, refuse=with_stages)
    values = cut_values(rewritten, cuts)
    stages: tuple[GraphModule, ...] = ()
    if with_stages:
        labels = {value.name: value.label for value in values}
        graphs = stage_graphs(rewritten, cuts, plan_transport(values, placement, cached), labels)
        stages = stage_modules(rewritten, cuts, graphs, two_phase)
    chains = rewritten.report.chains
    return PipelinePlan(
        ranks=ranks,
        virtual=virtual,
        placement=placement,
        boundaries=(0, *(boundary.before for boundary in chosen), sum(chain.num_sublayers for chain in chains)),
        block_sizes=tuple(size for chain in chains for size in chain.block_sizes or ()),
        values=values,
        cached=cached,
        two_phase=two_phase,
        stages=stages,
        costs=costs.of_stages(starts),
        notes=notes,
        signature=rewritten.call_signature,
    )


def _check_parameters(rewritten: RewrittenModule, cuts: Cuts, placement: tuple[int, ...], refuse: bool) -> tuple[str, ...]:
    """Every trained parameter belongs to one rank; what is only read may be on several. Notes on those in several stages.

    Raises:
        PartitionError: naming the parameter and the stages.
    """
    notes = []
    tensors = {
        **dict(rewritten.named_parameters(remove_duplicate=False)),
        **dict(rewritten.named_buffers(remove_duplicate=False)),
    }
    for name, stages in cuts.homes.items():
        tensor = tensors.get(name)
        if len(stages) < 2 or not isinstance(tensor, nn.Parameter):
            continue
        if refuse and tensor.requires_grad and len({placement[stage] for stage in stages}) > 1:
            listed = " and ".join(map(str, stages))
            others = ", ".join(repr(other) for other, tied in tensors.items() if tied is tensor and other != name)
            raise PartitionError(
                f"{name!r}{f' (tied to {others})' if others else ''} is used in stages {listed}, on different ranks, which would "
                "train apart. Untie it: give each reader a Parameter of its own (config.tie_word_embeddings = False does so for "
                "the head of most Transformers models). Or put these stages on one rank, by boundaries or by a folded placement "
                "with virtual=2."
            )
        notes.append(f"{name} is read in stages {', '.join(map(str, stages))}")
    return tuple(notes)
