"""The parameters of a converted model, and the hooks that keep it from running un-rewritten."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attnres_compile.capture import dynamo_is_active, never_compile_alone
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import ConfigError, NotRewrittenError, ParameterMismatchError
from attnres_compile.report import Report

ATTRIBUTE = "attnres"


@dataclasses.dataclass(frozen=True)
class SiteLayout:
    """What identifies a site: its reader, its width, the number of its sources."""

    module: str
    hidden_size: int
    num_sources: int


def layout_of(report: Report) -> tuple[SiteLayout, ...]:
    """The layout of all sites of a planned report, in stream order."""
    return tuple(
        SiteLayout(site.module, site.hidden_size, site.num_sources or 0) for chain in report.chains for site in chain.sites
    )


class AttnResSite(nn.Module):
    """Parameters of one site.

    ``query``: ``[D]``, the pseudo-query, zero at first. ``key_norm``: ``[D]``, the RMSNorm weight of the keys, one at
    first, or None. Both are 1-D so that optimizers and weight-decay rules treat them as they treat norms.
    """

    query: nn.Parameter
    key_norm: nn.Parameter | None

    def __init__(self, hidden_size: int, key_norm: bool, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        self.register_parameter(
            "key_norm", nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype)) if key_norm else None
        )

    def extra_repr(self) -> str:
        return f"hidden_size={self.query.numel()}, key_norm={self.key_norm is not None}"


class AttnResParameters(nn.Module):
    """``model.attnres``: the pseudo-queries and key-norm weights of all sites, in stream order, chain after chain."""

    def __init__(
        self, config: AttnResConfig, layout: tuple[SiteLayout, ...], device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.layout = layout
        self.sites = nn.ModuleList(AttnResSite(site.hidden_size, config.key_norm, device, dtype) for site in layout)

    def forward(self, x: Tensor) -> Tensor:
        """The identity: a container such as nn.Sequential calls every child, this one too."""
        return x

    def tensors(self) -> list[Tensor]:
        """Queries and key-norm weights, site after site: the order of the rewritten graph's extra inputs."""
        found: list[Tensor] = []
        for i, site in enumerate(self.sites):
            for name in ("query", "key_norm"):
                if name == "key_norm" and not self.config.key_norm:
                    continue
                tensor = getattr(site, name, None)
                if not isinstance(tensor, Tensor):
                    raise ParameterMismatchError(
                        f"attnres.sites.{i}.{name} was deleted; load it again, or remove AttnRes and convert anew."
                    )
                found.append(tensor)
        return found

    def check(self, report: Report) -> None:
        """Hold the sites of a captured graph against these parameters.

        Raises:
            ParameterMismatchError: naming the first site that differs.
        """
        expected, found = self.layout, layout_of(report)
        if len(self.sites) != len(expected):
            raise ParameterMismatchError(
                f"model.attnres holds {len(self.sites)} sites but was made for {len(expected)}; convert the model anew."
            )
        if expected == found:
            return
        what = f"The model was converted with {len(expected)} sites; this graph has {len(found)}."
        for i, (old, new) in enumerate(zip(expected, found, strict=False)):
            if old != new:
                what += (
                    f" The first that differs is site {i}: {old.module!r} with {old.num_sources} sources of width "
                    f"{old.hidden_size} then, {new.module!r} with {new.num_sources} sources of width {new.hidden_size} now."
                )
                break
        else:
            if len(found) < len(expected):
                what += f" The first missing is the read by {expected[len(found)].module!r}."
            else:
                what += f" The first extra one is the read by {found[len(expected)].module!r}."
        raise ParameterMismatchError(
            f"{what} The model's structure or the path that it took through its code has changed; convert it anew, or call it "
            "the way it was converted."
        )


def attach(model: nn.Module, report: Report, device: torch.device | None, dtype: torch.dtype | None) -> AttnResParameters:
    """Create ``model.attnres`` for a planned report, and the hooks that refuse to run the model un-rewritten.

    Raises:
        ConfigError: if the model has an attribute of that name already.
    """
    if hasattr(model, ATTRIBUTE):
        raise ConfigError(
            f"{type(model).__name__} already has an attribute {ATTRIBUTE!r}: it was converted before, or holds "
            "AttnRes of its own."
        )
    assert report.config is not None
    parameters = AttnResParameters(report.config, layout_of(report), device, dtype)
    setattr(model, ATTRIBUTE, parameters)
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward)
    return parameters


def hosts_in(model: nn.Module) -> list[nn.Module]:
    """The converted modules inside ``model``, itself included."""
    return [module for module in model.modules() if isinstance(module._modules.get(ATTRIBUTE), AttnResParameters)]


def parameters_of(host: nn.Module) -> AttnResParameters:
    found = host._modules.get(ATTRIBUTE)
    if not isinstance(found, AttnResParameters):
        raise ParameterMismatchError(f"{type(host).__name__}.attnres was removed after the model was compiled; convert it anew.")
    return found


# Forward calls of converted models that run outside a compiled graph, innermost last; one list per thread.
_local = threading.local()


@dataclasses.dataclass
class _Call:
    host: nn.Module
    rewritten: bool = False


def _calls() -> list[_Call]:
    if not hasattr(_local, "calls"):
        _local.calls = []
    return _local.calls


def eager_hosts() -> Iterator[nn.Module]:
    """Converted modules whose forward call runs eagerly in this thread right now."""
    return (call.host for call in _calls())


def note_execution(host: nn.Module) -> None:
    """To be called whenever the rewritten graph of ``host`` runs."""
    for call in _calls():
        if call.host is host:
            call.rewritten = True


def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():
        # Whatever backend compiles this: unless the graph is rewritten, the marker raises when it runs.
        return _mark_first_tensor(args, kwargs)
    _enter(module, is_compiled="forward" in module.__dict__ or dynamo_is_active())
    return None


def _after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling():
        _leave(module)


# Dynamo runs the hooks of the module that was compiled outside of its graph, or traces them as a part of a larger frame.
# It must not compile them as frames of their own.
never_compile_alone(_before_forward)
never_compile_alone(_after_forward)


@torch.compiler.disable
def _enter(module: nn.Module, is_compiled: bool) -> None:
    if not is_compiled:
        raise NotRewrittenError(
            f"{type(module).__name__} was converted to Attention Residuals but is being run eagerly, with its standard residual "
            'stream. Run it as torch.compile(model, backend="attnres") or after model.compile(backend="attnres"), or use '
            "attnres_compile.rewrite(model, ...)."
        )
    calls = _calls()
    calls[:] = [call for call in calls if call.host is not module]
    calls.append(_Call(module))


@torch.compiler.disable
def _leave(module: nn.Module) -> None:
    calls = _calls()
    mine = [call for call in calls if call.host is module]
    calls[:] = [call for call in calls if call.host is not module]
    # No record at all: the model was converted in the middle of this very call, by the backend that rewrote it.
    if mine and not any(call.rewritten for call in mine):
        raise NotRewrittenError(
            f"{type(module).__name__} was converted to Attention Residuals, but its forward call ran with the standard residual "
            "stream: another backend compiled it, or Dynamo gave up on it (TORCH_LOGS=recompiles,graph_breaks shows why). Run it "
            'as torch.compile(model, backend="attnres").'
        )


def _mark_first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    marked = list(args)
    for i, value in enumerate(marked):
        if isinstance(value, Tensor):
            marked[i] = torch.ops.attnres.only_rewritten.default(value)
            return tuple(marked), kwargs
    named = dict(kwargs)
    for name, value in named.items():
        if isinstance(value, Tensor):
            named[name] = torch.ops.attnres.only_rewritten.default(value)
            return args, named
    for i, value in enumerate(marked):
        if isinstance(value, (tuple, list, dict)) and len(value):
            marked[i] = _mark_inside(value)
            return tuple(marked), kwargs
    for name, value in named.items():
        if isinstance(value, (tuple, list, dict)) and len(value):
            named[name] = _mark_inside(value)
            return args, named
    return args, kwargs


def _mark_inside(value: Any) -> Any:
    """Mark the first tensor of a container, one level down: batches come as dicts and tuples."""
    if isinstance(value, dict):
        copy = dict(value)
        for key, item in copy.items():
            if isinstance(item, Tensor):
                copy[key] = torch.ops.attnres.only_rewritten.default(item)
                break
        return copy
    items = list(value)
    for i, item in enumerate(items):
        if isinstance(item, Tensor):
            items[i] = torch.ops.attnres.only_rewritten.default(item)
            break
    return type(value)(items) if isinstance(value, list) else tuple(items)
