"""The fused kernels on zero, huge and broken tokens, in Triton's interpreter where there is no GPU; few cases, as it is slow."""

from __future__ import annotations

import pytest
import torch
from interpreter import make_faithful
from torch import Tensor

from attnres_compile.kernels import differentiable
from attnres_compile.kernels.differentiable import FUSED, NAIVE
from attnres_compile.passes.rewrite import LEAST_EPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, WIDTH = 5, 32
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

if DEVICE.type == "cpu":
    make_faithful()


def drawn(seed: int, magnitude: float, dtype: torch.dtype) -> Tensor:
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x / x.abs().max() * magnitude).to(dtype).to(DEVICE)


def read(kernels: str, sources: list[Tensor], query: Tensor, eps: float, way: str) -> tuple[Tensor, list[Tensor]]:
    """One read of all sources, the last of which is the partial sum, and the gradients of the sources and the query."""
    leaves = [source.clone().requires_grad_() for source in sources]
    query = query.clone().requires_grad_()
    scale = float(len(sources))
    if way == "site":
        h, *_ = differentiable.site(leaves, query, None, eps, scale, kernels=kernels)
    else:
        mixed, lse, *_ = differentiable.inter(leaves[:-1], [query], [], eps, kernels)
        _, h = differentiable.merge(leaves[-1], None, mixed, lse, query, None, eps, scale, kernels=kernels)
    weights = torch.linspace(-1, 1, h.numel(), device=DEVICE).view_as(h).to(h.dtype)
    return h.detach(), list(torch.autograd.grad((h * weights).sum(), [*leaves, query]))


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    assert error.item() <= tolerance


WAY = pytest.mark.parametrize("way", ["site", "two phases"])


@WAY
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e10, 1e20, 1e37], ids=lambda magnitude: f"{magnitude:g}")
def test_magnitudes(magnitude: float, dtype: torch.dtype, way: str) -> None:
    """As in plain torch, and at zero queries the sum."""
    sources = [drawn(seed, magnitude, dtype) for seed in range(3)]
    for size in (0.0, 1.0, 100.0) if magnitude < 1e37 else (0.0,):  # no products with queries beyond the largest number
        query = size * drawn(9, 1.0, torch.float32)[0].to(dtype)
        (found, gradients), (expected, wanted) = (read(kernels, sources, query, 1e-5, way) for kernels in (FUSED, NAIVE))
        assert found.isfinite().all()
        assert_close(found, expected, TOLERANCE[dtype])
        if not size:
            assert_close(found, sum(source.double() for source in sources), TOLERANCE[dtype])
        assert all(gradient.isfinite().all() for gradient in gradients[:-1])
        for gradient, other in zip(gradients[:-1], wanted[:-1], strict=True):
            assert_close(gradient, other, 2 * TOLERANCE[dtype])


@WAY
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30], ids=str)
def test_a_broken_token_is_its_own_affair(broken: float, way: str) -> None:
    query = drawn(9, 1.0, torch.float32)[0]
    clean = [drawn(seed, 1.0, torch.float32) for seed in range(3)]
    expected, wanted = read(FUSED, clean, query, 1e-5, way)
    others = [0, 1, 3, 4]
    for place in range(3):
        dirty = [source.clone() for source in clean]
        dirty[place][2, 7] = broken
        found, gradients = read(FUSED, dirty, query, 1e-5, way)
        assert torch.equal(found[others], expected[others])
        for gradient, other in zip(gradients[:-1], wanted[:-1], strict=True):
            assert torch.equal(gradient[others], other[others])


@WAY
def test_a_source_of_zeros_under_the_least_eps(way: str) -> None:
    for zero in range(3):
        sources = [drawn(seed, float(seed != zero), torch.float32) for seed in range(3)]
        found, gradients = read(FUSED, sources, torch.zeros(WIDTH, device=DEVICE), LEAST_EPS, way)
        assert_close(found, sum(sources, torch.zeros(())), 2e-5)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("ratio", [1e4, 1e10], ids=lambda ratio: f"{ratio:g}")
def test_a_small_partial_sum_beside_large_blocks(ratio: float) -> None:
    x, o = drawn(1, 1.0, torch.float32), drawn(2, ratio, torch.float32)
    lse = torch.full((TOKENS,), -1e3, device=DEVICE)
    for norm, wanted in (("", x), ("rms", torch.nn.functional.rms_norm(x, (WIDTH,), eps=1e-6))):
        query = torch.ones(WIDTH, device=DEVICE)
        _, h = differentiable.merge(x, None, o, lse, query, None, 1e-5, 1.0, norm, None, None, 1e-6, kernels=FUSED)
        assert_close(h, wanted, 1e-5)
