"""A model directory with AttnRes tensors added or taken out: a new directory, in which no weight is read or changed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnres_compile.checkpoint.copying import as_safetensors, create, place, write_shard
from attnres_compile.checkpoint.files import problem, quoted, reading, writing
from attnres_compile.checkpoint.progress import progress_bar
from attnres_compile.checkpoint.shards import CONFIG, INDEX, WEIGHTS, ModelFolder, Shard, check_totals
from attnres_compile.checkpoint.staging import check_destination, staged

if TYPE_CHECKING:
    from torch import Tensor

ADDED = "model-attnres.safetensors"
ONLY_SHARD = "model-00001-of-00001.safetensors"
LINKED_FROM = 16 * 2**20  # bytes; a smaller file may be edited in place, which would change the source through a link


@dataclasses.dataclass(frozen=True)
class NewTensors:
    """What a conversion adds: tensors by the names that they get in the file, and entries of config.json."""

    tensors: Mapping[str, Tensor]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done, or in a dry run would be: ``tensors`` of ``nbytes`` bytes "added" or "removed" (``action``).

    Files are named as in ``destination``, and as in ``source`` where they were left out.
    """

    source: Path
    destination: Path
    dry_run: bool
    action: str
    tensors: int
    nbytes: int
    linked: tuple[str, ...]
    copied: tuple[str, ...]
    written: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {**dataclasses.asdict(self), "source": str(self.source), "destination": str(self.destination)}

    def __str__(self) -> str:
        would = "would be " if self.dry_run else ""
        files = f"files: {len(self.linked)} linked, {len(self.copied)} copied, {len(self.written)} written"
        return "\n".join(
            [
                f"{self.source} -> {self.destination}",
                f"{self.tensors} tensors ({self.nbytes:,} bytes) {would}{self.action}",
                f"{files}, {len(self.left_out)} left out",
                *self.notes,
            ]
        )


@dataclasses.dataclass(frozen=True)
class _Files:
    """Of what a destination is made, by the names there: whole shards, shards without some tensors, other files, new ones."""

    shards: dict[str, Path]
    thinned: dict[str, Shard]
    others: dict[str, Path]
    written: dict[str, bytes]


def write_converted(
    folder: ModelFolder, new: NewTensors, dst: Path, *, link: bool = False, overwrite: bool = False, dry_run: bool = False
) -> Conversion:
    """Write ``folder`` with ``new`` as the directory ``dst``: one more shard, which the index names, and a new config.json.

    Args:
        link: make hard links of weights and other large files instead of copies.
        overwrite: replace a model directory ``dst``, once the new one is complete.
        dry_run: check all that can be checked, and write nothing.

    Raises:
        CheckpointError: if ``folder`` was converted before, or ``dst`` can't be written. It is then what it was.
    """
    present = [key for key in new.config if folder.config.get(key) is not None]
    present += [name for name in new.tensors if name in folder.tensors]
    present += [ADDED] if ADDED in {_name_of(shard, folder) for shard in folder.shards} else []
    if present:
        what = f"has {quoted(present[0])} already, so it was converted before"
        raise problem(folder.path, f"{what}; take that out first: attnres convert --reverse SRC DST")
    nbytes = sum(tensor.nbytes for tensor in new.tensors.values())
    done = Conversion(folder.path, dst, dry_run, "added", len(new.tensors), nbytes, (), (), (), (), ())
    return _change(folder, (), (), new, done, link, overwrite)


def write_renamed(
    folder: ModelFolder, names: Collection[str], config_keys: Collection[str], new: NewTensors, dst: Path, *, link: bool = False,
    overwrite: bool = False, dry_run: bool = False,
) -> Conversion:  # fmt: skip
    """Write ``folder`` as ``dst`` with ``new`` instead of ``names`` and ``config_keys``; see the other two functions."""
    nbytes = sum(tensor.nbytes for tensor in new.tensors.values())
    done = Conversion(folder.path, dst, dry_run, "renamed", len(new.tensors), nbytes, (), (), (), (), ())
    return _change(folder, names, config_keys, new, done, link, overwrite)


def write_reverted(
    folder: ModelFolder,
    names: Collection[str],
    config_keys: Collection[str],
    dst: Path,
    *,
    link: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Conversion:
    """Write ``folder`` as ``dst`` without the tensors ``names``, and without those of ``config_keys`` that it has.

    What was converted gets back weight files that equal the original's byte for byte. ``link``, ``overwrite`` and
    ``dry_run`` are those of ``write_converted``.

    Raises:
        CheckpointError: if a tensor is not there, or no other one is, or ``dst`` can't be written. It is then what it was.
    """
    for name in sorted(set(names) - folder.tensors.keys()):
        raise problem(folder.path, f"has no tensor {quoted(name)} to take out; convert the original again")
    nbytes = sum(folder.tensors[name].tensors[name].nbytes for name in names)
    done = Conversion(folder.path, dst, dry_run, "removed", len(names), nbytes, (), (), (), (), ())
    return _change(folder, names, config_keys, NewTensors({}, {}), done, link, overwrite)


def _change(
    folder: ModelFolder, names: Collection[str], config_keys: Collection[str], new: NewTensors, done: Conversion, link: bool,
    overwrite: bool,
) -> Conversion:  # fmt: skip
    """Write ``folder`` without ``names`` and ``config_keys``, and with ``new``."""
    dropped = frozenset(names)
    kept = {_name_of(shard, folder): shard for shard in folder.shards if shard.tensors.keys() - dropped}
    places = {name: _name_of(shard, folder) for name, shard in folder.tensors.items() if name not in dropped}
    if not kept:
        raise problem(folder.path, "has no other tensors than those to take out, so nothing would be left")
    config = {key: value for key, value in folder.config.items() if key not in config_keys} | new.config
    written = {CONFIG: _as_json(config, folder.path / CONFIG)}
    infos = [folder.tensors[name].tensors[name] for name in dropped]
    nbytes = sum(tensor.nbytes for tensor in new.tensors.values()) - sum(info.nbytes for info in infos)
    elements = sum(tensor.numel() for tensor in new.tensors.values()) - sum(math.prod(info.shape) for info in infos)
    if new.tensors:
        if "transformers_weights" in folder.config:
            raise problem(folder.path / CONFIG, "transformers_weights would hide the added tensors; remove that entry")
        if kept.keys() == {WEIGHTS}:  # Transformers reads no index beside it
            kept, places = {ONLY_SHARD: kept[WEIGHTS]}, dict.fromkeys(places, ONLY_SHARD)
            done = dataclasses.replace(done, notes=(f"{WEIGHTS} is now called {ONLY_SHARD}, as it has an index",))
        places |= dict.fromkeys(new.tensors, ADDED)
    elif kept.keys() == {ONLY_SHARD}:
        kept, places = {WEIGHTS: kept[ONLY_SHARD]}, {}
    if new.tensors or (folder.index is not None and places):
        written[INDEX] = _as_json(_index(folder, places, nbytes, elements), folder.path / INDEX)
    if new.tensors:
        written[ADDED] = as_safetensors(new.tensors)
    thinned = {name: shard for name, shard in kept.items() if shard.tensors.keys() & dropped}
    shards = {name: shard.path for name, shard in kept.items() if name not in thinned}
    return _write(folder, _Files(shards, thinned, _others(folder), written), dropped, done, link, overwrite)


def _write(
    folder: ModelFolder, files: _Files, dropped: frozenset[str], done: Conversion, link: bool, overwrite: bool
) -> Conversion:
    with writing(done.destination):
        _require_apart(folder.path, check_destination(done.destination, overwrite))
    carried = files.shards | files.others
    with reading(folder.path):
        sizes = {name: path.stat().st_size for name, path in carried.items()}
    linked = [name for name in carried if link and (name in files.shards or sizes[name] >= LINKED_FROM)]
    copied = [name for name in carried if name not in linked]
    done = dataclasses.replace(
        done,
        linked=tuple(linked),
        copied=tuple(copied),
        written=(*files.thinned, *files.written),
        left_out=tuple(path.as_posix() for path in folder.left_out),
        notes=(*done.notes, *(f"left out: {path}" for path in folder.left_out)),
    )
    if done.dry_run:
        return done
    total = sum(sizes[name] for name in copied) + sum(shard.nbytes for shard in files.thinned.values())
    with staged(done.destination, overwrite) as partial, progress_bar(f"{done.destination.name}", total) as progress:
        for name in (*carried, *files.thinned):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
        for name, source in carried.items():
            place(source, partial / name, name in linked, progress)
        for name, shard in files.thinned.items():
            write_shard(partial / name, shard, dropped, {}, shard.metadata, progress)
        for name, content in files.written.items():
            with create(partial / name) as file:
                file.write(content)
    return done


def _require_apart(source: Path, destination: Path) -> None:
    """Neither may be, or contain, the other, by whatever path."""
    inner = destination.parent.resolve() / destination.name
    if inner.exists() and inner.samefile(source):
        raise problem(destination, "is the source itself; choose another name")
    if any(parent.samefile(source) for parent in inner.parents):
        raise problem(destination, f"lies in the source {source}; choose a place beside it")
    if inner.exists() and any(parent.samefile(inner) for parent in source.parents):
        raise problem(destination, f"contains the source {source}; choose a place beside it")


def _name_of(shard: Shard, folder: ModelFolder) -> str:
    return shard.path.relative_to(folder.path).as_posix()


def _others(folder: ModelFolder) -> dict[str, Path]:
    return {path.as_posix(): folder.path / path for path in folder.others}


def _index(folder: ModelFolder, places: dict[str, str], nbytes: int, elements: int) -> dict[str, Any]:
    """The index of ``folder`` with ``places`` as its map, and its totals changed by ``nbytes`` and ``elements``."""
    old = folder.index or {}
    metadata = dict(old.get("metadata", {}))
    metadata["total_size"] = max(0, metadata.get("total_size", sum(shard.nbytes for shard in folder.shards)) + nbytes)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = max(0, metadata["total_parameters"] + elements)
    check_totals(folder.path / INDEX, metadata)
    return {**old, "metadata": metadata, "weight_map": places}


def _as_json(content: dict[str, Any], path: Path) -> bytes:
    """``content`` as Transformers writes it; ``path`` names in errors where it is from."""
    try:
        return f"{json.dumps(content, indent=2)}\n".encode()
    except RecursionError as error:
        raise problem(path, "is nested too deeply for a JSON file of a model; save it again") from error
