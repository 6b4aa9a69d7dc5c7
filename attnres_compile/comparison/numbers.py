"""How far tensors of two models are apart: outputs, and what the readers of a residual stream read."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

_ROWS = 16  # distributions at a time: a vocabulary is large, and float64 doubles it

# Errors of a stream relative to its RMS that are this many units of its dtype's precision count as rounding: block sums add
# up in another order, sublayer after sublayer.
ROUNDING = 16


@dataclasses.dataclass(frozen=True)
class OutputComparison:
    """One output tensor, element by element, and as distributions where its last dimension counts a vocabulary or classes.

    ``max_rel_error`` is the largest difference over the largest magnitude of the original. ``kl_mean`` and ``kl_max`` are
    KL(original || other) in nats over tokens (or images), from float64 log-softmax; ``top1_agreement`` is the share of them
    with the same argmax. The three are None for other outputs.
    """

    name: str
    shape: tuple[int, ...]
    max_abs_error: float
    mean_abs_error: float
    max_rel_error: float
    kl_mean: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None


@dataclasses.dataclass(frozen=True)
class SiteComparison:
    """What the readers of a site read, ``before`` sublayers into a chain: elementwise differences, and the original's RMS.

    With ``scale="paper"`` a site gives the stream divided by its number of sources n; such a mixture is compared times n.
    ``weights`` are the other model's mean depth weights, one per source, or None where it is not converted.
    """

    site: int
    chain: int
    modules: tuple[str, ...]
    before: int
    max_abs_error: float
    mean_abs_error: float
    original_rms: float
    weights: tuple[float, ...] | None = None

    @property
    def max_rel_error(self) -> float:
        """The largest difference over the original's RMS."""
        return _over(self.max_abs_error, self.original_rms)

    @property
    def mean_rel_error(self) -> float:
        """The mean difference over the original's RMS."""
        return _over(self.mean_abs_error, self.original_rms)


def compare_reads(original: Tensor, other: Tensor) -> tuple[float, float, float]:
    """Largest and mean absolute difference of two tensors of one shape, and the RMS of ``original``; in float64."""
    errors = _absolute_errors(original, other)
    return errors.max().item(), errors.mean().item(), original.double().square().mean().sqrt().item()


def compare_outputs(name: str, original: Tensor, other: Tensor, is_distribution: bool) -> OutputComparison:
    """Compare two outputs of one shape, ``[..., classes]`` where they are distributions."""
    errors = _absolute_errors(original, other)
    largest = errors.max().item()
    found = OutputComparison(
        name, tuple(original.shape), largest, errors.mean().item(), _over(largest, original.double().abs().max().item())
    )
    if not is_distribution:
        return found
    rows, others = original.flatten(0, -2), other.flatten(0, -2)
    divergence = torch.cat([_kl(p, q) for p, q in zip(rows.split(_ROWS), others.split(_ROWS), strict=True)])
    agreement = (rows.argmax(-1) == others.argmax(-1)).double().mean().item()
    return dataclasses.replace(found, kl_mean=divergence.mean().item(), kl_max=divergence.max().item(), top1_agreement=agreement)


def rounding_of(dtype: torch.dtype) -> float:
    """The mean error relative to the RMS up to which values of ``dtype`` count as equal but for rounding."""
    return ROUNDING * torch.finfo(dtype).eps


def is_beyond(error: float, limit: float) -> bool:
    """Whether an error exceeds ``limit``; one that is not finite does."""
    return not error <= limit


def _absolute_errors(original: Tensor, other: Tensor) -> Tensor:
    """In float64; equal infinities, such as masked logits, don't differ."""
    a, b = original.double(), other.double()
    return torch.where(a == b, 0.0, (a - b).abs())


def _kl(original: Tensor, other: Tensor) -> Tensor:
    """KL divergence of every row in nats, float64, never below zero; what has no probability adds nothing."""
    p, q = original.double().log_softmax(-1), other.double().log_softmax(-1)
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp(min=0.0)


def _over(error: float, size: float) -> float:
    return error / size if size else error
