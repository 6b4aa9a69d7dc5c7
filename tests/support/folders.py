"""Small model directories on disk, and how they look: what the tests of offline conversion start from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from attnres_compile.checkpoint.folders import NewTensors

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-05, "hidden_size": 8}


def tensors(first: int, count: int, width: int = 8) -> dict[str, Tensor]:
    """``count`` small bfloat16 tensors, numbered from ``first``, of different values."""
    generator = torch.Generator().manual_seed(first)
    names = (f"model.layers.{i}.weight" for i in range(first, first + count))
    return {name: torch.randn(4, width, generator=generator).to(torch.bfloat16) for name in names}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_extras(folder: Path) -> None:
    write_json(folder / "config.json", CONFIG)
    (folder / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    (folder / "code").mkdir()
    (folder / "code" / "modeling.py").write_text("VALUE = 1\n")


def single(folder: Path, width: int = 8) -> Path:
    """A directory with one model.safetensors of four tensors."""
    folder.mkdir()
    write_extras(folder)
    save_file(tensors(0, 4, width), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sharded(folder: Path, shards: int = 3, width: int = 8) -> Path:
    """A directory with shards of two tensors each and an index."""
    folder.mkdir()
    write_extras(folder)
    weight_map, total = {}, 0
    for i in range(shards):
        name, held = f"model-{i + 1:05}-of-{shards:05}.safetensors", tensors(2 * i, 2, width)
        save_file(held, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
        total += sum(tensor.nbytes for tensor in held.values())
    metadata = {"total_parameters": total // 2, "total_size": total}
    write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    return folder


def new_tensors() -> NewTensors:
    """Two queries and two key norms of eight bfloat16 elements each, 64 bytes together, and an entry for config.json."""
    names = [f"attnres.sites.{i}.{name}" for i in range(2) for name in ("query", "key_norm")]
    made = {name: torch.full((8,), float(name.endswith("key_norm")), dtype=torch.bfloat16) for name in names}
    return NewTensors(made, {"attnres_config": {"format_version": 1, "variant": "block"}})


def snapshot(folder: Path) -> dict[str, str]:
    """A digest of every file below ``folder`` by its relative path; links and directories are named as what they are."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            seen[name] = f"link to {path.readlink()}"
        elif path.is_file():
            seen[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            seen[name] = "directory" if path.is_dir() else "special"
    return seen


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
