"""The definition's streams and norms: a value of a stream as its sources, what was added and read, and the formulas of norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import paths  # noqa: F401  (tests/support, where reference is)
import torch
from networks import Norm
from reference import attend
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------- structure


@dataclasses.dataclass
class Structure:
    """One stream. ``added`` says of every add what its branch sees: "norm", "raw" or "" for nothing of the stream. ``kinds``
    says of the sublayers whether there is a norm behind ("sandwich") or none ("prenorm"); None for parallel branches, rare adds.

    ``reads`` are (adds before, reading module, eps in terms of the mean square); ``looks`` are the numbers of adds at which
    something reads the plain sum. ``is_input``: the stream begins at an input of the model. ``is_fragile``: it is written to in
    place where views of it exist, so that leaving it alone is right as well.
    """

    added: list[str] = dataclasses.field(default_factory=list)
    kinds: list[str | None] = dataclasses.field(default_factory=list)
    reads: list[tuple[int, str, float]] = dataclasses.field(default_factory=list)
    looks: set[int] = dataclasses.field(default_factory=set)
    is_input: bool = False
    is_fragile: bool = False

    @property
    def sites(self) -> list[int]:
        """The numbers of adds before each site."""
        return sorted({before for before, _, _ in self.reads if before})

    @property
    def ends(self) -> list[int]:
        """The numbers of adds at which sublayers end: where anything but the next add reads the stream, and at the end."""
        return sorted({before for before, _, _ in self.reads if before} | (self.looks - {0}) | {len(self.added)})

    def sublayers_before(self, adds: int) -> int:
        return self.ends.index(adds) + 1

    def readers(self, site: int) -> list[str]:
        return list(dict.fromkeys(module for before, module, _ in self.reads if before == site))

    def eps(self, site: int) -> float:
        return next(eps for before, _, eps in self.reads if before == site)


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """How one stream is read: its structure, sublayers per block, and query and key norm of each of its sites."""

    structure: Structure
    block_size: int
    scale: str
    eps: float | None
    queries: dict[int, Tensor]
    key_norms: dict[int, Tensor | None]


class Value:
    """A tensor on a stream, as its sources; ``after`` are the linear maps since the last add. In-place arithmetic changes it."""

    def __init__(self, structure: Structure, plan: StreamPlan | None, root: Tensor) -> None:
        self.structure, self.plan = structure, plan
        self.sources: list[Tensor] = [root]
        self.after: list[Callable[[Tensor], Tensor]] = []
        self.has_views = False

    def copy(self) -> Value:
        value = Value(self.structure, self.plan, self.sources[0])
        value.sources, value.after = list(self.sources), list(self.after)
        return value

    @property
    def adds(self) -> int:
        return len(self.sources) - 1

    def _through(self, tensor: Tensor) -> Tensor:
        for function in self.after:
            tensor = function(tensor)
        return tensor

    def plain(self) -> Tensor:
        total = self.sources[0]
        for source in self.sources[1:]:
            total = total + source
        return self._through(total)

    def look(self) -> Tensor:
        """The plain sum, for a reader that is no norm."""
        self.structure.looks.add(self.adds)
        return self.plain()

    def read(self, module: str, eps: float) -> Tensor:
        """What a norm sees."""
        self.structure.reads.append((self.adds, module, eps))
        if self.plan is None or not self.adds:
            return self.plain()
        plan, ends = self.plan, self.plan.structure.ends
        outputs = []
        start = 0
        for end in ends[: ends.index(self.adds) + 1]:
            outputs.append(torch.stack(self.sources[1 + start : 1 + end]).sum(0))
            start = end
        size = plan.block_size
        blocks = [torch.stack(outputs[i : i + size]).sum(0) for i in range(0, len(outputs), size)]
        eps = plan.structure.eps(self.adds) if plan.eps is None else plan.eps
        mixed = attend([self.sources[0], *blocks], plan.queries[self.adds], plan.key_norms[self.adds], eps, plan.scale)
        return self._through(mixed)

    def add(self, branch: Tensor, sees: str, in_place: bool = False) -> Value:
        value = self if in_place else self.copy()
        self.structure.is_fragile |= in_place and self.has_views
        value.sources = [self._through(source) for source in self.sources] + [branch]
        value.after = []
        if len(self.structure.added) < value.adds:
            self.structure.added.append(sees)
        return value

    def map(self, function: Callable[[Tensor], Tensor], in_place: bool = False) -> Value:
        value = self if in_place else self.copy()
        self.structure.is_fragile |= in_place and self.has_views
        value.after.append(function)
        return value

    def inject(self, tensor: Tensor) -> Value:
        """Add what the stream has no part in: before the first sublayer that belongs to the embedding."""
        if self.adds:
            return self.add(tensor, "")
        value = self.copy()
        value.sources, value.after = [self.plain() + tensor], []
        value.structure.is_input = False
        return value


# -------------------------------------------------------------------------------------------------------------- norms


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def norm_value(norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The formula behind a spelling."""
    name, eps = norm.spelling, norm.eps
    w: Any = 1.0 if weight is None else weight
    b: Any = 0.0 if bias is None else bias
    if name == "rms one plus weight":
        return rms(x, eps) * (1 + w)
    if name == "rms in float32":
        return (x.float() * torch.rsqrt(x.float().double().pow(2).mean(-1, keepdim=True) + eps).float()).double() * w
    if name == "rms by norm":
        return x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + eps) * w
    if name == "F.normalize":
        return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) * x.shape[-1] ** 0.5 * w
    if name == "layer by std":
        return centred(x) / (x.std(-1, keepdim=True) + eps) * w + b
    if name == "mean of abs":
        return x / (x.abs().mean(-1, keepdim=True) + eps) * w
    if name == "amax":
        return x / x.abs().amax(-1, keepdim=True).clamp_min(eps) * w
    if "rms" in name.lower():
        return rms(x, eps) * w
    return rms(centred(x), eps) * w + b


def eps_of_mean_square(norm: Norm) -> float:
    """The eps of a norm as what is added to a mean square: the square of what is added to a root."""
    if norm.spelling == "F.normalize":
        eps = 1e-24
    else:
        eps = norm.eps**2 if norm.spelling in ("rms by norm", "layer by std", "mean of abs", "amax") else norm.eps
    return max(eps, 1e-12)  # a source may be zero: its key needs a finite scale
