"""What a weights file or a model directory holds: names, shapes and places, without reading weights."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from attnres_compile.checkpoint.files import (
    describe,
    entries,
    open_regular,
    parse_object,
    problem,
    quoted,
    read_object,
    reading,
    resolved,
)

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Other copies of the weights, and states of a training that they belong to: none of them would have AttnRes.
_OTHER_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "consolidated*.bin", "openvino_model*", "*.pt", "*.pth",
    "*.gguf", "*.ggml", "*.msgpack*", "*.h5*", "*.ckpt*", "*.onnx", "*.onnx_data*", "*.tflite", "*.mlmodel",
)  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes, for safetensors
_NOT_THE_MODEL = frozenset((".git", ".cache", "__pycache__"))


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: safetensors' name of its dtype, its shape, and ``nbytes`` bytes from ``start`` on in the data."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int

    @property
    def width(self) -> float:
        """Bytes per element, 0 where there is none."""
        elements = math.prod(self.shape)
        return self.nbytes / elements if elements else 0.0


@dataclasses.dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, which follow ``header`` bytes and are ``nbytes`` long."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    nbytes: int
    header: int


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A Transformers model directory: ``path`` without symbolic links, what config.json holds, and where the weights are.

    ``index`` is what model.safetensors.index.json holds, None where the weights are one file. ``others`` are all files
    besides, relative to ``path``: tokenizer, code and so on. ``left_out`` are entries that belong to no converted copy:
    weights in other formats or that Transformers doesn't read, which would lack AttnRes, and what is no regular file.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    others: tuple[Path, ...]
    left_out: tuple[Path, ...]

    @functools.cached_property
    def tensors(self) -> dict[str, Shard]:
        """The shard of every tensor, by the tensor's name, in the order of the index."""
        by_name = {name: shard for shard in self.shards for name in shard.tensors}
        return by_name if self.index is None else {name: by_name[name] for name in self.index["weight_map"]}


def read_shard(path: Path) -> Shard:
    """Read the header of the safetensors file ``path`` and none of its weights.

    Raises:
        CheckpointError: if the file can't be read or isn't a whole and unambiguous safetensors file.
    """
    descriptor, size = open_regular(path)  # first of all: safetensors would wait for a pipe
    try:
        with reading(path):
            if hasattr(os, "posix_fadvise"):  # else the system reads megabytes behind the header
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            length = int.from_bytes(os.read(descriptor, 8), "little")
            header = os.read(descriptor, min(length, size, _LONGEST_HEADER))
            # safetensors' own parser checks sizes, dtypes and offsets, with neither holes nor overlaps; it maps the file into
            # memory and touches only the header. It lets names stand twice, which ours does not.
            with safe_open(path, framework="np"):
                tensors, metadata = parse_header(header, path)
    except SafetensorError as error:
        why = describe(error).removeprefix("Error while deserializing header: ")
        raise problem(path, f"is not a whole safetensors file ({why}); download or save it again") from error
    finally:
        os.close(descriptor)
    return Shard(path, tensors, metadata, size - 8 - length, 8 + length)


def parse_header(content: bytes, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors, in the order of their bytes, and the metadata that a header describes, which safetensors has accepted.

    Raises:
        CheckpointError: if it is ambiguous; ``path`` is where it is from.
    """
    header = parse_object(content, f"{path}: the header")
    metadata = header.pop("__metadata__", None) or {}
    if not all(isinstance(entry, dict) for entry in header.values()):  # safetensors takes a list of the three values, too
        raise problem(path, "describes a tensor by something else than a JSON object; save it again")
    in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {name: _info(**entry) for name, entry in in_order}, metadata


def _info(dtype: str, shape: list[int], data_offsets: tuple[int, int], **_: Any) -> TensorInfo:
    start, stop = data_offsets
    return TensorInfo(dtype, tuple(shape), stop - start, start)


def read_folder(path: Path) -> ModelFolder:
    """Read config.json, the index and the headers of all shards of the Transformers model directory ``path``.

    Where there are both, model.safetensors counts and an index does not, as for Transformers.

    Raises:
        CheckpointError: if something is missing, damaged, contradictory, or outside the directory. A snapshot of a Hugging
            Face cache may link to the blobs of its own repository.
    """
    with reading(path):
        return _read_folder(path, resolved(path))


def _read_folder(path: Path, root: Path) -> ModelFolder:
    if not root.is_dir():
        raise problem(path, "is no directory; give a directory with config.json and safetensors weights")
    present = dict(entries(root, _NOT_THE_MODEL))
    if Path(CONFIG) not in present:
        raise problem(path, f"has no {CONFIG}, so it is no Transformers model directory")
    config = read_object(contained(root, Path(CONFIG)), constants=True)  # Transformers writes Infinity
    index = None
    if Path(WEIGHTS) in present:
        names = {WEIGHTS}
    elif Path(INDEX) in present:
        index = read_object(contained(root, Path(INDEX)))
        names = _check_index(root / INDEX, index)
    else:
        raise problem(path, f"has neither {WEIGHTS} nor {INDEX}; save the model with safetensors first (save_pretrained)")
    shards = tuple(_read_contained(root, name) for name in sorted(names))
    if index is not None:
        _check_places(root / INDEX, index["weight_map"], shards)
    used = {CONFIG, *names} if index is None else {CONFIG, INDEX, *names}
    rest = sorted(entry for entry in present if entry.as_posix() not in used)
    left_out = {entry for entry in rest if not present[entry] or any(fnmatch.fnmatch(entry.name, p) for p in _OTHER_WEIGHTS)}
    others = tuple(entry for entry in rest if entry not in left_out)
    for other in others:
        contained(root, other)
    return ModelFolder(root, config, shards, index, others, tuple(sorted(left_out)))


def read_tensors(source: ModelFolder | Shard, names: Collection[str]) -> dict[str, Tensor]:
    """Read the tensors ``names``, which should be small, into memory of their own.

    Raises:
        CheckpointError: if one is not there, or torch has no such dtype.
    """
    tensors: dict[str, Tensor] = {}
    places = source.tensors if isinstance(source, ModelFolder) else dict.fromkeys(source.tensors, source)
    for name in names:
        if name not in places:
            raise problem(source.path, f"has no tensor {quoted(name)}; convert the model again")
        path = places[name].path
        try:
            with safe_open(path, framework="pt") as file:
                tensors[name] = file.get_tensor(name).clone()  # what it gives may lie in the mapped file
        except (SafetensorError, OSError, AttributeError, TypeError) as error:
            raise problem(path, f"the tensor {quoted(name)} can't be read: {describe(error)}") from error
    return tensors


def check_totals(place: Path, metadata: dict[str, Any]) -> None:
    """The totals in the metadata of the index ``place`` must be numbers of bytes and elements, where they are given.

    Raises:
        CheckpointError: if not.
    """
    for key in ("total_size", "total_parameters"):
        count = metadata.get(key, 0)
        if isinstance(count, bool) or not isinstance(count, (int, float)) or not 0 <= count < 2**63:
            raise problem(place, f"{key} is {quoted(count)} and not a number in [0, 2**63); save the model again")


def contained(root: Path, relative: Path) -> Path:
    """The file that ``relative`` names in the directory ``root``, symbolic links followed.

    Raises:
        CheckpointError: if it is missing, or outside both ``root`` and the blobs of the Hugging Face cache around ``root``.
    """
    target = resolved(root / relative)
    in_cache = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    if not target.is_relative_to(root) and not (in_cache and target.parent == root.parent.parent / "blobs"):
        raise problem(root / relative, f"lies outside the directory, at {target}; replace the link with the file")
    return target


def _check_index(place: Path, index: dict[str, Any]) -> set[str]:
    """The names of the shards in ``index``, once its types and their spelling are checked."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise problem(place, "has no weight_map from tensors to files; save the model again")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise problem(place, f"the file of tensor {quoted(tensor)} is {quoted(name)} and not a name; save the model again")
        pure = PurePosixPath(name)
        if name in ("", ".") or pure.is_absolute() or ".." in pure.parts or str(pure) != name:
            raise problem(place, f"the file of tensor {quoted(tensor)} is {quoted(name)}, which is no file in the directory")
        names.add(name)
    metadata = index.get("metadata", {})
    if not isinstance(metadata, dict):
        raise problem(place, "metadata is no JSON object; save the model again")
    check_totals(place, metadata)
    return names


def _read_contained(root: Path, name: str) -> Shard:
    contained(root, Path(name))
    return read_shard(root / name)


def _check_places(place: Path, weight_map: dict[str, str], shards: tuple[Shard, ...]) -> None:
    """Index and shards must agree on every tensor."""
    root = place.parent
    held = {shard.path.relative_to(root).as_posix(): shard for shard in shards}
    for tensor, name in weight_map.items():
        if tensor not in held[name].tensors:
            raise problem(place, f"says that {name} holds {quoted(tensor)}, which it does not; save the model again")
    for name, shard in held.items():
        extra = next((tensor for tensor in shard.tensors if weight_map.get(tensor) != name), None)
        if extra is not None:
            raise problem(place, f"does not say that {name} holds {quoted(extra)}, which it does; save the model again")
