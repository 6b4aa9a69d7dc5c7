"""State dicts in one file, of safetensors or of ``torch.save``: names, what they say of AttnRes, and changed copies."""

from __future__ import annotations

import collections
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attnres_compile.checkpoint.copying import write_shard
from attnres_compile.checkpoint.files import describe, open_regular, parse_object, problem
from attnres_compile.checkpoint.progress import progress_bar
from attnres_compile.checkpoint.shards import read_shard, read_tensors
from attnres_compile.checkpoint.staging import staged_file
from attnres_compile.errors import CheckpointError
from attnres_compile.layout import CONFIG_KEY, StoredConversion
from attnres_compile.parameters import ATTRIBUTE
from attnres_compile.places import first_line

METADATA = ".metadata"
"""The file that makes a directory one of torch.distributed.checkpoint."""


class StateFile(Protocol):
    """A checkpoint that holds a state dict, whatever its format."""

    path: Path
    is_directory: bool

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of every tensor, by its name."""

    @property
    def stored(self) -> StoredConversion | None:
        """What the checkpoint says of its AttnRes, None where it has none."""

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """These tensors, in memory."""

    def write(
        self, destination: Path, removed: Collection[str], added: Mapping[str, Tensor], stored: StoredConversion | None,
        overwrite: bool,
    ) -> None:  # fmt: skip
        """Write a copy without the tensors ``removed``, with those ``added``, that says ``stored`` of them; all or nothing."""


def prefix_of(model: nn.Module, state: StateFile) -> str:
    """What stands before the model's own names in the state dict, such as "model." or "module.".

    Raises:
        CheckpointError: if tensors of the model are missing.
    """
    names, present = list(model.state_dict()), state.dtypes.keys()
    candidates = sorted({name.removesuffix(names[0]) for name in present if name.endswith(names[0])}, key=len) if names else []
    for prefix in candidates:
        if all(prefix + name in present for name in names):
            return prefix
    prefix = candidates[0] if candidates else ""
    missing = [prefix + name for name in names if prefix + name not in present]
    first = f"the first is {missing[0]}" if missing else "the model has no tensors"
    raise CheckpointError(f"{state.path}: lacks {len(missing)} of the {len(names)} tensors of {type(model).__name__}; {first}.")


class SafetensorsFile:
    """One safetensors file. What it says of AttnRes stands in its metadata, as JSON."""

    is_directory = False

    def __init__(self, path: Path) -> None:
        self.path, self.shard = path, read_shard(path)

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: SAFETENSORS_DTYPES.get(info.dtype, torch.uint8) for name, info in self.shard.tensors.items()}

    @property
    def stored(self) -> StoredConversion | None:
        text = self.shard.metadata.get(CONFIG_KEY)
        place = f"{self.path}: the entry {CONFIG_KEY} of its metadata"
        return None if text is None else StoredConversion.from_dict(parse_object(text.encode(), place), str(self.path))

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        return read_tensors(self.shard, names)

    def write(
        self, destination: Path, removed: Collection[str], added: Mapping[str, Tensor], stored: StoredConversion | None,
        overwrite: bool,
    ) -> None:  # fmt: skip
        metadata = {key: value for key, value in self.shard.metadata.items() if key != CONFIG_KEY}
        if stored is not None:
            metadata[CONFIG_KEY] = json.dumps(stored.to_dict())
        with staged_file(destination, overwrite) as partial, progress_bar(destination.name, self.shard.nbytes) as progress:
            write_shard(partial, self.shard, frozenset(removed), added, metadata, progress)


class TorchFile:
    """What ``torch.save`` wrote of a state dict, alone or in a dict with an optimizer's state and so on.

    What it says of AttnRes stands in the state dict's own metadata, where ``load_state_dict`` looks at it.
    """

    is_directory = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = _torch_load(path)
        self.state = _state_in(self.content)
        if self.state is None:
            raise problem(path, "holds no state dict: no dict of names and tensors, neither outermost nor one level below")

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: value.dtype for name, value in self.state.items() if isinstance(value, Tensor)}

    @property
    def stored(self) -> StoredConversion | None:
        for name, entry in getattr(self.state, "_metadata", {}).items():
            if name.rpartition(".")[2] == ATTRIBUTE and isinstance(entry, dict) and CONFIG_KEY in entry:
                return StoredConversion.from_dict(entry[CONFIG_KEY], str(self.path))
        return None

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        return {name: self.state[name] for name in names}

    def write(
        self, destination: Path, removed: Collection[str], added: Mapping[str, Tensor], stored: StoredConversion | None,
        overwrite: bool,
    ) -> None:  # fmt: skip
        changed = collections.OrderedDict((name, value) for name, value in self.state.items() if name not in removed)
        changed.update(added)
        metadata = {
            name: entry for name, entry in getattr(self.state, "_metadata", {}).items() if ATTRIBUTE not in name.split(".")
        }
        if stored is not None:
            host = next(iter(added)).partition(f"{ATTRIBUTE}.sites.")[0]
            metadata[f"{host}{ATTRIBUTE}"] = {"version": 1, CONFIG_KEY: stored.to_dict()}
        changed._metadata = metadata  # type: ignore[attr-defined]
        content: Any = changed
        if self.content is not self.state:
            content = {key: changed if value is self.state else value for key, value in self.content.items()}
        with staged_file(destination, overwrite) as partial, partial.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise problem(destination, f"can't be written: {describe(error)}") from error


SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def _torch_load(path: Path) -> Any:
    """The content of a file of ``torch.save``, tensors mapped where the format allows it; no code of the file runs."""
    descriptor, _ = open_regular(path)
    with open(descriptor, "rb") as file:
        mappable = file.read(2) == b"PK"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # torch documents no classes for what damaged files lead to
        raise problem(
            path, f"is no state dict that torch.load(weights_only=True) reads ({type(error).__name__}: {first_line(str(error))})"
        ) from error


def _state_in(content: Any) -> Any:
    """The mapping from names to tensors: the content itself or the largest of its entries that is one."""
    if not isinstance(content, dict):
        return None
    entries = [content, *(value for value in content.values() if isinstance(value, dict))]
    states = [entry for entry in entries if any(isinstance(value, Tensor) for value in entry.values())]
    states = [entry for entry in states if all(isinstance(name, str) for name in entry)]
    return max(states, key=len, default=None)
