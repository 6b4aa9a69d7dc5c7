"""A recipe with Attention Residuals, by the definition: from the recipe and the module's own parameters, in its dtype.

Nothing here knows the package under test. ``walk`` goes through a recipe step by step, with the sources of every value of
every stream. Without a plan every read is the plain sum, so that it gives what the module gives, and records the structure:
what is added, what is read, by which norm. With a plan every read of a norm is the softmax over sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from adds import contribution
from comparing import DRAWS
from networks import (
    IN_PLACE_ADDS,
    Branch,
    Cut,
    Injection,
    LongSkip,
    Network,
    Norm,
    Reader,
    Remember,
    Step,
    Sublayer,
    Tower,
    Transform,
)
from torch import Tensor, nn
from values import StreamPlan, Structure, Value, centred, eps_of_mean_square, norm_value, rms

# --------------------------------------------------------------------------------------------------------------- walk


class Walk:
    """One pass through a recipe. ``plans`` are those of the streams, in the order in which they begin; None for plain ones."""

    def __init__(
        self, network: Network, model: nn.Module, inputs: Sequence[Tensor], plans: Sequence[StreamPlan | None] = ()
    ) -> None:
        self.network, self.model, self.plans = network, model, list(plans)
        self.ids, self.patches, self.entry, self.side, self.mask = inputs
        self.structures: list[Structure] = []
        self.aux: list[Callable[[], Tensor]] = []
        self.is_unclear = False
        self.has_side = False  # whether anything so far was computed from side
        self.is_made_of_side = False  # whether an embedding, or what a cut begins with, was
        memory = self.side
        torch.manual_seed(DRAWS)
        for i, tower in enumerate(network.towers):
            y = self._tower(i, tower, memory)
            if i + 1 < len(network.towers):
                memory = y
                self.aux.append(lambda y=y: y)
        self.outputs = (y, *(late() for late in self.aux))

    # ------------------------------------------------------------------------------------------------------- names

    def _enter(self, tower: int, step: int | None) -> None:
        if step is None:
            self.prefix, self.host = f"t{tower}_", ""
        elif self.network.blocks:
            self.prefix, self.host = f"t{tower}_steps.{step}.", f"t{tower}_steps.{step}"
        else:
            self.prefix, self.host = f"t{tower}_s{step}_", ""

    def _module(self, name: str) -> Any:
        return self.model.get_submodule(self.prefix + name)

    def _parameter(self, name: str) -> Tensor:
        return self.model.get_parameter(self.prefix + name)

    def _begin(self, root: Tensor) -> Value:
        structure = Structure()
        plan = self.plans[len(self.structures)] if self.plans else None
        self.structures.append(structure)
        return Value(structure, plan, root)

    def _norm(self, norm: Norm, name: str, x: Tensor, path: str | None = None) -> Tensor:
        if norm.inline and not norm.spelling.startswith("nn."):
            return norm_value(norm, x, self._parameter(f"{name}_weight"), self._parameter(f"{name}_bias"))
        module = self.model.get_submodule(path or self.prefix + name)
        return norm_value(norm, x, getattr(module, "weight", None), getattr(module, "bias", None))

    def _read(self, value: Value, norm: Norm, name: str, path: str | None = None, reader: str | None = None) -> Tensor:
        """The stream's value as a norm sees it."""
        if reader is None:
            reader = self.host if norm.inline and not norm.spelling.startswith("nn.") else path or self.prefix + name
        return value.read(reader, eps_of_mean_square(norm))

    # ------------------------------------------------------------------------------------------------------- towers

    def _tower(self, i: int, tower: Tower, memory: Tensor) -> Tensor:
        self._enter(i, None)
        value = self._begin(self._embedding(tower.embedding))
        value.structure.is_input = tower.embedding == "input"
        kept: list[Value] = []
        for _ in range(tower.repeat):
            for j, step in enumerate(tower.steps):
                self._enter(i, j)
                value = self._step(step, value, memory, kept)
        self._enter(i, None)
        return self._head(tower, value)

    def _embedding(self, kind: str) -> Tensor:
        d = self.network.width
        if "ids" in kind or kind == "straight through":
            x = self._module("ids").weight[self.ids]
            if kind == "ids and positions":
                x = x + self._parameter("positions")
            elif kind == "scaled ids":
                x = x * d**0.5
            elif kind == "normed ids":
                norm = self._module("layer_norm")
                x = rms(centred(x), norm.eps) * norm.weight + norm.bias
            elif kind == "straight through":
                x = x + (x.round() - x).detach()
            elif kind == "dropped ids":
                x = F.dropout(x, 0.25, self.network.training)
            return x
        if kind == "patches and cls":
            cls = self._parameter("cls").expand(self.patches.shape[0], 1, d)
            return torch.cat([cls, self._module("project")(self.patches)[:, 1:]], dim=1)
        if "patches" in kind:
            x = self._module("project")(self.patches)
            return x * self.mask if kind == "masked patches" else x
        if kind == "latents":
            return self._parameter("latents").expand(self.ids.shape[0], -1, -1)
        return self.entry if kind == "input" else self._module("entry")(self.entry)

    def _head(self, tower: Tower, value: Value) -> Tensor:
        head, norm = tower.head, tower.norm
        if head == "raw":
            return value.plain()
        if head == "raw linear":
            return self._module("head")(value.look())
        if head in ("pooled norm", "token norm"):
            reader = "" if head == "pooled norm" else None  # the mean is what reads the stream
            x = self._read(value, norm, "norm", reader=reader)
            return self._norm(norm, "norm", x.mean(1) if head == "pooled norm" else x[:, 0])
        y = self._norm(norm, "norm", self._read(value, norm, "norm"))
        if head == "norm and linear":
            return self._module("head")(y)
        if head == "norm pooled":
            return y.mean(1)
        return y + self._module("head")(y) if head == "sum normed" else y

    # ------------------------------------------------------------------------------------------------------- steps

    def _step(self, step: Step, value: Value, memory: Tensor, kept: list[Value]) -> Value:
        if isinstance(step, Sublayer):
            return self._sublayer(step, value, memory)
        if isinstance(step, Transform):
            return self._transform(step.kind, value)
        if isinstance(step, Reader):
            self._reader(step, value)
        elif isinstance(step, Injection):
            if step.kind == "side":
                # side + f(side) in an embedding is a stream that begins at side, too, with a branch that reads it.
                self.is_unclear |= not value.adds and self.is_made_of_side
                self.has_side = True
                return value.inject(self.side)
            self.has_side |= step.kind == "projected"
            self.is_made_of_side |= step.kind == "projected"
            return value.inject(self._parameter("positions") if step.kind == "positions" else self._module("project")(self.side))
        elif isinstance(step, Remember):
            kept.append(value)
        elif isinstance(step, LongSkip):
            earlier = kept.pop()
            if earlier is value:
                return value.map(lambda t: 2 * t)
            self.is_unclear |= earlier.adds == value.adds
            return value.add(earlier.look(), "")
        elif isinstance(step, Cut):
            self.is_made_of_side |= self.has_side
            if step.kind == "norm":
                module = self._module("cut")
                x = value.read(self.prefix + "cut", 1e-5)
                return self._begin(rms(centred(x), 1e-5) * module.weight + module.bias)
            x = value.look()
            return self._begin(x.detach() if step.kind == "detach" else self._module("cut")(x))
        return value

    def _transform(self, kind: str, value: Value) -> Value:
        d = self.network.width
        if kind in ("mask", "mask in place"):
            return value.map(lambda t: t * self.mask, kind == "mask in place")
        if kind in ("scale", "scale in place"):
            return value.map(lambda t: t * 0.9, kind == "scale in place")
        if kind == "parameter":
            alpha = self._parameter("alpha")
            return value.map(lambda t: t * alpha)
        factors = {"divide": 0.5, "square root": d**-0.5, "doubled": 2.0}
        if kind in factors:
            return value.map(lambda t: t * factors[kind])
        if kind in ("transpose", "clone", "plus zero", "rejoined"):
            return value.copy()
        value.has_views = True  # of the same memory: flat, contiguous, cast, dropout, slice all, unsqueeze
        return value

    def _reader(self, step: Reader, value: Value) -> None:
        kind = step.kind
        if kind == "normed":
            found = self._norm(step.norm, "norm", self._read(value, step.norm, "norm"))
        elif kind in ("hidden", "hidden view", "token"):
            shown = {"hidden": lambda t: t, "hidden view": lambda t: t.transpose(0, 1), "token": lambda t: t[0]}[kind]
            value.has_views |= kind != "hidden"
            self.aux.append(lambda: shown(value.plain()))
            return
        elif kind == "hidden detached":
            value.has_views = True
            value.look()
            self.aux.append(lambda: value.plain().detach())
            return
        elif kind in ("hidden clone", "scaled"):
            found = value.plain() * (0.5 if kind == "scaled" else 1.0)
        else:
            x = value.look()
            found = {
                "pooled": lambda: x.mean(0),
                "router": lambda: self._module("router")(x).softmax(-1),
                "largest": lambda: x.abs().amax(-1),
                "detached": lambda: x.detach().amin(-1),
                "squares": lambda: x.square().sum(-1),
                "statistics": lambda: x.std(-1),
            }[kind]()
        self.aux.append(lambda: found)

    # ---------------------------------------------------------------------------------------------------- sublayers

    def _sublayer(self, step: Sublayer, value: Value, memory: Tensor) -> Value:
        given = []
        n: Any = None
        for i, branch in enumerate(step.branches):
            if branch.norm is not None:
                n = self._normed(step, i, branch, value)
            given.append(self._branch(i, branch, n, memory))
        if step.summed:
            given = [sum(given[1:], given[0])]
        is_plain = len(step.branches) == 1 and step.add in ("x + b", "b + x", "x += b", "torch.add", "x.add", "x - b")
        value.structure.kinds.append(("sandwich" if step.branches[0].behind else "prenorm") if is_plain else None)
        for b in given:
            value = self._add(step.add, value, b, "raw" if step.raw else "norm")
        return value

    def _normed(self, step: Sublayer, i: int, branch: Branch, value: Value) -> Tensor:
        if step.raw:
            return value.look()
        assert branch.norm is not None
        if not self.network.shared_norm:
            return self._norm(branch.norm, f"norm{i}", self._read(value, branch.norm, f"norm{i}"))
        norm = dataclasses.replace(self.network.towers[0].norm, inline=False)
        path = f"{self.prefix}norm{i}" if self.network.blocks else "shared_norm"
        return self._norm(norm, "", self._read(value, norm, "", path=path), path=path)

    def _branch(self, i: int, branch: Branch, n: Tensor, memory: Tensor) -> Tensor:
        if branch.kind == "functional":
            b = F.linear(torch.tanh(F.linear(n, self._parameter(f"up{i}"))), self._parameter(f"down{i}"))
        else:
            self.has_side |= branch.kind == "cross"  # memory is side, or a tower's output
            b = self._module(f"branch{i}")(n.clone(), *([memory] if branch.kind == "cross" else []))
        if branch.gate == "layer scale":
            b = b * self._parameter(f"gamma{i}")
        elif branch.gate == "gate of norm":
            b = b * torch.sigmoid(self._module(f"gate{i}")(n))
        elif branch.gate == "scalar":
            b = b * self._parameter(f"scalar{i}")
        elif branch.gate == "constant":
            b = b * 0.5
        elif branch.gate == "condition":
            self.has_side = True
            b = b * self.side
        elif branch.gate in ("dropout", "nn.Dropout"):
            b = F.dropout(b, 0.25, self.network.training)
        elif branch.gate == "rounded":
            b = b.float().double()
        return b if branch.behind is None else self._norm(branch.behind, f"behind{i}", b)

    def _add(self, spelling: str, value: Value, b: Tensor, sees: str) -> Value:
        b = contribution(spelling, b, self.mask, self._parameter)
        if spelling in ("lerp", "weighted"):
            factor = 0.5 if spelling == "lerp" else 0.9
            value = value.map(lambda t: t * factor)
        if spelling in ("transposed in place", "slice in place"):
            value.has_views = True
        value = value.add(b, sees, in_place=spelling in IN_PLACE_ADDS)
        if spelling == "halved sum":
            value = value.map(lambda t: t / 2)
        elif spelling == "masked sum":
            value = value.map(lambda t: t * self.mask)
        return value
