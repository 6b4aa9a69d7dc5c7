"""Offline conversion of checkpoints: the structure is captured on the meta device, the weights stay where they are."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnres_compile.checkpoint.factory import Factory, build, guess_inputs
from attnres_compile.checkpoint.folders import Conversion, NewTensors, write_converted, write_renamed, write_reverted
from attnres_compile.checkpoint.naming import (
    FOREIGN,
    OWN_TENSOR,
    SiteNames,
    foreign_entries,
    host_in,
    names_in,
    site_names,
    unused_names,
)
from attnres_compile.checkpoint.progress import working
from attnres_compile.checkpoint.shards import ModelFolder, read_folder, read_tensors
from attnres_compile.checkpoint.staging import check_destination
from attnres_compile.checkpoint.state_files import METADATA, SAFETENSORS_DTYPES, StateFile, open_state, prefix_of
from attnres_compile.checkpoint.structure import build_on_meta
from attnres_compile.config import AttnResConfig
from attnres_compile.convert import planned
from attnres_compile.errors import CheckpointError, ConfigError
from attnres_compile.layout import CONFIG_KEY, OWN_NAMING, StoredConversion, difference, layout_of
from attnres_compile.report import Report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        for old, new in zip(_values(folder, before), site_names(stored.layout, stored.config, naming), strict=True):
            for value, name in zip(old, names_in(new), strict=True):
                tensors[name] = value.reshape(tensors[name].shape).to(dtype or value.dtype)
        names = _added_names(folder, before)
        done = write_renamed(folder, names, _entries(before), NewTensors(tensors, entries), Path(destination), **how)
    return report, dataclasses.replace(done, notes=(*done.notes, *notes_on(stored)))


def _values(folder: ModelFolder, stored: StoredConversion) -> list[list[Tensor]]:
    """The tensors of every site."""
    sites = [names_in(site) for site in site_names(stored.layout, stored.config, stored.naming, host_in(folder.tensors))]
    tensors = read_tensors(folder, [name for site in sites for name in site])
    return [[tensors[name] for name in site] for site in sites]


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
        loss = what_is_lost([site[0] for site in _values(folder, stored)], stored)
    else:
        loss = "the AttnRes tensors were lost before: only config.json speaks of them"
    how = {"link": link, "overwrite": overwrite, "dry_run": dry_run}
    return loss, write_reverted(folder, names, _entries(stored), Path(destination), **how)


def convert_state(
    source: str | Path, destination: str | Path, config: AttnResConfig | None = None, *, model: Factory,
    inputs: Sequence[Tensor] = (), dtype: torch.dtype | None = None, overwrite: bool = False, dry_run: bool = False,
) -> tuple[Report, Conversion]:  # fmt: skip
    """Write a state dict with AttnRes: a file of safetensors or ``torch.save``, or a torch.distributed.checkpoint directory.

    Args:
        model: builds the model that the state dict belongs to; see :func:`attnres_compile.checkpoint.factory.build`.
        inputs: the model's example arguments, on the meta device, where ``model`` returns none.

    The others, and what it returns and raises, are those of :func:`convert_checkpoint`.
    """
    state, destination = open_state(Path(source)), Path(destination)
    check_destination(destination, overwrite, directory=state.is_directory)
    if state.stored is not None:
        raise CheckpointError(f"{source}: was converted before; undo that first: attnres convert --reverse SRC DST")
    built, args, kwargs = build(model, "meta")
    prefix = prefix_of(built, state)
    if not args and not kwargs:
        args = tuple(inputs) or guess_inputs(built)
    report = planned(built, config, args, kwargs)
    assert report.config is not None
    stored = StoredConversion(report.config, layout_of(report))
    tensors = new_tensors(stored, dtype or common_dtype(state.dtypes.values()), prefix)
    if not dry_run:
        state.write(destination, (), tensors, stored, overwrite)
    return report, _done(state, destination, "added", list(tensors.values()), dry_run)


def revert_state(
    source: str | Path, destination: str | Path, *, overwrite: bool = False, dry_run: bool = False
) -> tuple[str, Conversion]:
    """The inverse of :func:`convert_state`, as :func:`revert_checkpoint` is that of :func:`convert_checkpoint`."""
    state, destination = open_state(Path(source)), Path(destination)
    check_destination(destination, overwrite, directory=state.is_directory)
    if state.stored is None:
        raise CheckpointError(f"{source}: was not converted: it says nothing of AttnRes.")
    tensors = state.read([name for name in state.dtypes if OWN_TENSOR.match(name)])
    queries = [tensor for name, tensor in tensors.items() if name.endswith(".query")]
    if not dry_run:
        state.write(destination, tensors.keys(), {}, None, overwrite)
    done = _done(state, destination, "removed", list(tensors.values()), dry_run)
    return what_is_lost(queries, state.stored), done


def is_state(source: Path) -> bool:
    """Whether ``source`` is a state dict and no Transformers directory: a file, or a torch.distributed.checkpoint directory."""
    return source.is_file() or ((source / METADATA).is_file() and not (source / "config.json").is_file())


def require_plain_options(naming: str, link: bool, trust_remote_code: bool) -> None:
    """Raises ConfigError for options that mean something for Transformers directories alone."""
    given = {"--naming": naming != OWN_NAMING, "--link": link, "--trust-remote-code": trust_remote_code}
    for name, is_given in given.items():
        if is_given:
            raise ConfigError(f"{name} is for Transformers directories; leave it out for a state dict.")


def _done(state: StateFile, destination: Path, action: str, tensors: Sequence[Tensor], dry_run: bool) -> Conversion:
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return Conversion(state.path, destination, dry_run, action, len(tensors), nbytes, (), (), (destination.name,), (), ())


def stored_in(folder: ModelFolder) -> StoredConversion:
    """What config.json says of AttnRes.

    Raises:
        CheckpointError: if it says nothing.
    """
    if CONFIG_KEY not in folder.config:
        raise CheckpointError(f"{folder.path}: was not converted: its config.json has no {CONFIG_KEY}.")
    return StoredConversion.from_dict(folder.config[CONFIG_KEY], str(folder.path / "config.json"))


def new_tensors(stored: StoredConversion, dtype: torch.dtype, host: str = "") -> dict[str, Tensor]:
    """Zero queries and key-norm weights of one for every site, by the names that they get in a checkpoint."""
    sites = list(zip(site_names(stored.layout, stored.config, stored.naming, host), stored.layout, strict=True))
    unused = [(names, stored.layout[0]) for names in unused_names(stored.layout, stored.config, stored.naming)]
    tensors: dict[str, Tensor] = {}
    for names, site in [*unused, *sites]:
        tensors[names.query] = torch.zeros(shape_of_query(names, site.hidden_size), dtype=dtype)
        if names.key_norm is not None:
            tensors[names.key_norm] = torch.ones(site.hidden_size, dtype=dtype)
    return tensors


def shape_of_query(names: SiteNames, hidden_size: int) -> tuple[int, ...]:
    return (1, hidden_size) if names.column else (hidden_size,)


def dtype_named(name: str | None) -> torch.dtype | None:
    """Raises ConfigError for a name that is none of ``DTYPES``."""
    if name is not None and name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; the dtypes are: {', '.join(DTYPES)}.")
    return None if name is None else DTYPES[name]


def common_dtype(dtypes: Iterable[torch.dtype | None]) -> torch.dtype:
    """The most frequent of the dtypes that a parameter can have; float32 where there are only others (8-bit weights)."""
    found = collections.Counter(dtype for dtype in dtypes if dtype is not None and dtype in SAFETENSORS_DTYPES.values())
    return found.most_common(1)[0][0] if found else torch.float32


def what_is_lost(queries: Sequence[Tensor], stored: StoredConversion) -> str:
    """What a model loses with its AttnRes tensors, in a sentence."""
    trained = [query for query in queries if query.count_nonzero()]
    if trained:
        largest = max(query.abs().max().item() for query in trained)
        return (
            f"{len(trained)} of {len(queries)} sites have queries that are not zero (the largest entry is {largest:.3g}): "
            "without AttnRes the model computes something else"
        )
    if stored.config.scale == "paper":
        return (
            "all queries are zero, so nothing learned is lost; but scale='paper' divides what norms read by the number of "
            "sources, which their eps does not hide: without AttnRes outputs differ slightly"
        )
    return "all queries are zero: the model computes the same without AttnRes"


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
