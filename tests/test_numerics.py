"""Zero, tiny, huge and broken streams and queries: what the definition gives, and what the plain model gives at zero queries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from token_nets import PATHS, TokenNet, definition, rewritten
from torch import Tensor, nn

import attnres_compile as ac
from attnres_compile.kernels import differentiable

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 6e-2}
MAGNITUDES = [0.0, 1e-45, 1e-40, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e18, 1e20, 1e30, 1e38]
PATH = pytest.mark.parametrize("path", PATHS)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stream(magnitude: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[2, 4, 16]`` of values up to ``magnitude``, one of which has it."""
    x = drawn(2, 4, 16, dtype=torch.float64)
    return (x / x.abs().max() * magnitude).to(dtype)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    assert error.item() <= tolerance


@PATH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm], ids=["rms", "layer"])
def test_zero_queries_give_the_plain_model_at_every_magnitude(norm: type[nn.Module], dtype: torch.dtype, path: str) -> None:
    model = TokenNet(norm=norm).to(dtype)
    plain = copy.deepcopy(model)
    call = rewritten(model, stream(1.0, dtype), path)
    for magnitude in MAGNITUDES:
        x = stream(magnitude, dtype).requires_grad_()
        expected, found = plain(x), call(x)
        if not expected.isfinite().all():
            assert magnitude >= 1e20  # whose square is no float32: torch's layer_norm gives NaN, its rms_norm zeros
            continue
        assert_close(found, expected, TOLERANCE[dtype])
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        if wanted.isfinite().all():
            assert gradient.isfinite().all(), magnitude


@PATH
@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e2, 1e4], ids=lambda size: f"queries {size:g}")
def test_queries_of_every_size_are_the_definition_in_float64(size: float, path: str) -> None:
    model = TokenNet()
    call = rewritten(model, stream(1.0), path, seed=2, size=size)
    exact = copy.deepcopy(model).double()
    for magnitude in (0.0, 1e-20, 1e-3, 1.0, 1e3, 1e10):
        x = stream(magnitude)
        found, expected = call(x), definition(exact, x.double())
        assert found.isfinite().all()
        # Scores of magnitude S carry an error of S roundings, and so do the weights that they are the logarithms of.
        assert_close(found, expected, 2e-5 * max(1.0, size)) if size <= 100 else None
        found.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@PATH
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4], ids=lambda size: f"queries {size:g}")
def test_float64_at_every_magnitude(size: float, path: str) -> None:
    model = TokenNet().double()
    call = rewritten(model, stream(1.0, torch.float64), path, seed=2, size=size)
    for magnitude in (0.0, 1e-320, 1e-150, 1e-20, 1.0, 1e20, 1e150):
        x = stream(magnitude, torch.float64).requires_grad_()
        found, expected = call(x), definition(model, x)
        assert_close(found, expected, 1e-11 * max(1.0, size))
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        assert gradient.isfinite().all()


@PATH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_queries_pick_one_source(dtype: torch.dtype, path: str) -> None:
    """Queries of 1e4 along one direction: all weight on the source with the largest score, no NaN in either direction."""
    for sign in (1.0, -1.0):
        torch.compiler.reset()
        model = TokenNet().to(dtype)
        x = stream(1.0, dtype).requires_grad_()
        call = rewritten(model, x.detach(), path)
        with torch.no_grad():
            for site in model.attnres.sites:
                site.query.fill_(sign * 1e4)
        found = call(x)
        assert_close(found, definition(model, x), 0.2 if dtype == torch.bfloat16 else 1e-3)
        found.square().sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@PATH
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
def test_a_broken_token_is_its_own_affair(broken: float, path: str) -> None:
    model = TokenNet()
    call = rewritten(model, stream(1.0), path, seed=2)
    clean = stream(1.0).requires_grad_()
    dirty = stream(1.0)
    dirty[1, 2, 5] = broken
    dirty.requires_grad_()
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 2] = False
    expected, found = call(clean), call(dirty)
    assert torch.equal(found[others], expected[others])
    (wanted,) = torch.autograd.grad(expected.square().sum(), clean)
    (gradient,) = torch.autograd.grad(found.square().sum(), dirty)
    assert torch.equal(gradient[others], wanted[others])
    if broken != 1e30:
        assert found[1, 2].isnan().any()


@PATH
@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (2, 0), (1, 8), (3, 5), (4,)], ids=str)
@pytest.mark.parametrize("width", [1, 16])
def test_few_tokens_and_one_feature(width: int, shape: tuple[int, ...], path: str) -> None:
    model = TokenNet(width=width).double()
    x = drawn(*shape, width, dtype=torch.float64).requires_grad_()
    call = rewritten(model, x, path, seed=2)
    found, expected = call(x), definition(model, x)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *model.parameters()])
    gradients = torch.autograd.grad(found.square().sum(), [x, *model.parameters()])
    torch.testing.assert_close(gradients, wanted, rtol=1e-8, atol=1e-10)


@PATH
@pytest.mark.parametrize("sizes", [(1e10, 1e-10), (1e-10, 1e10), (1e18, 1.0), (1e-30, 1e-35)], ids=str)
@pytest.mark.parametrize("size", [0.0, 1.0], ids=["zero queries", "queries"])
def test_sources_of_very_different_size(size: float, sizes: tuple[float, float], path: str) -> None:
    model = TokenNet(branch_gain=sizes[1])
    plain = copy.deepcopy(model)
    x = stream(sizes[0]).requires_grad_()
    call = rewritten(model, x.detach(), path, seed=2, size=size)
    found = call(x)
    exact = copy.deepcopy(model).double()
    assert_close(found, definition(exact, x.double()), 1e-4)
    if not size:
        assert_close(found, plain(x), 2e-5)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6, 1e10], ids=lambda ratio: f"{ratio:g}")
def test_a_small_partial_sum_beside_large_blocks(ratio: float) -> None:
    """All weight on the partial sum: it comes out as it is, whatever the blocks hold. And the other way round."""
    x, o, query = drawn(3, 16), ratio * drawn(3, 16, seed=4), torch.ones(16)
    x, o = x.requires_grad_(), o.requires_grad_()
    for lse, wanted in ((-1e3, x), (1e3, o)):
        _, h = differentiable.merge(x, None, o, torch.full((3,), lse), query, None, 1e-5, 1.0)
        assert_close(h, wanted, 1e-6)
        gradients = torch.autograd.grad(h.sum(), [x, o])
        expected = [torch.full_like(each, float(each is wanted)) for each in (x, o)]
        torch.testing.assert_close(list(gradients), expected, rtol=1e-5, atol=1e-5)


@PATH
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-20])
def test_constant_streams(value: float, path: str) -> None:
    """A LayerNorm makes zeros of them, so that every branch gives its bias."""
    model = TokenNet(norm=nn.LayerNorm)
    plain = copy.deepcopy(model)
    x = torch.full((2, 4, 16), value, requires_grad=True)
    call = rewritten(model, x.detach(), path)
    assert_close(call(x), plain(x), 2e-5)
    with torch.no_grad():
        for linear in (*model.linears, *plain.linears):
            linear.bias.zero_()
    assert_close(call(x), plain(x), 2e-5)
    call(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@PATH
@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_branches_that_give_zeros_under_a_norm_without_eps(eps: float, path: str) -> None:
    """As output projections that start at zero do: their sources have no direction, the sum has."""
    model = TokenNet(eps=eps)
    with torch.no_grad():
        for linear in model.linears:
            linear.weight.zero_()
            linear.bias.zero_()
    plain = copy.deepcopy(model)
    x = stream(1.0).requires_grad_()
    call = rewritten(model, x.detach(), path)
    found, expected = call(x), plain(x)
    assert_close(found, expected, 2e-5)
    weights = torch.linspace(-1, 1, x.numel()).view_as(x)  # the sum of squares of what a norm gives is constant
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for parameter, other in zip(model.linears.parameters(), plain.linears.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert_close(parameter.grad, other.grad, 1e-4)
    assert all(site.query.grad.isfinite().all() for site in model.get_submodule("attnres.sites").children())


@PATH
def test_the_largest_numbers_of_bfloat16(path: str) -> None:
    largest = torch.finfo(torch.bfloat16).max
    model = TokenNet().bfloat16()
    plain = copy.deepcopy(model)
    x = torch.full((1, 2, 16), largest, dtype=torch.bfloat16)
    x[0, 1] = -largest
    call = rewritten(model, x, path)
    expected = plain(x)
    assert expected.isfinite().all()
    assert_close(call(x), expected, 6e-2)


@pytest.mark.parametrize("paper", [False, True], ids=["preserve", "paper"])
def test_opposite_sources_near_the_largest_number(paper: bool) -> None:
    """Their sum is finite, and so is their mixture: no difference of two of them may be taken."""
    largest = 0.9 * torch.finfo(torch.float32).max
    kinds: dict[str, Any] = {"scale": "paper" if paper else "preserve", "num_blocks": 2}

    class Opposite(TokenNet):
        def forward(self, x: Tensor) -> Tensor:
            x = x * self.gain
            for i, (norm, linear) in enumerate(zip(self.norms, self.linears, strict=False)):
                x = x + (linear(norm(x)) * 1e-30 - 2 * (i % 2 - 0.5) * largest)
            return self.norms[-1](x)

    model, x = Opposite(), stream(1.0)
    assert model(x).isfinite().all()
    ahead = ac.rewrite(model, ac.AttnResConfig(**kinds), (x,))(x)
    assert ahead.isfinite().all()
    from small_nets import eager

    ac.convert_(model, ac.AttnResConfig(**kinds), (x,))
    assert torch.compile(model, backend=eager)(x).isfinite().all()
