"""The tensors that a conversion adds to a checkpoint, and what a model loses without them."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from attnres_compile.checkpoint.naming import FOREIGN, SiteNames, foreign_entries, site_names, unused_names
from attnres_compile.checkpoint.state_files import SAFETENSORS_DTYPES
from attnres_compile.errors import ConfigError
from attnres_compile.layout import OWN_NAMING, StoredConversion
from attnres_compile.site_parameters import initial_value

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def new_tensors(stored: StoredConversion, dtype: torch.dtype, host: str = "") -> dict[str, Tensor]:
    """Zero queries, key-norm weights of one and so on for every site, by the names that they get in a checkpoint.

    Raises:
        ConfigError: if sites have no parameters: there is nothing to add.
    """
    if not stored.layout[0].parameter_shapes(stored.config):
        raise ConfigError(f"weights={stored.config.weights!r} has no parameters: there is nothing to add to a checkpoint.")
    sites = list(zip(site_names(stored.layout, stored.config, stored.naming, host), stored.layout, strict=True))
    unused = [(names, stored.layout[0]) for names in unused_names(stored.layout, stored.config, stored.naming)]
    tensors: dict[str, Tensor] = {}
    for names, site in [*unused, *sites]:
        for parameter, shape in site.parameter_shapes(stored.config).items():
            made = torch.full(names.shape(parameter, shape), initial_value(parameter), dtype=dtype)
            tensors[names.tensors[parameter]] = made
    return tensors


def dtype_named(name: str | None) -> torch.dtype | None:
    """Raises ConfigError for a name that is none of ``DTYPES``."""
    if name is not None and name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; the dtypes are: {', '.join(DTYPES)}.")
    return None if name is None else DTYPES[name]


def common_dtype(dtypes: Iterable[torch.dtype | None]) -> torch.dtype:
    """The most frequent of the dtypes that a parameter can have; float32 where there are only others (8-bit weights)."""
    found = collections.Counter(dtype for dtype in dtypes if dtype is not None and dtype in SAFETENSORS_DTYPES.values())
    return found.most_common(1)[0][0] if found else torch.float32


def what_is_lost(tensors: Mapping[str, Tensor], names: Sequence[SiteNames], stored: StoredConversion) -> str:
    """What a model loses with its AttnRes ``tensors``, those of ``names``, in a sentence."""
    what = "queries" if stored.config.has_queries else "parameters"
    largest = [max(float(tensors[name].abs().max()) for key, name in site.tensors.items() if key != "key_norm") for site in names]
    trained = [value for value in largest if value]
    if trained:
        return (
            f"{len(trained)} of {len(names)} sites have {what} that are not zero (the largest entry is {max(trained):.3g}): "
            "without AttnRes the model computes something else"
        )
    if stored.config.scale == "paper":
        return (
            f"all {what} are zero, so nothing learned is lost; but scale='paper' divides what norms read by the number of "
            "sources, which their eps does not hide: without AttnRes outputs differ slightly"
        )
    return f"all {what} are zero: the model computes the same without AttnRes"


def notes_on(stored: StoredConversion) -> list[str]:
    """What the naming's home would compute otherwise from these tensors."""
    if stored.naming == OWN_NAMING:
        return []
    home = FOREIGN[stored.naming].home
    notes = []
    if stored.config.scale != "paper":
        notes.append(f"{home} computes scale='paper'; with scale='preserve' it differs by what the norms' eps makes of that")
    if not foreign_entries(stored.layout, stored.config, stored.naming):
        size = stored.config.resolved_block_size(stored.layout[0].num_sublayers)
        notes.append(f"{home} has no blocks of {size} sublayers: config.json has no {FOREIGN[stored.naming].block_key}")
    return notes
