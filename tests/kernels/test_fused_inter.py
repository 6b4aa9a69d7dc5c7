"""Phase 1 of Block AttnRes in the interpreter: forward and backward against autograd in float64."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton decorates anything

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import interpreter

from attnres_compile.kernels import fused_inter, fused_inter_backward
from attnres_compile.kernels.fused_inter import inter_forward
from attnres_compile.kernels.fused_inter_backward import inter_backward
from attnres_compile.kernels.launch import Config

EPS = 1e-5
# Relative L2 error of what is rounded to the storage dtype.
ROUNDING = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4, torch.float32: 3e-6}
STATISTICS = 2e-5  # of everything in float32: lse, scores, inverse rms, weight gradients


@pytest.fixture(autouse=True)
def faithful(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.make_faithful()
    interpreter.poisoned(monkeypatch)


@dataclass
class Case:
    """Inputs of one block, drawn at random and rounded to the storage dtype."""

    n: int
    S: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    given: str = "some"  # incoming gradients: none, some or all
    sharpness: float = 3.0  # standard deviation of the scores
    magnitude: float = 1.0  # of gradients
    sources: list[Tensor] = field(init=False)
    weights: Tensor = field(init=False)
    grad_mixed: list[Tensor] = field(init=False)
    grad_lse: Tensor = field(init=False)
    grad_sources: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        width = self.shape[-1]
        # Sources of unlike magnitude: the inverse rms matters.
        self.sources = [self.draw(2.0 ** (i % 5 - 2)) for i in range(self.n)]
        self.weights = torch.randn(self.S, width) * self.sharpness / width**0.5
        self.grad_mixed = [self.draw(self.magnitude) for _ in range(self.S)]
        self.grad_lse = self.magnitude * torch.randn(self.S, self.sources[0].numel() // width)
        has = {"none": lambda i: False, "some": lambda i: i % 3 != 1, "all": lambda i: True}[self.given]
        self.grad_sources = [self.draw(self.magnitude) if has(i) else None for i in range(self.n)]

    def draw(self, magnitude: float) -> Tensor:
        return (magnitude * torch.randn(self.shape, dtype=torch.float64)).to(self.dtype)

    def reference(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs and gradients, by autograd in float64."""
        sources = torch.stack([source.reshape(-1, self.shape[-1]) for source in self.sources]).double().requires_grad_()
        weights = self.weights.double().requires_grad_()
        inverse_rms = torch.rsqrt(sources.square().mean(-1) + EPS)
        scores = torch.einsum("sd,ntd->snt", weights, sources) * inverse_rms
        lse = torch.logsumexp(scores, 1)
        mixed = torch.einsum("snt,ntd->std", torch.exp(scores - lse[:, None]), sources)
        upstream = torch.stack([grad.reshape(-1, self.shape[-1]) for grad in self.grad_mixed]).double()
        ((mixed * upstream).sum() + (lse * self.grad_lse).sum()).backward()
        assert sources.grad is not None and weights.grad is not None
        for i, grad in enumerate(self.grad_sources):
            if grad is not None:
                sources.grad[i] += grad.reshape(-1, self.shape[-1])
        outputs = {"mixed": mixed, "lse": lse, "scores": scores, "inverse_rms": inverse_rms}
        return {name: output.detach() for name, output in outputs.items()}, {"sources": sources.grad, "weights": weights.grad}


def run(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mixed, lse, scores, inverse_rms = inter_forward(case.sources, case.weights, EPS)
    grads, grad_weights = inter_backward(
        case.grad_mixed, case.grad_lse, case.grad_sources, case.sources, case.weights, lse, scores, inverse_rms
    )
    assert len(mixed) == (case.S if case.n > 1 else 0)
    assert len(grads) == case.n
    assert all((x.shape, x.dtype) == (case.shape, case.dtype) for x in (*mixed, *grads))
    flat = (-1, case.shape[-1])
    outputs = {"lse": lse, "scores": scores, "inverse_rms": inverse_rms}
    if mixed:
        outputs["mixed"] = torch.stack([x.reshape(flat) for x in mixed])
    return outputs, {"sources": torch.stack([x.reshape(flat) for x in grads]), "weights": grad_weights}


def relative_l2(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected).norm() / expected.norm()).item()


def check(case: Case) -> None:
    outputs, grads = run(case)
    expected_outputs, expected_grads = case.reference()
    for found, expected in ((outputs, expected_outputs), (grads, expected_grads)):
        for name, value in found.items():
            tolerance = ROUNDING[case.dtype] if name in ("mixed", "sources") else STATISTICS
            assert relative_l2(value, expected[name]) <= tolerance, name


DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING), ids=lambda dtype: str(dtype).removeprefix("torch."))


@DTYPES
@pytest.mark.parametrize(
    ("n", "S", "shape"),
    [
        # No mixture is written, and the gradient of the one weight vanishes but for that of the log-sum-exp.
        pytest.param(1, 2, (5, 96), id="n1"),
        # Rows narrower than what the warps split among them, and not aligned.
        pytest.param(1, 16, (3, 7), id="n1-D7"),
        # One query of sixteen; the last block of features is ragged.
        pytest.param(2, 1, (4, 1000), id="n2-D1000"),
        # No two rows aligned alike; tokens fill no tile.
        pytest.param(3, 5, (5, 1001), id="n3-D1001"),
        # A sum of the most terms there are.
        pytest.param(8, 16, (2, 7168), id="n8-D7168"),
        # Two tiles of queries, one token in a tile of two.
        pytest.param(9, 24, (1, 5120), id="n9-D5120"),
        # Half of the last block of features.
        pytest.param(8, 8, (3, 1536), id="n8-D1536"),
        # Blocks of features without a remainder.
        pytest.param(9, 16, (4, 1024), id="n9-D1024"),
        # The least width; two tiles of tokens in the weight gradient.
        pytest.param(3, 2, (40, 1), id="n3-D1"),
        # A tile full of sources, then one more, which stands alone in its tile; three tiles; seven.
        pytest.param(16, 24, (3, 96), id="n16"),
        pytest.param(17, 5, (2, 96), id="n17"),
        pytest.param(33, 16, (3, 7), id="n33"),
        pytest.param(100, 2, (2, 257), id="n100"),
        # The most queries: four tiles.
        pytest.param(2, 64, (2, 96), id="S64"),
    ],
)
def test_against_autograd(n: int, S: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(Case(n, S, shape, dtype))


@pytest.mark.parametrize("given", ["none", "all"])
@pytest.mark.parametrize("n", [3, 17])
def test_incoming_gradients_may_be_missing(n: int, given: str) -> None:
    check(Case(n, 2, (3, 96), torch.bfloat16, given))


@DTYPES
@pytest.mark.parametrize("sharpness", [0.0, 1e-6, 300.0, 1e4])
def test_scores_of_any_size(sharpness: float, dtype: torch.dtype) -> None:
    """Zero queries, queries below float16's small numbers, and a softmax that is all but a maximum."""
    case = Case(5, 3, (3, 96), dtype, sharpness=sharpness)
    outputs, grads = run(case)
    expected_outputs, expected_grads = case.reference()
    assert all(value.isfinite().all() for value in (*outputs.values(), *grads.values()))
    if sharpness == 0.0:
        assert torch.equal(outputs.pop("scores"), torch.zeros(3, 5, 3))
    for name, value in outputs.items():
        tolerance = ROUNDING[dtype] if name == "mixed" else STATISTICS
        # A score of 1e4 is rounded by 1e-3 in float32, and in two numbers of bfloat16 by more: that is an error of a weight.
        if sharpness < 100.0 or name != "mixed":
            assert relative_l2(value, expected_outputs[name]) <= tolerance, name
    if sharpness < 1.0:
        assert relative_l2(grads["sources"], expected_grads["sources"]) <= ROUNDING[dtype]
        assert relative_l2(grads["weights"], expected_grads["weights"]) <= STATISTICS


@DTYPES
@pytest.mark.parametrize("magnitude", [2.0**-12, 2.0**8])
def test_gradients_of_any_size(magnitude: float, dtype: torch.dtype) -> None:
    """In float16, coefficients and their low halves below its least number, and large ones."""
    check(Case(5, 3, (3, 96), dtype, magnitude=magnitude))


@pytest.mark.parametrize("n", [1, 4])
def test_no_tokens(n: int) -> None:
    mixed, *statistics = inter_forward([torch.empty(2, 0, 16)] * n, torch.randn(3, 16), EPS)
    assert [x.shape for x in mixed] == [(2, 0, 16)] * (3 if n > 1 else 0)
    assert [x.shape for x in statistics] == [(3, 0), (3, n, 0), (n, 0)]
    empty = torch.empty(2, 0, 16)
    grads, grad_weights = inter_backward([empty] * 3, statistics[0], [None] * n, [empty] * n, torch.randn(3, 16), *statistics)
    assert [x.shape for x in grads] == [(2, 0, 16)] * n
    assert torch.equal(grad_weights, torch.zeros(3, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_leading_dimensions_and_strides(dtype: torch.dtype) -> None:
    """Batches, rows with gaps, transposed batches, rows off the 16-byte boundary, an expanded gradient."""
    case = Case(4, 2, (2, 3, 96), dtype)
    plain = run(case)
    case.sources[0] = torch.stack([case.sources[0], case.sources[0]], -1)[..., 0]
    case.sources[1] = case.sources[1].transpose(0, 1).contiguous().transpose(0, 1)
    shifted = torch.empty(case.sources[2].numel() + 1, dtype=dtype)[1:].view(case.shape)
    case.sources[2] = shifted.copy_(case.sources[2])
    case.grad_mixed[1] = case.grad_mixed[1].transpose(0, 1).contiguous().transpose(0, 1)
    case.grad_lse = case.grad_lse.t().contiguous().t()
    case.weights = case.weights.t().contiguous().t()
    for found, expected in zip(run(case), plain, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


CONFIGURATIONS = {
    config: f"warps{config.num_warps}-tokens{config.tokens}-width{config.width}-programs{config.programs}"
    for D in (1024, 7168)
    for lanes in (32, 64)
    for module in (fused_inter, fused_inter_backward)
    for name, _, _, _, config in module.variants(D, torch.bfloat16, lanes)
    if not name.startswith("inter_weights")
}


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=CONFIGURATIONS.get)
def test_every_configuration(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of several tokens, the last one ragged, and programs that loop over them."""
    for module in (fused_inter, fused_inter_backward):
        monkeypatch.setattr(module, "tuned", lambda name, key, candidates, launch: config)
    check(Case(3, 5, (7, 600), torch.bfloat16))


def test_weight_gradients_are_summed_over_shares_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs share the tokens of the one source, the last of them has fewer."""
    config = Config(num_warps=4, num_stages=1, tokens=16, width=64)
    monkeypatch.setattr(fused_inter_backward, "_weight_config", lambda dtype, S: config)
    check(Case(1, 2, (35, 7), torch.float32))


def test_repeats_to_the_bit() -> None:
    case = Case(5, 3, (5, 96), torch.bfloat16)
    for found, expected in zip(run(case), run(case), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
