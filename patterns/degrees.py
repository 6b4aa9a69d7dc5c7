"""Homogeneity degrees: how a value scales when the residual stream is scaled.

Give the stream degree 1. A value v has degree k if ``v(c x) = c^k v(x)`` for every c > 0. Norms are the readers whose
every result has degree 0: they are scale invariant, whatever they are called and however they are written. The one
table below is all that "recognising a norm" means here.

An eps, a constant of at most ``EPS_MAX`` added under the root, keeps the degree: it breaks homogeneity only where the
stream is as small as the eps itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from fractions import Fraction

from torch.fx import Node

from attnres_compile.patterns.operations import (
    CASTS,
    DROPOUTS,
    MOVES,
    PERMUTES,
    RESHAPES,
    argument,
    constant,
    is_float_tensor,
    name_of,
    reads_only_metadata,
)  # fmt: skip

EPS_MAX = 1e-2
Degree = Fraction | tuple[Fraction, ...]
ZERO, ONE = Fraction(0), Fraction(1)


@dataclasses.dataclass(frozen=True)
class Eps:
    """A constant added to a quantity of ``degree`` (2 for a mean square, 1 for a root of it)."""

    value: float
    degree: Fraction

    @property
    def of_mean_square(self) -> float:
        return self.value if self.degree == 2 else self.value ** float(2 / self.degree)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The degree of a result, and the eps that the operation added, if any."""

    degree: Degree
    eps: Eps | None = None


KEEPS = CASTS | RESHAPES | PERMUTES | DROPOUTS | MOVES | frozenset({
    "neg", "abs", "relu", "mean", "nanmean", "sum", "cumsum", "amax", "amin", "max", "min", "std", "vector_norm", "getitem",
    "select", "narrow", "expand", "expand_as", "pad", "roll", "repeat", "repeat_interleave", "index_select", "chunk", "split",
    "split_with_sizes", "unbind", "flip", "masked_select", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "broadcast_to",
    "adaptive_avg_pool2d", "detach", "positive", "unfold", "gather",
})  # fmt: skip
# Fused norms: position and default of eps, and the degree of what it is added to.
FUSED_NORMS: Mapping[str, tuple[int, float | None, int]] = {
    "layer_norm": (4, 1e-5, 2), "rms_norm": (3, None, 2), "group_norm": (4, 1e-5, 2), "instance_norm": (7, 1e-5, 2),
    "normalize": (3, 1e-12, 1), "native_layer_norm": (4, 1e-5, 2), "_fused_rms_norm": (3, None, 2),
    "native_group_norm": (7, 1e-5, 2), "cosine_similarity": (3, 1e-8, 2),
}  # fmt: skip

DegreeOf = Callable[[object], Fraction]


def degree_of(node: Node, known: Mapping[Node, Degree]) -> Scaling | None:
    """The degree of ``node``, given those of the values that depend on the stream; others have degree 0.

    Returns None where the result is not homogeneous in the stream.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    name = name_of(node)
    first = node.args[0] if node.args else None
    if name == "getitem" and isinstance(first, Node) and isinstance(known.get(first), tuple):
        parts, index = known[first], node.args[1]
        assert isinstance(parts, tuple)
        return Scaling(parts[index]) if isinstance(index, int) and -len(parts) <= index < len(parts) else None
    if any(isinstance(known.get(source), tuple) for source in node.all_input_nodes):
        return None

    def degree(value: object) -> Fraction:
        found = known.get(value, ZERO) if isinstance(value, Node) else ZERO
        assert isinstance(found, Fraction)
        return found

    rule = _RULES.get(name)
    if rule is not None:
        return rule(node, degree)
    if all(degree(source) == 0 for source in node.all_input_nodes):
        return Scaling(ZERO)
    return None


def _keep(node: Node, degree: DegreeOf) -> Scaling | None:
    first = node.args[0]
    if isinstance(first, (list, tuple)):
        return None
    others = [s for s in node.all_input_nodes if s is not first and not reads_only_metadata(node, s)]
    if degree(first) != 0:
        # max(x, constant) and a non-zero padding are not homogeneous; the reductions of the same name are.
        if name_of(node) in ("max", "min") and any(is_float_tensor(s) for s in others):
            return None
        if name_of(node) in CASTS and not is_float_tensor(node):
            return None
        if name_of(node) == "vector_norm" and argument(node, 1, "p", argument(node, 1, "ord")) == 0:
            return None
        if name_of(node) == "pad" and constant(argument(node, 3, "value") or 0.0) != 0.0:
            return None
    return None if any(degree(s) != 0 for s in others) else Scaling(degree(first))


def _keep_two(node: Node, degree: DegreeOf) -> Scaling | None:
    kept = _keep(node, degree)
    return Scaling((kept.degree, kept.degree)) if kept and isinstance(kept.degree, Fraction) else None


def _var(node: Node, degree: DegreeOf) -> Scaling | None:
    return Scaling(2 * degree(node.args[0]))


def _var_mean(node: Node, degree: DegreeOf) -> Scaling | None:
    first = degree(node.args[0])
    return Scaling((2 * first, first))


def _fused_norm(node: Node, degree: DegreeOf) -> Scaling | None:
    if any(degree(source) != 0 for source in node.all_input_nodes if source is not node.args[0]):
        return None
    if name_of(node) == "instance_norm" and argument(node, 5, "use_input_stats", True) is False:
        return None  # with running statistics it is an affine map
    position, default, power = FUSED_NORMS[name_of(node)]
    eps = constant(argument(node, position, "eps", default))
    first = degree(node.args[0])
    if first != 0 and eps is not None and eps > EPS_MAX:
        return None
    added = Eps(eps, power * first) if eps is not None and first > 0 else None
    several = name_of(node) in ("native_layer_norm", "native_group_norm", "_fused_rms_norm")
    # Mean and reciprocal deviation come along as further results.
    return Scaling((ZERO, first, -first) if several else ZERO, added)


def _product(node: Node, degree: DegreeOf) -> Scaling | None:
    return Scaling(degree(node.args[0]) + degree(argument(node, 1, "other")))


def _bilinear(node: Node, degree: DegreeOf) -> Scaling | None:
    """A product summed over features, such as a mean square written as an inner product; projections are left alone."""
    degrees = [degree(source) for source in node.all_input_nodes] * (2 if len(node.all_input_nodes) == 1 else 1)
    if len(degrees) == 2 and all(degrees):
        return Scaling(degrees[0] + degrees[1])
    return Scaling(ZERO) if not any(degrees) else None


def _joined(node: Node, degree: DegreeOf) -> Scaling | None:
    """Parts of one degree, such as the neighbours that patch merging lays side by side."""
    parts = node.args[0] if isinstance(node.args[0], (list, tuple)) else ()
    degrees = {degree(part) for part in parts}
    return Scaling(degrees.pop()) if len(degrees) == 1 else None


def _quotient(node: Node, degree: DegreeOf) -> Scaling | None:
    if node.kwargs.get("rounding_mode") is not None:
        return None
    return Scaling(degree(node.args[0]) - degree(argument(node, 1, "other")))


def _sum(node: Node, degree: DegreeOf) -> Scaling | None:
    left, right = node.args[0], argument(node, 1, "other")
    if degree(left) == degree(right):
        return Scaling(degree(left))
    for value, added in ((left, right), (right, left)):
        number = constant(added)
        if number is not None and degree(value) > 0 and 0 <= number <= EPS_MAX and name_of(node) == "add":
            return Scaling(degree(value), Eps(number, degree(value)))
    return None


def _power(node: Node, degree: DegreeOf) -> Scaling | None:
    exponent = constant(argument(node, 1, "exponent"))
    if exponent is None or not isinstance(node.args[0], Node):
        return None
    return Scaling(degree(node.args[0]) * Fraction(exponent).limit_denominator(64))


def _clamp(node: Node, degree: DegreeOf) -> Scaling | None:
    lower = constant(argument(node, 1, "min"))
    upper = argument(node, 2, "max") if name_of(node) == "clamp" else None
    first = degree(node.args[0])
    if first == 0 and all(degree(source) == 0 for source in node.all_input_nodes):
        return Scaling(ZERO)
    if upper is None and lower is not None and 0 <= lower <= EPS_MAX and first > 0:
        return Scaling(first, Eps(lower, first))
    return None


def _scaled(factor: Fraction) -> Callable[[Node, DegreeOf], Scaling | None]:
    return lambda node, degree: Scaling(factor * degree(node.args[0]))


def _sign(node: Node, degree: DegreeOf) -> Scaling | None:
    return Scaling(ZERO)


_RULES: dict[str, Callable[[Node, DegreeOf], Scaling | None]] = {
    **dict.fromkeys(KEEPS, _keep),
    **dict.fromkeys(FUSED_NORMS, _fused_norm),
    "std_mean": _keep_two, "var": _var, "var_mean": _var_mean,
    "mul": _product, "div": _quotient, "add": _sum, "sub": _sum,
    "pow": _power, "square": _scaled(Fraction(2)), "sqrt": _scaled(Fraction(1, 2)), "rsqrt": _scaled(Fraction(-1, 2)),
    "cat": _joined, "concat": _joined, "concatenate": _joined, "stack": _joined,
    "einsum": _bilinear, "vecdot": _bilinear, "linalg_vecdot": _bilinear,
    "reciprocal": _scaled(Fraction(-1)), "clamp": _clamp, "clamp_min": _clamp, "sign": _sign, "sgn": _sign,
}  # fmt: skip
