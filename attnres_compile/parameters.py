"""The parameters of a converted model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnres_compile.config import AttnResConfig
from attnres_compile.errors import ConfigError, ParameterMismatchError
from attnres_compile.execution import refuse_unrewritten
from attnres_compile.layout import CONFIG_KEY, SiteLayout, StoredConversion, check_same, difference, layout_of
from attnres_compile.report import Report
from attnres_compile.site_parameters import initial_value
from attnres_compile.wrappers import check_no_wrapper

log = logging.getLogger(__name__)

ATTRIBUTE = "attnres"


class AttnResSite(nn.LayerNorm):
    """Parameters of one site.

    ``query``: ``[D]``, the pseudo-query, zero at first. ``key_norm``: ``[D]``, the RMSNorm weight of the keys, one at
    first. Both are 1-D so that optimizers and weight-decay rules treat them as they treat norms. Rules that go by a module's
    class (the Transformers Trainer's) know ``nn.LayerNorm`` alone, so this is one by class; it is never called. Each is None
    where the options have no such thing; some have others, see :func:`attnres_compile.site_parameters.parameter_shapes`.
    """

    query: nn.Parameter
    key_norm: nn.Parameter | None

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device | None, dtype: torch.dtype | None) -> None:
        nn.Module.__init__(self)  # not nn.LayerNorm's: there is no weight and no bias
        for name in ("query", "key_norm"):
            self.register_parameter(name, None)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to zero queries, also after ``to_empty``: the model then computes what it computed before conversion."""
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, initial_value(name))

    def extra_repr(self) -> str:
        held = ((name, parameter) for name, parameter in self._parameters.items() if parameter is not None)
        return ", ".join(f"{name}={list(parameter.shape)}" for name, parameter in held)


class AttnResParameters(nn.Module):
    """``model.attnres``: the parameters of all sites, in stream order, chain after chain."""

    def __init__(
        self, config: AttnResConfig, layout: tuple[SiteLayout, ...], device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.layout = layout
        self.sites = nn.ModuleList(AttnResSite(site.parameter_shapes(config), device, dtype) for site in layout)

    def forward(self, x: Tensor) -> Tensor:
        """The identity: a container such as nn.Sequential calls every child, this one too."""
        return x

    @property
    def active(self) -> AttnResParameters:
        """These parameters. A wrapper in their place that lends their attributes, as peft's does, gives those of its adapter."""
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """What every site holds."""
        return tuple(self.layout[0].parameter_shapes(self.config))

    def tensors(self) -> list[Tensor]:
        """Queries, key-norm weights and so on, site after site: the order of the rewritten graph's extra inputs.

        Raises:
            ParameterMismatchError: if there are more or fewer than there should be, or one has not the shape that its site
                asks for. A wrong one would broadcast, and compute something else.
        """
        sites = getattr(self, "sites", ())
        if len(sites) != len(self.layout):
            raise ParameterMismatchError(
                f"model.attnres holds {len(sites)} sites but was made for {len(self.layout)}; convert the model anew."
            )
        found: list[Tensor] = []
        for i, (site, entry) in enumerate(zip(sites, self.layout, strict=True)):
            for name, shape in entry.parameter_shapes(self.config).items():
                tensor = getattr(site, name, None)
                if problem := _problem(tensor, shape, next(iter(found), tensor)):
                    raise ParameterMismatchError(
                        f"attnres.sites.{i}.{name} {problem}; load it again, or remove AttnRes and convert anew."
                    )
                assert isinstance(tensor, Tensor)
                found.append(tensor)
        return found

    def stored(self) -> StoredConversion:
        """What a checkpoint that holds these parameters must say of them."""
        return StoredConversion(self.config, self.layout)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})[CONFIG_KEY] = self.stored().to_dict()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Tensors fit in shape where blocks differ, so the options travel in the state dict's metadata. Where there is none, a
        warning says which options it is taken to have.

        Raises:
            ParameterMismatchError: if the state dict was saved with other options or sites.
        """
        if local_metadata.get(CONFIG_KEY) is not None:
            self.check_stored(StoredConversion.from_dict(local_metadata[CONFIG_KEY], "state dict"))
        elif any(name.startswith(prefix) for name in state_dict):
            log.warning(
                "the tensors that are loaded as %s do not say with which options they were saved, as those from safetensors and "
                "torch.distributed.checkpoint do not; they are taken to be of %s.",
                prefix.rstrip("."),
                self.config,
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def check_stored(self, stored: StoredConversion) -> None:
        """Hold these parameters against what a checkpoint says of its own.

        Raises:
            ParameterMismatchError: naming the option or the first site that differs.
        """
        check_same(self.stored(), stored)

    def check(self, report: Report) -> None:
        """Hold the sites of a captured graph against these parameters.

        Raises:
            ParameterMismatchError: naming the first site that differs, or the first parameter that is none.
        """
        self.tensors()
        expected, found = self.layout, layout_of(report)
        if expected == found:
            return
        what = f"The model was converted with {len(expected)} sites; this graph has {len(found)}. {difference(expected, found)}"
        raise ParameterMismatchError(
            f"{what} The model's structure or the path that it took through its code has changed; convert it anew, or call it "
            "the way it was converted."
        )


def _problem(tensor: Any, shape: tuple[int, ...], first: Any) -> str:
    """Why ``tensor`` can't be the parameter of a site that has this ``shape``, or "" if it can.

    ``first`` is the first of them all.
    """
    if not isinstance(tensor, Tensor):
        return "was deleted"
    if tensor.shape != shape:
        return f"has shape {list(tensor.shape)} instead of {list(shape)}"
    if not tensor.is_floating_point():
        return f"holds {str(tensor.dtype).removeprefix('torch.')}, no floating-point numbers"
    if tensor.is_meta != first.is_meta:
        return f"is on {tensor.device}, the first one on {first.device}"
    return ""


def attach(model: nn.Module, parameters: AttnResParameters) -> AttnResParameters:
    """Make ``parameters`` ``model.attnres``, and refuse from now on to run the model un-rewritten.

    A Transformers model says in the config.json that it saves what was converted.

    Raises:
        ConfigError: see :func:`check_unconverted`.
    """
    check_unconverted(model)
    setattr(model, ATTRIBUTE, parameters)
    refuse_unrewritten(model)
    if hasattr(type(model), "save_pretrained") and hasattr(type(model), "config_class"):
        model.save_pretrained = _SavePretrained(model)  # type: ignore[assignment]
    return parameters


def check_unconverted(model: nn.Module) -> None:
    """Raises:
        ConfigError: if the model has an attribute ``attnres`` already, is a wrapper around the model that is meant, or was
            loaded from a converted checkpoint without the AttnRes tensors.
    """
    if hasattr(model, ATTRIBUTE):
        raise ConfigError(
            f"{type(model).__name__} already has an attribute {ATTRIBUTE!r}: it was converted before, or holds "
            "AttnRes of its own."
        )
    check_no_wrapper(model)
    if getattr(getattr(model, "config", None), CONFIG_KEY, None) is not None:
        raise ConfigError(
            f"{type(model).__name__} comes from a converted checkpoint, but was loaded without its AttnRes tensors, which "
            f"converting it again would replace by new ones. Load it with attnres_compile.from_pretrained(path), or delete "
            f"model.config.{CONFIG_KEY} to start from zero queries."
        )


class _SavePretrained:
    """``save_pretrained`` of a converted Transformers model: its own, with an entry about AttnRes in config.json.

    The entry is in ``model.config`` only meanwhile: several models may share that object.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        setattr(model.config, CONFIG_KEY, parameters_of(model).stored().to_dict())
        try:
            return type(model).save_pretrained(model, *args, **kwargs)
        finally:
            delattr(model.config, CONFIG_KEY)


def attached_to(model: nn.Module) -> AttnResParameters | None:
    """``model.attnres`` where ``model`` is converted: those of the active adapter where peft keeps some for each."""
    found = getattr(model._modules.get(ATTRIBUTE), "active", None)
    return found if isinstance(found, AttnResParameters) else None


def hosts_in(model: nn.Module) -> list[nn.Module]:
    """The converted modules inside ``model``, itself included."""
    return [module for module in model.modules() if attached_to(module) is not None]


def parameters_of(host: nn.Module) -> AttnResParameters:
    found = attached_to(host)
    if found is None:
        raise ParameterMismatchError(f"{type(host).__name__}.attnres was removed after the model was compiled; convert it anew.")
    return found
