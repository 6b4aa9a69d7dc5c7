"""The files of a run: its checkpoint, and once it is finished its weights and its result."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def checkpoint_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.checkpoint.pt"


def weights_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.weights.pt"


def result_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: under another name first, and to the disk before it takes the place of ``path``."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    yield unfinished
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)
