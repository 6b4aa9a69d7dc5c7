"""Places in the user's own code: of forward methods, of the call that is running, of a line in an explanation by torch."""

from __future__ import annotations

import inspect
import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)
_OURS = str(Path(__file__).parent)


def forward_ranges(root: nn.Module) -> list[tuple[str, int, int]]:
    """File, first and last line of the forward methods inside ``root``."""
    found = set()
    for kind in {type(module) for module in root.modules()}:
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        if code is not None:
            lines = [line for _, _, line in code.co_lines() if line is not None]
            found.add((code.co_filename, min(lines, default=0), max(lines, default=0)))
    return list(found)


def is_inside(file: str, line: int | None, ranges: list[tuple[str, int, int]]) -> bool:
    return line is not None and any(file == name and first <= line <= last for name, first, last in ranges)


def caller_of(root: nn.Module) -> str:
    """Where the eager code of a module around ``root`` calls it right now, as "Module at file:line: code"; else "".

    Dynamo compiles a part of a model alone when a graph break made it give up on the frame around the part.
    """
    frame = inspect.currentframe()
    found = ""
    while frame is not None:
        owner = frame.f_locals.get("self")
        file, number = frame.f_code.co_filename, frame.f_lineno
        if isinstance(owner, nn.Module) and _holds(owner, root) and is_inside(file, number, forward_ranges(owner)):
            found = f"{type(owner).__name__} at {file}:{number}: {linecache.getline(file, number).strip()}"
        frame = frame.f_back
    return found


def caller_of_kind(kind: type[M]) -> M | None:
    """The innermost module of class ``kind`` whose method is running right now."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None


def modules_that_run() -> Iterator[nn.Module]:
    """Modules whose eager code runs right now, the innermost first; instead of torch.compile's wrapper what it wraps."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            yield getattr(owner, "_orig_mod", owner)
        frame = frame.f_back


def _holds(owner: nn.Module, part: nn.Module) -> bool:
    """Whether ``owner`` is a model around ``part``; DDP is a wrapper, not a model."""
    if owner is part or isinstance(owner, nn.parallel.DistributedDataParallel):
        return False
    return any(module is part for module in owner.modules())


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def user_place(text: str) -> str:
    """The last of the model's own lines in Dynamo's explanation, as " at file:line: code"."""
    places = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.+)', text)
    own = [place for place in places if "/torch/" not in place[0] and not place[0].startswith(_OURS)]
    return f" at {own[-1][0]}:{own[-1][1]}: {own[-1][2].strip()}" if own else ""
