"""Wrappers around a model that must know its AttnRes parameters: DDP, averages of weights, peft's adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from attnres_compile.errors import ChainCutError, ConfigError

log = logging.getLogger(__name__)

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


SHARD_BLOCKS = (
    "Shard blocks of the rewritten graph instead: split = attnres_compile.rewrite(model, ..., split=True), fully_shard each of "
    "split.blocks, then split."
)


def check_no_wrapper(model: nn.Module) -> None:
    """What is added to a wrapper is not part of the model inside: DDP does not synchronise it, peft neither saves nor merges it.

    Raises:
        ConfigError: if ``model`` is such a wrapper.
    """
    if isinstance(model, _WRAPPERS) or _is_from_peft(model):
        raise ConfigError(
            f"{type(model).__name__} wraps a model, which had no AttnRes parameters when it was wrapped: call "
            "attnres_compile.convert_(model, ...) on the model itself, before wrapping it."
        )


def fsdp_modules(host: nn.Module) -> list[nn.Module]:
    """The modules in ``host``, itself included, that FSDP shards. Its parameters look like any others while its forward runs.

    Tensor parallelism alone is no obstacle: all ranks make the same new parameters, and get the same gradients of them.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return [module for module in host.modules() if isinstance(module, (FSDPModule, FullyShardedDataParallel))]


def check_not_sharded_in_parts(host: nn.Module | None) -> None:
    """Raises:
        ChainCutError: if FSDP shards modules inside ``host``: it gathers each before it runs, outside of any graph.
    """
    inside = [] if host is None else [module for module in fsdp_modules(host) if module is not host]
    if inside:
        raise ChainCutError(
            f"FSDP shards {len(inside)} modules inside {type(host).__name__}, the first a {type(inside[0]).__name__}, and "
            f"gathers each before it runs, which cuts the residual chain. {SHARD_BLOCKS}"
        )


def check_not_sharded(model: nn.Module) -> None:
    """Raises:
        ConfigError: if FSDP shards ``model`` or parts of it: no graph holds it, and it would never learn of new parameters.
    """
    if fsdp_modules(model):
        raise ConfigError(
            f"FSDP shards {type(model).__name__}, and gathers it outside of any graph; convert or rewrite it before that. "
            f"{SHARD_BLOCKS}"
        )


def _is_from_peft(model: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(model).__mro__)


def check_synchronised(host: nn.Module, tensors: Sequence[Tensor], known: Iterable[Tensor]) -> None:
    """Hold the AttnRes parameters of ``host`` against the parameters that DDP found when it wrapped the model.

    Raises:
        ConfigError: if DDP does not know one that learns: every rank would then train its own.
    """
    found = set(map(id, known))
    for tensor in tensors:
        # A weight that is computed from others is none of DDP's parameters; the mark is on those that it was told to ignore.
        if tensor.is_leaf and tensor.requires_grad and id(tensor) not in found and not getattr(tensor, "_ddp_ignored", False):
            raise unsynchronised(host)


def unsynchronised(host: nn.Module) -> ConfigError:
    return ConfigError(
        f"{type(host).__name__} was wrapped for distributed training before it had AttnRes parameters, which would then not "
        "be synchronised between ranks; call attnres_compile.convert_(model, ...) before wrapping it."
    )


def warn_of_adapters(root: nn.Module, host: nn.Module, is_wrapped: bool, tensors: Sequence[Tensor]) -> None:
    """Say so where peft trains the AttnRes parameters of ``host`` without knowing it: it saves adapters without them.

    ``is_wrapped`` says that peft keeps copies of them per adapter, as it does for what ``modules_to_save`` names.
    """
    has_adapters = any(getattr(module, "peft_config", None) for module in (root, host))
    if has_adapters and not is_wrapped and any(tensor.requires_grad for tensor in tensors):
        log.warning(
            "peft saves adapters of %s without its AttnRes parameters, although they are being trained; add them with "
            'LoraConfig(modules_to_save=["attnres"]), or save the whole model after merge_and_unload().',
            type(host).__name__,
        )
