"""Converted checkpoints as models: ``from_pretrained``."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnres_compile.checkpoint.factory import Factory, build
from attnres_compile.checkpoint.files import in_one_line, problem
from attnres_compile.checkpoint.naming import FOREIGN, OWN_TENSOR, SiteNames, host_in, names_in, site_names
from attnres_compile.checkpoint.shards import ModelFolder, read_folder, read_tensors
from attnres_compile.checkpoint.state_files import StateFile, prefix_of
from attnres_compile.checkpoint.states import open_state
from attnres_compile.checkpoint.structure import check_depth, model_class, quietly, transformers_config
from attnres_compile.errors import CheckpointError, ConfigError
from attnres_compile.layout import CONFIG_KEY, StoredConversion
from attnres_compile.parameters import ATTRIBUTE, AttnResParameters, attach

log = logging.getLogger(__name__)


def from_pretrained(
    path: str | Path, *, model: nn.Module | Factory | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> nn.Module:
    """Load what ``attnres convert`` or a converted model's ``save_pretrained`` wrote.

    The model is in evaluation mode and holds its AttnRes parameters as ``model.attnres``. Run it as
    ``torch.compile(model, backend="attnres")``.

    Args:
        path: a directory with config.json and safetensors; with ``model``, a state dict in a file or in a
            torch.distributed.checkpoint directory.
        model: for models outside Transformers: a module to load into, or a function that builds it.
        trust_remote_code: whether to run Python code that the directory ships.
        kwargs: for the ``from_pretrained`` of the Transformers class: ``dtype``, ``device_map``, ``attn_implementation`` and so
            on. With a ``dtype`` the AttnRes parameters have it too, else they keep the one that they were saved in.

    Raises:
        CheckpointError: if the directory was not converted, lacks tensors, or holds others than its config.json speaks of.
    """
    path = Path(path)
    if model is not None:
        if kwargs:
            raise ConfigError(f"{next(iter(kwargs))!r} is for Transformers directories; build the model as you want it.")
        return _load_state(open_state(path), model)
    config = transformers_config(path, trust_remote_code)
    folder = read_folder(path)
    stored = _stored(config, folder)
    if stored is None:
        raise CheckpointError(
            f"{path}: was not converted: its config.json has no {CONFIG_KEY}. Convert it with `attnres convert`, or load it with "
            "Transformers and call attnres_compile.convert_(model, ...)."
        )
    host, names = _checked_names(folder, stored)
    tensors = read_tensors(folder, [name for site in names for name in names_in(site)])
    check_depth(config, len(folder.tensors), path)
    loaded = _load(path, config, stored, trust_remote_code, kwargs)
    _attach(loaded, host, stored, tensors, names, kwargs)
    return loaded


def load_plain_or_converted(path: Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """A Transformers directory as a model on the CPU, in evaluation mode, with AttnRes where it was converted.

    Raises:
        CheckpointError: as :func:`from_pretrained` does, except that a directory without AttnRes is fine.
    """
    config = transformers_config(path, trust_remote_code)
    folder = read_folder(path)
    kwargs: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if _stored(config, folder) is not None:
        return from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    check_depth(config, len(folder.tensors), path)
    return _load(path, config, None, trust_remote_code, kwargs)


def _load_state(state: StateFile, model: nn.Module | Factory) -> nn.Module:
    module = model if isinstance(model, nn.Module) else build(model)[0]
    stored = state.stored
    if stored is None:
        raise CheckpointError(f"{state.path}: was not converted: it says nothing of AttnRes. Convert it with `attnres convert`.")
    prefix = prefix_of(module, state)
    own = [name for site in site_names(stored.layout, stored.config, stored.naming) for name in names_in(site)]
    missing = [name for name in own if prefix + name not in state.dtypes]
    if missing:
        raise CheckpointError(
            f"{state.path}: {len(missing)} of the {len(own)} AttnRes tensors are missing, the first is {prefix + missing[0]}; "
            "convert the original checkpoint anew."
        )
    attach(module, AttnResParameters(stored.config, stored.layout, *_first_float(module)))
    tensors = state.read([prefix + name for name in module.state_dict()])
    try:
        module.load_state_dict(_with_metadata({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, stored))
    except RuntimeError as error:  # shapes
        raise problem(state.path, f"does not fit {type(module).__name__}: {in_one_line(error)}") from error
    return module


def _with_metadata(tensors: dict[str, Tensor], stored: StoredConversion) -> dict[str, Tensor]:
    """As ``state_dict()`` has it, where the tensors of a file come alone."""
    state = OrderedDict(tensors)
    state._metadata = {ATTRIBUTE: {"version": 1, CONFIG_KEY: stored.to_dict()}}  # type: ignore[attr-defined]
    return state


def _first_float(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return first.device, first.dtype


def _stored(config: Any, folder: ModelFolder) -> StoredConversion | None:
    """What config.json says of AttnRes, or None where neither it nor the weights know of any."""
    entry = getattr(config, CONFIG_KEY, None)
    if entry is not None:
        return StoredConversion.from_dict(entry, str(folder.path / "config.json"))
    found = next((name for name in folder.tensors if OWN_TENSOR.match(name)), None)
    if found is not None:
        raise CheckpointError(
            f"{folder.path}: holds {found} but its config.json has no {CONFIG_KEY}, without which its blocks are not known; "
            "restore the config.json that was saved with it."
        )
    return None


def _checked_names(folder: ModelFolder, stored: StoredConversion) -> tuple[str, list[SiteNames]]:
    """The name of the converted module below the model, with a dot, and the tensors of its sites, which are there and fit."""
    host = host_in(folder.tensors)
    names = site_names(stored.layout, stored.config, stored.naming, host)
    wanted = [name for site in names for name in names_in(site)]
    missing = [name for name in wanted if name not in folder.tensors]
    if missing and len(missing) == len(wanted):
        raise CheckpointError(
            f"{folder.path}: config.json speaks of AttnRes with {len(stored.layout)} sites, but none of their tensors is there. "
            "Stock Transformers loads a converted checkpoint without them and leaves such a directory when it saves it again. "
            f"Use the directory that it was loaded from, or delete {CONFIG_KEY} from config.json to go without AttnRes."
        )
    if missing:
        raise CheckpointError(
            f"{folder.path}: {len(missing)} of the {len(wanted)} AttnRes tensors are missing, the first is {missing[0]}; convert "
            "the original checkpoint anew, or find the file that holds them."
        )
    extra = [name for name in folder.tensors if OWN_TENSOR.match(name) and name not in wanted]
    if extra:
        raise CheckpointError(
            f"{folder.path}: holds {extra[0]}, but config.json speaks of {len(stored.layout)} sites; the two do not belong "
            "together."
        )
    for site, entry in zip(names, stored.layout, strict=True):
        for parameter, own in entry.parameter_shapes(stored.config).items():
            name, expected = site.tensors[parameter], site.shape(parameter, own)
            shape = folder.tensors[name].tensors[name].shape
            if shape != expected:
                raise CheckpointError(
                    f"{folder.path}: {name} has shape {list(shape)}, where config.json asks for {list(expected)}; the two do not "
                    "belong together."
                )
    return host, names


def _load(path: Path, config: Any, stored: StoredConversion | None, trust_remote_code: bool, kwargs: dict[str, Any]) -> nn.Module:
    """The model as Transformers loads it, without AttnRes."""
    if stored is not None:
        delattr(config, CONFIG_KEY)  # what the model saves is up to its parameters
        if stored.naming in FOREIGN:
            setattr(config, FOREIGN[stored.naming].block_key, None)
    # Transformers documents no classes for what it raises about files, so all are caught.
    try:
        with quietly():
            model, info = model_class(config).from_pretrained(
                path, config=config, trust_remote_code=trust_remote_code, output_loading_info=True, **kwargs
            )
    except Exception as error:
        raise problem(path, f"Transformers can't load it: {in_one_line(error)}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: lacks {len(missing)} of the tensors of {type(model).__name__}, or has them in another shape; the first is "
            f"{missing[0]}."
        )
    loaded: nn.Module = model.eval()
    return loaded


def _attach(
    model: nn.Module, host: str, stored: StoredConversion, tensors: dict[str, Tensor], names: list[SiteNames],
    kwargs: dict[str, Any],
) -> None:  # fmt: skip
    modules = dict(model.named_modules())
    owner = modules.get(host.rstrip("."))
    if owner is None:
        raise CheckpointError(
            f"{type(model).__name__} has no module {host.rstrip('.')!r}, whose AttnRes tensors the checkpoint holds; its "
            "config.json was edited."
        )
    below = dict(owner.named_modules())
    for site in stored.layout:
        if site.module not in below:
            raise CheckpointError(
                f"{type(model).__name__} has no module {site.module!r}, whose read of the residual stream was converted; the "
                "config.json was edited, or the model's code has changed."
            )
    device, dtype = _first_float(model)
    parameters = attach(owner, AttnResParameters(stored.config, stored.layout, device, dtype))
    cast = kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) not in (None, "auto")
    for holder, entry in zip(parameters.sites, names, strict=True):
        for parameter, name in entry.tensors.items():
            own = holder.get_parameter(parameter)
            setattr(holder, parameter, nn.Parameter(tensors[name].view(own.shape).to(device, dtype if cast else None)))
