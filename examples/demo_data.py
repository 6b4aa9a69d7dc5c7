"""The demo's text: the Python standard library's own source, as bytes. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
HELD_OUT = 10  # every tenth file is for validation
LARGEST_FILE = 250_000
# Tests repeat the code that they test; the others are tables that a script generated, or don't belong to the library.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3"}


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes for training and for validation. No file is in both."""

    train: Tensor
    validation: Tensor
    train_files: int
    validation_files: int

    def batch(self, generator: torch.Generator, size: int, length: int) -> Tensor:
        """``[size, length + 1]`` bytes from random places in the training text: inputs and, one further, targets."""
        starts = torch.randint(len(self.train) - length, (size,), generator=generator)
        return torch.stack([self.train[start : start + length + 1] for start in starts.tolist()]).long()

    def validation_batches(self, count: int, size: int, length: int) -> list[Tensor]:
        """``count`` batches of windows that don't overlap, evenly spread over the validation text."""
        starts = torch.linspace(0, len(self.validation) - length - 1, count * size, dtype=torch.float64).long()
        if len(starts) > 1 and int(starts.diff().min()) <= length:
            raise ValueError(f"the validation text of {len(self.validation)} bytes is too short for {len(starts)} windows.")
        windows = torch.stack([self.validation[start : start + length + 1] for start in starts.tolist()]).long()
        return list(windows.split(size))

    def unigram_entropy(self) -> float:
        """Nats per byte of validation text for a model that knows how frequent each byte is in training, and no more."""
        counts = torch.bincount(self.train.long(), minlength=VOCABULARY).double() + 1
        return float(-(counts / counts.sum()).log()[self.validation.long()].mean())


def standard_library() -> Text:
    """Read the standard library of the Python that runs this, split by file in sorted order."""
    training, held_out = split_files()
    return Text(joined(training), joined(held_out), len(training), len(held_out))


def split_files() -> tuple[list[bytes], list[bytes]]:
    """What is in the files for training, and in those for validation."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if _is_wanted(path, root))
    held_out = files[::HELD_OUT]
    training = [path for index, path in enumerate(files) if index % HELD_OUT]
    return [path.read_bytes() for path in training], [path.read_bytes() for path in held_out]


def joined(files: list[bytes]) -> Tensor:
    """One text of all files, ``[bytes]``, uint8."""
    return torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8)


def _is_wanted(path: Path, root: Path) -> bool:
    relative = path.relative_to(root)
    generated = path.name.startswith("_sysconfigdata")
    return not SKIPPED.intersection(relative.parts) and not generated and 0 < path.stat().st_size <= LARGEST_FILE
