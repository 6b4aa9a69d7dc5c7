"""The fused merge against float64 autograd, and what every Triton wrapper shares: rows, addresses, tuned launches.

Without a GPU the kernels run in triton's interpreter, which ``interpreter.make_faithful`` corrects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from interpreter import make_faithful, poisoned
from torch import Tensor

from attnres_compile.kernels import fused_merge, launch
from attnres_compile.kernels.fused_merge import merge_backward, merge_forward, variants
from attnres_compile.kernels.launch import Config, addresses, num_programs, rows, tuned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
# Relative L2 error against float64: one rounding to the storage dtype, and float32 arithmetic before it.
ROUNDING = {torch.float32: 3e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
FLOAT32 = 2e-5  # of what is kept in float32, whatever the storage

if DEVICE.type == "cpu":
    make_faithful()


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel must write all that it returns."""
    poisoned(monkeypatch)


@dataclass(frozen=True)
class Case:
    """One call of the merge; the defaults fuse all that there is."""

    width: int = 96
    batch: tuple[int, ...] = (5,)
    dtype: torch.dtype = torch.float32
    norm: str = "rms"
    branch: bool = True
    grad_total: bool = True
    weight: bool = True
    bias: bool = True
    scale: float = 5.0
    norm_eps: float = 1e-6

    def __str__(self) -> str:
        options = ("branch", "grad_total", "weight", "bias")
        absent = [f"no-{name}" for name in options if not getattr(self, name)]
        shape = "x".join(map(str, (*self.batch, self.width)))
        return "-".join((shape, str(self.dtype)[6:], self.norm or "none", f"scale{self.scale:g}", *absent))


@dataclass
class Data:
    """The tensors of a case, in storage dtype and on the device."""

    partial: Tensor
    branch: Tensor | None
    mixed: Tensor
    lse: Tensor
    weight: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    grad_y: Tensor
    grad_total: Tensor | None


def draw(case: Case) -> Data:
    def stored(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(case.dtype).to(DEVICE)

    shape = (*case.batch, case.width)
    return Data(
        partial=stored(*shape),
        branch=stored(*shape) if case.branch else None,
        mixed=stored(*shape),
        lse=torch.randn(torch.Size(case.batch).numel(), device=DEVICE),
        weight=3 * torch.randn(case.width, device=DEVICE) / case.width**0.5,
        norm_weight=1 + 0.3 * stored(case.width) if case.norm and case.weight else None,
        norm_bias=stored(case.width) if case.norm == "layer" and case.bias else None,
        grad_y=stored(*shape),
        grad_total=stored(*shape) if case.grad_total else None,
    )


def forward(data: Data, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    d = data
    return merge_forward(
        d.partial, d.branch, d.mixed, d.lse, d.weight, EPS, case.scale, case.norm, d.norm_weight, d.norm_bias, case.norm_eps
    )  # fmt: skip


def backward(data: Data, case: Case, total: Tensor, stats: Tensor) -> tuple[Tensor | None, ...]:
    d = data
    return merge_backward(
        d.grad_y, d.grad_total, total, d.mixed, d.weight, case.scale, case.norm, d.norm_weight, d.norm_bias, stats
    )


def reference(data: Data, case: Case, total: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """y, statistics and gradients in float64, by autograd from the rounded total."""
    given = (total, data.mixed, data.lse, data.weight, data.norm_weight, data.norm_bias)
    leaves = [None if leaf is None else leaf.detach().cpu().double().requires_grad_() for leaf in given]
    x, o, lse, weight, norm_weight, norm_bias = leaves
    inverse_rms = torch.rsqrt(x.square().mean(-1) + EPS)
    score = (x * weight).sum(-1) * inverse_rms
    excess = score - lse.view(score.shape)
    m = torch.sigmoid(excess).unsqueeze(-1)
    y = h = case.scale * (o + m * (x - o))
    stats = [excess, score, inverse_rms]
    if case.norm == "rms":
        stats.append(torch.rsqrt(h.square().mean(-1) + case.norm_eps))
        y = h * stats[-1].unsqueeze(-1)
        y = y if norm_weight is None else y * norm_weight
    elif case.norm == "layer":
        stats += [h.mean(-1), torch.rsqrt(h.var(-1, correction=0) + case.norm_eps)]
        y = torch.nn.functional.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, case.norm_eps)
    objective = (y * data.grad_y.cpu().double()).sum()
    if data.grad_total is not None:
        objective = objective + (x * data.grad_total.cpu().double()).sum()
    objective.backward()
    return y.detach(), torch.stack([row.detach().flatten() for row in stats]), tuple(
        None if leaf is None else leaf.grad for leaf in leaves
    )  # fmt: skip


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


NAMES = ("grad_total", "grad_mixed", "grad_lse", "grad_weight", "grad_norm_weight", "grad_norm_bias")


def check(case: Case, data: Data | None = None) -> None:
    """Every output of both directions within its tolerance."""
    data = draw(case) if data is None else data
    total, y, stats = forward(data, case)
    if data.branch is None:
        assert total is data.partial
    else:
        assert torch.equal(total, (data.partial.float() + data.branch.float()).to(case.dtype))
    expected_y, expected_stats, expected_grads = reference(data, case, total)
    assert (y.dtype, y.shape) == (case.dtype, data.partial.shape)
    assert relative_l2(y, expected_y) <= ROUNDING[case.dtype]
    assert (stats.dtype, stats.shape) == (torch.float32, expected_stats.shape)
    for found, expected in zip(stats, expected_stats, strict=True):
        assert relative_l2(found, expected) <= FLOAT32
    grads = backward(data, case, total, stats)
    for name, found, expected in zip(NAMES, grads, expected_grads, strict=True):
        if expected is None:
            assert found is None, name
            continue
        of_rows = name in NAMES[:2]
        assert found is not None, name
        assert (found.dtype, found.shape) == (case.dtype if of_rows else torch.float32, expected.shape), name
        assert relative_l2(found, expected) <= (ROUNDING[case.dtype] if of_rows else FLOAT32), name


def grid(*cases: Case) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


# --------------------------------------------------------------------------------------------------------- numerics

# 7 and 1001 align no row; 96 and 1000 leave a chunk unfilled in whole vectors; 1024 is one chunk, 1536 and 5120 are whole
# chunks but no power of two; 7168 ends within a chunk of 16 bits and not of 32. One feature is a case of its own below.
WIDTHS = (7, 96, 1000, 1001, 1024, 1536, 5120, 7168)


@grid(*(Case(d, dtype=dtype, norm=norm) for d in WIDTHS for norm in ("", "rms", "layer") for dtype in ROUNDING))
def test_widths(case: Case) -> None:
    check(case)


# Each pointer that may be absent, alone and together, and both scales.
@grid(
    *(
        Case(norm=norm, weight=weight, bias=bias, branch=branch, grad_total=grad_total, scale=scale)
        for norm, weight, bias in (
            ("", False, False), ("rms", True, False), ("rms", False, False),
            ("layer", True, True), ("layer", True, False), ("layer", False, True), ("layer", False, False),
        )
        for branch in (True, False)
        for grad_total in (True, False)
        for scale in (1.0, 5.0)
    )
)  # fmt: skip
def test_options(case: Case) -> None:
    check(case)


# Fewer and more tokens than programs (three in the interpreter), and than a program holds at a time (16 of 96 features).
@grid(
    *(Case(d, (t,), norm=norm) for d, t in ((96, 1), (96, 2), (96, 3), (96, 4), (96, 67), (1536, 17)) for norm in ("", "layer"))
)
def test_tokens(case: Case) -> None:
    check(case)


@grid(Case(batch=()), Case(batch=(1, 1)), Case(batch=(2, 3), dtype=torch.bfloat16), Case(batch=(2, 1, 2), norm="layer"))
def test_batches(case: Case) -> None:
    check(case)


# What a GPU with much to do is timed on: every configuration, with several rounds per program.
@pytest.mark.parametrize("index", [0, 1, 2])
@grid(
    Case(96, (99,)),
    Case(1000, (33,), norm="layer", dtype=torch.float16),
    Case(1536, (33,), norm="layer", dtype=torch.bfloat16),
    Case(4096, (9,), dtype=torch.bfloat16),
    Case(7168, (5,), norm="layer", dtype=torch.bfloat16),
    Case(7168, (4,), norm="", branch=False),
)
def test_configurations(case: Case, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_merge, "FEW_TOKENS", 0)
    monkeypatch.setattr(fused_merge, "tuned", lambda name, key, configs, launch: configs[min(index, len(configs) - 1)])
    check(case)


@pytest.mark.parametrize("norm", ["", "rms"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_one_feature(dtype: torch.dtype, norm: str) -> None:
    # With a small eps the norm of one feature is its sign, whose gradient is the difference of equal numbers.
    check(Case(1, dtype=dtype, norm=norm, norm_eps=10.0))


def test_layer_norm_of_one_feature_is_the_bias() -> None:
    case = Case(1, norm="layer")
    data = draw(case)
    total, y, stats = forward(data, case)
    grad, grad_mixed, *_ = backward(data, case, total, stats)
    torch.testing.assert_close(y, data.norm_bias.expand_as(y))
    torch.testing.assert_close(grad, data.grad_total)
    torch.testing.assert_close(grad_mixed, torch.zeros_like(grad_mixed))


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sequence-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "unaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@grid(Case(96, (2, 3)), Case(1024, (2, 2), torch.bfloat16, "layer"))
def test_layouts(case: Case, layout: str) -> None:
    change = LAYOUTS[layout]
    data = draw(case)
    data = replace(
        data,
        partial=change(data.partial),
        branch=change(data.branch),
        mixed=change(data.mixed),
        grad_y=change(data.grad_y),
        grad_total=change(data.grad_total),
        norm_weight=torch.stack((data.norm_weight, data.norm_weight), -1)[:, 0],
        lse=torch.stack((data.lse, data.lse), -1)[:, 0],
    )
    check(case, data)


@pytest.mark.parametrize("norm", ["", "rms", "layer"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("batch", [(0,), (2, 0)], ids=["T0", "B2-T0"])
def test_no_tokens(batch: tuple[int, ...], dtype: torch.dtype, norm: str) -> None:
    case = Case(batch=batch, dtype=dtype, norm=norm)
    data = draw(case)
    total, y, stats = forward(data, case)
    grads = backward(data, case, total, stats)
    assert total.shape == y.shape == grads[0].shape == grads[1].shape == (*batch, 96)
    assert stats.shape[1] == grads[2].numel() == 0
    for grad in grads[3:]:
        assert grad is None or torch.equal(grad, torch.zeros(96, device=DEVICE))


# ---------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the sigmoid of -1e4 is 1 / inf
@grid(Case(norm=""), Case(), Case(norm="layer"))
def test_one_side_takes_all(case: Case) -> None:
    """Scores far apart: the read is the mixture, or the total, and nothing overflows."""
    data = draw(case)
    for lse, winner in ((1e4, data.mixed), (-1e4, data.partial.float() + data.branch.float())):
        data.lse.fill_(lse)
        total, y, stats = forward(data, case)
        grads = backward(data, case, total, stats)
        if case.norm == "":
            torch.testing.assert_close(y, case.scale * winner)
        assert all(grad.isfinite().all() for grad in grads if grad is not None)
        assert torch.equal(grads[2], torch.zeros_like(data.lse))


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(("dtype", "magnitude"), [(torch.float16, 1e4), (torch.bfloat16, 1e15), (torch.float32, 1e-10)], ids=str)
def test_magnitudes(dtype: torch.dtype, magnitude: float, norm: str) -> None:
    """Squares of float16 rows leave float16, and rows far below eps have no norm to speak of."""
    case = Case(dtype=dtype, norm=norm)
    data = draw(case)
    for name in ("partial", "branch", "mixed"):
        setattr(data, name, (magnitude * getattr(data, name).double()).to(dtype))
    total, y, _ = forward(data, case)
    expected, *_ = reference(data, case, total)
    assert relative_l2(y, expected) <= ROUNDING[dtype]


@grid(Case(norm="layer"), Case(1536, norm="rms"))
def test_a_bad_token_does_not_spread(case: Case) -> None:
    data = draw(case)
    clean = forward(data, case)
    clean_grads = backward(data, case, clean[0], clean[2])
    data.mixed[2, 7] = float("nan")
    found = forward(data, case)
    grads = backward(data, case, found[0], found[2])
    others = [0, 1, 3, 4]
    assert not found[1][2].isfinite().any()
    assert torch.equal(found[1][others], clean[1][others])
    for ours, theirs in zip(grads[:3], clean_grads[:3], strict=True):
        assert torch.equal(ours[others], theirs[others])


def test_the_same_bits_every_time() -> None:
    case = Case(1000, (7,), torch.bfloat16, "layer")
    data = draw(case)
    first, second = forward(data, case), forward(data, case)
    grads = [backward(data, case, total, stats) for total, _, stats in (first, second)]
    for ours, theirs in zip((*first, *grads[0]), (*second, *grads[1]), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("lanes", [32, 64], ids=["nvidia", "amd"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("width", [1, 96, 1001, 1024, 1536, 2048, 4096, 5120, 7168, 16384], ids=lambda d: f"D{d}")
def test_variants_are_complete_and_few(width: int, dtype: torch.dtype, lanes: int) -> None:
    found = variants(width, dtype, lanes)
    assert {name.split("-")[0] + "-" + name.split("-")[1] for name, *_ in found} == {
        f"merge_{direction}-{norm}" for direction in ("forward", "backward") for norm in ("none", "rms", "layer")
    }
    assert len(found) <= 15
    for name, kernel, signature, constants, config in found:
        assert {*signature, *constants} == {*kernel.arg_names}, name
        assert len(signature) + len(constants) == len(kernel.arg_names), name
        # Tiles are powers of two, and from a row of one warp on every thread loads 128 bits.
        tile = constants["TOKENS"] * constants["WIDTH"]
        assert tile & (tile - 1) == 0
        assert tile == config.num_warps * lanes * 16 // dtype.itemsize


# ------------------------------------------------------------------------------------------------------- interpreter


@triton.jit
def _add(left, right, other_left, other_right):
    return left + other_left, right + other_right


@triton.jit
def _try_out(x, narrow, product, sums, mode: tl.constexpr):
    i = tl.arange(0, 16)
    values = tl.load(x + i[:, None] * 16 + i[None, :])
    rounded = values.to(tl.bfloat16, fp_downcast_rounding="rtne") if mode == "rtne" else values.to(tl.bfloat16)
    tl.store(narrow + i[:, None] * 16 + i[None, :], rounded)
    tl.store(product + i[:, None] * 16 + i[None, :], tl.dot(rounded, rounded))
    plain, squares = tl.reduce((values, values * values), 1, _add)
    tl.store(sums + i, plain)
    tl.store(sums + 16 + i, squares)


@pytest.mark.parametrize("mode", ["plain", "rtne"])
def test_the_interpreter_rounds_multiplies_and_reduces_as_a_gpu(mode: str) -> None:
    x = torch.randn(16, 16, device=DEVICE)
    x[0, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-9, -1 - 2**-8])  # ties to even, and a carry
    narrow = torch.empty(16, 16, dtype=torch.bfloat16, device=DEVICE)
    product, sums = torch.empty(16, 16, device=DEVICE), torch.empty(2, 16, device=DEVICE)
    _try_out[(1,)](x, narrow, product, sums, mode)
    assert torch.equal(narrow, x.bfloat16())
    torch.testing.assert_close(product, narrow.float() @ narrow.float())
    torch.testing.assert_close(sums, torch.stack((x.sum(1), x.square().sum(1))))


# ------------------------------------------------------------------------------------------------------------ launch


def test_rows_copies_only_what_it_must() -> None:
    x = torch.randn(2, 3, 8)
    assert rows(x).data_ptr() == x.data_ptr()
    for other in (x.transpose(0, 1), x[:, 1:], x.flatten()[1:9], x[0, 0].expand(4, 8), torch.randn(8), torch.randn(2, 0, 8)):
        found = rows(other)
        assert found.shape == (other.numel() // 8, 8)
        assert found.is_contiguous()
        assert found.data_ptr() % 16 == 0
        assert torch.equal(found, other.reshape(-1, 8))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 256])
def test_addresses(n: int) -> None:
    tensors = [torch.randn(2, 4, device=DEVICE) for _ in range(n)]
    table = addresses(tensors)
    assert table.dtype == torch.int64
    assert table.tolist() == [tensor.data_ptr() for tensor in tensors]


def test_num_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 132)
    assert [num_programs(tokens, torch.device("cpu")) for tokens in (1, 2, 3, 9)] == [1, 2, 3, 3]
    assert [num_programs(tokens, torch.device("cuda:0")) for tokens in (1, 132, 9999)] == [1, 132, 132]
    assert num_programs(9999, torch.device("cuda:0"), per_multiprocessor=2) == 264


@dataclass
class Clock:
    """Stands for a GPU on which configurations take as many milliseconds as they have warps."""

    timed: list[Config]
    capturing: bool = False

    def milliseconds(self, config: Config, launch: Any) -> float:
        self.timed.append(config)
        return float(config.num_warps)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock([])
    monkeypatch.setattr(launch, "_picked", {})
    monkeypatch.setattr(launch, "_milliseconds", fake.milliseconds)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    return fake


CANDIDATES = (Config(8), Config(2), Config(4))


def pick(*key: Any, candidates: tuple[Config, ...] = CANDIDATES) -> Config:
    return tuned("kernel", key, candidates, lambda config: None)


def test_the_fastest_is_picked_and_timed_once_per_key(clock: Clock) -> None:
    assert pick(96) == pick(96) == Config(2)
    assert clock.timed == list(CANDIDATES)
    assert pick(128, candidates=CANDIDATES[::2]) == Config(4)
    assert len(clock.timed) == 5


def test_one_candidate_is_not_timed(clock: Clock) -> None:
    assert pick(96, candidates=(Config(16),)) == Config(16)
    assert clock.timed == []


def test_capture_takes_the_first_unless_timed_before(clock: Clock) -> None:
    clock.capturing = True
    assert pick(96) == Config(8)
    clock.capturing = False
    assert pick(96) == Config(2)
    clock.capturing = True
    assert pick(96) == Config(2)
    assert clock.timed == list(CANDIDATES)


def test_deterministic_algorithms_take_the_first_even_if_timed_before(clock: Clock) -> None:
    assert pick(96) == Config(2)
    torch.use_deterministic_algorithms(True)
    try:
        assert pick(96) == Config(8)
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_a_gpu_the_first_is_taken(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick(96) == Config(8)
    assert clock.timed == []
