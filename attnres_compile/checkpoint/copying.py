"""Bringing the bytes of one file into another, or giving them a second name, without looking at them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from attnres_compile.checkpoint.files import describe, open_regular, problem
from attnres_compile.checkpoint.shards import Shard, parse_header

if TYPE_CHECKING:
    from torch import Tensor

Advance = Callable[[int], None]

_CHUNK = 2**24
# What operating systems and file systems say that can't copy by themselves.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


def place(source: Path, target: Path, link: bool, progress: Advance = lambda count: None) -> None:
    """Make the new file ``target`` a hard link to the file ``source``, or a copy with its permissions and its holes.

    ``progress`` is called with the number of bytes that were copied since it was called last.

    Raises:
        CheckpointError: if ``source`` can't be linked or read, or changes meanwhile.
        OSError: if ``target`` can't be written.
    """
    if link:
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            raise problem(source, f"can't be hard-linked ({describe(error)}); leave --link out to copy it") from error
        return
    with _unchanged(source) as (descriptor, status), create(target, stat.S_IMODE(status.st_mode) & 0o777) as file:
        copy_range(descriptor, 0, status.st_size, file.fileno(), 0, progress)


def create(target: Path, mode: int = 0o666) -> BinaryIO:
    """Open the new file ``target`` for writing, with the permissions of ``mode`` that the umask leaves."""
    return open(target, "xb", opener=lambda name, flags: os.open(name, flags, mode))


def copy_range(source: int, start: int, stop: int, target: int, at: int, progress: Advance) -> None:
    """Copy bytes ``start`` to ``stop`` of the descriptor ``source`` to ``target``, which then ends behind them.

    They go to position ``at``, where ``target`` ended so far.

    Raises:
        OSError: if that fails, or ``source`` ends before ``stop``.
    """
    os.ftruncate(target, at + stop - start)
    in_kernel = hasattr(os, "copy_file_range")  # can share blocks, or copy on a file server
    for first, last in _extents(source, start, stop):
        while first < last:
            count = min(last - first, _CHUNK)
            done = 0
            if in_kernel:
                try:
                    done = os.copy_file_range(source, target, count, first, at + first - start)
                except OSError as error:
                    if error.errno not in _NO_KERNEL_COPY:
                        raise
                in_kernel = done > 0
            if not in_kernel:
                done = os.pwrite(target, os.pread(source, count, first), at + first - start)
            if not done:
                raise OSError(errno.EIO, f"the source ends at byte {first:,}, before {stop:,}")
            first += done
            progress(done)


def write_shard(
    target: Path,
    shard: Shard,
    removed: Collection[str],
    added: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    progress: Advance = lambda count: None,
) -> None:
    """Write ``shard`` without the tensors ``removed``, with those ``added``, as the new safetensors file ``target``.

    Raises:
        CheckpointError: if ``shard`` can't be read.
        OSError: if ``target`` can't be written.
    """
    new = as_safetensors(added)
    new_start = 8 + int.from_bytes(new[:8], "little")
    header = {name: info for name, info in shard.tensors.items() if name not in removed}
    header |= parse_header(new[8:new_start], target)[0]
    # The widest elements first, as safetensors has it: so every tensor is aligned, whatever went before it.
    names = sorted(header, key=lambda name: -header[name].width)
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in names:
        info = header[name]
        described[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (at, at + info.nbytes)}
        at += info.nbytes
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _unchanged(shard.path) as (descriptor, status), create(target) as file:
        if status.st_size != shard.header + shard.nbytes:
            raise problem(shard.path, "has changed since its header was read; try again when nothing writes to it")
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            start, count = header[name].start, header[name].nbytes
            if name in added:
                file.write(new[new_start + start : new_start + start + count])
                continue
            file.flush()
            start += shard.header
            copy_range(descriptor, start, start + count, file.fileno(), file.tell(), progress)
            file.seek(0, os.SEEK_END)


def as_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of ``tensors``, which should be small. They may share memory."""
    from safetensors.torch import save

    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(apart, metadata={"format": "pt"})


@contextlib.contextmanager
def _unchanged(source: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Yield a descriptor of ``source`` and its status, and insist that it has that size and age at the end, too."""
    descriptor, _ = open_regular(source)
    try:
        before = os.fstat(descriptor)
        yield descriptor, before
        after = os.fstat(descriptor)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise problem(source, "changed while it was copied; try again when nothing writes to it")
    except OSError as error:
        raise OSError(error.errno, describe(error), error.filename or str(source)) from error
    finally:
        os.close(descriptor)


def _extents(descriptor: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where a file has data between ``start`` and ``stop``; a sparse file has holes besides."""
    while start < stop:
        try:
            first = os.lseek(descriptor, start, os.SEEK_DATA)
            last = os.lseek(descriptor, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            first, last = start, stop  # a file system that can't tell
        yield first, min(last, stop)
        start = last
