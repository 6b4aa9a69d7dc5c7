"""Everything that needs a GPU, in one call: ``python tests/bench/gpu.py --wheels FOLDER --out FOLDER``.

Sections run in order of importance until the time is used up: one that is not expected to fit is skipped, one that takes
longer is cut off, and the report says so. results.json and results.md are written anew after each. With ``--dry-run`` every
section runs at toy sizes on the CPU, to exercise the script; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Findings:
    """What a section found: tables to read, and the same as data."""

    tables: list[Table]
    data: Any


@dataclass(frozen=True)
class Section:
    """``seconds`` is what it should need at most on an H100; without them it is not begun."""

    name: str
    seconds: float
    run: Callable[[], Findings]


class TimeUp(BaseException):
    """Raised in the middle of a section. Not an Exception, or a side that may fail would swallow it."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeUp

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@dataclass
class Report:
    """What is known so far, on disk after every section."""

    folder: Path
    title: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)

    def add(self, name: str, status: str, seconds: float, findings: Findings | None = None, reason: str = "") -> None:
        data = findings.data if findings else None
        self.sections[name] = {"status": status, "seconds": round(seconds, 1), "reason": reason, "data": data}
        tables = [markdown(table) for table in findings.tables] if findings else [f"{status}: {reason}\n"]
        self.text.append(f"## {name}\n\n" + "\n".join(tables))
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"title": self.title, "sections": self.sections}
        (self.folder / "results.json").write_text(json.dumps(content, indent=1, default=plain))
        (self.folder / "results.md").write_text(f"# {self.title}\n\n" + "\n".join(self.text))


def plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


def markdown(table: Table) -> str:
    rows = [[str(column.header) for column in table.columns], ["---" for _ in table.columns]]
    rows += zip(*(column.cells for column in table.columns), strict=True)
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([str(table.title), "", *lines, "", *([str(table.caption), ""] if table.caption else [])])


def run_all(sections: list[Section], report: Report, budget: float, console: Console) -> bool:
    """Whether all of them were done; ``budget`` is in seconds from the start of the script."""
    complete = True
    for section in sections:
        begin, left = time.monotonic(), max(0.0, budget - (time.monotonic() - STARTED))
        if left <= section.seconds:
            report.add(section.name, "skipped", 0, reason=f"{left:.0f} s were left, it may need {section.seconds:.0f}")
            console.print(f"{section.name}: skipped, {left:.0f} s left")
            complete = False
            continue
        try:
            with deadline(left):
                findings = section.run()
        except (Exception, TimeUp) as error:  # one section must not cost the others
            spent, is_late = time.monotonic() - begin, isinstance(error, TimeUp)
            status, reason = ("cut off", f"after {spent:.0f} s") if is_late else ("failed", f"{type(error).__name__}: {error}")
            report.add(section.name, status, spent, reason=reason)
            console.print(f"{section.name}: {status}")
            traceback.print_exc(limit=-6)
            complete = False
            continue
        spent = time.monotonic() - begin
        report.add(section.name, "done", spent, findings)
        for table in findings.tables:
            console.print(table)
        console.print(f"{section.name}: {spent:.0f} s")
    return complete


def install(wheels: Path) -> None:
    """Put wheels into a folder of their own, on the path of this process and its children; nothing is fetched."""
    folder = tempfile.mkdtemp(prefix="peers-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", folder]
    subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def use_checkout() -> None:
    """Import attnres_compile from this checkout, without leaving the root, and thus our kernels/, on the path."""
    sys.path.insert(0, str(ROOT))
    import attnres_compile  # noqa: F401

    sys.path.remove(str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=520, help="seconds in all (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, help="a folder with the peers' wheels")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")), help="default: $OUT or build/gpu")
    parser.add_argument("--sections", nargs="+", metavar="WORD", help="only sections whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the sections' names")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, without the fused kernels")
    parser.add_argument("--ahead", metavar="TASK", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Inductor would choose another folder in the middle of the run, and what was compiled ahead would not be found.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "attnres-bench-triton"))
    if arguments.wheels:
        install(arguments.wheels)
    use_checkout()
    import gpu_sections

    if arguments.ahead:
        gpu_sections.compile_one(arguments.ahead, arguments.dry_run)
        return 0
    sections = [
        section for section in gpu_sections.sections(arguments.dry_run)
        if not arguments.sections or any(word in section.name for word in arguments.sections)
    ]  # fmt: skip
    if arguments.list:
        print("\n".join(f"{section.name} ({section.seconds:.0f} s)" for section in sections))
        return 0
    title = gpu_sections.title(arguments.dry_run)
    console = Console(width=160)
    console.print(title)
    complete = run_all(sections, Report(arguments.out, title), arguments.budget, console)
    console.print(f"{time.monotonic() - STARTED:.0f} s, results in {arguments.out}")
    return 0 if complete else 1


STARTED = time.monotonic()

if __name__ == "__main__":
    sys.modules["gpu"] = sys.modules["__main__"]  # what gpu_sections imports is this module, not a second one
    sys.exit(main())
