"""Sums in disguise: each carries a residual stream, and what only looks like one carries none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import FileCheck

import attnres_compile as ac
from attnres_compile.capture import capture
from attnres_compile.passes.base import Program, run_passes
from attnres_compile.passes.normalize import Normalize

BATCH, TOKENS, WIDTH, SUBLAYERS = 2, 6, 8, 4
CONFIGS = {"full": ac.AttnResConfig(variant="full"), "block": ac.AttnResConfig(num_blocks=2)}
EYE = torch.eye(WIDTH, dtype=torch.float64).flip(0)
EVEN = (torch.arange(TOKENS) % 2 == 0)[:, None]
CHOSEN = torch.tensor([4, 0, 4])  # one token twice
Add = Callable[[Tensor, Tensor], Tensor]


class Network(nn.Module):
    """Four sublayers ``add(x, branch(norm(x)))`` and a final norm, ``[B, T, D]`` to the same."""

    def __init__(self, add: Add) -> None:
        super().__init__()
        self.add = add
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(SUBLAYERS)])
        self.mix = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(SUBLAYERS)])
        self.norm = nn.LayerNorm(WIDTH)

    def branch(self, x: Tensor, i: int) -> Tensor:
        return self.mix[i](self.norms[i](x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(SUBLAYERS):
            x = self.add(x, self.branch(x, i))
        return self.norm(x)


def inputs() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def normalised(add: Add, model: type[Network] = Network) -> Program:
    captured = capture(model(add).double(), (inputs(),), {})
    return run_passes(Program(captured.graph_module, ac.AttnResConfig(), captured.parameters), [Normalize()])


def scatter_index(x: Tensor) -> Tensor:
    return CHOSEN[None, :, None].expand(BATCH, -1, WIDTH)


def doubled(x: Tensor, f: Tensor) -> Tensor:
    y = x + f
    return y + y


ADDS: dict[str, Add] = {
    "lerp-towards-the-branch": lambda x, f: torch.lerp(x, f, 0.3),
    "x.lerp": lambda x, f: x.lerp(f, weight=0.25),
    "lerp-from-the-branch": lambda x, f: torch.lerp(f, x, 0.75),
    "lerp-by-keywords": lambda x, f: torch.lerp(input=x, end=f, weight=0.5),
    "lerp-towards-the-sum": lambda x, f: torch.lerp(x, x + f, 0.3),
    "lerp-towards-the-sum-reversed": lambda x, f: torch.lerp(x, f + x, 0.3),
    "lerp-towards-the-difference": lambda x, f: torch.lerp(x, x - f, 0.3),
    "where-sum": lambda x, f: torch.where(EVEN, x + f, x),
    "where-stream": lambda x, f: torch.where(EVEN, x, x + f),
    "where-sum-reversed": lambda x, f: torch.where(EVEN, f + x, x),
    "where-sum-with-alpha": lambda x, f: torch.where(EVEN, torch.add(x, f, alpha=0.5), x),
    "where-difference": lambda x, f: torch.where(EVEN, x, x - f),
    "x.where": lambda x, f: (x + f).where(EVEN, x),
    "where-by-keywords": lambda x, f: torch.where(condition=EVEN, input=x + f, other=x),
    "addmm": lambda x, f: torch.addmm(x.flatten(0, 1), f.flatten(0, 1), EYE).view_as(x),
    "x.addmm-alpha": lambda x, f: x.flatten(0, 1).addmm(f.flatten(0, 1), EYE, alpha=-0.5).view_as(x),
    "addmm-by-keywords": lambda x, f: torch.addmm(input=x.flatten(0, 1), mat1=f.flatten(0, 1), mat2=EYE).view_as(x),
    "baddbmm": lambda x, f: torch.baddbmm(x, f, EYE.expand(BATCH, -1, -1)),
    "x.baddbmm-alpha": lambda x, f: x.baddbmm(f, EYE.expand(BATCH, -1, -1), alpha=0.5),
    "rsub": lambda x, f: torch.rsub(f, x),
    "rsub-by-keywords": lambda x, f: torch.rsub(input=f, other=x),
    "rsub-alpha": lambda x, f: torch.rsub(f, x, alpha=0.5),
    "aten.rsub": lambda x, f: torch.ops.aten.rsub(f, x),
    "index_add": lambda x, f: torch.index_add(x, 1, CHOSEN, f[:, :3]),
    "x.index_add-alpha": lambda x, f: x.index_add(1, CHOSEN, f[:, 2:5], alpha=0.5),
    "scatter_add": lambda x, f: torch.scatter_add(x, 1, scatter_index(x), f[:, :3]),
    "x.scatter_add": lambda x, f: x.scatter_add(1, scatter_index(x), f[:, :3]),
    "x+x": doubled,
    "y.add(y)-alpha": lambda x, f: (lambda y: y.add(y, alpha=0.5))(x + f),
    "scaled-before": lambda x, f: (x + x) + f,
}  # fmt: skip


@pytest.mark.parametrize("name", ADDS)
def test_disguised_sums_carry_a_stream(name: str) -> None:
    """Found, equal at zero queries, and every query reaches the output."""
    model, x = Network(ADDS[name]).double(), inputs()
    for config in CONFIGS.values():
        rewritten = ac.rewrite(model, config, (x,))
        (chain,) = rewritten.report.chains
        assert (chain.kind, chain.num_sublayers, chain.num_sites) == ("prenorm", SUBLAYERS, SUBLAYERS)
        assert rewritten.report.refusals == ()
        assert ac.compare(model, rewritten, (x,)).max_rel_error <= 1e-13
    queries = [site.query for site in rewritten.attnres.sites]
    with torch.no_grad():
        for query in queries:
            query.normal_()
    gradients = torch.autograd.grad((rewritten(x) * torch.randn_like(x)).sum(), queries)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_a_sum_that_nothing_uses_takes_nobodys_place() -> None:
    unused: Add = lambda x, f: (x + f.exp(), x + f)[1]  # noqa: E731
    (chain,) = ac.detect(Network(unused).double(), (inputs(),)).chains
    assert (chain.num_sublayers, chain.num_sites) == (SUBLAYERS, SUBLAYERS)


# ----------------------------------------------------------------------------------------------------- no sums of the kind


def after_a_write(total: Add, write: Callable[[Tensor, Tensor], object], join: Add) -> Add:
    """Something is written to between the sum and what would be respelled as one."""

    def add(x: Tensor, f: Tensor) -> Tensor:
        y = total(x, f)
        write(x, f)
        return join(x, y)

    return add


@pytest.mark.parametrize("write", [lambda x, f: x.mul_(2.0), lambda x, f: f.mul_(2.0), lambda x, f: x[:, :1].zero_()])
@pytest.mark.parametrize(
    ("total", "join"),
    [
        pytest.param(lambda x, f: x + f, lambda x, y: torch.where(EVEN, y, x), id="where"),
        pytest.param(lambda x, f: x + f, lambda x, y: torch.lerp(x, y, 0.5), id="lerp"),
        pytest.param(lambda x, f: x[:, 1:] + f[:, 1:], lambda x, y: torch.cat([x[:, :1], y], 1), id="cat"),
    ],
)
def test_no_sum_is_moved_across_a_write(total: Add, write: Callable[[Tensor, Tensor], object], join: Add) -> None:
    with torch.no_grad():
        report = ac.detect(Network(after_a_write(total, write, join)).double(), (inputs(),))
    assert report.chains == ()


def text_of(program: Program) -> str:
    return "\n".join(line for line in str(program.graph_module.graph).splitlines() if " = placeholder[" not in line)


def stays(add: Add, operation: str, model: type[Network] = Network) -> None:
    """Normalisation leaves the operation alone."""
    program = normalised(add, model)
    assert program.history[0].changes == 0
    FileCheck().check(operation).run(text_of(program))


def test_lerp_with_a_tensor_of_weights_is_no_sum() -> None:
    gate: Add = lambda x, f: torch.lerp(x, f, f.sigmoid())  # noqa: E731
    stays(gate, "torch.lerp]")
    assert ac.detect(Network(gate), (inputs().float(),)).chains == ()


@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda x, f: torch.where(EVEN, f, x), id="branch-instead-of-the-stream"),
        pytest.param(lambda x, f: torch.where(EVEN, f + f.exp(), x), id="another-sum"),
        pytest.param(lambda x, f: torch.where(EVEN, f.sub(x), x), id="stream-subtracted"),
        pytest.param(lambda x, f: torch.where(EVEN, f.add(x, alpha=2), x), id="stream-scaled-in-the-sum"),
        pytest.param(lambda x, f: torch.where(EVEN, x + f, 0.0), id="zeros"),
    ],
)
def test_where_between_other_values_is_no_sum(add: Add) -> None:
    stays(add, "torch.where]")


def test_a_where_over_more_than_the_stream_is_no_sum() -> None:
    """The stream is broadcast by the condition: the result has another shape."""
    stays(lambda x, f: torch.where(EVEN.expand(3, 1, -1, 1), x + f, x).amax(0), "torch.where]")


def test_the_sum_stays_where_others_read_it() -> None:
    def add(x: Tensor, f: Tensor) -> Tensor:
        total = x + f
        return torch.where(EVEN, total, x) + 0.1 * total.tanh()

    program = normalised(add)
    FileCheck().check("%total : ").check_same("operator.add](args = (%x, %tanh)").run(text_of(program))
    model, x = Network(add).double(), inputs()
    rewritten = ac.rewrite(model, CONFIGS["full"], (x,))
    assert ac.compare(model, rewritten, (x,)).max_rel_error <= 1e-13


class Biased(Network):
    """The branch ends in ``addmm`` with the module's bias, as ``nn.Linear`` is once decomposed."""

    def branch(self, x: Tensor, i: int) -> Tensor:
        bias, weight = self.mix[i].bias, self.mix[i].weight
        return torch.addmm(bias, self.norms[i](x).flatten(0, 1), weight.t()).view_as(x).tanh()


class BiasedPerToken(Network):
    """A parameter as large as the result."""

    def __init__(self, add: Add) -> None:
        super().__init__(add)
        self.bias = nn.Parameter(torch.randn(BATCH, TOKENS, WIDTH))

    def branch(self, x: Tensor, i: int) -> Tensor:
        return torch.baddbmm(self.bias, self.norms[i](x), EYE.expand(BATCH, -1, -1)).tanh()


class BetaScaled(Network):
    def branch(self, x: Tensor, i: int) -> Tensor:
        return torch.addmm(x.exp().flatten(0, 1), self.norms[i](x).flatten(0, 1), EYE, beta=0.5).view_as(x)


@pytest.mark.parametrize(
    ("model", "operation"),
    [
        pytest.param(Biased, "torch.addmm]", id="bias"),
        pytest.param(BiasedPerToken, "torch.baddbmm]", id="parameter-of-the-result's-shape"),
        pytest.param(BetaScaled, "torch.addmm]", id="beta"),
    ],
)
def test_a_bias_is_no_stream(model: type[Network], operation: str) -> None:
    stays(lambda x, f: x + f, operation, model)


@pytest.mark.parametrize("model", [Biased, BiasedPerToken])
def test_biased_branches_are_branches(model: type[Network]) -> None:
    (chain,) = ac.detect(model(lambda x, f: x + f).double(), (inputs(),)).chains
    assert (chain.num_sublayers, chain.num_sites) == (SUBLAYERS, SUBLAYERS)


def test_rsub_from_a_number_is_no_sum() -> None:
    stays(lambda x, f: x + torch.rsub(f, 1.0), "torch.rsub]")


class Experts(Network):
    """Mixture of experts: what they give is written to its tokens, in a buffer of zeros; ``write`` begins and fills it."""

    def branch(self, x: Tensor, i: int) -> Tensor:
        tokens = self.norms[i](x).flatten(0, 1)
        buffer = torch.zeros_like(tokens)
        for expert in range(2):
            chosen = torch.arange(expert, BATCH * TOKENS, 2)
            buffer = self.write(buffer, chosen, self.mix[(i + expert) % SUBLAYERS](tokens[chosen]))
        return buffer.view_as(x)

    def write(self, buffer: Tensor, chosen: Tensor, f: Tensor) -> Tensor:
        return buffer.index_add(0, chosen, f)


class ScatteringExperts(Experts):
    def write(self, buffer: Tensor, chosen: Tensor, f: Tensor) -> Tensor:
        return torch.scatter_add(buffer, 0, chosen[:, None].expand_as(f), f)


@pytest.mark.parametrize(
    ("model", "operation"),
    [
        pytest.param(Experts, "target=index_add]", id="index_add"),
        pytest.param(ScatteringExperts, "scatter_add]", id="scatter_add"),
    ],
)
def test_a_buffer_that_begins_at_zeros_is_no_stream(model: type[Network], operation: str) -> None:
    add: Add = lambda x, f: x + f  # noqa: E731
    stays(add, operation, model)
    rewritten = ac.rewrite(model(add).double(), CONFIGS["block"], (inputs(),))
    (chain,) = rewritten.report.chains
    assert (chain.kind, chain.num_sublayers, chain.num_sites) == ("prenorm", SUBLAYERS, SUBLAYERS)


def test_index_add_and_scatter_add_keep_their_zeros_apart() -> None:
    """The branch is what would have been written into zeros; alpha stays with the add."""
    program = normalised(lambda x, f: x.index_add(1, CHOSEN, f[:, :3], alpha=0.5))
    (
        FileCheck()
        .check("%zeros_like : ").check_same("torch.zeros_like](args = (%x,)")
        .check("%index_add : ").check_same("torch.index_add](args = (%zeros_like, 1, ")
        .check("torch.add](args = (%x, %index_add), kwargs = {alpha: 0.5}")
        .run(text_of(program))
    )  # fmt: skip
    assert program.history[0].changes == SUBLAYERS


def test_a_value_added_to_itself_is_a_scaling() -> None:
    program = normalised(doubled)
    FileCheck().check_count("torch.mul](args = (%y", SUBLAYERS, exactly=True).run(text_of(program))
    assert program.history[0].changes == SUBLAYERS


def test_a_value_subtracted_from_itself_is_left_alone() -> None:
    stays(lambda x, f: x + (f - f), "operator.sub]")


@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda x, f, b: (torch.cat([x[:, :1], x[:, 1:]], 1, out=b), x + f * b.tanh())[1], id="cat"),
        pytest.param(lambda x, f, b: (torch.add(x, x, out=b), x + f * b.tanh())[1], id="x+x"),
        pytest.param(lambda x, f, b: (torch.lerp(x, f, 0.5, out=b), x + f * b.tanh())[1], id="lerp"),
        pytest.param(lambda x, f, b: (torch.addcmul(x, f, f, out=b), x + f * b.tanh())[1], id="addcmul"),
    ],
)
def test_what_is_written_to_an_output_stays_written(add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    model = Network(lambda x, f: add(x, f, torch.zeros_like(x))).double().requires_grad_(False)
    rewritten = ac.rewrite(model, CONFIGS["full"], (inputs(),))
    assert ac.compare(model, rewritten, (inputs(),)).max_rel_error <= 1e-13


def test_a_stream_that_is_written_to_an_output_is_refused() -> None:
    def add(x: Tensor, f: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        return torch.add(x, f, out=out) + 0.5 * out.tanh()

    assert ac.detect(Network(add).double().requires_grad_(False), (inputs(),)).chains == ()
