"""What is shown on stderr, if that is a terminal, while something takes long."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

SHOWN_AFTER = 1.0  # seconds


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of bytes done since its last call, of ``total``.

    Nothing is shown within the first second, nor where stderr is no terminal, and nothing remains.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task(title, total=total)
    begin = time.monotonic() + SHOWN_AFTER
    shown = False

    def advance(count: int) -> None:
        nonlocal shown
        bar.advance(task, count)
        if not shown and sys.stderr.isatty() and time.monotonic() > begin:
            shown = True
            bar.start()

    try:
        yield advance
    finally:
        if shown:
            bar.stop()


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show ``what`` with something that moves. Nothing else may be shown meanwhile, and nothing remains."""
    from rich.console import Console

    with Console(stderr=True).status(what) if sys.stderr.isatty() else contextlib.nullcontext():
        yield
