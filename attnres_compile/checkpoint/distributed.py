"""State dicts in directories of torch.distributed.checkpoint, read without running code that their metadata could hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from attnres_compile.checkpoint.copying import create, place
from attnres_compile.checkpoint.files import describe, open_regular, problem, quoted, read_object
from attnres_compile.checkpoint.shards import contained
from attnres_compile.checkpoint.staging import staged
from attnres_compile.checkpoint.state_files import METADATA
from attnres_compile.layout import CONFIG_KEY, StoredConversion

CONVERSION = f"{CONFIG_KEY}.json"
ADDED = "__attnres.distcp"

# All that the metadata of torch.distributed.checkpoint is made of; unpickling anything else could run anything.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device", *(name for name in dir(torch) if isinstance(getattr(torch, name), (torch.dtype, torch.layout)))},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset", "list", "dict", "tuple", "int", "str", "bytes"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads metadata without running its code; the tensors themselves torch reads with ``weights_only``."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._known = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._known


class DistributedState:
    """A directory that ``torch.distributed.checkpoint.save`` wrote, with any number of files and layouts of tensors.

    What it says of AttnRes stands in a file of its own, attnres_config.json.
    """

    is_directory = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = _read_metadata(path)
        self.files = sorted({str(info.relative_path) for info in self.metadata.storage_data.values()})
        for file in self.files:
            contained(path.resolve(), Path(file))

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        entries = self.metadata.state_dict_metadata.items()
        return {name: entry.properties.dtype for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    @property
    def stored(self) -> StoredConversion | None:
        path = self.path / CONVERSION
        return StoredConversion.from_dict(read_object(path), str(path)) if path.exists() else None

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        entries: Mapping[str, Any] = self.metadata.state_dict_metadata
        tensors = {name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype) for name in names}
        # torch documents no classes for what damaged files lead to, so all are caught.
        try:
            load(tensors, storage_reader=_Reader(self.path, self.metadata), no_dist=True)
        except Exception as error:
            raise problem(self.path, f"its tensors can't be read ({type(error).__name__}: {describe(error)})") from error
        return tensors

    def write(
        self, destination: Path, removed: Collection[str], added: Mapping[str, Tensor], stored: StoredConversion | None,
        overwrite: bool,
    ) -> None:  # fmt: skip
        """Data files are copied as they are; the metadata then lists what belongs to the copy."""
        metadata = self.metadata
        entries = {name: entry for name, entry in metadata.state_dict_metadata.items() if name not in removed}
        places = {index: info for index, info in metadata.storage_data.items() if index.fqn in entries}
        planner = metadata.planner_data
        if isinstance(planner, dict):
            planner = {name: path for name, path in planner.items() if name in entries}
        with staged(destination, overwrite) as partial:
            for name in sorted({str(info.relative_path) for info in places.values()}):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                place(contained(self.path.resolve(), Path(name)), partial / name, link=False)
            if added:
                new = _save_alone(added, partial / ADDED)
                entries |= new.state_dict_metadata
                for index, info in new.storage_data.items():
                    places[index] = type(info)(ADDED, info.offset, info.length)
                if isinstance(planner, dict):
                    planner |= {name: _path_like(name, metadata.planner_data) for name in added}
            if stored is not None:
                with create(partial / CONVERSION) as file:
                    file.write(f"{json.dumps(stored.to_dict(), indent=2)}\n".encode())
            changed = Metadata(entries, planner, places, metadata.storage_meta, metadata.version)
            with create(partial / METADATA) as file:
                pickle.dump(changed, file)


def _save_alone(tensors: Mapping[str, Tensor], target: Path) -> Metadata:
    """Let torch write ``tensors`` as the one data file ``target``, and give back what it says of them."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
        save(dict(tensors), storage_writer=writer, no_dist=True)
        metadata = _read_metadata(Path(folder))
        (file,) = {str(info.relative_path) for info in metadata.storage_data.values()}
        os.replace(Path(folder) / file, target)
    return metadata


def _path_like(name: str, planner: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where a flattened name stood in nested dicts: below the entry that the checkpoint's other tensors stand below."""
    for path in planner.values():
        if len(path) > 1 and all(isinstance(part, str) for part in path) and name.startswith(f"{path[0]}."):
            return (path[0], name.removeprefix(f"{path[0]}."))
    return (name,)


def _read_metadata(folder: Path) -> Metadata:
    descriptor, _ = open_regular(folder / METADATA)
    with open(descriptor, "rb") as file:
        content = file.read()
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise problem(
            folder / METADATA, f"is no metadata of torch.distributed.checkpoint ({type(error).__name__}: {describe(error)})"
        ) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise problem(folder / METADATA, f"holds {quoted(type(metadata).__name__)}, no metadata of torch.distributed.checkpoint")
    return metadata
