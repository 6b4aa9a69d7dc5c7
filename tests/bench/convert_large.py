"""``attnres convert --link`` of a Llama-3-70B directory: seconds, memory, and the bytes of its shards that are read.

The directory has the names, shapes and headers of the real one, 141 GB in shards of at most 5 GB; their data are holes of
sparse files, which take no space on disk. Linking doesn't depend on what is in them; a copy would.

What is read of the shards is counted twice. Pages of them that are in the page cache afterwards, and were not before, bound
what was read in any way, by mapping too, with the read-ahead of the kernel. Where strace is installed, a second run counts
what system calls returned from descriptors of shards. Peak memory is that of the process, as the kernel tells its parent.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

LAYERS, WIDTH, INNER, VOCABULARY, KEY_VALUE_WIDTH = 80, 8192, 28672, 128256, 1024
SHARD_LIMIT = 5 * 10**9  # bytes
INDEX = "model.safetensors.index.json"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_attention_heads": 64, "num_hidden_layers": LAYERS, "num_key_value_heads": 8, "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One conversion: seconds and bytes; ``mapped`` bounds what was read of the shards, ``returned`` is None if unknown."""

    seconds: float
    peak_memory: int
    mapped: int
    returned: int | None


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of Llama-3-70B, in the order of its checkpoint."""
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (WIDTH,)
        for name, rows, columns in (
            ("mlp.down_proj", WIDTH, INNER),
            ("mlp.gate_proj", INNER, WIDTH),
            ("mlp.up_proj", INNER, WIDTH),
            ("self_attn.k_proj", KEY_VALUE_WIDTH, WIDTH),
            ("self_attn.o_proj", WIDTH, WIDTH),
            ("self_attn.q_proj", WIDTH, WIDTH),
            ("self_attn.v_proj", KEY_VALUE_WIDTH, WIDTH),
        ):
            yield f"{layer}{name}.weight", (rows, columns)
        yield layer + "post_attention_layernorm.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCABULARY, WIDTH)


def build(folder: Path) -> int:
    """Write the directory and return the bytes of its tensors."""
    folder.mkdir()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes():
        nbytes = 2 * math.prod(shape)
        if filled + nbytes > SHARD_LIMIT:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    weight_map, total = {}, 0
    for i, held in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        total += write_shard(folder / file, held)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, content in (("config.json", CONFIG), (INDEX, index), ("tokenizer_config.json", {})):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return total


def write_shard(path: Path, held: dict[str, tuple[int, ...]]) -> int:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in held.items():
        nbytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (at, at + nbytes)}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)
    return at


def convert(source: Path, destination: Path, options: list[str], prefix: list[str]) -> tuple[float, int]:
    """Run the command and return its seconds and the most memory that it had, in bytes."""
    command = [*prefix, sys.executable, "-m", "attnres_compile", "convert", str(source), str(destination), *options]
    start = time.perf_counter()
    with open(destination.with_suffix(".log"), "w+") as log:
        # In another directory than a checkout, whose folder kernels/ would pass for a package of that name.
        process = subprocess.Popen(command, cwd=source.parent, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed: {log.read()}")
    return seconds, usage.ru_maxrss * 1024


def resident(paths: list[Path]) -> int:
    """Bytes of these files that are in the page cache."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    libc.mmap.restype, pages = ctypes.c_void_p, 0
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    for path in paths:
        size = path.stat().st_size
        with open(path, "rb") as file:
            address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
            here = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), here):
                raise OSError(ctypes.get_errno(), f"mincore of {path}")
            libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
        pages += sum(byte & 1 for byte in bytes(here).replace(b"\0", b""))
    return pages * mmap.PAGESIZE


def forget(paths: list[Path]) -> None:
    """Let no page of these files be in the page cache."""
    for path in paths:
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(paths):
        raise SystemExit("the page cache doesn't let go of the shards, so what is read of them can't be counted")


def traced_bytes(log: Path, source: Path) -> int:
    """What reading calls returned from descriptors of shards in ``source``, from the log of ``strace -y``."""
    call = re.compile(rf"(?:read|pread64|readv|copy_file_range|sendfile)\(.*?<{re.escape(str(source))}/model-.*\) = ([0-9]+)$")
    return sum(int(match[1]) for line in log.read_text(errors="replace").splitlines() if (match := call.search(line)))


def measure(source: Path, destination: Path, options: list[str]) -> Run:
    shards = sorted(source.glob("model-*.safetensors"))
    returned = None
    if shutil.which("strace"):
        log = destination.with_suffix(".strace")
        calls = "trace=read,pread64,readv,copy_file_range,sendfile"
        convert(source, destination, options, ["strace", "-f", "-y", "-qq", "-s", "0", "-e", calls, "-o", str(log)])
        returned = traced_bytes(log, source)
        shutil.rmtree(destination)
    forget(shards)
    seconds, memory = convert(source, destination, options, [])
    return Run(seconds, memory, resident(shards), returned)


def check(source: Path, destination: Path) -> None:
    """Every shard is the same file, and the index names the old tensors as before and then the new ones."""
    old, new = (json.loads((folder / INDEX).read_text()) for folder in (source, destination))
    for file in set(old["weight_map"].values()):
        assert (source / file).samefile(destination / file), file
    entries = list(new["weight_map"].items())
    assert entries[: len(old["weight_map"])] == list(old["weight_map"].items())
    added = entries[len(old["weight_map"]) :]
    assert len(added) == 2 * 2 * LAYERS, len(added)  # a query and a key norm of every read but the first, and the last norm
    grown = new["metadata"]["total_size"] - old["metadata"]["total_size"]
    assert grown == len(added) * WIDTH * 2, grown


def run() -> Table:
    table = Table(title="attnres convert --link of Llama-3-70B", title_justify="left")
    for header in ("command", "shards", "GB", "seconds", "peak memory (MB)", "pages of shards read (MB)", "by calls (MB)"):
        table.add_column(header, justify="left" if header == "command" else "right")
    with tempfile.TemporaryDirectory() as place:
        source, converted, reverted = (Path(place).resolve() / name for name in ("src", "dst", "back"))
        total = build(source)
        forward = measure(source, converted, ["--link"])
        check(source, converted)
        back = measure(converted, reverted, ["--link", "--reverse"])
        assert json.loads((reverted / INDEX).read_text()) == json.loads((source / INDEX).read_text())
        shards = len(list(source.glob("model-*.safetensors")))
    for name, done in (("convert", forward), ("convert --reverse", back)):
        by_calls = "" if done.returned is None else f"{done.returned / 1e6:.3f}"
        numbers = (f"{total / 1e9:.1f}", f"{done.seconds:.1f}", f"{done.peak_memory / 1e6:.0f}", f"{done.mapped / 1e6:.3f}")
        table.add_row(name, str(shards), *numbers, by_calls)
    return table


if __name__ == "__main__":
    Console(width=150).print(run())
