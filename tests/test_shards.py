"""Reading what a weights file or a model directory holds: the figures, and one clear error for everything that is wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import sharded, single, tensors, write_json
from safetensors.torch import save_file

from attnres_compile.checkpoint import files
from attnres_compile.checkpoint.shards import TensorInfo, read_folder, read_shard, read_tensors
from attnres_compile.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def error_of(read: Callable[[Path], object], path: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    assert [word for word in words if word not in message] == [], message
    return message


def shard_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[Any], start: Any, stop: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# One shard

TWO = entry("F32", [2], 0, 8)
TEXT = json.dumps(TWO).encode()
BROKEN = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "no header": b"\0" * 8,
    "header longer than the file": shard_bytes({"a": TWO}, b"\0" * 8, length=10**6),
    "header of 2**63 bytes": shard_bytes({"a": TWO}, b"\0" * 8, length=2**63),
    "header of all bytes there could be": shard_bytes({"a": TWO}, b"\0" * 8, length=2**64 - 1),
    "a pickle": b"\x80\x02}q\x00.",
    "a zip file": b"PK\x03\x04" + bytes(100),
    "a list": shard_bytes([]),
    "null": shard_bytes(b"null"),
    "NaN": shard_bytes(b'{"__metadata__": {"x": NaN}}'),
    "no UTF-8": shard_bytes(b'{"__metadata__": {"x": "\xff"}}'),
    "half a surrogate pair": shard_bytes(b'{"\\ud800": ' + TEXT + b"}", b"\0" * 8),
    "something behind": shard_bytes(b"{}\0\0"),
    "deep nesting": shard_bytes(b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "metadata that is no text": shard_bytes({"__metadata__": {"x": 1}, "a": TWO}, b"\0" * 8),
    "unknown dtype": shard_bytes({"a": entry("F31", [2], 0, 8)}, b"\0" * 8),
    "wrong shape": shard_bytes({"a": entry("F32", [3], 0, 8)}, b"\0" * 8),
    "negative shape": shard_bytes({"a": entry("F32", [-2, -1], 0, 8)}, b"\0" * 8),
    "fractional shape": shard_bytes({"a": entry("F32", [2.0], 0, 8)}, b"\0" * 8),
    "shape that overflows": shard_bytes({"a": entry("F32", [2**62, 4], 0, 0)}),
    "shape beyond 64 bits": shard_bytes({"a": entry("F32", [2**64], 0, 0)}),
    "negative offset": shard_bytes({"a": entry("F32", [2], -8, 0)}, b"\0" * 8),
    "three offsets": shard_bytes({"a": {**TWO, "data_offsets": [0, 8, 8]}}, b"\0" * 8),
    "backwards": shard_bytes({"a": entry("F32", [0], 8, 0)}, b"\0" * 8),
    "a hole": shard_bytes({"a": TWO, "b": entry("F32", [1], 12, 16)}, b"\0" * 16),
    "a hole before all": shard_bytes({"a": entry("F32", [2], 4, 12)}, b"\0" * 12),
    "an overlap": shard_bytes({"a": TWO, "b": entry("F32", [2], 4, 12)}, b"\0" * 12),
    "cut off": shard_bytes({"a": TWO}, b"\0" * 7),
    "bytes of no tensor": shard_bytes({"a": TWO}, b"\0" * 9),
    # What safetensors 0.8 lets pass:
    "a tensor twice": shard_bytes(b'{"a": ' + TEXT + b', "a": ' + TEXT + b"}", b"\0" * 8),
    "a tensor twice, differently": shard_bytes(
        b'{"a": ' + TEXT + b', "a": ' + TEXT.replace(b"F32", b"F16").replace(b"[2]", b"[4]") + b"}", b"\0" * 8
    ),
    "a metadata key twice": shard_bytes(b'{"__metadata__": {"x": "1", "x": "2"}, "a": ' + TEXT + b"}", b"\0" * 8),
    "a tensor described by a list": shard_bytes({"a": ["F32", [2], [0, 8]]}, b"\0" * 8),
    "a number of 5000 digits": shard_bytes(b'{"a": ' + TEXT[:-1] + b', "z": ' + b"1" * 5000 + b"}}", b"\0" * 8),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_shard_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    error_of(read_shard, path, str(path), "save it again")


def test_a_header_beyond_the_limit_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(shard_bytes(b"{}" + b" " * 100_000_000))
    error_of(read_shard, path, "header too large")


def test_a_shard_tells_names_shapes_and_places(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    held = {
        "half": torch.zeros(3, 5, dtype=torch.bfloat16),
        "eight": torch.zeros(7, dtype=torch.float8_e4m3fn),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(1, dtype=torch.int64),
    }
    save_file(held, path, metadata={"format": "pt"})
    shard = read_shard(path)
    assert shard.tensors == {
        "scalar": TensorInfo("I64", (), 8, 0),
        "none": TensorInfo("F32", (0, 4), 0, 8),
        "half": TensorInfo("BF16", (3, 5), 30, 8),
        "eight": TensorInfo("F8_E4M3", (7,), 7, 38),
    }
    assert shard.metadata == {"format": "pt"}
    assert shard.nbytes == 45
    assert shard.header + shard.nbytes == path.stat().st_size
    assert {name: info.width for name, info in shard.tensors.items()} == {"scalar": 8, "none": 0, "half": 2, "eight": 1}


def test_sub_byte_types_unaligned_bytes_and_odd_names_are_no_errors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = {"": entry("F4", [2], 0, 1), "a\nb": entry("F32", [2], 1, 9)}
    path.write_bytes(shard_bytes(header, b"\0" * 9))
    assert read_shard(path).tensors == {"": TensorInfo("F4", (2,), 1, 0), "a\nb": TensorInfo("F32", (2,), 8, 1)}


@pytest.mark.skipif(sys.platform != "linux", reason="counts read bytes as Linux does")
def test_no_weights_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = 2**36
    header = shard_bytes({"a": entry("BF16", [size // 2], 0, size)})
    path.write_bytes(header)
    try:
        os.truncate(path, len(header) + size)
    except OSError:
        pytest.skip("no file of 64 GiB here")

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    for_itself = -bytes_read() + bytes_read()
    before, start = bytes_read(), time.perf_counter()
    assert read_shard(path).nbytes == size
    assert bytes_read() - before - for_itself == len(header)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("kind", ["nothing", "directory", "pipe", "socket", "device", "link in a circle"])
def test_what_is_no_regular_file_is_never_waited_for(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("model.safetensors")
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "link in a circle":
        path.symlink_to(path)
    start = time.perf_counter()
    error_of(read_shard, path, str(path))
    assert time.perf_counter() - start < 1


# A directory


def test_a_folder_of_shards(tmp_path: Path) -> None:
    folder = read_folder(sharded(tmp_path / "model"))
    assert folder.config["model_type"] == "llama"
    assert [shard.path.name for shard in folder.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert folder.index is not None
    assert list(folder.tensors) == list(folder.index["weight_map"]) == [f"model.layers.{i}.weight" for i in range(6)]
    assert folder.tensors["model.layers.3.weight"] is folder.shards[1]
    assert folder.others == (Path("code/modeling.py"), Path("tokenizer.json"))
    assert folder.left_out == ()


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    folder = read_folder(single(tmp_path / "model"))
    assert folder.index is None
    assert [shard.path.name for shard in folder.shards] == ["model.safetensors"]
    assert len(folder.tensors) == 4


def test_what_is_carried_over_and_what_is_not(tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    kept = ("generation_config.json", "vocab.txt", "a/b/c.txt", ".gitattributes", "training_args.bin", "README.md")
    dropped = (
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "consolidated.safetensors",
        "model.fp16.safetensors", "original/consolidated.00.pth", "q4.gguf", "tf_model.h5", "flax_model.msgpack", "last.ckpt",
        "onnx/model.onnx", "optimizer.pt",
    )  # fmt: skip
    ignored = (".git/HEAD", ".cache/huggingface/x.lock", "code/__pycache__/modeling.pyc", "a/.git")
    for name in (*kept, *dropped, *ignored):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("x")
    os.mkfifo(model / "pipe")
    (model / "latest").symlink_to("code", target_is_directory=True)
    folder = read_folder(model)
    assert {path.as_posix() for path in folder.others} == {*kept, "code/modeling.py", "tokenizer.json"}
    assert {path.as_posix() for path in folder.left_out} == {*dropped, "pipe", "latest"}


def test_one_file_counts_before_an_index_as_for_transformers(tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    save_file(tensors(0, 1), model / "model.safetensors")
    folder = read_folder(model)
    assert (folder.index, len(folder.tensors), len(folder.left_out)) == (None, 1, 4)


def test_a_snapshot_in_a_hugging_face_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    plain = sharded(tmp_path / "plain")
    model = Path(shutil.copytree(plain, repository / "snapshots" / "0123abc"))
    for i, path in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{i:040}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    assert set(read_folder(model).tensors) == set(read_folder(plain).tensors)
    # Blobs of another repository are not this one's.
    (tmp_path / "models--org--other").mkdir()
    repository.joinpath("blobs").rename(tmp_path / "models--org--other" / "blobs")
    (repository / "blobs").symlink_to("../models--org--other/blobs")
    error_of(read_folder, model, "outside")


def test_a_folder_by_way_of_a_link(tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    assert read_folder(tmp_path / "link").path == model.resolve()


def test_links_within_the_folder_are_fine(tmp_path: Path) -> None:
    model = single(tmp_path / "model")
    (model / "model.safetensors").rename(model / "weights.dat")
    (model / "model.safetensors").symlink_to("weights.dat")
    assert len(read_folder(model).tensors) == 4


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00003.safetensors", "tokenizer.json", "code/modeling.py"])
def test_links_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    (model / name).rename(tmp_path / "elsewhere")
    (model / name).symlink_to(tmp_path / "elsewhere")
    error_of(read_folder, model, str(model / name), "outside", "replace the link")


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    (model / "vocab.txt").symlink_to("nothing")
    error_of(read_folder, model, "vocab.txt", "No such file")


def test_folders_that_are_none(tmp_path: Path) -> None:
    error_of(read_folder, tmp_path / "nothing", "No such file")
    error_of(read_folder, Path("\0"), "null byte")
    error_of(read_folder, tmp_path, "no config.json")
    write_json(tmp_path / "config.json", {})
    error_of(read_folder, tmp_path, "neither model.safetensors nor", "save_pretrained")
    error_of(read_folder, tmp_path / "config.json", "no directory")


def test_names_that_would_break_a_line_are_escaped(tmp_path: Path) -> None:
    error_of(read_folder, tmp_path / "a\nb\x1b[31m\udcff", r"a\nb\x1b[31m\udcff")


# The index

BAD_INDEXES = {
    "a list": ("[]", "a JSON list"),
    "nothing": ("", "not valid JSON"),
    "half": ('{"weight_map": {', "not valid JSON"),
    "no UTF-8": (b'{"weight_map": {"\xff": 1}}', "utf-8"),
    "NaN": ('{"metadata": {"total_size": NaN}, "weight_map": {}}', "NaN"),
    "a number beyond floats": ('{"metadata": {"total_size": 1e999}, "weight_map": {}}', "too large"),
    "a number of 5000 digits": ('{"metadata": {"total_size": ' + "1" * 5000 + "}}", "digits"),
    "deep nesting": ("[" * 10**6, "nested too deeply"),
    "no map": ('{"metadata": {}}', "no weight_map"),
    "an empty map": ('{"weight_map": {}}', "no weight_map"),
    "a map that is none": ('{"weight_map": ["x"]}', "no weight_map"),
    "the same tensor twice": ('{"weight_map": {"a": "x", "a": "y"}}', "'a' stands twice"),
    "metadata that is none": ('{"metadata": 1, "weight_map": {"a": "x"}}', "metadata"),
    "a negative total": ('{"metadata": {"total_size": -1}, "weight_map": {"a": "x"}}', "total_size"),
    "a total in words": ('{"metadata": {"total_size": "9"}, "weight_map": {"a": "x"}}', "total_size"),
    "a total that is true": ('{"metadata": {"total_parameters": true}, "weight_map": {"a": "x"}}', "total_parameters"),
    "a huge total": ('{"metadata": {"total_size": 9223372036854775808}, "weight_map": {"a": "x"}}', "total_size"),
    "a missing file": ('{"weight_map": {"a": "missing.safetensors"}}', "missing.safetensors"),
    "no shard": ('{"weight_map": {"a": "tokenizer.json"}}', "tokenizer.json"),
    "a directory": ('{"weight_map": {"a": "code"}}', "regular file"),
    "a number for a file": ('{"weight_map": {"a": 7}}', "not a name"),
    **{
        f"a file called {name!r}": (json.dumps({"weight_map": {"a": name}}), "no file in the directory")
        for name in ("", ".", "..", "../other/model.safetensors", "/etc/passwd", "code/../x", "./x", "a//b", "a/")
    },
    "a file with NUL": ('{"weight_map": {"a": "x\\u0000"}}', "null"),
    "a file with half a surrogate pair": ('{"weight_map": {"a": "x\\ud800"}}', r"x\ud800"),
    "a file with a long name": (json.dumps({"weight_map": {"a": "x" * 300}}), "too long"),
}


@pytest.mark.parametrize(("content", "word"), BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_a_bad_index_is_one_clear_error(content: str | bytes, word: str, tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    (model / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    error_of(read_folder, model, str(model), word)


def test_an_index_and_shards_that_disagree(tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    index = json.loads((model / INDEX).read_text())
    first, last = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"

    def with_map(**changes: str | None) -> None:
        names = {**index["weight_map"], **changes}
        write_json(model / INDEX, {**index, "weight_map": {name: file for name, file in names.items() if file}})

    with_map(**{"model.layers.9.weight": first})
    error_of(read_folder, model, INDEX, first, "'model.layers.9.weight', which it does not")
    with_map(**{"model.layers.0.weight": None})
    error_of(read_folder, model, INDEX, first, "'model.layers.0.weight', which it does")
    with_map(**{"model.layers.0.weight": last})
    error_of(read_folder, model, INDEX, last, "'model.layers.0.weight', which it does not")
    with_map()
    save_file({**tensors(4, 2), **tensors(0, 1)}, model / last)
    error_of(read_folder, model, INDEX, last, "'model.layers.0.weight', which it does")


def test_a_tensor_name_of_a_megabyte_does_not_fill_the_screen(tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    write_json(model / INDEX, {"weight_map": {"x" * 10**6: "tokenizer.json"} | {"\n" * 10**6: 1}})
    error_of(read_folder, model)


def test_shards_in_subdirectories(tmp_path: Path) -> None:
    model = sharded(tmp_path / "model")
    (model / "model-00001-of-00003.safetensors").rename(model / "code" / "first.safetensors")
    text = (model / INDEX).read_text()
    (model / INDEX).write_text(text.replace("model-00001-of-00003.safetensors", "code/first.safetensors"))
    assert len(read_folder(model).tensors) == 6


def test_config_may_hold_infinity_but_nothing_else_that_is_no_json(tmp_path: Path) -> None:
    model = single(tmp_path / "model")
    (model / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_folder(model).config == {"time_step_limit": [0.0, float("inf")]}
    (model / "config.json").write_text('{"a": 1, "a": 1}')
    error_of(read_folder, model, "config.json", "stands twice")


def test_json_files_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = single(tmp_path / "model")
    monkeypatch.setattr(files, "JSON_LIMIT", 100)
    error_of(read_folder, model, "config.json", "bytes long, more than the 100")


# Tensors


def test_tensors_are_read_by_name(tmp_path: Path) -> None:
    folder = read_folder(sharded(tmp_path / "model"))
    names = ["model.layers.5.weight", "model.layers.0.weight"]
    found = read_tensors(folder, names)
    assert list(found) == names
    assert torch.equal(found[names[0]], tensors(4, 2)[names[0]])
    assert torch.equal(read_tensors(folder.shards[0], names[1:])[names[1]], tensors(0, 2)[names[1]])
    os.truncate(folder.shards[2].path, 0)  # what was read is no view of the file
    assert torch.equal(found[names[0]], tensors(4, 2)[names[0]])


def test_tensors_that_cannot_be_read(tmp_path: Path) -> None:
    folder = read_folder(sharded(tmp_path / "model"))
    error_of(lambda _: read_tensors(folder, ["x"]), folder.path, "no tensor 'x'")
    error_of(lambda _: read_tensors(folder.shards[0], ["model.layers.5.weight"]), folder.path, "no tensor")
    os.truncate(folder.shards[0].path, 100)
    error_of(lambda _: read_tensors(folder, ["model.layers.0.weight"]), folder.path, "'model.layers.0.weight' can't be read")
