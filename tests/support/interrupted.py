"""The command line in a process of its own, with whatever befalls it there: a full disk, an interrupt."""

from __future__ import annotations

import dataclasses
import importlib
import os
import resource
import signal
import subprocess
import sys
from typing import Any

FULL_DISK = "full disk"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code (minus a signal), and what it wrote."""

    code: int
    stdout: str
    stderr: str


def run_alone(arguments: list[str], befalls: str = "", stdout: str = "") -> Outcome:
    """``attnres`` with ``arguments``.

    Args:
        befalls: FULL_DISK, or ``module:function``, in whose place the process is interrupted.
        stdout: a file that its results go to instead.
    """
    command = [sys.executable, __file__, befalls, *arguments]
    with open(stdout or os.devnull, "w") as results:
        target = results if stdout else subprocess.PIPE
        done = subprocess.run(command, stdout=target, stderr=subprocess.PIPE, text=True, check=False, timeout=300)
    return Outcome(done.returncode, done.stdout or "", done.stderr)


def _interrupt(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()


def _main() -> None:
    befalls, *sys.argv[1:] = sys.argv[1:]
    del sys.path[0]  # the folder of this file
    from attnres_compile import cli

    if befalls == FULL_DISK:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    elif befalls:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let jobs in the background ignore it
        module, function = befalls.split(":")
        setattr(importlib.import_module(module), function, _interrupt)
    cli.main()


if __name__ == "__main__":
    _main()
