"""Files that somebody else wrote, read strictly: regular files only, JSON objects without surprises, errors of one line."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import reprlib
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

from attnres_compile.errors import CheckpointError

JSON_LIMIT = 256 * 2**20
_ELSEWHERE = "choose another place"
_WAYS_OUT = {
    errno.ENOSPC: "free space there, or choose another place",
    errno.EDQUOT: "free space within your quota, or choose another place",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another file system",
    errno.EEXIST: "another run is writing it, wait for that",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
}
_LONGEST_HALF = 400  # characters of a message
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


def problem(place: Path | str, what: str) -> CheckpointError:
    """The error to raise about ``place``: one printable line, whatever the names in it are made of, and however long."""
    message = f"{place}: {what}"
    if len(message) > 2 * _LONGEST_HALF:
        message = f"{message[:_LONGEST_HALF]}...{message[-_LONGEST_HALF:]}"
    return CheckpointError("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def quoted(value: object) -> str:
    """``value`` as Python writes it, cut where it is too long for a message."""
    return _short.repr(value)


def describe(error: BaseException) -> str:
    """What the operating system or a parser said, without the path that a message already has."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__


@contextlib.contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turn every OSError into a CheckpointError: ``destination`` can't be written, why, and the way out."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f" ({error.filename})"
        way_out = _WAYS_OUT.get(error.errno or 0, _ELSEWHERE)
        raise problem(destination, f"can't be written: {describe(error)}{where}; {way_out}") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every OSError into a CheckpointError: ``path`` can't be read, and why."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        raise problem(path, f"can't be read: {describe(error)}{where}") from error


def resolved(path: Path) -> Path:
    """The absolute path of what ``path`` names, without symbolic links.

    Raises:
        CheckpointError: if there is nothing.
    """
    try:
        return path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise problem(path, f"can't be read: {describe(error)}") from error


def in_one_line(error: BaseException) -> str:
    """What another library raised: the name of its class, and its message without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def open_regular(path: Path) -> tuple[int, int]:
    """A descriptor for reading the regular file ``path``, which the caller closes, and its size in bytes.

    Raises:
        CheckpointError: if it is missing, unreadable, or anything else than a regular file. A pipe is never waited for.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: no path can hold a NUL or half a surrogate pair
        raise problem(path, f"can't be read: {describe(error)}") from error
    try:
        with reading(path):
            status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise problem(path, "is not a regular file; replace it with one")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def entries(root: Path, ignored: Collection[str]) -> Iterator[tuple[Path, bool]]:
    """Everything in ``root`` that is no directory, relative to it, and whether it is a regular file or a link to one.

    What has a name in ``ignored`` is passed over, and links to directories are not followed.

    Raises:
        OSError: if a directory can't be read.
    """

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if name not in ignored]
        links = [name for name in subfolders if (here / name).is_symlink()]
        for name in (*links, *(name for name in names if name not in ignored)):
            entry = here / name
            linked_file = entry.is_symlink() and name not in links  # a dangling one, too
            yield entry.relative_to(root), linked_file or stat.S_ISREG(entry.lstat().st_mode)


def read_object(path: Path, constants: bool = False) -> dict[str, Any]:
    """The JSON object in the file ``path``; ``constants`` lets NaN and Infinity pass, which Python writes and JSON lacks.

    Raises:
        CheckpointError: if the file can't be read, is larger than ``JSON_LIMIT`` bytes, or holds anything else.
    """
    descriptor, size = open_regular(path)
    with open(descriptor, "rb") as file:
        if size > JSON_LIMIT:
            raise problem(path, f"is {size:,} bytes long, more than the {JSON_LIMIT:,} that a JSON file may have here")
        with reading(path):
            content = file.read(size)
    return parse_object(content, path, constants)


def parse_object(content: bytes, place: Path | str, constants: bool = False) -> dict[str, Any]:
    """The JSON object that ``content`` spells, in UTF-8; ``place`` names it in errors, ``constants`` as above.

    Raises:
        CheckpointError: for other content, a key that stands twice in one object, numbers and depths beyond Python's reach.
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_float=_finite,
            parse_constant=float if constants else _refuse_constant,
        )
    except RecursionError as error:
        raise problem(place, "is nested too deeply for a JSON file of a model; save it again") from error
    except ValueError as error:
        raise problem(place, f"is not valid JSON ({describe(error)}); save it again") from error
    if not isinstance(value, dict):
        raise problem(place, f"holds a JSON {type(value).__name__} where an object belongs; save it again")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {quoted(key)} stands twice in one object")
        value[key] = item
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {quoted(text)} is too large")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
