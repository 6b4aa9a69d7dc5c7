"""Thousands of damaged directories: each is converted faithfully or refused in one line, and nothing else is touched."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from folders import names_in, new_tensors, sharded, single, snapshot
from mutations import INDEX, SHARD, as_text, mutated_text, mutated_value

from attnres_compile.checkpoint.folders import ADDED, write_converted
from attnres_compile.checkpoint.shards import read_folder
from attnres_compile.errors import CheckpointError

CASES = 2000  # of each kind
SECONDS = 5  # that a single one may take
MEMORY = 300 * 2**20  # bytes that all of one kind may add to the process


def mutated_json(text: bytes, draw: random.Random) -> bytes:
    return as_text(mutated_value(json.loads(text), draw)) if draw.random() < 0.6 else mutated_text(text, draw)


def mutated_shard(content: bytes, draw: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    what = draw.randrange(10)
    if what == 0:
        return mutated_text(content, draw)
    if what == 1:
        return struct.pack("<Q", draw.choice((0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1))) + content[8:]
    if what == 2:
        return content[: draw.randrange(len(content))]
    if what == 3:
        return content + bytes(draw.randrange(1, 100))
    header = mutated_json(header, draw)
    if what == 4:  # data to match whatever the offsets say, within reason
        data = bytes(draw.choice((0, 1, 64, 127, 128, 1024)))
    return struct.pack("<Q", len(header)) + header + data


KINDS: dict[str, tuple[Callable[[Path], Path], str, Callable[[bytes, random.Random], bytes]]] = {
    "header of a shard": (sharded, SHARD, mutated_shard),
    "header of the only file": (single, "model.safetensors", mutated_shard),
    "index": (sharded, INDEX, mutated_json),
    "config": (single, "config.json", mutated_json),
}


class TooSlow(BaseException):
    """A case that hangs; no Exception, so that nothing catches it."""


def give_up(number: int, frame: FrameType | None) -> None:
    raise TooSlow


@pytest.fixture
def alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, give_up)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_directories(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, name, mutate = KINDS[kind]
    source = make(tmp_path / "src", 2) if make is sharded else make(tmp_path / "src")  # type: ignore[call-arg]
    shutil.copy(source / (SHARD if make is sharded else "model.safetensors"), tmp_path / "outside.safetensors")
    (source / "link.safetensors").symlink_to("../outside.safetensors")
    os.mkfifo(source / "pipe")
    original = (source / name).read_bytes()
    around, new = snapshot(tmp_path), new_tensors()
    del around[f"src/{name}"]
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of which would measure the disk
    draw, refused, written = random.Random(kind), 0, 0
    seen: set[str] = set()  # beginnings of messages
    memory = peak_memory()
    for case in range(CASES):
        content = mutate(original, draw)
        (source / name).write_bytes(content)
        destination = tmp_path / "dst"
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            folder = read_folder(source)
            write_converted(folder, new, destination, link=draw.random() < 0.5)
        except CheckpointError as error:
            message = str(error)
            assert message.isprintable(), (case, message)
            assert len(message) < 1000, (case, message[:200])
            assert str(tmp_path) in message, (case, message)
            assert names_in(tmp_path) == ["outside.safetensors", "src"], (case, message)
            seen.add(message.partition(": ")[2][:80])
            refused += 1
        else:
            signal.setitimer(signal.ITIMER_REAL, 0)
            written += 1
            assert (source / name).read_bytes() == content, case
            check_converted(source, destination)
            shutil.rmtree(destination)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if case % 100 == 0 or case == CASES - 1:
            now = snapshot(tmp_path)
            del now[f"src/{name}"]
            assert now == around, case
    assert peak_memory() - memory < MEMORY
    assert written > CASES / 100, "hardly any case gets as far as writing"
    assert refused > CASES / 4
    assert len(seen) > 8, seen


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_converted(source: Path, destination: Path) -> None:
    """Whatever was accepted is carried over byte for byte, and can be read again."""
    before, after = read_folder(source), read_folder(destination)
    assert after.tensors.keys() == before.tensors.keys() | new_tensors().tensors.keys()
    assert not any(path.is_symlink() for path in destination.rglob("*"))
    for old, shard in zip(before.shards, [shard for shard in after.shards if shard.path.name != ADDED], strict=True):
        assert old.path.read_bytes() == shard.path.read_bytes()
    expected = {**before.config, **new_tensors().config}
    assert json.dumps(after.config) == json.dumps(expected)  # as text: NaN differs from itself
