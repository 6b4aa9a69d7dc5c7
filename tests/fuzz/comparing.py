"""Errors of outputs and gradients, and what they are computed from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# Relative, in float64. Zero queries: the same sums in another order. Random queries: softmax and merging besides.
ZERO_TOLERANCE = 1e-12
TOLERANCE = 1e-9
# Gradients are held against their own norm, or against this part of the norm of all of them where they vanish.
VANISHING = 1e-4
DRAWS = 5  # the seed of what a network draws at random while it runs
IN_PLACE = "modified by an inplace operation"


class Mismatch(AssertionError):
    """The package did something else than what is expected."""


def compare(
    model: nn.Module, found: nn.Module, inputs: tuple[Tensor, ...], wanted_outputs: tuple[Tensor, ...],
    wanted: list[Tensor | None], sites: Sequence[nn.Module], what: str,
) -> tuple[float, float]:  # fmt: skip
    given = leaves(inputs)
    outputs = run(found, given)
    error = error_of(outputs, wanted_outputs)
    if not error <= TOLERANCE:
        raise Mismatch(f"with random queries the outputs of the {what} model differ by {error:.1e}")
    try:
        gradients = gradients_of(model, given, outputs, sites)
    except RuntimeError as failure:
        if IN_PLACE in str(failure) and _plain_backward_fails(model, inputs):
            return error, 0.0
        raise
    worst, i = worst_of(gradients, wanted)
    if not worst <= TOLERANCE:
        names = [name for name, _ in trained(model)] + ["a query, key norm or input"] * len(wanted)
        raise Mismatch(f"the gradient of {names[i]} of the {what} model differs by {worst:.1e}")
    return error, worst


def _plain_backward_fails(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    plain = {name: value for name, value in model.named_modules() if name == "attnres"}
    if plain:
        return True  # a converted model does not run eagerly; the rewritten one was tried before
    given = leaves(inputs)
    try:
        gradients_of(model, given, run(model, given), [])
    except RuntimeError as failure:
        return IN_PLACE in str(failure)
    return False


def worst_of(found: list[Tensor | None], wanted: list[Tensor | None]) -> tuple[float, int]:
    """The largest relative error of a gradient, and its index; nan counts as the largest."""
    total = math.sqrt(sum(g.square().sum().item() for g in wanted if g is not None))
    errors = []
    for a, b in zip(found, wanted, strict=True):
        a, b = (torch.zeros((), dtype=torch.float64) if g is None else g for g in (a, b))
        error = (a - b).norm().item() / max(b.norm().item(), VANISHING * total, 1e-30)
        errors.append(math.inf if math.isnan(error) else error)
    return max(errors), errors.index(max(errors))


@contextlib.contextmanager
def rounded_elsewhere(model: nn.Module) -> Iterator[None]:
    """The parameters moved by about a rounding of numbers around one."""
    parameters = [p for _, p in trained(model)]
    before = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 1e-16 * (1 + p.abs()))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if not name.startswith("attnres.")]


def gradients_of(
    model: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], sites: Sequence[nn.Module]
) -> list[Tensor | None]:
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).cos().view_as(output)
        loss = loss + (output * weights).sum() + output.square().mean()
    of = [p for _, p in trained(model)] + [p for site in sites for p in site.parameters()]
    of += [given for given in inputs if given.requires_grad]
    return list(torch.autograd.grad(loss, of, allow_unused=True))


def leaves(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies whose gradients are asked for, but for ids and mask."""
    last = len(inputs) - 1
    return tuple(value.clone().requires_grad_(value.is_floating_point() and i < last) for i, value in enumerate(inputs))


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs; dropout draws the same every time."""
    torch.manual_seed(DRAWS)
    outputs: tuple[Tensor, ...] = model(*inputs)
    return outputs


def clones(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.clone() for value in inputs)


def error_of(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of the outputs; infinite where their shapes differ."""
    if [f.shape for f in found] != [e.shape for e in expected]:
        return math.inf
    errors = [((f - e).norm() / e.norm().clamp_min(1e-30)).item() for f, e in zip(found, expected, strict=True)]
    return max(errors, key=lambda error: (math.isnan(error), error))


def randomise(parameters: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for name, parameter in parameters.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if name.endswith("key_norm") else noise)
