"""The command line in a forked process, with whatever befalls it there."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from attnres_compile import cli


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code (minus a signal), and what it wrote."""

    code: int
    stdout: str
    stderr: str


def run_forked(folder: Path, arguments: list[str], prepare: Callable[[], None] = lambda: None, stdout: str = "") -> Outcome:
    """``attnres`` with ``arguments``; ``prepare`` runs in its process first. ``stdout`` is a file in ``folder`` by default."""
    out, err = folder / "stdout", folder / "stderr"
    pid = os.fork()
    if not pid:
        code = 99
        try:
            for number, path in ((1, stdout or out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["attnres", *arguments]
            prepare()
            cli.main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
            except OSError:
                traceback.print_exc()
                code = 120  # as Python ends where its last flush fails
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found = Outcome(code, out.read_text() if out.exists() else "", err.read_text())
    out.unlink(missing_ok=True)
    err.unlink()
    return found
