"""What cuts a residual stream is refused with its reason and its place, and what only looks like a cut is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attnres_compile as ac

BATCH, TOKENS, WIDTH, LAYERS, STREAMS = 2, 6, 8, 4, 3


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

    def sublayer(self, x: Tensor, i: int) -> Tensor:
        return x + self.branch(x, i)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(2 * LAYERS):
            x = self.sublayer(x, i)
        return self.norm(x)


def inputs() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(7))


def refusal_of(model: nn.Module) -> ac.Refusal:
    """The nearest miss of a model without chains."""
    report = ac.detect(model, (inputs(),))
    assert report.chains == (), report
    return report.near_misses()[0]


GATED = "gated residual: the stream is multiplied by a factor computed from itself, so that adds alone carry nothing on"
MIXED = "hyper-connections or another multi-stream residual"


class GatedByGRU(Network):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList([nn.GRUCell(WIDTH, WIDTH) for _ in range(2 * LAYERS)])

    def sublayer(self, x: Tensor, i: int) -> Tensor:
        return self.gates[i](self.branch(x, i).flatten(0, 1), x.flatten(0, 1)).view_as(x)


class Highway(Network):
    def sublayer(self, x: Tensor, i: int) -> Tensor:
        gate = self.mix[i](x).sigmoid()
        return gate * self.branch(x, i) + (1 - gate) * x


class HyperConnections(Network):
    """Several streams ``[B, T, S, D]``, carried on by ``mixed``; each sublayer reads and feeds all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Parameter(torch.randn(2 * LAYERS, STREAMS))
        self.matrix = nn.Parameter(torch.randn(2 * LAYERS, STREAMS, STREAMS))
        self.feed = nn.Parameter(torch.randn(2 * LAYERS, STREAMS))

    def mixed(self, streams: Tensor, i: int) -> Tensor:
        return torch.einsum("rs,btsd->btrd", self.matrix[i], streams)

    def sublayer(self, streams: Tensor, i: int) -> Tensor:
        branch = self.branch(torch.einsum("s,btsd->btd", self.read[i], streams), i)
        return self.mixed(streams, i) + self.feed[i][:, None] * branch.unsqueeze(2)

    def forward(self, x: Tensor) -> Tensor:
        streams = self.embed(x).unsqueeze(2).expand(-1, -1, STREAMS, -1)
        for i in range(2 * LAYERS):
            streams = self.sublayer(streams, i)
        return self.norm(streams.sum(2))


class MixedByMatmul(HyperConnections):
    def mixed(self, streams: Tensor, i: int) -> Tensor:
        return self.matrix[i] @ streams


class Unmixed(HyperConnections):
    """Nothing is mixed, but each sublayer still writes to all streams at once."""

    def sublayer(self, streams: Tensor, i: int) -> Tensor:
        branch = self.branch(torch.einsum("s,btsd->btd", self.read[i], streams), i)
        feed = self.feed[i] * branch.mean(-1, keepdim=True)
        return streams + feed.unsqueeze(-1) * branch.unsqueeze(2)


class UnmixedAndStatic(HyperConnections):
    """The same with a weight per stream that is a parameter alone."""

    def mixed(self, streams: Tensor, i: int) -> Tensor:
        return streams


@pytest.mark.parametrize(
    ("model", "reason", "size"),
    [
        pytest.param(
            GatedByGRU, "gated residual: a recurrent cell (gru_cell) stands where the residual add would (8 such sums)", 8,
            id="GRU",
        ),
        pytest.param(Highway, f"{GATED} (8 such sums)", 8, id="highway"),
        pytest.param(
            HyperConnections,
            f"{MIXED}: 'einsum' mixes the stream between sublayers, so that adds alone carry nothing on (8 such sums)", 8,
            id="hyper-connections-by-einsum",
        ),
        pytest.param(
            MixedByMatmul,
            f"{MIXED}: 'matmul' mixes the stream between sublayers, so that adds alone carry nothing on (8 such sums)", 8,
            id="hyper-connections-by-matmul",
        ),
        pytest.param(Unmixed, f"{MIXED}: every sublayer adds to several streams at once", 8, id="hyper-connections-unmixed"),
        pytest.param(UnmixedAndStatic, f"{MIXED}: every sublayer adds to several streams at once", 8, id="unmixed-and-static"),
    ],
)  # fmt: skip
def test_gates_and_mixtures(model: type[Network], reason: str, size: int) -> None:
    refusal = refusal_of(model())
    assert (refusal.subject, refusal.reason, refusal.size) == ("chain", reason, size)
    assert "test_breaks.py" in refusal.source_line


class UNet(Network):
    """The upper half concatenates the lower half's streams and projects back."""

    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.ModuleList([nn.Linear(2 * WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        skips = []
        for i in range(2 * LAYERS):
            if i in (4, 6):
                x = self.merge[i // 2 - 2](torch.cat([x, skips.pop()], dim=-1))
            x = self.sublayer(x, i)
            if i in (1, 3):
                skips.append(x)
        return self.norm(x)


def test_a_stream_in_fragments() -> None:
    refusal = refusal_of(UNet())
    assert (refusal.subject, refusal.size) == ("chain", 4)
    assert refusal.reason == (
        "the stream is fragmented: 'linear' (module 'merge.0') lies on it, with 4 of 8 residual adds on one side"
    )


class Conditional(Network):
    """Whole layers run inside ``torch.cond``, which hides the residual adds."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(0, 2 * LAYERS, 2):
            run = lambda y, i=i: self.sublayer(self.sublayer(y, i), i + 1)  # noqa: E731
            x = torch.cond(x.mean() > -100, run, lambda y: y.clone(), (x,))
        return self.norm(x)


class ConditionalSublayers(Network):
    def sublayer(self, x: Tensor, i: int) -> Tensor:
        return torch.cond(x.mean() > -100, lambda y: y + self.branch(y, i), lambda y: y.clone(), (x,))


@pytest.mark.parametrize(("model", "size"), [(Conditional, 2), (ConditionalSublayers, 1)])
def test_layers_inside_an_operator(model: type[Network], size: int) -> None:
    refusal = refusal_of(model())
    assert (refusal.subject, refusal.size) == ("chain", size)
    assert refusal.reason == "the stream passes through the higher-order operator 'cond', whose bodies are not looked into"


# ------------------------------------------------------------------------------------------ depth attention by hand


class DepthAttention(Network):
    """Every sublayer reads a softmax over all that was given so far."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2 * LAYERS + 1, WIDTH))

    def collect(self, sources: list[Tensor]) -> Tensor:
        return torch.stack(sources, dim=-2)

    def attend(self, values: Tensor, i: int) -> Tensor:
        weights = torch.einsum("d,btsd->bts", self.queries[i], torch.rms_norm(values, (WIDTH,))).softmax(-1)
        return torch.einsum("bts,btsd->btd", weights, values)

    def forward(self, x: Tensor) -> Tensor:
        sources = [self.embed(x)]
        for i in range(2 * LAYERS):
            sources.append(self.branch(self.attend(self.collect(sources), i), i))
        return self.norm(self.attend(self.collect(sources), -1))


class CollectedByCat(DepthAttention):
    def collect(self, sources: list[Tensor]) -> Tensor:
        return torch.cat([source.unsqueeze(-2) for source in sources], dim=-2)


class BlockDepthAttention(DepthAttention):
    """Sums of two sublayers are the sources. Complete blocks are kept in one tensor, which begins empty."""

    def forward(self, x: Tensor) -> Tensor:
        partial = self.embed(x)
        blocks = partial.unsqueeze(-2)
        blocks = torch.cat([blocks[..., :0, :], partial.unsqueeze(-2)], -2)
        for i in range(LAYERS):
            partial = self.branch(self.attend(blocks, 2 * i), 2 * i)
            with_partial = torch.cat([blocks, partial.unsqueeze(-2)], -2)
            partial = partial + self.branch(self.attend(with_partial, 2 * i + 1), 2 * i + 1)
            blocks = torch.cat([blocks, partial.unsqueeze(-2)], -2)
        return self.norm(self.attend(blocks, -1))


@pytest.mark.parametrize(
    ("model", "operation", "count"),
    [
        pytest.param(DepthAttention, "stack", 9, id="full"),
        pytest.param(CollectedByCat, "cat", 9, id="full-by-cat"),
        pytest.param(BlockDepthAttention, "cat", 5, id="block"),
    ],
)
def test_depth_attention_by_hand(model: type[Network], operation: str, count: int) -> None:
    reason = f"the model attends over depth already: {operation!r} collects {count} values of its stream"
    assert refusal_of(model()).reason == reason


# ----------------------------------------------------------------------------------------------------- where norms stand


class PostNorm(Network):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))

    def sublayer(self, x: Tensor, i: int) -> Tensor:
        return self.norms[i](x + self.mix[i](x).tanh())


class Reordered(Network):
    def sublayer(self, x: Tensor, i: int) -> Tensor:
        return x + self.norms[i](self.mix[i](x).tanh())


def test_post_norm_names_the_norm() -> None:
    refusal = refusal_of(PostNorm())
    assert (refusal.size, refusal.module) == (8, "norms.0")
    assert refusal.reason == (
        "post-norm: 'norms.0' normalises the sum right after the residual add, so no residual stream is carried on (8 such adds)"
    )


def test_reordered_norms_are_named() -> None:
    refusal = refusal_of(Reordered())
    assert refusal.size == 8
    assert refusal.reason == (
        "reordered norm: branches read the raw stream and 'norms.0' normalises their output before the residual add"
    )


WRITES: dict[str, Callable[[Tensor], object]] = {
    "assigned": lambda y: y.__setitem__((slice(None), slice(3)), 0.5 * y[:, :3]),
    "scaled-through-a-view": lambda y: y[:, 0].mul_(0.5),
    "filled": lambda y: y.masked_fill_(torch.arange(TOKENS)[:, None] == 0, 0.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_written_clone_of_the_stream(name: str) -> None:
    class CloneWritten(Network):
        def sublayer(self, x: Tensor, i: int) -> Tensor:
            y = super().sublayer(x, i).clone()
            WRITES[name](y)
            return y

    refusal = refusal_of(CloneWritten())
    assert refusal.size == 8
    assert refusal.reason.startswith("the stream, or a branch after its residual add, is overwritten in place by")


class HalvesOfAUNet(Network):
    """One skip over the lower half, joined in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = early = self.sublayer(self.embed(x), 0)
        for i in range(1, 2 * LAYERS):
            if i == LAYERS:
                x = self.join(torch.cat((x, early), dim=-1))
            x = self.sublayer(x, i)
        return self.norm(x)


def test_two_halves_that_one_skip_joins() -> None:
    refusal = refusal_of(HalvesOfAUNet())
    assert refusal.reason.startswith("the stream is fragmented: a U-Net skip, 'cat' of earlier and later values, lies on it")
    assert refusal.reason.endswith("with 4 of 8 residual adds on one side")
    assert "torch.cat((x, early), dim=-1)" in refusal.source_line
