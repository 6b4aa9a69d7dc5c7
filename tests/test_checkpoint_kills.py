"""A conversion that is killed, interrupted, or that fails at any point: the destination is nothing or whole."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folders import names_in, new_tensors, sharded, single, snapshot

from attnres_compile.checkpoint.folders import write_converted, write_reverted
from attnres_compile.checkpoint.shards import read_folder
from attnres_compile.checkpoint.staging import _names_beside
from attnres_compile.errors import CheckpointError

# The calls of the os module that touch files, directly or by way of pathlib and shutil.
CALLS = (
    "open", "mkdir", "rename", "replace", "link", "fsync", "fstat", "stat", "lstat", "scandir", "listdir", "lseek", "ftruncate",
    "copy_file_range", "unlink", "rmdir",
)  # fmt: skip


def convert(source: Path, destination: Path, link: bool = False, overwrite: bool = False) -> None:
    write_converted(read_folder(source), new_tensors(), destination, link=link, overwrite=overwrite)


def forked(action: Callable[[], None]) -> int:
    """The number of a new process that runs ``action`` and ends with 0, with 1 if it raised, or by a signal."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        action()
        code = 0
    except BaseException:
        pass  # only what it leaves on disk is looked at
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """How a process ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    assert ended(forked(action)) == 0
    return time.perf_counter() - start


class Moments:
    """Random moments of a run whose speed drifts with the machine: some three of four come before its end."""

    def __init__(self, typical: float, seed: int) -> None:
        self.span, self.draw = 1.1 * typical, random.Random(seed)

    def wait(self) -> None:
        time.sleep(self.draw.uniform(0, self.span))

    def came(self, too_late: bool) -> None:
        """Tell whether the run had ended by itself: the next moments then come sooner, else a little later."""
        self.span *= 0.85 if too_late else 1.05


def leftovers(parent: Path, *expected: str) -> set[str]:
    return set(names_in(parent)) - set(expected)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 12 MiB together."""
    return sharded(tmp_path_factory.mktemp("large") / "src", width=2**18)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a complete conversion of ``source`` holds."""
    destination = tmp_path_factory.mktemp("whole") / "dst"
    convert(source, destination)
    return snapshot(destination)


@pytest.mark.parametrize(("overwrite", "kills"), [(False, 200), (True, 60)])
def test_killed_at_any_moment(overwrite: bool, kills: int, source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    before, destination = snapshot(source), tmp_path / "dst"

    def renew() -> None:
        shutil.rmtree(destination, ignore_errors=True)
        if overwrite:
            shutil.copytree(single(tmp_path / "old"), destination)
            shutil.rmtree(tmp_path / "old")

    def run() -> None:
        convert(source, destination, overwrite=overwrite)

    def run_once() -> float:
        renew()
        return seconds(run)

    moments = Moments(sorted(run_once() for _ in range(3))[1], seed=0)
    renew()
    old = snapshot(destination)
    outcomes = {"before": 0, "during": 0, "after": 0}
    for _ in range(kills):
        pid = forked(run)
        moments.wait()
        os.kill(pid, signal.SIGKILL)
        moments.came(too_late=ended(pid) == 0)
        found, left = snapshot(destination), leftovers(tmp_path, "dst")
        assert all(name.startswith((".dst.attnres-partial.", ".dst.attnres-replaced.")) for name in left)
        put_aside = any(name.startswith(".dst.attnres-replaced.") for name in left)
        assert found in (old, whole) or (not destination.exists() and put_aside)
        assert snapshot(source) == before
        outcomes["after" if found == whole else "during" if left else "before"] += 1
        if found == whole:
            renew()
    assert outcomes["during"] >= kills // 4, outcomes
    assert outcomes["after"] > 0, outcomes
    shutil.rmtree(destination, ignore_errors=True)
    run()
    assert snapshot(destination) == whole
    assert leftovers(tmp_path, "dst") == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_politely_at_any_moment(number: signal.Signals, source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    before, destination = snapshot(source), tmp_path / "dst"
    moments = Moments(seconds(lambda: convert(source, destination)), seed=1)
    shutil.rmtree(destination)
    interrupted = 0
    for _ in range(50):
        pid = forked(lambda: convert(source, destination))
        moments.wait()
        os.kill(pid, number)
        code = ended(pid)
        moments.came(too_late=code == 0)
        assert leftovers(tmp_path, "dst") == set(), code
        if destination.exists():
            assert snapshot(destination) == whole
            shutil.rmtree(destination)
        interrupted += code == 1
    assert snapshot(source) == before
    assert interrupted >= 10


# The same at every single call


@contextlib.contextmanager
def faults(at: int, fault: Callable[[str], None]) -> Iterator[list[str]]:
    """Call ``fault`` with its name instead of the ``at``-th file operation. The names of all calls go into the list."""
    calls: list[str] = []

    def counted(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object, **options: object) -> object:
            calls.append(name)
            if len(calls) == at:
                fault(name)
            return call(*arguments, **options)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            if hasattr(os, name):
                patch.setattr(os, name, counted(name, getattr(os, name)))
        yield calls


def no_space(name: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(name: str) -> None:
    raise KeyboardInterrupt


def kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Case:
    """What to run in ``place``, which holds a source and maybe a destination, and how the destination looks before and after."""

    place: Path
    run: Callable[[], None]
    before: dict[str, str]
    after: dict[str, str]

    @property
    def destination(self) -> Path:
        return self.place / "dst"

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.place.with_name("pristine"), self.place)

    def sources(self) -> dict[str, str]:
        return snapshot(self.place / "src")

    def leftovers(self) -> set[str]:
        return leftovers(self.place, "src", "dst")

    def check(self, sources: dict[str, str], where: str) -> None:
        """The source is what it was, and so is the destination, or it is whole; or its old content waits to be put back."""
        assert self.sources() == sources, where
        found = snapshot(self.destination)
        assert self.destination.exists() == bool(found), where
        put_aside = any(name.startswith(".dst.attnres-replaced.") for name in self.leftovers())
        assert found in (self.before, self.after) or (not found and put_aside), where

    def finish(self, where: str) -> None:
        """Run again after a failure; that the destination is there by now is no failure."""
        with contextlib.suppress(CheckpointError):
            self.run()
        assert snapshot(self.destination) == self.after, where
        assert self.leftovers() == set(), where


@pytest.fixture(params=["copy", "link", "overwrite", "overwrite after a kill", "revert", "rewrite"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    how, place, pristine = request.param, tmp_path / "place", tmp_path / "pristine"
    pristine.mkdir()
    source, destination = place / "src", place / "dst"
    if how == "revert":
        convert(sharded(tmp_path / "original", shards=2), pristine / "src")
    else:
        (single if how == "rewrite" else sharded)(pristine / "src")
    if how.startswith("overwrite"):
        single(pristine / "dst")
    before = snapshot(pristine / "dst")
    if how == "overwrite after a kill":  # between the renames, so that the old directory has to be put back first
        pid = forked(lambda: None)
        ended(pid)
        partial, replaced = _names_beside(pristine / "dst", pid)
        (pristine / "dst").rename(replaced)
        partial.mkdir()

    def run() -> None:
        if how == "revert":
            write_reverted(read_folder(source), new_tensors().tensors, new_tensors().config, destination)
        elif how == "rewrite":
            write_reverted(read_folder(source), {"model.layers.1.weight"}, (), destination)
        else:
            convert(source, destination, link=how == "link", overwrite=how.startswith("overwrite"))

    result = Case(place, run, before, {})
    result.reset()
    run()
    assert result.leftovers() == set()
    return dataclasses.replace(result, after=snapshot(destination))


@pytest.mark.parametrize("fault", [no_space, interrupt])
def test_failing_at_every_single_call(fault: Callable[[str], None], case: Case) -> None:
    case.reset()
    sources, at_first = case.sources(), case.leftovers()
    with faults(0, fault) as calls:
        case.run()
    total, failed, stuck = len(calls), 0, 0
    for at in range(1, total + 1):
        case.reset()
        with faults(at, fault) as calls, contextlib.suppress(CheckpointError, KeyboardInterrupt):
            case.run()
        where = f"{at}: {calls[at - 1]}"
        case.check(sources, where)
        failed += snapshot(case.destination) != case.after
        if left := case.leftovers():
            stuck += not left <= at_first
            case.finish(where)
    assert failed > total / 2
    # Something new is left only where the very call failed that should have removed what was replaced.
    assert stuck < (total / 4 if case.before else 1)


def test_killed_at_every_single_call(case: Case) -> None:
    case.reset()
    sources = case.sources()
    with faults(0, kill) as calls:
        case.run()
    for at in range(calls.index("listdir") + 1, len(calls) + 1):  # before, files are only read
        case.reset()

        def killed(at: int = at) -> None:
            with faults(at, kill):
                case.run()

        where = f"{at}: {calls[at - 1]}"
        assert ended(forked(killed)) == -signal.SIGKILL, where
        case.check(sources, where)
        case.finish(where)
