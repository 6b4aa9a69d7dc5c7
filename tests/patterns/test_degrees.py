"""Norms are recognised by degree: every spelling of a norm makes a site, and what is not scale invariant makes none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnres_compile

WIDTH, TOKENS, SUBLAYERS = 16, 6, 4


class Network(nn.Module):
    """Four sublayers ``x + linear(norm(x))`` and a final norm, ``[B, T, D]`` to ``[B, T, 3]``."""

    def __init__(self, make_norm: Callable[[], nn.Module], width_of_norm: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList([make_norm() for _ in range(SUBLAYERS)])
        self.mix = nn.ModuleList([nn.Linear(width_of_norm, WIDTH) for _ in range(SUBLAYERS)])
        self.norm = make_norm()
        self.head = nn.Linear(width_of_norm, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, mix in zip(self.norms, self.mix, strict=True):
            x = x + mix(norm(x))
        return self.head(self.norm(x))


class Norm(nn.Module):
    """A function of the stream, a weight and a bias, as a module."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.bias = nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def detect(make_norm: Callable[[], nn.Module], width_of_norm: int = WIDTH, training: bool = False) -> attnres_compile.Report:
    model = Network(make_norm, width_of_norm).train(training)
    return attnres_compile.detect(model, (torch.randn(2, TOKENS, WIDTH),))


def llama(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-6)
    return weight * x.to(dtype)


def gemma(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.float()
    output = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (output * (1.0 + weight.float())).type_as(x)


def standardise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + bias


def layer_norm_by_var(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * weight + bias


def layer_norm_by_moments(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return F.linear((x - mean) / (variance + 1e-5).sqrt() * weight, torch.eye(WIDTH, dtype=x.dtype), bias)


def layer_norm_by_second_moment(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = torch.mean(x, dim=-1, keepdim=True)
    variance = torch.mean(x * x, dim=-1, keepdim=True) - mean * mean
    return torch.addcmul(bias, (x - mean) * torch.rsqrt(variance + 1e-5), weight)


def layer_norm_by_var_mean(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * weight + bias


def layer_norm_by_std_mean(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(x, -1, keepdim=True)
    return torch.div(torch.sub(x, mean), torch.add(deviation, 1e-6))


def rms_by_methods(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.mul(x.square().mean(dim=-1, keepdim=True).add(1e-6).rsqrt()).mul(weight)


def rms_in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scale = x.pow(2).mean(-1, keepdim=True)
    scale += 1e-6
    return x * scale.rsqrt() * weight


def rms_in_place_methods(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * x.pow(2).mean(-1, keepdim=True).add_(1e-6).rsqrt_() * weight


def rms_by_einsum(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * torch.rsqrt(torch.einsum("btd,btd->bt", x, x).unsqueeze(-1) / WIDTH + 1e-6)


def channels_first(norm: nn.Module) -> nn.Module:
    class ChannelsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    return ChannelsFirst()


def grouped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer norm per head, written as a reshape."""
    return F.layer_norm(x.reshape(2, TOKENS, 4, WIDTH // 4), (WIDTH // 4,), eps=1e-5).flatten(2)


def zero_padded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(F.pad(x, (0, 1)), (WIDTH + 1,))


# A norm, and the eps that it adds to a mean square (an eps added to a root counts squared), or None where it adds none.
NORMS: dict[str, tuple[Callable[[], nn.Module], float | None]] = {
    "LayerNorm": (lambda: nn.LayerNorm(WIDTH, eps=1e-6), 1e-6),
    "LayerNorm-no-affine": (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), 1e-5),
    "LayerNorm-no-bias": (lambda: nn.LayerNorm(WIDTH, bias=False), 1e-5),
    "F.layer_norm": (lambda: Norm(lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, 1e-12)), 1e-12),
    "F.layer_norm-keywords": (lambda: Norm(lambda x, w, b: F.layer_norm(x, [WIDTH], weight=w, eps=1e-3)), 1e-3),
    "F.layer_norm-default": (lambda: Norm(lambda x, w, b: F.layer_norm(x, x.shape[-1:])), 1e-5),
    "torch.layer_norm": (lambda: Norm(lambda x, w, b: torch.layer_norm(x, (WIDTH,), w, b, 1e-6)), 1e-6),
    "RMSNorm": (lambda: nn.RMSNorm(WIDTH, eps=1e-6), 1e-6),
    "RMSNorm-eps-none": (lambda: nn.RMSNorm(WIDTH), None),
    "F.rms_norm": (lambda: Norm(lambda x, w, b: F.rms_norm(x, (WIDTH,), w, 1e-5)), 1e-5),
    "F.rms_norm-float32": (lambda: Norm(lambda x, w, b: F.rms_norm(x.float(), (WIDTH,), eps=1e-5).to(x.dtype) * w), 1e-5),
    "llama": (lambda: Norm(llama), 1e-6),
    "gemma": (lambda: Norm(gemma), 1e-6),
    "rms-by-methods": (lambda: Norm(rms_by_methods), 1e-6),
    "rms-in-place": (lambda: Norm(rms_in_place), 1e-6),
    "rms-in-place-methods": (lambda: Norm(rms_in_place_methods), 1e-6),
    "rms-power-minus-half": (lambda: Norm(lambda x, w, b: w * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.5), 1e-6),
    "rms-reciprocal": (
        lambda: Norm(lambda x, w, b: x * torch.reciprocal(torch.sqrt(torch.mean(x**2, -1, keepdim=True) + 1e-6)) * w), 1e-6,
    ),
    "rms-one-over": (lambda: Norm(lambda x, w, b: x * (1.0 / torch.sqrt((x * x).mean(-1, True) + 1e-6)) * w), 1e-6),
    "rms-sum-over-width": (lambda: Norm(lambda x, w, b: x / ((x * x).sum(-1, keepdim=True) / WIDTH + 1e-6).sqrt()), 1e-6),
    "rms-eps-first": (lambda: Norm(lambda x, w, b: x * torch.rsqrt(1e-6 + x.square().mean(-1, keepdim=True)) * w), 1e-6),
    "rms-no-eps": (lambda: Norm(lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * w), None),
    "rms-clamp_min": (lambda: Norm(lambda x, w, b: x / torch.sqrt((x * x).mean(-1, keepdim=True)).clamp_min(1e-4)), 1e-8),
    "rms-clamp-min-keyword": (lambda: Norm(lambda x, w, b: x / (x * x).mean(-1, keepdim=True).clamp(min=1e-6).sqrt()), 1e-6),
    "rms-einsum": (lambda: Norm(rms_by_einsum), 1e-6),
    "rms-vecdot": (lambda: Norm(lambda x, w, b: x * torch.rsqrt(torch.linalg.vecdot(x, x)[..., None] / WIDTH + 1e-6)), 1e-6),
    "norm-method": (lambda: Norm(lambda x, w, b: x / (x.norm(dim=-1, keepdim=True) + 1e-4) * w), 1e-8),
    "norm-two-positional": (lambda: Norm(lambda x, w, b: x / (x.norm(2, -1, keepdim=True) + 1e-4) * w), 1e-8),
    "torch.norm": (lambda: Norm(lambda x, w, b: w * x / torch.norm(x, dim=-1, keepdim=True)), None),
    "vector_norm": (lambda: Norm(lambda x, w, b: x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-4) * w), 1e-8),
    "linalg.norm": (lambda: Norm(lambda x, w, b: x / torch.linalg.norm(x, dim=-1, keepdim=True) * math.sqrt(WIDTH)), None),
    "scale-norm": (lambda: Norm(lambda x, w, b: w[0] * x / x.norm(dim=-1, keepdim=True).clamp(min=1e-4)), 1e-8),
    "F.normalize": (lambda: Norm(lambda x, w, b: F.normalize(x, dim=-1, eps=1e-6) * WIDTH**0.5 * w), 1e-12),
    "F.normalize-default": (lambda: Norm(lambda x, w, b: F.normalize(x, dim=-1) * WIDTH**0.5 * w), 1e-24),
    "mean-absolute": (lambda: Norm(lambda x, w, b: x / (x.abs().mean(-1, keepdim=True) + 1e-4)), 1e-8),
    "largest-absolute": (lambda: Norm(lambda x, w, b: x / x.abs().amax(-1, keepdim=True)), None),
    "largest-by-max": (lambda: Norm(lambda x, w, b: x / x.abs().max(-1, keepdim=True)[0]), None),
    "standardise": (lambda: Norm(standardise), 1e-12),
    "layer-norm-var": (lambda: Norm(layer_norm_by_var), 1e-5),
    "layer-norm-moments": (lambda: Norm(layer_norm_by_moments), 1e-5),
    "layer-norm-second-moment": (lambda: Norm(layer_norm_by_second_moment), 1e-5),
    "layer-norm-var_mean": (lambda: Norm(layer_norm_by_var_mean), 1e-5),
    "layer-norm-std_mean": (lambda: Norm(layer_norm_by_std_mean), 1e-12),
    "GroupNorm-channels-first": (lambda: channels_first(nn.GroupNorm(4, WIDTH)), 1e-5),
    "layer-norm-per-head": (lambda: Norm(grouped), 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms_make_sites(name: str) -> None:
    make_norm, eps = NORMS[name]
    report = detect(make_norm)
    assert [chain.num_sublayers for chain in report.chains] == [SUBLAYERS], report
    (chain,) = report.chains
    assert (chain.kind, chain.num_sites, chain.hidden_size) == ("prenorm", SUBLAYERS, WIDTH)
    assert [site.before for site in chain.sites] == [1, 2, 3, 4]
    assert report.refusals == ()
    expected = [eps] * SUBLAYERS
    assert [site.eps for site in chain.sites] == (expected if eps is None else pytest.approx(expected, rel=1e-6, abs=0))


@pytest.mark.parametrize("name", NORMS)
def test_every_spelling_is_rewritten(name: str) -> None:
    model, x = Network(NORMS[name][0]).double().eval(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    rewritten = attnres_compile.rewrite(model, attnres_compile.AttnResConfig(num_blocks=2), (x,))
    tolerance = 1e-6 if name in ("llama", "gemma", "F.rms_norm-float32") else 1e-12  # these compute in float32
    assert attnres_compile.compare(model, rewritten, (x,)).max_rel_error <= tolerance
    with torch.no_grad():
        before = rewritten(x)
        for site in rewritten.attnres.sites:
            site.query.normal_()
            assert (rewritten(x) - before).abs().max() >= 1e-6  # every site reaches the output
            before = rewritten(x)


@pytest.mark.parametrize("name", ["LayerNorm", "llama", "GroupNorm-channels-first"])
def test_readers_are_named(name: str) -> None:
    (chain,) = detect(NORMS[name][0]).chains
    inner = ".norm" if name == "GroupNorm-channels-first" else ""
    prefix = [f"norms.{i}" for i in (1, 2, 3)] + ["norm"]
    # the first operation on the stream is the transposition, which is no part of the inner norm
    assert [site.module.removesuffix(inner) for site in chain.sites] == prefix


def test_zero_padding_keeps_the_degree() -> None:
    (chain,) = detect(lambda: Norm(zero_padded), width_of_norm=WIDTH + 1).chains
    assert chain.num_sites == SUBLAYERS


def test_dropout_before_a_norm_keeps_the_degree() -> None:
    make = lambda: nn.Sequential(nn.Dropout(0.5), nn.LayerNorm(WIDTH))  # noqa: E731
    (chain,) = detect(make, training=True).chains
    assert chain.num_sites == SUBLAYERS


def test_casts_keep_the_degree() -> None:
    model = Network(lambda: Norm(llama)).bfloat16()
    (chain,) = attnres_compile.detect(model, (torch.randn(2, TOKENS, WIDTH, dtype=torch.bfloat16),)).chains
    assert (chain.num_sublayers, chain.num_sites) == (SUBLAYERS, SUBLAYERS)


# ------------------------------------------------------------------------------------------------ not scale invariant


class DynamicTanh(nn.Module):
    """``weight * tanh(alpha x) + bias`` in place of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "tanh": lambda: Norm(lambda x, w, b: torch.tanh(x) * w),
    "softmax": lambda: Norm(lambda x, w, b: torch.softmax(x, -1) * w),
    "silu": lambda: Norm(lambda x, w, b: x * torch.sigmoid(x)),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "affine": lambda: Norm(lambda x, w, b: x * w + b),
    "centred": lambda: Norm(lambda x, w, b: x - x.mean(-1, keepdim=True)),
    "DynamicTanh": DynamicTanh,
    "bias-before-the-norm": lambda: Norm(lambda x, w, b: F.layer_norm(x + b, (WIDTH,), w)),
    "constant-before-the-norm": lambda: Norm(lambda x, w, b: F.layer_norm(x + torch.arange(WIDTH), (WIDTH,))),
    "unnormalised-product": lambda: Norm(lambda x, w, b: x * x.norm(dim=-1, keepdim=True)),
    "square-root-of-the-norm": lambda: Norm(lambda x, w, b: x / x.norm(dim=-1, keepdim=True).sqrt()),
    "large-eps-in-the-mean-square": lambda: Norm(lambda x, w, b: rms(x, 0.1) * w),
    "large-eps-added-to-the-norm": lambda: Norm(lambda x, w, b: x / (1.0 + x.norm(dim=-1, keepdim=True))),
    "large-eps-in-LayerNorm": lambda: nn.LayerNorm(WIDTH, eps=0.1),
    "large-eps-in-normalize": lambda: Norm(lambda x, w, b: F.normalize(x, dim=-1, eps=1.0)),
    "large-clamp_min": lambda: Norm(lambda x, w, b: x / x.norm(dim=-1, keepdim=True).clamp_min(1.0)),
    "max-with-a-parameter": lambda: Norm(lambda x, w, b: F.layer_norm(torch.max(x, b), (WIDTH,))),
    "maximum-with-a-parameter": lambda: Norm(lambda x, w, b: F.layer_norm(torch.maximum(x, b), (WIDTH,))),
    "clamped-on-both-sides": lambda: Norm(lambda x, w, b: F.layer_norm(x.clamp(-1.0, 1.0), (WIDTH,))),
    "clamped-above": lambda: Norm(lambda x, w, b: F.layer_norm(x.clamp(max=1.0), (WIDTH,))),
    "rounded": lambda: Norm(lambda x, w, b: F.layer_norm(torch.round(x), (WIDTH,))),
    "integer-cast": lambda: Norm(lambda x, w, b: F.layer_norm(x.to(torch.int32).float(), (WIDTH,))),
    "floor-division": lambda: Norm(lambda x, w, b: F.layer_norm(torch.div(x, 0.5, rounding_mode="floor"), (WIDTH,))),
    "divided-by-the-mean-square": lambda: Norm(lambda x, w, b: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "norm-counting-nonzero": lambda: Norm(lambda x, w, b: x / torch.linalg.vector_norm(x, ord=0, dim=-1, keepdim=True)),
    "exponential": lambda: Norm(lambda x, w, b: x * torch.exp(-x.norm(dim=-1, keepdim=True))),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_scale_invariant_makes_no_site(name: str) -> None:
    report = detect(OTHERS[name])
    assert report.num_sites == 0
    assert report.chains == ()
    (miss,) = report.near_misses()
    assert miss.size == SUBLAYERS
    assert miss.reason.startswith("nothing reads the stream through a norm: the reader is not scale invariant (")


def test_beside_a_raw_gate_the_norm_is_a_site_and_the_gate_keeps_the_plain_sum() -> None:
    report = detect(lambda: Norm(lambda x, w, b: rms(x, 1e-6) * torch.sigmoid(x)))
    (chain,) = report.chains
    assert (chain.kind, chain.num_sublayers) == ("prenorm", SUBLAYERS)
    gates = [refusal for refusal in report.refusals if refusal.subject == "read"]
    assert {gate.reason for gate in gates} == {"reads the stream but is not scale invariant (sigmoid): it keeps the plain sum"}
    assert len(gates) == chain.num_sites + 1  # the first read has one source and is no site, but it has a gate


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "make_norm",
    [
        pytest.param(lambda: channels_first(nn.BatchNorm1d(WIDTH)), id="BatchNorm1d"),
        pytest.param(lambda: channels_first(nn.BatchNorm1d(WIDTH, affine=False)), id="BatchNorm1d-no-affine"),
    ],
)
def test_batch_norm_makes_no_site(make_norm: Callable[[], nn.Module], training: bool) -> None:
    assert detect(make_norm, training=training).num_sites == 0


def test_instance_norm_with_running_statistics_makes_no_site_in_evaluation() -> None:
    assert detect(lambda: channels_first(nn.InstanceNorm1d(WIDTH, track_running_stats=True))).num_sites == 0


def test_a_norm_over_the_sequence_makes_no_site() -> None:
    report = detect(lambda: channels_first(nn.InstanceNorm1d(WIDTH)))
    assert report.num_sites == 0


@pytest.mark.parametrize("mode", ["constant", "replicate"])
def test_padding_with_a_constant(mode: str) -> None:
    value = 1.0 if mode == "constant" else None
    pad = lambda x, w, b: F.layer_norm(F.pad(x, (0, 1), mode=mode, value=value), (WIDTH + 1,))  # noqa: E731
    assert detect(lambda: Norm(pad), width_of_norm=WIDTH + 1).num_sites == (0 if mode == "constant" else SUBLAYERS)


def test_one_raw_reader_among_norms_keeps_the_plain_sum() -> None:
    """A chain with a norm everywhere but in one place loses that one site."""

    class OneRaw(Network):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for i in range(SUBLAYERS):
                x = x + self.mix[i](torch.tanh(x) if i == 2 else self.norms[i](x))
            return self.head(self.norm(x))

    report = attnres_compile.detect(OneRaw(lambda: nn.LayerNorm(WIDTH)), (torch.randn(2, TOKENS, WIDTH),))
    (chain,) = report.chains
    assert [site.before for site in chain.sites] == [1, 3, 4]
    (refusal,) = report.refusals
    assert (refusal.subject, refusal.reason) == (
        "read", "reads the stream but is not scale invariant (tanh): it keeps the plain sum",
    )  # fmt: skip
