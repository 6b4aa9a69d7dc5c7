"""A directory or a file appears whole or not at all; what a killed process left is cleared; bytes are copied or linked."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from folders import names_in

from attnres_compile.checkpoint import copying, staging
from attnres_compile.checkpoint.copying import place
from attnres_compile.checkpoint.staging import staged, staged_file
from attnres_compile.errors import CheckpointError

NOBODY = 65534
HOST = socket.gethostname().replace(".", "-").replace("_", "-")


def write(destination: Path, content: str = "new", overwrite: bool = False) -> None:
    with staged(destination, overwrite) as partial:
        (partial / "config.json").write_text(content)


def refusal(destination: Path, overwrite: bool = False) -> str:
    before = names_in(destination.parent) if destination.parent.is_dir() else None
    with pytest.raises(CheckpointError) as caught, staged(destination, overwrite):
        raise AssertionError("the block ran")
    assert (names_in(destination.parent) if destination.parent.is_dir() else None) == before
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.fixture
def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    destination = tmp_path / "dst"
    with staged(destination) as partial:
        assert partial == tmp_path / f".dst.attnres-partial.{HOST}.{os.getpid()}"
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("x")
        assert not destination.exists()
    assert names_in(tmp_path) == ["dst"]
    assert (destination / "inner" / "file").read_text() == "x"


def test_a_relative_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("dst"))
    with staged_file(Path("file")) as partial:
        partial.write_text("x")
    assert names_in(tmp_path) == ["dst", "file"]


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[int | str] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(os.fstat(descriptor).st_ino)

    def logged_rename(a: Path, b: Path) -> None:
        rename(a, b)
        events.append(f"{a.name} -> {b.name}")

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    with staged(tmp_path / "dst") as partial:
        (partial / "inner").mkdir()
        written = [partial / "inner" / "a", partial / "inner", partial / "b", partial]
        for path in written[::2]:
            path.write_text("x")
        inodes = [path.stat().st_ino for path in written]
    assert events == [*inodes, f"{partial.name} -> dst", tmp_path.stat().st_ino]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("directory", [True, False])
def test_whatever_is_raised_nothing_remains(error: type[BaseException], directory: bool, tmp_path: Path) -> None:
    with pytest.raises(error), (staged if directory else staged_file)(tmp_path / "dst") as partial:
        (partial / "file" if directory else partial).write_text("x")
        raise error
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "choose another place"),
        (errno.EIO, "choose another place"),
    ],
)
def test_errors_of_the_system_name_the_destination_and_the_way_out(code: int, word: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, staged(tmp_path / "dst"):
        raise OSError(code, os.strerror(code))
    assert str(caught.value).startswith(f"{tmp_path / 'dst'}: can't be written: {os.strerror(code)}; ")
    assert word in str(caught.value)
    assert names_in(tmp_path) == []


def test_modes_are_those_that_the_umask_leaves(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("x")
    source.chmod(0o750)
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "dst") as partial:
            place(source, partial / "script", link=False)
            copying.create(partial / "file").close()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / "dst" / name).stat().st_mode) for name in (".", "script", "file")]
    assert modes == [0o750, 0o750, 0o640]


# What is there already


def test_what_exists_is_kept_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    destination = tmp_path / "dst"
    write(destination, "old")
    assert "--overwrite" in refusal(destination)
    assert (destination / "config.json").read_text() == "old"
    (destination / "more").write_text("x")
    write(destination, "new", overwrite=True)
    assert (destination / "config.json").read_text() == "new"
    assert names_in(destination) == ["config.json"]
    assert names_in(tmp_path) == ["dst"]


def test_overwriting_takes_empty_directories_and_model_directories_only(tmp_path: Path) -> None:
    destination = tmp_path / "dst"
    destination.mkdir()
    write(destination, overwrite=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    assert "no config.json" in refusal(home, overwrite=True)
    (tmp_path / "file").write_text("x")
    assert "no directory" in refusal(tmp_path / "file", overwrite=True)
    (tmp_path / "link").symlink_to(destination)
    assert str(destination) in refusal(tmp_path / "link", overwrite=True)
    (tmp_path / "dangling").symlink_to("nothing")
    assert "exists" in refusal(tmp_path / "dangling")
    assert "create it first" in refusal(tmp_path / "no" / "dst")
    assert "create it first" in refusal(tmp_path / "file" / "dst")
    assert "exists" in refusal(Path("/"))


def test_a_file_is_replaced_only_by_a_file(tmp_path: Path) -> None:
    destination = tmp_path / "file"
    destination.write_text("old")
    with pytest.raises(CheckpointError, match="exists already"), staged_file(destination):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="no regular file"), staged_file(tmp_path / "folder", overwrite=True):
        pass
    with staged_file(destination, overwrite=True) as partial:
        partial.write_text("new")
        assert destination.read_text() == "old"
    assert destination.read_text() == "new"
    assert names_in(tmp_path) == ["file", "folder"]


def test_a_file_that_is_never_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"), staged_file(tmp_path / "file"):
        pass
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_not_replaced_by_accident(overwrite: bool, tmp_path: Path) -> None:
    destination = tmp_path / "dst"
    with pytest.raises(CheckpointError), staged(destination, overwrite):
        destination.mkdir()
        (destination / "notes.txt").write_text("mine")
    assert names_in(tmp_path) == ["dst"]
    assert names_in(destination) == ["notes.txt"]


@pytest.mark.parametrize("failing", [1, 2])
def test_the_old_directory_comes_back_if_the_new_one_cannot_take_its_place(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "dst", "old")
    rename, calls = os.rename, []

    def fail_once(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) == failing:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(CheckpointError, match="busy"):
        write(tmp_path / "dst", "new", overwrite=True)
    assert names_in(tmp_path) == ["dst"]
    assert (tmp_path / "dst" / "config.json").read_text() == "old"


# What killed processes leave


def leave(parent: Path, kind: str, pid: int, host: str = HOST) -> Path:
    left = parent / f".dst.attnres-{kind}.{host}.{pid}"
    left.mkdir()
    (left / "config.json").write_text(kind)
    return left


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path, dead: int) -> None:
    leave(tmp_path, "partial", dead)
    leave(tmp_path, "partial", os.getpid())  # in a container numbers come again soon
    write(tmp_path / "dst")
    assert names_in(tmp_path) == ["dst"]


def test_leftovers_that_may_be_in_use_stay(tmp_path: Path, dead: int) -> None:
    locked = leave(tmp_path, "partial", dead)  # as by a process in another container
    others = [
        locked.name,
        leave(tmp_path, "partial", os.getppid()).name,
        leave(tmp_path, "partial", dead, host="elsewhere").name,
        ".dst.attnres-partial",
        f".dst2.attnres-partial.{HOST}.{dead}",
        f".dst.attnres-partial.{HOST}.{dead}x",
        f".dst.attnres-partial.{HOST}.{'9' * 30}",
    ]
    for name in others[3:]:
        (tmp_path / name).mkdir()
    descriptor = os.open(locked, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    write(tmp_path / "dst")
    assert names_in(tmp_path) == sorted([*others, "dst"])
    os.close(descriptor)
    write(tmp_path / "dst", overwrite=True)
    assert names_in(tmp_path) == sorted([*others[1:], "dst"])


def test_what_a_process_killed_between_two_renames_kept_is_put_back(tmp_path: Path, dead: int) -> None:
    leave(tmp_path, "replaced", dead)
    leave(tmp_path, "partial", dead)
    with pytest.raises(CheckpointError, match="exists already"):
        write(tmp_path / "dst")
    assert names_in(tmp_path) == ["dst"]
    assert (tmp_path / "dst" / "config.json").read_text() == "replaced"


def test_what_was_replaced_is_removed_once_the_new_one_is_there(tmp_path: Path, dead: int) -> None:
    write(tmp_path / "dst", "finished")
    leave(tmp_path, "replaced", dead)
    with pytest.raises(CheckpointError, match="exists already"):
        write(tmp_path / "dst")
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "dst", overwrite=True):
        raise ZeroDivisionError
    assert names_in(tmp_path) == ["dst"]
    assert (tmp_path / "dst" / "config.json").read_text() == "finished"


def test_two_runs_at_once_do_not_mix(tmp_path: Path) -> None:
    with staged(tmp_path / "dst") as partial:
        (partial / "config.json").write_text("first")
        with pytest.raises(CheckpointError, match="another run is writing it"), staged(tmp_path / "dst"):
            pass
    assert names_in(tmp_path) == ["dst"]
    assert (tmp_path / "dst" / "config.json").read_text() == "first"


# Signals


@pytest.fixture
def handlers() -> Iterator[None]:
    """Handlers as in a fresh process, whatever pytest or an earlier test set."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_process_becomes_an_exit(number: signal.Signals, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught, staged(tmp_path / "dst"):
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number
    assert names_in(tmp_path) == []
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.usefixtures("handlers")
def test_an_interrupt_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "dst"):
        os.kill(os.getpid(), signal.SIGINT)
    assert names_in(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("handlers")
def test_a_second_signal_does_not_disturb_the_cleaning_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = staging.shutil.rmtree

    def interrupted(path: Path, ignore_errors: bool) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(staging.shutil, "rmtree", interrupted)
    with pytest.raises(SystemExit), staged(tmp_path / "dst"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert names_in(tmp_path) == []


@pytest.mark.usefixtures("handlers")
def test_a_signal_during_the_renames_waits_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "dst", "old")
    rename = os.rename

    def interrupted(a: Path, b: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        rename(a, b)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(SystemExit):
        write(tmp_path / "dst", "new", overwrite=True)
    assert names_in(tmp_path) == ["dst"]
    assert (tmp_path / "dst" / "config.json").read_text() == "new"


@pytest.mark.usefixtures("handlers")
def test_handlers_of_others_are_left_alone_and_threads_can_write(tmp_path: Path) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with staged(tmp_path / "dst"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    thread = threading.Thread(target=write, args=(tmp_path / "other",))
    thread.start()
    thread.join()
    assert names_in(tmp_path) == ["dst", "other"]


# Copies and links


def test_a_link_is_the_same_file_and_a_copy_is_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1000))
    (tmp_path / "by name").symlink_to("source")
    place(tmp_path / "by name", tmp_path / "link", link=True)
    counts: list[int] = []
    place(tmp_path / "by name", tmp_path / "copy", link=False, progress=counts.append)
    assert (tmp_path / "link").samefile(source)
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_ino != source.stat().st_ino
    assert counts == [1000]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_what_cannot_be_linked_is_said_with_the_way_out(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "source").write_text("x")
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(CheckpointError, match="leave --link out") as caught:
        place(tmp_path / "source", tmp_path / "link", link=True)
    assert str(caught.value).startswith(f"{tmp_path / 'source'}: can't be hard-linked ({os.strerror(code)})")


def sparse(path: Path) -> bytes:
    """A file of 64 MiB: data, a hole, data, a hole."""
    with open(path, "wb") as file:
        file.write(b"a" * 10_000)
        file.seek(2**25 + 7)
        file.write(b"b" * 10_000)
        file.truncate(2**26)
    return path.read_bytes()


@pytest.mark.parametrize("in_kernel", [True, False])
def test_holes_stay_holes(in_kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = sparse(tmp_path / "source")
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    place(tmp_path / "source", tmp_path / "copy", link=False)
    assert (tmp_path / "copy").read_bytes() == content
    if (tmp_path / "source").stat().st_blocks * 512 < 2**20:  # where the file system has holes
        assert (tmp_path / "copy").stat().st_blocks * 512 < 2**20


def test_a_file_without_holes_that_no_system_call_knows_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    content = sparse(tmp_path / "source")
    monkeypatch.setattr(os, "lseek", unknown)
    monkeypatch.setattr(os, "copy_file_range", unknown, raising=False)
    place(tmp_path / "source", tmp_path / "copy", link=False)
    assert (tmp_path / "copy").read_bytes() == content


@pytest.mark.parametrize("size", [0, 1, 4095, 2**24 - 1, 2**24, 2**24 + 1])
def test_copies_of_all_sizes(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    (tmp_path / "source").write_bytes(content)
    counts: list[int] = []
    place(tmp_path / "source", tmp_path / "copy", link=False, progress=counts.append)
    assert (tmp_path / "copy").read_bytes() == content
    assert sum(counts) == size


@pytest.mark.parametrize("change", ["shorter", "longer", "touched"])
def test_a_source_that_changes_meanwhile_is_noticed(change: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2**25))

    def meddle(count: int) -> None:
        if change == "touched":
            os.utime(source, ns=(0, 0))
        else:
            os.truncate(source, 1000 if change == "shorter" else 2**26)

    with pytest.raises((CheckpointError, OSError), match=r"changed while|the source ends at byte"):
        place(source, tmp_path / "copy", link=False, progress=meddle)


def test_an_error_while_copying_names_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "source").write_text("x")
    monkeypatch.setattr(copying.os, "copy_file_range", fail, raising=False)
    with pytest.raises(CheckpointError, match=f"Input/output error \\({tmp_path}/source\\)"), staged(tmp_path / "dst") as partial:
        place(tmp_path / "source", partial / "copy", link=False)
    assert names_in(tmp_path) == ["source"]


def test_a_real_limit_on_file_sizes(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(range(256)) * 2**14)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(CheckpointError, match="ulimit -f"), staged(tmp_path / "dst") as partial:
            place(tmp_path / "source", partial / "copy", link=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(tmp_path) == ["source"]


@pytest.fixture
def place_of_nobody() -> Iterator[Path]:
    """A directory of a user without privileges, who this process is meanwhile: root may read and write everything."""
    with tempfile.TemporaryDirectory() as folder:
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(folder, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)


def test_a_parent_that_cannot_be_written(place_of_nobody: Path) -> None:
    place_of_nobody.chmod(0o500)
    try:
        assert "Permission denied" in refusal(place_of_nobody / "dst")
    finally:
        place_of_nobody.chmod(0o700)


def test_a_source_that_cannot_be_read(place_of_nobody: Path) -> None:
    (place_of_nobody / "source").touch(mode=0)
    with pytest.raises(CheckpointError, match=r"source: can't be read: Permission denied"):
        place(place_of_nobody / "source", place_of_nobody / "copy", link=False)
