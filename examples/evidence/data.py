"""The demo's text without anything in the validation files that the training files hold too."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the demo's modules lie one folder up

from demo_data import Text, joined, split_files

REPEATED = 4  # so many lines in a row that training holds too are a repetition; fewer are what programs have in common
COPY = 0.25  # of the lines of a validation file: with more repeated ones it is a copy, and is left out as a whole


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The text, and what was taken out of the validation files. ``fingerprint`` tells one Python's library from another's."""

    text: Text
    copies: int
    repeated_lines: int
    held_out_lines: int
    fingerprint: str

    def __str__(self) -> str:
        train, validation = len(self.text.train) / 1e6, len(self.text.validation) / 1e6
        return (
            f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}, {train:.2f} MB in "
            f"{self.text.train_files} files for training, {validation:.2f} MB in {self.text.validation_files} others for "
            f"validation ({self.copies} more were left out as copies, and {self.repeated_lines} of {self.held_out_lines} lines, "
            f"since training files hold them too); sha256 {self.fingerprint}"
        )


@functools.cache
def corpus() -> Corpus:
    """Read the standard library, split by file, and take repetitions out of the validation files."""
    training, held_out = split_files()
    seen = {run for file in training for run in runs(lines_of(file))}
    kept, copies, repeated, total = [], 0, 0, 0
    for file in held_out:
        count = len(lines_of(file))
        rest, removed = without_repetitions(file, seen)
        copies += removed > COPY * count
        repeated += removed
        total += count
        if removed <= COPY * count:
            kept.append(rest)
    text = Text(joined(training), joined(kept), len(training), len(kept))
    return Corpus(text, copies, repeated, total, fingerprint(text.train, text.validation))


def lines_of(file: bytes) -> list[bytes]:
    """What its lines say: neither indentation nor empty lines."""
    return [line for line in map(bytes.strip, file.split(b"\n")) if line]


def runs(lines: list[bytes]) -> Iterable[int]:
    """Every ``REPEATED`` lines in a row, as a hash."""
    return (hash(tuple(lines[i : i + REPEATED])) for i in range(len(lines) - REPEATED + 1))


def without_repetitions(file: bytes, seen: set[int]) -> tuple[bytes, int]:
    """The file without lines that belong to a run in ``seen``, and how many were removed.

    Removing lines brings others together, so this goes on until no run of the file is in ``seen``.
    """
    lines, removed = file.split(b"\n"), 0
    while True:
        full = [i for i, line in enumerate(lines) if line.strip()]
        found = [i for i, run in enumerate(runs([lines[j].strip() for j in full])) if run in seen]
        if not found:
            return b"\n".join(lines), removed
        dropped = {full[i + j] for i in found for j in range(REPEATED)}
        removed += len(dropped)
        lines = [line for i, line in enumerate(lines) if i not in dropped]


def fingerprint(*texts: Tensor) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.numpy().tobytes())
    return digest.hexdigest()[:16]
