"""Offline conversion of Transformers directories: the model is captured on the meta device, the weights stay where they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from attnres_compile.checkpoint.folders import Conversion, NewTensors, write_converted, write_renamed, write_reverted
from attnres_compile.checkpoint.naming import SiteNames, foreign_entries, host_in, names_in, site_names, unused_names
from attnres_compile.checkpoint.new_tensors import common_dtype, new_tensors, notes_on, what_is_lost
from attnres_compile.checkpoint.progress import working
from attnres_compile.checkpoint.shards import ModelFolder, read_folder, read_tensors
from attnres_compile.checkpoint.staging import check_destination
from attnres_compile.checkpoint.state_files import SAFETENSORS_DTYPES
from attnres_compile.checkpoint.structure import build_on_meta
from attnres_compile.config import AttnResConfig
from attnres_compile.convert import planned
from attnres_compile.errors import CheckpointError
from attnres_compile.layout import CONFIG_KEY, OWN_NAMING, StoredConversion, difference, layout_of
from attnres_compile.report import Report


def convert_checkpoint(
    source: str | Path, destination: str | Path, config: AttnResConfig | None = None, *, naming: str = OWN_NAMING,
    dtype: torch.dtype | None = None, link: bool = False, overwrite: bool = False, dry_run: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Report, Conversion]:  # fmt: skip
    """Write the Transformers directory ``source`` with AttnRes as ``destination``. No weight is read or changed.

    Of a directory that is converted already the tensors are renamed, and keep their values; it then takes no ``config``.

    Args:
        naming: "attnres", "kimi-k3" or "fla": how the new tensors are called.
        dtype: of the new tensors; by default the one that most of the checkpoint's tensors have.
        link: hard links instead of copies for weights and other large files.
        overwrite: replace a model directory ``destination``, once the new one is complete.
        dry_run: check all that can be checked, and write nothing.
        trust_remote_code: whether to run Python code that the directory ships.

    Returns:
        What is rewritten, and what was done with the files.

    Raises:
        NoResidualChainError: if the model has nothing to rewrite.
        ConfigError: if the options don't fit the model.
        CheckpointError: if ``source`` is damaged or was converted before, or ``destination`` can't be written.
    """
    folder = read_folder(Path(source))
    check_destination(Path(destination), overwrite)  # before the capture, which takes its time
    before = stored_in(folder) if CONFIG_KEY in folder.config else None
    if before is not None and (config is not None or naming == before.naming):
        raise CheckpointError(
            f"{source}: was converted before; undo that first (attnres convert --reverse SRC DST), or give --naming alone, other "
            f"than {before.naming!r}, to rename its tensors."
        )
    with working(f"capturing the model of {source}"):
        report = planned(
            build_on_meta(Path(source), trust_remote_code, len(folder.tensors)), config if before is None else before.config
        )
    assert report.config is not None
    stored = StoredConversion(report.config, layout_of(report), naming)
    dtypes = [SAFETENSORS_DTYPES.get(shard.tensors[name].dtype) for name, shard in folder.tensors.items()]
    tensors = new_tensors(stored, dtype or common_dtype(dtypes))
    entries = {CONFIG_KEY: stored.to_dict(), **foreign_entries(stored.layout, stored.config, naming)}
    how = {"link": link, "overwrite": overwrite, "dry_run": dry_run}
    if before is None:
        done = write_converted(folder, NewTensors(tensors, entries), Path(destination), **how)
    else:
        if before.layout != stored.layout:
            raise CheckpointError(f"{source}: its config.json speaks of other sites: {difference(before.layout, stored.layout)}")
        values, names_before = _values(folder, before)
        for old, new in zip(names_before, site_names(stored.layout, stored.config, naming), strict=True):
            for parameter, name in new.tensors.items():
                value = values[old.tensors[parameter]]
                tensors[name] = value.reshape(tensors[name].shape).to(dtype or value.dtype)
        names = _added_names(folder, before)
        done = write_renamed(folder, names, _entries(before), NewTensors(tensors, entries), Path(destination), **how)
    return report, dataclasses.replace(done, notes=(*done.notes, *notes_on(stored)))


def _values(folder: ModelFolder, stored: StoredConversion) -> tuple[dict[str, Tensor], list[SiteNames]]:
    """The tensors of all sites, and the names of each site's."""
    sites = site_names(stored.layout, stored.config, stored.naming, host_in(folder.tensors))
    return read_tensors(folder, [name for site in sites for name in names_in(site)]), sites


def _added_names(folder: ModelFolder, stored: StoredConversion) -> list[str]:
    """All tensors of the directory that conversion added, those that no site uses among them."""
    sites = site_names(stored.layout, stored.config, stored.naming, host_in(folder.tensors))
    every = [*unused_names(stored.layout, stored.config, stored.naming), *sites]
    return [name for site in every for name in names_in(site) if name in folder.tensors]


def _entries(stored: StoredConversion) -> set[str]:
    """What conversion added to config.json."""
    return {CONFIG_KEY, *foreign_entries(stored.layout, stored.config, stored.naming)}


def revert_checkpoint(
    source: str | Path, destination: str | Path, *, link: bool = False, overwrite: bool = False, dry_run: bool = False
) -> tuple[str, Conversion]:
    """Write the converted directory ``source`` without AttnRes as ``destination``; arguments as for conversion.

    Returns:
        What the model loses by that, in a sentence, and what was done with the files.

    Raises:
        CheckpointError: if ``source`` was not converted or is damaged, or ``destination`` can't be written.
    """
    folder = read_folder(Path(source))
    stored = stored_in(folder)
    names = _added_names(folder, stored)
    if names:
        loss = what_is_lost(*_values(folder, stored), stored)
    else:
        loss = "the AttnRes tensors were lost before: only config.json speaks of them"
    how = {"link": link, "overwrite": overwrite, "dry_run": dry_run}
    return loss, write_reverted(folder, names, _entries(stored), Path(destination), **how)


def stored_in(folder: ModelFolder) -> StoredConversion:
    """What config.json says of AttnRes.

    Raises:
        CheckpointError: if it says nothing.
    """
    if CONFIG_KEY not in folder.config:
        raise CheckpointError(f"{folder.path}: was not converted: its config.json has no {CONFIG_KEY}.")
    return StoredConversion.from_dict(folder.config[CONFIG_KEY], str(folder.path / "config.json"))
