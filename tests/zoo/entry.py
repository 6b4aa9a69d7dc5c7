"""What the zoo consists of: named models that are built on demand, with inputs of a call."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model on the CPU, in eval mode and float32, all weights random, and the arguments of one call."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the zoo. ``group`` is a heading of the table, such as "causal LM"; ``build`` gives equal cases each time."""

    name: str
    group: str
    build: Callable[[], Case]
