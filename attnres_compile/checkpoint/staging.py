"""Writing a whole directory, or one file, or nothing: whatever is raised, and whenever the process is killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from attnres_compile.checkpoint.files import problem, writing


def check_destination(destination: Path, overwrite: bool, directory: bool = True) -> Path:
    """The absolute path of ``destination``, if a directory (or a file, if not ``directory``) may be put there.

    With ``overwrite`` it may replace a regular file, or a directory that is empty or a checkpoint.

    Raises:
        CheckpointError: if not.
    """
    absolute = Path(os.path.abspath(destination))
    with writing(destination):
        if not absolute.parent.is_dir():
            raise problem(destination, f"there is no directory {absolute.parent}; create it first")
        if not os.path.lexists(absolute):
            return absolute
        if not overwrite:
            raise problem(destination, "exists already; choose another name, or --overwrite it")
        if absolute.is_symlink():
            raise problem(destination, f"is a symbolic link, and only its target can be overwritten: {absolute.resolve()}")
        if not (absolute.is_dir() if directory else absolute.is_file()):
            raise problem(destination, f"exists and is no {'directory' if directory else 'regular file'}; choose another name")
        if directory and not (absolute / "config.json").is_file() and any(absolute.iterdir()):
            raise problem(destination, "has files but no config.json, so it is no model directory; choose another name")
    return absolute


@contextlib.contextmanager
def staged(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``destination``, which takes that name and is on disk when the block has ended.

    If anything is raised within, the directory is removed. SIGTERM and SIGHUP raise SystemExit meanwhile where they would
    have ended the process. What a killed process left behind, the next one with this destination removes or puts back.

    Raises:
        CheckpointError: if ``destination`` may not be written (``check_destination``), or for any OSError within.
    """
    with _staged(destination, overwrite, directory=True) as partial:
        yield partial


@contextlib.contextmanager
def staged_file(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """The same for one file: yield the path at which to write it."""
    with _staged(destination, overwrite, directory=False) as partial:
        yield partial / Path(os.path.abspath(destination)).name


@contextlib.contextmanager
def _staged(destination: Path, overwrite: bool, directory: bool) -> Iterator[Path]:
    absolute = check_destination(destination, overwrite, directory)
    partial, replaced = _names_beside(absolute, os.getpid())
    with writing(destination), _Interrupts() as interrupts:
        _clean_up(absolute)
        check_destination(destination, overwrite, directory)  # again: something may have been put back
        os.mkdir(partial)
        try:
            with _locked(partial):
                with interrupts.raised():
                    yield partial
                    _sync(partial)
                check_destination(destination, overwrite, directory)  # again: it may be there by now
                _swap(partial if directory else partial / absolute.name, absolute, replaced)
        finally:
            _settle(absolute, partial, replaced)


def _names_beside(destination: Path, pid: int | str) -> tuple[Path, Path]:
    """Where process ``pid`` writes what becomes ``destination``, and where it keeps what was there, for three renames long."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
    kinds = (f".{destination.name}.attnres-{kind}.{host}.{pid}" for kind in ("partial", "replaced"))
    partial, replaced = map(destination.with_name, kinds)
    return partial, replaced


def _sync(folder: Path) -> None:
    """Have everything in ``folder`` on disk, and then ``folder``."""
    for inner, _, names in os.walk(folder, topdown=False):
        for path in (*(os.path.join(inner, name) for name in names), inner):
            _sync_one(path)


def _sync_one(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have this for a directory
            raise
    finally:
        os.close(descriptor)


def _swap(finished: Path, destination: Path, replaced: Path) -> None:
    if finished.is_dir() and destination.exists():  # a directory can't be renamed onto one that has files
        os.rename(destination, replaced)
    os.rename(finished, destination)
    _sync_one(destination.parent)


def _settle(destination: Path, partial: Path, replaced: Path) -> None:
    """Leave ``destination`` alone beside what it was or became. A second call ends what a killed first one began."""
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        if not os.path.lexists(destination):
            os.rename(replaced, destination)
        else:
            os.rename(replaced, partial)  # under this name nobody puts back a directory of which half is removed
            shutil.rmtree(partial, ignore_errors=True)


def _clean_up(destination: Path) -> None:
    """Settle what processes of this host that are no more have left beside ``destination``."""
    prefixes = tuple(path.name for path in _names_beside(destination, ""))
    endings = {name.rpartition(".")[2] for name in os.listdir(destination.parent) if name.startswith(prefixes)}
    for pid in (int(ending) for ending in endings if re.fullmatch("[0-9]{1,9}", ending)):
        partial, replaced = _names_beside(destination, pid)
        if not _is_used(partial, pid):
            _settle(destination, partial, replaced)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder``, which ends with the process; on file systems that have locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def _is_used(partial: Path, pid: int) -> bool:
    """Whether a process is at work in ``partial``: one in another container may have any number, so the lock counts first."""
    try:
        with _locked(partial):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


class _Interrupts:
    """Takes the signals that end a process: they are raised as exceptions within ``raised``, else when all is settled.

    Only the first one is raised, so that no second one cuts short what the first one has to clean up.
    """

    def __init__(self) -> None:
        self._raise = False
        self._pending: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers, or gets signals
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None and (kind is None or issubclass(kind, Exception)):
            self._throw(self._pending)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        self._raise = True
        try:
            if self._pending is not None:
                self._throw(self._pending)
            yield
        finally:
            self._raise = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raise:
            self._throw(number)
        self._pending = number

    def _throw(self, number: int) -> None:
        self._raise = False
        self._pending = None
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
