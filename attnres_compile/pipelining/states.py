"""The parameters of a rank, all stages together: what optimizers and checkpoints take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import nn
from torch.distributed.fsdp import FSDPModule

from attnres_compile.errors import ConfigError
from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.split import SplitModule


class _Stage(Protocol):
    """What of a :class:`attnres_compile.BlockCacheStage` is read here."""

    plan: PipelinePlan
    stage_index: int


def rank_module(stages: Iterable[_Stage] | SplitModule) -> nn.Module:
    """One module that holds the parameters and buffers of ``stages``, all those of a rank, under the model's names.

    Of a model that ``rewrite(..., split=True)`` returned it holds all.

    It computes nothing. ``rank_module(stages).parameters()`` is for the optimizer. Its state dict and the optimizer's, as
    ``torch.distributed.checkpoint.state_dict`` gives them with ``flatten_optimizer_state_dict=True``, fit every other layout of
    the pipeline, and the converted model in one process. Make it when the stages have their final parameters: moved, loaded and
    sharded.
    """
    tree = nn.Module()
    for module in _parts_of(stages):
        for inner in module.modules():
            if isinstance(inner, FSDPModule):
                inner.reshard()  # after an evaluation whole parameters are still in the shards' places
        for name, owner in module.named_modules():
            _adopt(_place(tree, name), owner)
    return tree


def _parts_of(stages: Iterable[_Stage] | SplitModule) -> list[nn.Module]:
    if isinstance(stages, SplitModule):
        return list(stages.parts)
    return [stage.plan.stages[stage.stage_index] for stage in stages]


def check_ties(plan: PipelinePlan, rank: int) -> None:
    """Whether a parameter that several stages of ``rank`` use is still one.

    Raises:
        ConfigError: if it is not: they would train apart.
    """
    seen: dict[str, tuple[int, nn.Parameter]] = {}
    for index, place in enumerate(plan.placement):
        for name, parameter in plan.stages[index].named_parameters(remove_duplicate=False) if place == rank else ():
            first, other = seen.setdefault(name, (index, parameter))
            if other is not parameter and (parameter.requires_grad or other.requires_grad):
                raise ConfigError(
                    f"{name!r} of stages {first} and {index} was one parameter and is two now, which would train apart: to_empty "
                    "and fully_shard separate tied weights. Tie it again, or untie it in the model."
                )


def _place(tree: nn.Module, name: str) -> nn.Module:
    """The module at the qualified ``name``, made where there is none."""
    for part in filter(None, name.split(".")):
        if part not in tree._modules:
            tree._modules[part] = nn.Module()
        tree = tree._modules[part]  # type: ignore[assignment]
    return tree


def _adopt(place: nn.Module, owner: nn.Module) -> None:
    place._parameters |= owner._parameters
    place._buffers |= owner._buffers
    place._non_persistent_buffers_set |= owner._non_persistent_buffers_set
