"""Streams that look cut, short or written to, and are whole: what belongs to a chain, and what beside it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attnres_compile as ac

BATCH, TOKENS, WIDTH, LAYERS = 2, 6, 8, 4
CONFIGS = {"full": ac.AttnResConfig(variant="full"), "block": ac.AttnResConfig(num_blocks=2)}


class Network(nn.Module):
    """Four layers of two sublayers ``x + tanh(linear(norm(x)))`` and a final norm, ``[B, T, D]`` to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS)])
        self.mix = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2 * LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)

    def branch(self, x: Tensor, i: int) -> Tensor:
        return self.mix[i](self.norms[i](x)).tanh()

    def layer(self, x: Tensor, i: int) -> Tensor:
        x = x + self.branch(x, 2 * i)
        return x + self.branch(x, 2 * i + 1)

    def begin(self, x: Tensor) -> Tensor:
        return self.embed(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for i in range(LAYERS):
            x = self.layer(x, i)
        return self.norm(x)


def inputs() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def figures(report: ac.Report) -> list[tuple[str, int, int, int]]:
    return [(chain.kind, chain.num_sublayers, chain.num_sites, chain.hidden_size) for chain in report.chains]


def checked(model: nn.Module, x: Tensor | None = None) -> ac.Report:
    """Equal at zero queries, Full and Block, and the backward pass reaches every query and what the model's own reaches."""
    x = inputs() if x is None else x
    model = model.double()
    for config in CONFIGS.values():
        rewritten = ac.rewrite(model, config, (x,))
        expected, found = model(x), rewritten(x)
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
        with torch.no_grad():
            for site in rewritten.attnres.sites:
                site.query.normal_()
        projection = torch.randn_like(expected)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        own = torch.autograd.grad((model(x) * projection).sum(), trained, allow_unused=True)
        queries = [site.query for site in rewritten.attnres.sites]
        gradients = torch.autograd.grad((rewritten(x) * projection).sum(), [*queries, *trained], allow_unused=True)
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[: len(queries)])
        assert [g is None for g in gradients[len(queries) :]] == [g is None for g in own]
    return rewritten.report


WHOLE = [("prenorm", 8, 8, WIDTH)]


class ThreeEmbeddings(Network):
    """Words, positions and segments."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(TOKENS, WIDTH)
        self.segments = nn.Embedding(2, WIDTH)

    def begin(self, x: Tensor) -> Tensor:
        tokens = torch.arange(TOKENS).expand(BATCH, -1)
        return self.embed(x) + self.positions(tokens) + self.segments(tokens // 3)


class StraightThrough(Network):
    """Embeddings are rounded, with the gradient of what they were."""

    def begin(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return x + (x.round() - x).detach()


class Masked(Network):
    """One mask serves the branches and the stream."""

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[..., :1] > -0.5).to(x.dtype)
        x = self.begin(x)
        for i in range(2 * LAYERS):
            x = (x + self.branch(x * mask, i) * mask) * mask
        return self.norm(x)


class ExpertsInPlace(Network):
    """What two experts give is written to their tokens, in zeros made like the norm's output."""

    def branch(self, x: Tensor, i: int) -> Tensor:
        n = self.norms[i](x).flatten(0, 1)
        y = torch.zeros_like(n)
        for expert in range(2):
            chosen = torch.arange(expert, n.shape[0], 2)
            y.index_add_(0, chosen, self.mix[(i + expert) % len(self.mix)](n[chosen]))
        return y.view_as(x)


class ReadForNothing(Network):
    """In every layer a second norm reads the stream, and no output needs what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.LayerNorm(WIDTH)

    def layer(self, x: Tensor, i: int) -> Tensor:
        x = super().layer(x, i)
        self.mix[0](self.probe(x)).tanh().mean()
        return x


class ScaledByAParameter(Network):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.9))

    def layer(self, x: Tensor, i: int) -> Tensor:
        x = super().layer(x, i)
        x *= self.scale
        return x


class ScaledByABuffer(Network):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))

    def layer(self, x: Tensor, i: int) -> Tensor:
        return super().layer(x, i).mul_(self.scale)


class DividedInPlace(Network):
    """Between the adds, and behind a view, at which nothing else looks."""

    def layer(self, x: Tensor, i: int) -> Tensor:
        x = (x + self.branch(x, 2 * i)).div_(1.25).view(BATCH, TOKENS, WIDTH)
        return x + self.branch(x, 2 * i + 1)


@pytest.mark.parametrize(
    "model",
    [ThreeEmbeddings, StraightThrough, Masked, ExpertsInPlace, ScaledByAParameter, ScaledByABuffer, DividedInPlace],
)
def test_whole_streams(model: type[Network]) -> None:
    report = checked(model())
    assert figures(report) == WHOLE
    assert report.refusals == ()


def test_a_read_for_nothing_is_no_site() -> None:
    """Only a norm that an output needs is a reader: ``probe`` appears nowhere."""
    report = checked(ReadForNothing())
    assert figures(report) == WHOLE
    assert [site.modules for site in report.chains[0].sites] == [(f"norms.{i}",) for i in range(1, 8)] + [("norm",)]
    assert report.refusals == ()


def test_the_root_of_summed_embeddings_is_their_sum() -> None:
    """The first sublayer's read has one source: no part of the embedding is one of its own."""
    model, x = ThreeEmbeddings().double(), inputs()
    rewritten = ac.rewrite(model, CONFIGS["full"], (x,))
    sites = list(rewritten.graph.find_nodes(op="call_function", target=torch.ops.attnres.site.default))
    assert [len(site.args[0]) for site in sites] == [2, 3, 4, 5, 6, 7, 8, 9]


class Routed(Network):
    """The router's state is carried from layer to layer beside the stream, and read through a norm: it only routes."""

    NARROW = 4

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(WIDTH, self.NARROW) for _ in range(LAYERS)])
        self.router_norms = nn.ModuleList([nn.LayerNorm(self.NARROW) for _ in range(LAYERS)])
        self.score = nn.ModuleList([nn.Linear(self.NARROW, 2) for _ in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        x, state = self.begin(x), None
        for i in range(LAYERS):
            x = x + self.branch(x, 2 * i)
            n = self.norms[2 * i + 1](x)
            state = self.down[i](n) if state is None else self.down[i](n) + state
            chosen = self.score[i](self.router_norms[i](state)).topk(1, dim=-1).indices
            experts = torch.stack([self.mix[2 * i + 1](n), self.mix[2 * i](n).tanh()], dim=-2)
            x = x + experts.gather(-2, chosen.unsqueeze(-1).expand(-1, -1, 1, WIDTH)).squeeze(-2)
        return self.norm(x)


def test_a_routers_own_chain_is_refused_beside_the_stream() -> None:
    report = checked(Routed())
    assert figures(report) == WHOLE
    (refusal,) = report.refusals
    assert (refusal.subject, refusal.size) == ("chain", LAYERS - 1)
    assert refusal.reason == "no sublayer is computed from what the norms on this stream give"


class Tokens(nn.Module):
    """Images ``[B, 3, H, W]``: a residual convolution on ``[B, D, H, W]``, then tokens, whose width the norms normalise."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before = before
        self.stem = nn.Conv2d(3, WIDTH, 1)
        self.positions = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(4)])
        self.mix = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        size = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for i in range(4):
            if i == self.before:
                image = x.transpose(1, 2).unflatten(2, size)
                x = (image + self.positions(image)).flatten(2).transpose(1, 2)
            x = x + self.mix[i](self.norms[i](x)).tanh()
        return self.norm(x)


@pytest.mark.parametrize(
    ("before", "befores"),
    [
        # The convolution is a sublayer as well, and the token layout of its sum is what the norms behind it read.
        pytest.param(0, [1, 2, 3, 4, 5], id="at-the-root"),
        pytest.param(2, [1, 3, 4, 5], id="in-mid-depth"),
    ],
)
def test_reads_in_the_layout_that_the_stream_takes_later(before: int, befores: list[int]) -> None:
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    report = checked(Tokens(before), images)
    assert figures(report) == [("prenorm", 5, len(befores), WIDTH)]
    assert [site.before for site in report.chains[0].sites] == befores


# ------------------------------------------------------------------------------------------------- recurrences over time


class RecurrentBranch(Network):
    """A gated recurrence over the tokens inside each branch, whose states are collected twice."""

    def branch(self, x: Tensor, i: int) -> Tensor:
        values = self.mix[i](self.norms[i](x))
        state, states = torch.zeros_like(values[:, 0]), []
        for token in values.unbind(1):
            gate = token.sigmoid()
            state = gate * state + (1 - gate) * token
            states.append(state)
        return torch.stack(states, dim=1) * torch.stack(states, dim=1).sigmoid()


class RecurrentCellBranch(Network):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def branch(self, x: Tensor, i: int) -> Tensor:
        states = [torch.zeros_like(x[:, 0])]
        for token in self.norms[i](x).unbind(1):
            states.append(self.cell(token, states[-1]))
        return torch.stack(states[1:], dim=1)


class AttentiveBranch(Network):
    """Every token attends to what the tokens before it have become, inside the branch."""

    def branch(self, x: Tensor, i: int) -> Tensor:
        first, *others = self.mix[i](self.norms[i](x)).unbind(1)
        states = [first]
        for token in others:
            past = torch.stack(states, dim=1)
            weights = (past * token[:, None]).sum(-1, keepdim=True).softmax(1)
            states.append(token + (weights * past).sum(1))
        return torch.stack(states, dim=1)


@pytest.mark.parametrize("model", [RecurrentBranch, RecurrentCellBranch, AttentiveBranch])
def test_recurrences_over_time_are_neither_gated_residuals_nor_depth_attention(model: type[Network]) -> None:
    report = ac.detect(model(), (inputs().float(),))
    assert figures(report) == WHOLE
    assert not any("gated" in refusal.reason or "over depth" in refusal.reason for refusal in report.refusals)


class RecurrentOnly(Network):
    """No residual stream at all."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        state, states = torch.zeros_like(x[:, 0]), []
        for token in x.unbind(1):
            gate = self.mix[0](token + state).sigmoid()
            state = gate * state + (1 - gate) * self.mix[1](token + state).tanh()
            states.append(state)
        return torch.stack(states, dim=1)


def test_a_recurrence_alone_is_no_gated_residual() -> None:
    report = ac.detect(RecurrentOnly(), (inputs().float(),))
    assert report.chains == ()
    assert not any("gated" in refusal.reason or "over depth" in refusal.reason for refusal in report.refusals)
