"""The kernels of one read against float64 autograd of the definition, with inputs rounded to storage beforehand.

Without a GPU they run in Triton's interpreter, which ``interpreter.make_faithful`` corrects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from interpreter import make_faithful, poisoned
from torch import Tensor

from attnres_compile.kernels import fused_site

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
# Relative L2 against float64 of what is stored in the storage dtype, and of what is always float32.
ROUNDING = {torch.float32: 3e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
STATISTICS = 2e-5
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

if DEVICE.type == "cpu":
    make_faithful()


@pytest.fixture(autouse=True)
def device_and_poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel must write all that it returns."""
    poisoned(monkeypatch)
    with DEVICE:
        yield


def every(i: int) -> bool:
    return True


def none(i: int) -> bool:
    return False


def odd(i: int) -> bool:
    return i % 2 == 1


def relative_l2(found: Tensor, expected: Tensor) -> float:
    if not expected.numel() or torch.equal(found.double(), expected):  # the second: both may be zero
        return 0.0
    return ((found.double() - expected).norm() / expected.norm()).item()


class Read:
    """Random inputs of one read, and the definition on them in float64."""

    def __init__(
        self, n: int, *shape: int, dtype: torch.dtype, prior: bool, scale: float, given: Callable[[int], bool] = odd
    ) -> None:
        *batch, D = shape
        self.n, self.shape, self.dtype, self.scale = n, shape, dtype, scale
        tokens = int(torch.tensor(batch).prod())
        self.sources = [torch.randn(shape).to(dtype) for _ in range(n)]
        self.weight = 3 * torch.randn(D) / D**0.5
        self.prior = torch.randn(shape).to(dtype) if prior else None
        self.prior_lse = torch.randn(tokens) if prior else None
        self.grad_h = torch.randn(shape).to(dtype)
        self.grad_sources = [torch.randn(shape).to(dtype) if given(i) else None for i in range(n)]

    def check(self) -> None:
        h, lse, scores, inverse_rms = fused_site.site_forward(
            self.sources, self.weight, EPS, self.scale, self.prior, self.prior_lse
        )
        grads, grad_weight, grad_prior, grad_prior_lse = fused_site.site_backward(
            self.grad_h, self.grad_sources, self.sources, self.weight, self.scale, self.prior, self.prior_lse,
            lse, scores, inverse_rms,
        )  # fmt: skip
        stored, statistics = self.expected()
        found = {"h": h, **{f"source {i}": grad for i, grad in enumerate(grads)}}
        wide = {"lse": lse, "scores": scores, "inverse_rms": inverse_rms, "weight": grad_weight}
        if self.prior is not None:
            assert grad_prior is not None
            assert grad_prior_lse is not None
            found["prior"], wide["prior_lse"] = grad_prior, grad_prior_lse
        else:
            assert grad_prior is grad_prior_lse is None
        assert all(value.shape == self.shape and value.dtype == self.dtype for value in found.values())
        assert all(value.shape == statistics[name].shape and value.dtype == F32 for name, value in wide.items())
        errors = {name: relative_l2(value, stored[name]) for name, value in found.items()}
        assert {name: error for name, error in errors.items() if not error <= ROUNDING[self.dtype]} == {}
        errors = {name: relative_l2(value, statistics[name]) for name, value in wide.items()}
        assert {name: error for name, error in errors.items() if not error <= STATISTICS} == {}

    def expected(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is rounded to storage, and what stays float32; gradients under the name of what they belong to."""
        D = self.shape[-1]
        values = [source.double().reshape(-1, D).requires_grad_() for source in self.sources]
        weight = self.weight.double().requires_grad_()
        inverse_rms = [torch.rsqrt(v.square().mean(-1) + EPS) for v in values]
        scores = [(v * weight).sum(-1) * r for v, r in zip(values, inverse_rms, strict=True)]
        leaves, terms = [*values, weight], list(values)
        logits = list(scores)
        if self.prior is not None and self.prior_lse is not None:
            terms.append(self.prior.double().reshape(-1, D).requires_grad_())
            logits.append(self.prior_lse.double().requires_grad_())
            leaves += [terms[-1], logits[-1]]
        alpha = torch.softmax(torch.stack(logits), 0)
        h = self.scale * sum(a[:, None] * v for a, v in zip(alpha, terms, strict=True))
        gradients = torch.autograd.grad(h, leaves, self.grad_h.double().reshape(-1, D))
        toward_sources, grad_weight, toward_prior = gradients[: self.n], gradients[self.n], gradients[self.n + 1 :]
        stored = {"h": h.detach()}
        for i, (gradient, incoming) in enumerate(zip(toward_sources, self.grad_sources, strict=True)):
            stored[f"source {i}"] = gradient if incoming is None else gradient + incoming.double().reshape(-1, D)
        statistics = {
            "lse": torch.logsumexp(torch.stack(logits), 0), "scores": torch.stack(scores),
            "inverse_rms": torch.stack(inverse_rms), "weight": grad_weight,
        }  # fmt: skip
        if toward_prior:
            stored["prior"], statistics["prior_lse"] = toward_prior
        return {name: value.reshape(self.shape) for name, value in stored.items()}, statistics


# What every row stresses stands beside it.
@pytest.mark.parametrize(
    ("n", "tokens", "D", "dtype", "prior", "preserve", "given"),
    [
        pytest.param(1, 3, 96, F32, False, False, none, id="n1-D96-fp32"),  # one source: weight 1, no gradient of the query
        pytest.param(1, 2, 96, BF16, True, True, every, id="n1-D96-bf16-prior"),  # a prior alone makes it a mixture
        pytest.param(2, 5, 1000, F16, False, True, odd, id="n2-D1000-fp16"),  # an incomplete part; more tokens than programs
        pytest.param(3, 4, 1024, BF16, True, False, odd, id="n3-D1024-bf16-prior"),  # whole parts, one program has two tokens
        pytest.param(5, 1, 1536, F32, False, True, every, id="n5-D1536-fp32"),  # one token; parts of 128 features
        pytest.param(9, 2, 5120, BF16, False, False, none, id="n9-D5120-bf16"),  # five parts; no incoming gradients
        pytest.param(3, 5, 7168, BF16, True, True, odd, id="n3-D7168-bf16-prior"),  # seven parts, all that there is
        pytest.param(2, 3, 7168, F32, True, False, every, id="n2-D7168-fp32-prior"),  # the most registers
        pytest.param(5, 3, 7168, F16, False, True, none, id="n5-D7168-fp16"),  # weights that add up to n in a narrow format
        pytest.param(17, 2, 1024, F16, True, True, odd, id="n17-D1024-fp16-prior"),  # the addresses take several launches
        pytest.param(33, 1, 1536, BF16, False, True, odd, id="n33-D1536-bf16"),  # more sources than an unrolled loop could hold
        pytest.param(33, 2, 96, F32, True, False, every, id="n33-D96-fp32-prior"),  # rescaling many times in float32
        pytest.param(256, 2, 7, F32, False, False, odd, id="n256-D7-fp32"),  # the longest table
        pytest.param(3, 4, 1, F32, True, False, odd, id="n3-D1-fp32-prior"),  # keys are +-1, half of the gradients vanish
        pytest.param(5, 3, 7, BF16, False, True, odd, id="n5-D7-bf16"),  # rows that begin off any boundary
        pytest.param(3, 2, 1001, F16, True, False, odd, id="n3-D1001-fp16-prior"),  # the same with several parts
    ],
)
def test_against_float64(
    n: int, tokens: int, D: int, dtype: torch.dtype, prior: bool, preserve: bool, given: Callable[[int], bool]
) -> None:
    Read(n, tokens, D, dtype=dtype, prior=prior, scale=float(n + prior) if preserve else 1.0, given=given).check()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 17, 33], ids=lambda n: f"n{n}")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_every_number_of_sources(n: int, dtype: torch.dtype) -> None:
    Read(n, 3, 96, dtype=dtype, prior=n % 2 == 0, scale=float(n)).check()


@pytest.mark.parametrize("batch", [(2, 3), (1, 1, 4), (5,)], ids=["BTD", "ABTD", "TD"])
def test_leading_dimensions(batch: tuple[int, ...]) -> None:
    Read(3, *batch, 96, dtype=BF16, prior=True, scale=3.0).check()


def test_inputs_need_not_be_contiguous_or_aligned() -> None:
    read = Read(3, 2, 4, 96, dtype=F16, prior=True, scale=1.0, given=every)
    read.sources[0] = read.sources[0].transpose(0, 1).contiguous().transpose(0, 1)
    read.sources[1] = torch.randn(2, 4, 192).half()[..., ::2]
    read.sources[2] = torch.randn(2 * 4 * 96 + 1).half()[1:].view(2, 4, 96)  # two bytes off the boundary
    read.prior = torch.randn(96, 2, 4).half().permute(1, 2, 0)
    read.prior_lse = torch.randn(16)[::2]
    read.grad_h = torch.randn(2, 1, 96).half().expand(2, 4, 96)  # what the gradient of a sum looks like
    read.grad_sources[0] = torch.ones(1).half().expand(2, 4, 96)
    read.check()


def test_a_gradient_may_be_the_source_itself() -> None:
    read = Read(3, 3, 96, dtype=F32, prior=False, scale=1.0, given=none)
    read.grad_sources = list(read.sources)
    read.check()


def test_a_source_may_appear_twice() -> None:
    read = Read(3, 3, 96, dtype=F32, prior=False, scale=3.0)
    read.sources[2] = read.sources[0]
    read.check()


@pytest.mark.parametrize("prior", [True, False], ids=["prior", "no-prior"])
@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)], ids=["TD", "BTD"])
def test_no_tokens(shape: tuple[int, ...], prior: bool) -> None:
    Read(3, *shape, dtype=BF16, prior=prior, scale=1.0).check()


def test_scores_far_apart_do_not_overflow() -> None:
    read = Read(5, 4, 96, dtype=F32, prior=True, scale=1.0)
    read.weight *= 1e4
    h, lse, scores, _ = fused_site.site_forward(read.sources, read.weight, EPS, 1.0, read.prior, read.prior_lse)
    best = torch.stack(read.sources).gather(0, scores.argmax(0)[None, :, None].expand(1, 4, 96))[0]
    assert scores.max() - scores.min() > 1e3
    assert torch.equal(lse, scores.amax(0))
    assert torch.equal(h, best)


def test_nothing_is_written_to_the_inputs() -> None:
    read = Read(3, 3, 96, dtype=F32, prior=True, scale=1.0, given=every)
    inputs = [*read.sources, *(g for g in read.grad_sources if g is not None), read.grad_h, read.weight]
    before = [value.clone() for value in inputs]
    read.check()
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize(
    "other", [torch.randn(3, 96).half(), torch.randn(4, 96), torch.randn(3, 95)], ids=["dtype", "tokens", "features"]
)
def test_tensors_that_disagree_are_refused(other: Tensor) -> None:
    read, other = Read(2, 3, 96, dtype=F32, prior=False, scale=1.0), other.to(DEVICE)
    with pytest.raises(ValueError, match="must agree"):
        fused_site.site_forward([read.sources[0], other], read.weight, EPS, 1.0, None, None)
    _, *saved = fused_site.site_forward(read.sources, read.weight, EPS, 1.0, None, None)
    with pytest.raises(ValueError, match="must agree"):
        fused_site.site_backward(read.grad_h, [None, other], read.sources, read.weight, 1.0, None, None, *saved)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("D", [1, 96, 1001, 1024, 1536, 2048, 4096, 5120, 7168, 8192, 16384])
def test_configurations_cover_a_row(D: int, lanes: int, dtype: torch.dtype) -> None:
    configs = {config for *_, config in fused_site.variants(D, dtype, lanes)}
    assert configs
    for config in configs:
        assert config.num_warps * lanes <= 1024
        assert config.width * dtype.itemsize == config.num_warps * lanes * 16  # a part is one load of 128 bits per thread
        assert config.programs >= 1
