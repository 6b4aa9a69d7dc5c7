"""One AttnRes read: naive.site against the written-out definition, and the operator with its backward against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import attend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attnres_compile.kernels import naive

EPS = 1e-5
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Relative L2 error against float64: one rounding to the storage dtype, and float32 arithmetic before it.
ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3, torch.float32: 3e-6}
SHAPES = [
    pytest.param((), id="D"),
    pytest.param((5,), id="TD"),
    pytest.param((2, 3), id="BTD"),
    pytest.param((2, 0), id="no-tokens"),
]


def draw(n: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor]:
    """n sources ``shape``, a query and a key-norm weight."""
    width = shape[-1]
    sources = [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(n)]
    query = torch.randn(width, dtype=torch.float64).to(dtype)
    key_norm = (1 + 0.3 * torch.randn(width, dtype=torch.float64)).to(dtype)
    return sources, query, key_norm


def sum_of_weights(scale: str, n: int) -> float:
    return float(n) if scale == "preserve" else 1.0


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest difference, over the largest magnitude expected."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if expected.numel():
        error = (found - expected).abs().max() / expected.abs().max()
        assert error.item() <= tolerance


# ------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("scale", ["preserve", "paper"])
@pytest.mark.parametrize("weighted", [True, False], ids=["key-norm", "no-key-norm"])
@pytest.mark.parametrize("batch", SHAPES)
@pytest.mark.parametrize("width", [1, 7, 16, 96], ids=lambda d: f"D{d}")
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 9, 33], ids=lambda n: f"n{n}")
def test_definition(n: int, width: int, batch: tuple[int, ...], weighted: bool, scale: str) -> None:
    sources, query, key_norm = draw(n, *batch, width)
    weight = key_norm if weighted else None
    found = naive.site(sources, query, weight, EPS, sum_of_weights(scale, n))
    assert_close(found, attend(sources, query, weight, EPS, scale), 1e-13)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6, 0.5])
def test_eps(eps: float) -> None:
    sources, query, key_norm = draw(4, 3, 16)
    sources = [1e-3 * source for source in sources]
    assert_close(naive.site(sources, query, key_norm, eps, 1.0), attend(sources, query, key_norm, eps, "paper"), 1e-13)


@pytest.mark.parametrize("n", [2, 5, 33])
def test_a_zero_query_gives_the_sum_and_the_mean(n: int) -> None:
    sources, query, key_norm = draw(n, 2, 3, 16)
    total = torch.stack(sources).sum(0)
    zero = torch.zeros_like(query)
    assert_close(naive.site(sources, zero, key_norm, EPS, float(n)), total, 1e-14)
    assert_close(naive.site(sources, zero, key_norm, EPS, 1.0), total / n, 1e-14)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_zero_query_gives_the_running_sum_bit_by_bit_at_powers_of_two(n: int) -> None:
    sources, query, key_norm = draw(n, 2, 3, 16, dtype=torch.float32)
    total = sources[0]
    for source in sources[1:]:
        total = total + source
    assert torch.equal(naive.site(sources, torch.zeros_like(query), key_norm, EPS, float(n)), total)


def test_scores_far_apart_do_not_overflow() -> None:
    sources, query, _ = draw(3, 4, 16)
    read = naive.site(sources, 1e6 * query, None, EPS, 1.0)
    scores = torch.stack([(s * query).sum(-1) * torch.rsqrt(s.square().mean(-1) + EPS) for s in sources])
    best = torch.stack(sources).gather(0, scores.argmax(0)[None, :, None].expand(1, 4, 16))[0]
    assert_close(read, best, 1e-13)


# ----------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("query_dtype", ["storage", "float32"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("n", [2, 9, 33], ids=lambda n: f"n{n}")
def test_storage_is_rounded_once(n: int, dtype: torch.dtype, query_dtype: str) -> None:
    sources, query, key_norm = draw(n, 7, 96, dtype=dtype)
    if query_dtype == "float32":
        query, key_norm = query.float(), key_norm.float()
    found = naive.site(sources, query, key_norm, EPS, float(n))
    expected = attend([s.double() for s in sources], query.double(), key_norm.double(), EPS, "preserve")
    assert found.dtype == dtype
    assert relative_l2(found, expected) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_float32_and_one_downcast(dtype: torch.dtype) -> None:
    sources, query, key_norm = draw(5, 7, 96, dtype=dtype)
    wide = naive.site([s.float() for s in sources], query.float(), key_norm.float(), EPS, 1.0)
    assert torch.equal(naive.site(sources, query, key_norm, EPS, 1.0), wide.to(dtype))


@pytest.mark.parametrize("second", DTYPES, ids=str)
@pytest.mark.parametrize("first", DTYPES, ids=str)
def test_mixed_dtypes_promote_as_add_does(first: torch.dtype, second: torch.dtype) -> None:
    sources, query, key_norm = draw(3, 2, 16)
    mixed = [sources[0].to(first), sources[1].to(second), sources[2].to(first)]
    expected = mixed[0] + mixed[1] + mixed[2]
    found = naive.site(mixed, query.to(first), key_norm.to(first), EPS, 3.0)
    assert found.dtype == expected.dtype
    assert torch.ops.attnres.site(mixed, query.to(first), key_norm.to(first), EPS, 3.0).dtype == expected.dtype
    with FakeTensorMode() as mode:
        fake = torch.ops.attnres.site([mode.from_tensor(v) for v in mixed], mode.from_tensor(query), None, EPS, 3.0)
    assert (fake.dtype, fake.shape) == (expected.dtype, expected.shape)


@pytest.mark.parametrize("call", [naive.site, torch.ops.attnres.site.default], ids=["naive", "operator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(call: Any, dtype: torch.dtype) -> None:
    sources, query, key_norm = draw(5, 7, 96, dtype=dtype)
    plain = call(sources, query, key_norm, EPS, 5.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(sources, query, key_norm, EPS, 5.0)
    assert cast.dtype == dtype
    assert torch.equal(cast, plain)


def test_autocast_changes_no_gradient() -> None:
    def gradients() -> tuple[Tensor, ...]:
        read = torch.ops.attnres.site(sources, query, key_norm, EPS, 5.0)
        return torch.autograd.grad(read.square().sum(), [*sources, query, key_norm])

    sources, query, key_norm = draw(5, 7, 96, dtype=torch.float32)
    for leaf in (*sources, query, key_norm):
        leaf.requires_grad_()
    plain = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients()
    assert all(map(torch.equal, cast, plain))


# --------------------------------------------------------------------------------------------------------- backward


@pytest.mark.parametrize("scale", ["preserve", "paper"])
@pytest.mark.parametrize("weighted", [True, False], ids=["key-norm", "no-key-norm"])
@pytest.mark.parametrize("batch", SHAPES)
@pytest.mark.parametrize("width", [1, 7, 16, 96], ids=lambda d: f"D{d}")
@pytest.mark.parametrize("n", [2, 5, 9, 33], ids=lambda n: f"n{n}")
def test_backward_is_autograd(n: int, width: int, batch: tuple[int, ...], weighted: bool, scale: str) -> None:
    sources, query, key_norm = draw(n, *batch, width)
    weight = key_norm if weighted else None
    leaves = [*sources, query, *([key_norm] if weighted else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    read = naive.site(sources, query, weight, EPS, sum_of_weights(scale, n))
    grad = torch.randn_like(read)
    expected = torch.autograd.grad(read, leaves, grad)
    with torch.no_grad():
        d_sources, d_query, d_key_norm = torch.ops.attnres.site_backward(
            grad, sources, query, weight, EPS, sum_of_weights(scale, n)
        )
    found = [*d_sources, d_query, *([d_key_norm] if weighted else [])]
    largest = max((gradient.abs().max().item() for gradient in expected if gradient.numel()), default=0.0)
    for leaf, ours, theirs in zip(leaves, found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (leaf.shape, leaf.dtype)
        # at D = 1 the keys are +-1 and some gradients vanish, so the yardstick is the largest of them all
        assert not ours.numel() or (ours - theirs).abs().max().item() <= 1e-12 * largest
    if not weighted:
        assert torch.equal(d_key_norm, torch.zeros_like(query))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", ["sources", "query", "key_norm"])
def test_backward_in_storage(name: str, dtype: torch.dtype) -> None:
    sources, query, key_norm = draw(5, 64, 96, dtype=dtype)
    grad = torch.randn(64, 96, dtype=torch.float64).to(dtype)
    found = torch.ops.attnres.site_backward(grad, sources, query, key_norm, EPS, 5.0)
    wide = torch.ops.attnres.site_backward(
        grad.double(), [s.double() for s in sources], query.double(), key_norm.double(), EPS, 5.0
    )
    position = ["sources", "query", "key_norm"].index(name)
    ours, theirs = found[position], wide[position]
    if isinstance(ours, list):
        ours, theirs = torch.stack(ours), torch.stack(theirs)
    assert ours.dtype == dtype
    assert relative_l2(ours, theirs) <= ROUNDING[dtype]


def test_gradients_keep_the_dtype_of_what_they_belong_to() -> None:
    sources, query, key_norm = draw(3, 4, 16)
    mixed = [sources[0].float(), sources[1].bfloat16(), sources[2].half()]
    d_sources, d_query, d_key_norm = torch.ops.attnres.site_backward(
        torch.randn(4, 16), mixed, query.bfloat16(), key_norm.float(), EPS, 3.0
    )
    assert [d.dtype for d in (*d_sources, d_query, d_key_norm)] == [
        torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32,
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("weighted", [True, False], ids=["key-norm", "no-key-norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_is_naive(dtype: torch.dtype, weighted: bool) -> None:
    sources, query, key_norm = draw(4, 2, 3, 16, dtype=dtype)
    weight = key_norm if weighted else None
    found = torch.ops.attnres.site(sources, query, weight, EPS, 4.0)
    assert torch.equal(found, naive.site(sources, query, weight, EPS, 4.0))


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["paper", "preserve"])
@pytest.mark.parametrize("weighted", [True, False], ids=["key-norm", "no-key-norm"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=["D", "TD", "BTD"])
def test_operator_gradcheck(batch: tuple[int, ...], weighted: bool, scale: float) -> None:
    sources, query, key_norm = draw(3, *batch, 5)
    leaves = [leaf.requires_grad_() for leaf in (*sources, query, *([key_norm] if weighted else []))]

    def read(*inputs: Tensor) -> Tensor:
        return torch.ops.attnres.site.default(inputs[:3], inputs[3], inputs[4] if weighted else None, EPS, scale)

    assert torch.autograd.gradcheck(read, leaves)


@pytest.mark.parametrize("frozen", ["sources", "query", "key_norm"])
def test_operator_with_frozen_inputs(frozen: str) -> None:
    sources, query, key_norm = draw(3, 2, 5)
    leaves = {"sources": sources, "query": [query], "key_norm": [key_norm]}
    trained = [leaf.requires_grad_() for name, group in leaves.items() if name != frozen for leaf in group]
    grad = torch.randn(2, 5, dtype=torch.float64)
    found = torch.autograd.grad(torch.ops.attnres.site(sources, query, key_norm, EPS, 3.0), trained, grad)
    expected = torch.autograd.grad(naive.site(sources, query, key_norm, EPS, 3.0), trained, grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-12)


LAYOUTS = {
    "contiguous": lambda x: x,
    "sequence-first": lambda x: x.transpose(0, 1),
    "channels-first": lambda x: x.mT.contiguous().mT,
    "slice": lambda x: x[:, 1:],
    "expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["key-norm", "no-key-norm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_site(layout: str, weighted: bool, dtype: torch.dtype) -> None:
    sources, query, key_norm = draw(3, 2, 4, 8, dtype=dtype)
    leaves = [LAYOUTS[layout](source).detach().requires_grad_() for source in sources]
    weight = key_norm.requires_grad_() if weighted else None
    torch.library.opcheck(torch.ops.attnres.site.default, (leaves, query.requires_grad_(), weight, EPS, 3.0))


@pytest.mark.parametrize("weighted", [True, False], ids=["key-norm", "no-key-norm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_site_backward(layout: str, weighted: bool) -> None:
    sources, query, key_norm = draw(3, 2, 4, 8, dtype=torch.float32)
    values = [LAYOUTS[layout](source) for source in sources]
    grad = torch.randn(values[0].shape)
    arguments = (grad, values, query, key_norm if weighted else None, EPS, 3.0)
    torch.library.opcheck(torch.ops.attnres.site_backward.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_layout_is_the_real_layout(layout: str) -> None:
    sources, query, key_norm = draw(3, 2, 4, 8, dtype=torch.float32)
    values = [LAYOUTS[layout](source) for source in sources]
    grad = torch.randn(values[0].shape)
    real = torch.ops.attnres.site(values, query, key_norm, EPS, 3.0)
    real_grads = torch.ops.attnres.site_backward(grad, values, query, key_norm, EPS, 3.0)[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(value) for value in values]
        fake = torch.ops.attnres.site(fakes, query, key_norm, EPS, 3.0)
        fake_grads = torch.ops.attnres.site_backward(mode.from_tensor(grad), fakes, query, key_norm, EPS, 3.0)[0]
    assert fake.stride() == real.stride()
    assert [g.stride() for g in fake_grads] == [g.stride() for g in real_grads]


# -------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("source", [0, 2], ids=["first-source", "last-source"])
def test_a_bad_token_does_not_spread(source: int, poison: float) -> None:
    """Sources at other tokens, and their gradients, are what they would be without it."""
    sources, query, key_norm = draw(3, 5, 16, dtype=torch.float32)
    grad = torch.randn(5, 16)
    clean = naive.site(sources, query, key_norm, EPS, 3.0)
    clean_grads = torch.ops.attnres.site_backward(grad, sources, query, key_norm, EPS, 3.0)[0]
    sources[source][2, 7] = poison
    found = naive.site(sources, query, key_norm, EPS, 3.0)
    found_grads = torch.ops.attnres.site_backward(grad, sources, query, key_norm, EPS, 3.0)[0]
    others = [0, 1, 3, 4]
    assert not found[2].isfinite().all()
    assert torch.equal(found[others], clean[others])
    for ours, theirs in zip(found_grads, clean_grads, strict=True):
        assert torch.equal(ours[others], theirs[others])


# The mean square leaves float32 beyond 1e19, as in torch's own RMSNorm.
@pytest.mark.parametrize("magnitude", [1e-20, 1e-10, 1e-3, 1e3, 1e10, 1e18])
def test_magnitudes_in_float32(magnitude: float) -> None:
    sources, query, key_norm = draw(4, 5, 96)
    wide = [magnitude * source for source in sources]
    narrow = [source.float() for source in wide]
    found = naive.site(narrow, query.float(), key_norm.float(), 1e-6, 4.0)
    expected = attend([s.double() for s in narrow], query.float().double(), key_norm.float().double(), 1e-6, "preserve")
    assert relative_l2(found / magnitude, expected / magnitude) <= ROUNDING[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e20])
def test_extreme_magnitudes_stay_finite(magnitude: float, dtype: torch.dtype) -> None:
    sources, query, key_norm = draw(4, 5, 96)
    values = [(magnitude * source).to(dtype) for source in sources]
    found = naive.site(values, query.to(dtype), key_norm.to(dtype), 1e-6, 4.0)
    grads = torch.ops.attnres.site_backward(torch.ones_like(found), values, query.to(dtype), key_norm.to(dtype), 1e-6, 4.0)
    for result in (found, *grads[0], *grads[1:]):
        assert result.isfinite().all()


@pytest.mark.parametrize("small", [1e-20, 1e-6, 1e-3])
def test_sources_of_very_different_magnitude(small: float) -> None:
    sources, query, key_norm = draw(3, 5, 96)
    values = [sources[0].float(), (small * sources[1]).float(), (sources[2] / small).float().clamp(-1e18, 1e18)]
    found = naive.site(values, query.float(), key_norm.float(), 1e-6, 1.0)
    expected = attend([v.double() for v in values], query.float().double(), key_norm.float().double(), 1e-6, "paper")
    assert relative_l2(found, expected) <= ROUNDING[torch.float32]


def test_float16_sources_whose_squares_overflow() -> None:
    sources, query, key_norm = draw(3, 5, 96)
    values = [(1e4 * source).half() for source in sources]
    found = naive.site(values, query.half(), key_norm.half(), 1e-6, 1.0)
    expected = attend([v.double() for v in values], query.half().double(), key_norm.half().double(), 1e-6, "paper")
    assert relative_l2(found, expected) <= ROUNDING[torch.float16]
