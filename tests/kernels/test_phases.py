"""The naive twins and the differentiable functions over them, against autograd through the definition in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from interpreter import make_faithful
from torch import Tensor
from torch.nn import functional as F

import attnres_compile.kernels.ops  # noqa: F401  (registers the attnres:: operators)
from attnres_compile.kernels import (
    differentiable,
    fused,
    fused_inter,
    fused_inter_backward,
    fused_merge,
    fused_site,
    naive,
    naive_inter,
    naive_merge,
    naive_site,
)  # fmt: skip

make_faithful()
EPS, NORM_EPS = 1e-6, 1e-5
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
TWINS = {
    "inter_forward": (naive_inter.inter_forward, fused_inter.inter_forward),
    "inter_backward": (naive_inter.inter_backward, fused_inter_backward.inter_backward),
    "merge_forward": (naive_merge.merge_forward, fused_merge.merge_forward),
    "merge_backward": (naive_merge.merge_backward, fused_merge.merge_backward),
    "site_forward": (naive_site.site_forward, fused_site.site_forward),
    "site_backward": (naive_site.site_backward, fused_site.site_backward),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins_take_the_same_arguments(name: str) -> None:
    slow, fast = (list(inspect.signature(function).parameters) for function in TWINS[name])
    assert slow == fast


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    pairs = zip(found, expected, strict=True)
    return max(((a - b).norm() / b.norm().clamp(min=1.0)).item() for a, b in pairs if a.numel())


def with_gradients(function: Callable[[], list[Tensor]], leaves: list[Tensor]) -> list[Tensor]:
    outputs = function()
    torch.manual_seed(3)
    weights = [torch.randn(output.shape, dtype=torch.float64).to(output.dtype) for output in outputs]
    total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, leaves)]


def normalised(h: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if norm == "rms":
        return F.rms_norm(h, h.shape[-1:], weight, NORM_EPS)
    return F.layer_norm(h, h.shape[-1:], weight, bias, NORM_EPS) if norm == "layer" else h


# What every row stresses: one source, whose mixtures are itself; two; more sources than sites; a single token; none; D = 1.
BLOCKS = [
    pytest.param(1, 3, (2, 3), 16, id="one-source"),
    pytest.param(2, 2, (5,), 16, id="two-sources"),
    pytest.param(9, 4, (2, 2), 24, id="nine-sources"),
    pytest.param(3, 5, (1,), 7, id="one-token"),
    pytest.param(3, 2, (2, 0), 16, id="no-tokens"),
    pytest.param(4, 3, (3,), 1, id="one-feature"),
    pytest.param(3, 3, (), 16, id="no-batch"),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("keyed", [True, False], ids=["key-norm", "no-key-norm"])
@pytest.mark.parametrize(("n", "queries", "batch", "width"), BLOCKS)
def test_inter(n: int, queries: int, batch: tuple[int, ...], width: int, keyed: bool, dtype: torch.dtype) -> None:
    sources = [drawn(*batch, width, dtype=dtype) for _ in range(n)]
    q = [drawn(width, dtype=dtype) for _ in range(queries)]
    g = [drawn(width, dtype=dtype) for _ in range(queries)] if keyed else []

    def definition() -> list[Tensor]:
        values = torch.stack(sources)
        mixed, lses = [], []
        for s in range(queries):
            weight = q[s] * g[s] if keyed else q[s]
            scores = (values * weight).sum(-1) * torch.rsqrt(values.square().mean(-1) + EPS)
            mixed.append((scores.softmax(0).unsqueeze(-1) * values).sum(0))
            lses.append(scores.logsumexp(0).reshape(-1))
        return [*mixed, *lses, *(source * 1 for source in sources)]

    leaves = [*sources, *q, *g]
    expected = with_gradients(definition, leaves)
    found = with_gradients(lambda: torch.ops.attnres.inter(sources, q, g, EPS), leaves)
    assert difference(found, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)], ids=["affine", "weight", "plain"])
@pytest.mark.parametrize("norm", naive_merge.STATISTICS, ids=["no-norm", "rms", "layer"])
@pytest.mark.parametrize(
    ("batch", "width", "branched", "scale"),
    [
        pytest.param((2, 3), 16, True, 1.0, id="branch"),
        pytest.param((5,), 7, False, 4.0, id="no-branch"),
        pytest.param((1,), 24, True, 3.0, id="one-token"),
        pytest.param((0,), 16, True, 1.0, id="no-tokens"),
    ],
)
def test_merge(
    batch: tuple[int, ...], width: int, branched: bool, scale: float, norm: str, affine: tuple[bool, bool], dtype: torch.dtype
) -> None:
    partial, mixed, branch = (drawn(*batch, width, dtype=dtype) for _ in range(3))
    lse = drawn(mixed[..., 0].numel(), dtype=dtype)
    query, key_norm, weight, bias = (drawn(width, dtype=dtype) for _ in range(4))
    norm_weight = weight if norm and affine[0] else None
    norm_bias = bias if norm == "layer" and affine[1] else None

    def definition() -> list[Tensor]:
        total = partial + branch if branched else partial * 1
        score = (total * query * key_norm).sum(-1) * torch.rsqrt(total.square().mean(-1) + EPS)
        share = torch.sigmoid(score - lse.view(score.shape)).unsqueeze(-1)
        return [total, normalised(scale * (mixed + share * (total - mixed)), norm, norm_weight, norm_bias)]

    def merge() -> list[Tensor]:
        return torch.ops.attnres.merge(
            partial, branch if branched else None, mixed, lse, query, key_norm, EPS, scale, norm, norm_weight, norm_bias, NORM_EPS
        )

    given = (partial, mixed, lse, query, key_norm, branch if branched else None, norm_weight, norm_bias)
    leaves = [leaf for leaf in given if leaf is not None]
    assert difference(with_gradients(merge, leaves), with_gradients(definition, leaves)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 5.0], ids=["paper", "preserve"])
@pytest.mark.parametrize(
    ("n", "batch", "width", "after"),
    [
        pytest.param(1, (2, 3), 16, True, id="one-after-phase-1"),
        pytest.param(4, (3,), 7, True, id="four-after-phase-1"),
        pytest.param(5, (3,), 16, False, id="by-itself"),
        pytest.param(33, (2,), 8, False, id="33-sources"),
        pytest.param(2, (0,), 8, True, id="no-tokens"),
    ],
)
def test_site(n: int, batch: tuple[int, ...], width: int, after: bool, scale: float, dtype: torch.dtype) -> None:
    sources = [drawn(*batch, width, dtype=dtype) for _ in range(n)]
    query, key_norm = drawn(width, dtype=dtype), drawn(width, dtype=dtype)
    prior = drawn(*batch, width, dtype=dtype) if after else None
    prior_lse = drawn(sources[0][..., 0].numel(), dtype=dtype) if after else None

    def definition() -> list[Tensor]:
        values = torch.stack([*sources, *([] if prior is None else [prior])])
        scores = (values[:n] * query * key_norm).sum(-1) * torch.rsqrt(values[:n].square().mean(-1) + EPS)
        if prior_lse is not None:
            scores = torch.cat([scores, prior_lse.view(1, *scores.shape[1:])])
        return [scale * (scores.softmax(0).unsqueeze(-1) * values).sum(0), *(source * 1 for source in sources)]

    leaves = [leaf for leaf in (*sources, query, key_norm, prior, prior_lse) if leaf is not None]
    expected = with_gradients(definition, leaves)
    found = with_gradients(
        lambda: differentiable.site(sources, query, key_norm, EPS, scale, prior, prior_lse), leaves
    )  # fmt: skip
    assert difference(found, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    """Phase 1 and phase 2 in 16 bits are those in float32 on the same values, and one downcast each."""
    sources = [torch.randn(5, 96).to(dtype) for _ in range(4)]
    weights = 0.3 * torch.randn(3, 96)
    mixed, lse, *_ = naive_inter.inter_forward(sources, weights, EPS)
    wide, wide_lse, *_ = naive_inter.inter_forward([source.float() for source in sources], weights, EPS)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(mixed, wide, strict=True))
    assert torch.equal(lse, wide_lse)
    branch = torch.randn(5, 96).to(dtype)
    arguments = (lse[0], weights[0], EPS, 3.0, "rms", None, None, NORM_EPS)
    total, y, _ = naive_merge.merge_forward(sources[0], branch, mixed[0], *arguments)
    assert torch.equal(total, sources[0] + branch)
    _, wide_y, _ = naive_merge.merge_forward(total.float(), None, mixed[0].float(), *arguments)
    assert torch.equal(y, wide_y.to(dtype))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast_changes_nothing(device: str) -> None:
    sources = [torch.randn(4, 16, device=device) for _ in range(3)]
    queries = [torch.randn(16, device=device) for _ in range(2)]
    plain = differentiable.inter(sources, queries, [], EPS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = differentiable.inter(sources, queries, [], EPS)
    assert [tensor.dtype for tensor in cast] == [torch.float32] * 7
    if device == "cpu":
        assert all(map(torch.equal, cast, plain))


def test_a_second_derivative_is_refused() -> None:
    sources = [drawn(3, 8) for _ in range(2)]
    mixed = differentiable.inter(sources, [drawn(8), drawn(8)], [], EPS)[0]
    (gradient,) = torch.autograd.grad(mixed.sum(), sources[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        pytest.param("cpu", torch.float32, "CUDA and ROCm", id="cpu"),
        pytest.param("cuda", torch.float64, "float64", id="float64"),
        pytest.param("cuda", torch.bfloat16, "", id="bf16"),
    ],
)
def test_where_fused_kernels_are_available(device: str, dtype: torch.dtype, reason: str) -> None:
    found = fused.available(device, dtype)
    assert reason in found if reason else found == ""


@pytest.mark.parametrize("name", ["fused_inter", "fused_merge", "fused_site"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run there")
def test_opaque_operators_know_their_outputs(name: str) -> None:
    """The fake implementations give what the kernels give, in the interpreter."""
    sources = [torch.randn(2, 3, 16) for _ in range(3)]
    vector, per_token = torch.randn(16), torch.randn(6)
    arguments = {
        "fused_inter": (sources, torch.randn(2, 16), EPS),
        "fused_merge": (*sources, per_token, vector, EPS, 3.0, "layer", vector, vector, NORM_EPS),
        "fused_site": (sources, vector, EPS, 3.0, sources[0], per_token),
    }[name]
    torch.library.opcheck(
        getattr(torch.ops.attnres, name).default, arguments, test_utils=("test_schema", "test_faketensor")
    )  # fmt: skip


def test_naive_site_is_the_definition() -> None:
    sources, weight = [torch.randn(4, 8) for _ in range(3)], torch.randn(8)
    h, *_ = naive_site.site_forward(sources, weight, EPS, 3.0, None, None)
    torch.testing.assert_close(h, naive.site(sources, weight, None, EPS, 3.0), rtol=1e-6, atol=1e-6)
