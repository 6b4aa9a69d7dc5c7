"""Norms in a form that a kernel can compute: RMSNorm and LayerNorm over the features, fused or spelled out.

The detector needs to know only that a reader is scale invariant, whatever it is called. Here the reader is to be replaced, so
its formula must be known exactly; what is not recognised stays as the model wrote it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from attnres_compile.patterns.operations import (
    CASTS,
    argument,
    constant,
    dtype_of,
    is_call,
    is_float_tensor,
    name_of,
    reads_only_metadata,
    same_shape,
    shape_of,
    width_of,
)  # fmt: skip

# A spelled-out RMSNorm takes at most this many operations, casts included.
_LONGEST = 16


@dataclasses.dataclass(frozen=True)
class NormForm:
    """``output = norm(value) * weight + bias`` over the last dimension; ``nodes`` compute it and serve nothing else.

    ``kind`` is "rms" or "layer"; ``eps`` is added to the mean square, or to the variance.
    """

    kind: str
    weight: Node | None
    bias: Node | None
    eps: float
    output: Node
    nodes: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class _Step:
    """What an operation of a spelled-out RMSNorm holds: "value", "square", "mean", "inverse", "rms", "normed", "scaled"."""

    kind: str
    eps: float | None = None
    weight: Node | None = None


def match_norm(value: Node) -> NormForm | None:
    """The norm that alone reads ``value``, ``[..., D]``, and gives a tensor of its shape and dtype; None if there is none."""
    readers = [user for user in value.users if not reads_only_metadata(user, value)]
    form = _fused(value, readers[0]) if len(readers) == 1 else None
    form = form or _spelled_out(value)
    if form is None or not same_shape(form.output, value) or dtype_of(form.output) != dtype_of(value):
        return None
    affine = [node for node in (form.weight, form.bias) if node is not None]
    return form if all(_is_vector(node, value) for node in affine) else None


def _is_vector(node: Node, value: Node) -> bool:
    shape = shape_of(node)
    return is_float_tensor(node) and shape is not None and len(shape) == 1 and str(shape[0]) == width_of(value)


def _fused(value: Node, reader: Node) -> NormForm | None:
    kind = {"rms_norm": "rms", "layer_norm": "layer"}.get(name_of(reader))
    sizes = argument(reader, 1, "normalized_shape")
    if kind is None or argument(reader, 0, "input") is not value or not isinstance(sizes, (tuple, list)) or len(sizes) != 1:
        return None
    weight = argument(reader, 2, "weight")
    bias = argument(reader, 3, "bias") if kind == "layer" else None
    given = argument(reader, 4, "eps", 1e-5) if kind == "layer" else argument(reader, 3, "eps")
    eps = constant(given) if given is not None else _default_eps(value)
    return None if eps is None else NormForm(kind, weight, bias, eps, reader, (reader,))


def _default_eps(value: Node) -> float | None:
    """The eps of rms_norm without one; for 16-bit dtypes torch versions disagree about whose it is."""
    dtype = dtype_of(value)
    return torch.finfo(dtype).eps if dtype in (torch.float32, torch.float64) else None


def _spelled_out(value: Node) -> NormForm | None:
    known = {value: _Step("value")}
    pending = set(value.users)
    outside: set[Node] = set()
    while pending and len(known) <= _LONGEST:
        node = min(pending)
        pending.discard(node)
        step = _next_step(node, known, value)
        if step is not None:
            known[node] = step
            pending.update(node.users)
        else:
            read = {source for source in node.all_input_nodes if source in known}
            outside.update(source for source in read if source is not value or not reads_only_metadata(node, source))
    if pending or len(outside) != 1:
        return None
    output = outside.pop()
    step = known[output]
    if step.kind not in ("normed", "scaled") or step.eps is None:
        return None
    return NormForm("rms", step.weight, None, step.eps, output, tuple(node for node in known if node is not value))


def _next_step(node: Node, known: dict[Node, _Step], value: Node) -> _Step | None:
    """What ``node`` adds to the formula, or None where it is no part of it."""
    if not is_call(node) or not is_float_tensor(node) or not _is_precise(node, value):
        return None
    name = name_of(node)
    sources = [source for source in node.args if isinstance(source, Node)]
    steps = [known[source] for source in sources if source in known]
    kinds = [step.kind for step in steps]
    first = steps[0] if steps else None
    if first is None or len(sources) > 2:
        return None
    if name in CASTS and node.args[0] in known:
        return first
    if kinds == ["value"] and (name == "square" or (name == "pow" and constant(argument(node, 1, "exponent")) == 2)):
        return _Step("square")
    if kinds == ["value", "value"] and name == "mul":
        return _Step("square")
    if kinds == ["square"] and name == "mean" and _over_features(node):
        return _Step("mean")
    if kinds == ["mean"] and name == "add" and first.eps is None and len(node.args) == 2 and not node.kwargs:
        eps = next((constant(other) for other in node.args if other not in known), None)
        return None if eps is None else _Step("mean", eps)
    if kinds == ["mean"] and first.eps is not None:
        if name == "rsqrt" or (name == "pow" and constant(argument(node, 1, "exponent")) == -0.5):
            return _Step("inverse", first.eps)
        if name == "sqrt":
            return _Step("rms", first.eps)
    if sorted(kinds) == ["inverse", "value"] and name == "mul":
        return _Step("normed", next(step.eps for step in steps if step.kind == "inverse"))
    if kinds == ["value", "rms"] and name == "div" and len(node.args) == 2 and not node.kwargs:
        return _Step("normed", steps[1].eps)
    if kinds == ["normed"] and name == "mul" and len(sources) == 2:
        weight = next(source for source in sources if source not in known)
        return _Step("scaled", first.eps, weight) if _is_vector(weight, value) else None
    return None


def _is_precise(node: Node, value: Node) -> bool:
    """A norm computed in fewer bits than the stream has would be computed better than the model does: that is a change."""
    found, stream = dtype_of(node), dtype_of(value)
    return found is not None and stream is not None and found.itemsize >= stream.itemsize


def _over_features(node: Node) -> bool:
    dims, keepdim = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    return dims in (-1, (-1,), [-1]) and keepdim is True
