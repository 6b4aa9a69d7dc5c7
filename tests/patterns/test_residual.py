"""Residual streams in every spelling: what is found in them, and that rewriting keeps the function at zero queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import ReferenceStream, attend
from torch import Tensor, nn
from torch.nn import functional as F

import attnres_compile as ac

BATCH, TOKENS, WIDTH, LAYERS = 2, 6, 16, 4
CONFIGS = {"two-blocks": ac.AttnResConfig(num_blocks=2), "full": ac.AttnResConfig(variant="full")}
EPS = 1e-5


class Network(nn.Module):
    """Four layers of the form that a subclass gives to ``layer`` and a final norm: ``[B, T, D]`` to ``[B, T, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH, eps=EPS) for _ in range(2 * LAYERS)])
        self.mix = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2 * LAYERS)])
        self.gamma = nn.ParameterList([0.5 + torch.rand(WIDTH) for _ in range(LAYERS)])
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.norm = nn.LayerNorm(WIDTH, eps=EPS)
        self.head = nn.Linear(WIDTH, 3)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.uniform_(parameter, 0.5, 1.5)

    def branch(self, x: Tensor, i: int) -> Tensor:
        return torch.tanh(self.mix[i](self.norms[i](x)))

    def layer(self, x: Tensor, i: int) -> Tensor:
        return x + self.branch(x, i)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(LAYERS):
            x = self.layer(x, i)
        return self.head(self.norm(x))


def inputs() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def build(cls: type[nn.Module], training: bool = False) -> nn.Module:
    return cls().double().train(training)


def assert_same_function(model: nn.Module, config: ac.AttnResConfig, tolerance: float = 1e-12) -> ac.Report:
    """The rewritten model computes the same at zero queries; returns the report of the rewrite."""
    x = inputs()
    rewritten = ac.rewrite(model, config, (x,))
    assert ac.compare(model, rewritten, (x,)).max_rel_error <= tolerance
    return rewritten.report


# -------------------------------------------------------------------------------------------- spellings of one add


def accumulate(x: Tensor, f: Tensor, i: int, net: Network) -> Tensor:
    x += f
    return x


def subtract_in_place(x: Tensor, f: Tensor, i: int, net: Network) -> Tensor:
    x -= f
    return x


def drop_path(f: Tensor, probability: float, training: bool) -> Tensor:
    """Stochastic depth, as in timm."""
    if probability == 0.0 or not training:
        return f
    mask = f.new_empty((f.shape[0], 1, 1)).bernoulli_(1 - probability)
    return f * mask.div_(1 - probability)


def lerp(x: Tensor, f: Tensor, i: int, net: Network) -> Tensor:
    return torch.lerp(x, x + f, 0.5)


# Every one of these is linear in the stream and in the branch: add(x, f) = x + add(0, f).
ADDS: dict[str, Callable[[Tensor, Tensor, int, Network], Tensor]] = {
    "x+f": lambda x, f, i, net: x + f,
    "f+x": lambda x, f, i, net: f + x,
    "torch.add": lambda x, f, i, net: torch.add(x, f),
    "torch.add-alpha": lambda x, f, i, net: torch.add(x, f, alpha=0.5),
    "torch.add-other": lambda x, f, i, net: torch.add(x, other=f),
    "x.add": lambda x, f, i, net: x.add(f),
    "x.add-alpha": lambda x, f, i, net: x.add(f, alpha=-0.25),
    "f.add": lambda x, f, i, net: f.add(x),
    "x+=f": accumulate,
    "x.add_": lambda x, f, i, net: x.add_(f),
    "f.add_": lambda x, f, i, net: f.add_(x),
    "x.add_-alpha": lambda x, f, i, net: x.add_(f, alpha=0.5),
    "x-f": lambda x, f, i, net: x - f,
    "x-=f": subtract_in_place,
    "torch.sub-alpha": lambda x, f, i, net: torch.sub(x, f, alpha=0.5),
    "x.__add__": lambda x, f, i, net: x.__add__(f),
    "addcmul": lambda x, f, i, net: torch.addcmul(x, f, net.gamma[i]),
    "addcmul-value": lambda x, f, i, net: torch.addcmul(x, net.gamma[i], f, value=0.5),
    "x.addcmul": lambda x, f, i, net: x.addcmul(f, net.gamma[i]),
    "x.addcmul_": lambda x, f, i, net: x.addcmul_(f, net.gamma[i]),
    "constant-times-f": lambda x, f, i, net: x + 0.3 * f,
    "f-over-constant": lambda x, f, i, net: x + f / 1.7,
    "layer-scale": lambda x, f, i, net: x + net.gamma[i] * f,
    "dropout-eval": lambda x, f, i, net: x + F.dropout(f, 0.1, net.training),
    "dropout-of-the-sum-eval": lambda x, f, i, net: F.dropout(x + f, 0.1, net.training),
    "drop-path-eval": lambda x, f, i, net: x + drop_path(f, 0.2, net.training),
    "cast": lambda x, f, i, net: x + f.to(x.dtype),
    "contiguous": lambda x, f, i, net: (x + f).contiguous(),
    "clone": lambda x, f, i, net: x.clone() + f,
    "branch-minus-of-minus": lambda x, f, i, net: -f + x,
    "lerp": lerp,
    "stack-sum": lambda x, f, i, net: torch.stack([x, f]).sum(0),
    "sum-of-list": lambda x, f, i, net: sum([x, f]),
}


def with_add(add: Callable[[Tensor, Tensor, int, Network], Tensor]) -> type[Network]:
    class Spelled(Network):
        def layer(self, x: Tensor, i: int) -> Tensor:
            return add(x, self.branch(x, i), i, self)

    return Spelled


def reference_output(
    model: Network, x: Tensor, block_size: int, queries: list[Tensor], key_norms: list[Tensor], add: Any
) -> Tensor:
    """The model with the given queries, by the definition of Block AttnRes."""
    stream = ReferenceStream(model.embed(x), block_size, "preserve", EPS, queries, key_norms)
    for i in range(LAYERS):
        f = model.branch(stream.read(), i)
        stream.add(add(torch.zeros_like(f), f, i, model))
    return model.head(model.norm(stream.read()))


def test_two_branches_in_one_stack() -> None:
    """The stream and two branches of one read, stacked and summed: a parallel sublayer."""
    model = build(with_add(lambda x, f, i, net: torch.stack([x, 0.5 * f, 0.25 * f.tanh()]).sum(dim=0)))
    rewritten = ac.rewrite(model, CONFIGS["two-blocks"], (inputs(),))
    (chain,) = rewritten.report.chains
    assert (chain.kind, chain.num_sublayers, chain.num_sites) == ("parallel", LAYERS, LAYERS)
    assert ac.compare(model, rewritten, (inputs(),)).max_rel_error <= 1e-12


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ADDS)
def test_adds(name: str, config: str) -> None:
    """Found, equal at zero queries, and the written-out definition at random ones."""
    model = build(with_add(ADDS[name]))
    x = inputs()
    rewritten = ac.rewrite(model, CONFIGS[config], (x,))
    (chain,) = rewritten.report.chains
    assert (chain.kind, chain.num_sublayers, chain.num_sites, chain.hidden_size) == ("prenorm", LAYERS, LAYERS, WIDTH)
    assert ac.compare(model, rewritten, (x,)).max_rel_error <= 1e-12
    with torch.no_grad():
        for site in rewritten.attnres.sites:
            site.query.normal_()
            site.key_norm.uniform_(0.5, 1.5)
        queries, key_norms = zip(*[(site.query, site.key_norm) for site in rewritten.attnres.sites], strict=True)
        expected = reference_output(model, x, 2 if config == "two-blocks" else 1, queries, key_norms, ADDS[name])
        assert (rewritten(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert (model(x) - expected).abs().max() >= 1e-3 * expected.abs().max()  # the queries do matter


@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda x, f, i, net: x + F.dropout(f, 0.0, net.training), id="dropout-of-nothing"),
        pytest.param(lambda x, f, i, net: x + F.dropout(f, 0.5, net.training), id="dropout"),
        pytest.param(lambda x, f, i, net: x + nn.Dropout(0.5)(f), id="nn.Dropout"),
        pytest.param(lambda x, f, i, net: x + drop_path(f, 0.5, net.training), id="drop-path"),
        pytest.param(lambda x, f, i, net: F.dropout(x, 0.0, net.training) + f, id="dropout-of-nothing-on-the-stream"),
    ],
)
def test_dropout_in_training(add: Callable[..., Tensor]) -> None:
    report = assert_same_function(build(with_add(add), training=True), CONFIGS["two-blocks"])
    (chain,) = report.chains
    assert (chain.kind, chain.num_sublayers, chain.num_sites) == ("prenorm", LAYERS, LAYERS)


@pytest.mark.parametrize("config", CONFIGS)
def test_float32_stream_beside_bfloat16_branches(config: str) -> None:
    """The residual stays in float32: sources must not round more than the stream did."""

    class MixedPrecision(Network):
        def layer(self, x: Tensor, i: int) -> Tensor:
            return x + self.mix[i](self.norms[i](x).bfloat16())

    model = MixedPrecision().float()
    model.mix.bfloat16()
    x = inputs().float()
    rewritten = ac.rewrite(model, CONFIGS[config], (x,))
    (chain,) = rewritten.report.chains
    assert (chain.num_sublayers, chain.num_sites) == (LAYERS, LAYERS)
    # float32 rounding of the stream may move a branch by an ulp of bfloat16
    assert ac.compare(model, rewritten, (x,)).max_rel_error <= 2e-3
    sites = list(rewritten.graph.find_nodes(op="call_function", target=torch.ops.attnres.site.default))
    assert {source.meta["example_value"].dtype for site in sites for source in site.args[0]} == {torch.float32}


# -------------------------------------------------------------------------------------------------- other streams


class ReshapedInMidStream(Network):
    """Tokens are flattened after the second layer and unflattened at the end."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(LAYERS):
            x = self.layer(x, i)
            if i == 1:
                x = x.reshape(-1, WIDTH)
        return self.head(self.norm(x.view(BATCH, TOKENS, WIDTH)))


class ReshapedInEveryLayer(Network):
    """As mixture-of-experts layers do: the branch and the stream are ``[tokens, D]`` and back."""

    def layer(self, x: Tensor, i: int) -> Tensor:
        flat = x.view(-1, WIDTH)
        return (flat + self.branch(flat, i)).view(BATCH, TOKENS, WIDTH)


class TransposedStream(Network):
    """Sequence first, turned to batch first in mid-depth."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(0, 1)
        for i in range(LAYERS):
            x = self.layer(x, i)
            if i == 1:
                x = x.transpose(0, 1)
        return self.head(self.norm(x))


class ChannelsFirstStream(Network):
    """``[B, D, T]`` between the layers."""

    def layer(self, x: Tensor, i: int) -> Tensor:
        return x + self.branch(x.transpose(1, 2), i).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        for i in range(LAYERS):
            x = self.layer(x, i)
        return self.head(self.norm(x.transpose(1, 2)))


class ScaledSkip(Network):
    """The stream decays."""

    def layer(self, x: Tensor, i: int) -> Tensor:
        return x * 0.7 + self.branch(x, i)


class LearnedSkip(Network):
    def layer(self, x: Tensor, i: int) -> Tensor:
        return self.gamma[i] * x + self.branch(x, i)


class ScaledEmbedding(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * WIDTH**0.5
        for i in range(LAYERS):
            x = self.layer(x, i)
        return self.head(self.norm(x))


class NormedEmbedding(Network):
    """BLOOM's word embedding norm: the stream begins behind it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[-1](self.embed(x))
        for i in range(LAYERS):
            x = self.layer(x, i)
        return self.head(self.norm(x))


class EmbeddingAndPositions(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        for i in range(LAYERS):
            x = self.layer(x, i)
        return self.head(self.norm(x))


class SlicedInMidDepth(Network):
    """The first token is dropped after the second layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(LAYERS):
            x = self.layer(x, i)
            if i == 1:
                x = x[:, 1:]
        return self.head(self.norm(x))


class LastTokenRead(Network):
    """Only the last token reaches the head."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(LAYERS):
            x = self.layer(x, i)
        return self.head(self.norm(x[:, -1]))


class PositionsInMidDepth(Network):
    """An injection: it joins the increment of the layer before it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        positions = self.positions.expand(BATCH, TOKENS, WIDTH)
        for i in range(LAYERS):
            x = self.layer(x, i)
            if i == 1:
                x = x + positions
        return self.head(self.norm(x))


class BroadcastPositionsInMidDepth(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(LAYERS):
            x = self.layer(x, i)
            if i == 1:
                x = x + self.positions
        return self.head(self.norm(x))


class ParallelOneAfterTheOther(Network):
    """``x + a(n(x)) + m(n(x))``: two adds, one increment."""

    def layer(self, x: Tensor, i: int) -> Tensor:
        normed = self.norms[i](x)
        return x + self.mix[i](normed) + torch.tanh(self.mix[i + LAYERS](normed))


class ParallelWithTwoNorms(Network):
    def layer(self, x: Tensor, i: int) -> Tensor:
        return x + self.branch(x, i) + self.branch(x, i + LAYERS)


class ParallelSummedFirst(Network):
    """``x + (a + m)`` with attention in one branch."""

    def attention(self, x: Tensor, i: int) -> Tensor:
        return F.scaled_dot_product_attention(x, x, self.mix[i](x))

    def layer(self, x: Tensor, i: int) -> Tensor:
        normed = self.norms[i](x)
        return x + (self.attention(normed, i) + torch.tanh(self.mix[i + LAYERS](normed)))


class SharedNorm(Network):
    """One norm module for all layers."""

    def branch(self, x: Tensor, i: int) -> Tensor:
        return torch.tanh(self.mix[i](self.norms[0](x)))


class NormUsedTwice(Network):
    """A branch that reads its norm twice, through two calls."""

    def branch(self, x: Tensor, i: int) -> Tensor:
        return torch.tanh(self.mix[i](self.norms[i](x))) * torch.sigmoid(self.norms[i](x))


class Sandwich(Network):
    """A norm before and after every branch."""

    def layer(self, x: Tensor, i: int) -> Tensor:
        return x + self.norms[i + LAYERS](self.branch(x, i))


class AttentionAndMlp(Network):
    """Two sublayers a layer."""

    def layer(self, x: Tensor, i: int) -> Tensor:
        normed = self.norms[i](x)
        x = x + F.scaled_dot_product_attention(normed, normed, self.mix[i](normed))
        return x + self.branch(x, i + LAYERS)


class StreamReturnedToo(Network):
    """Hidden states are outputs: they keep the plain sum."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.embed(x)
        for i in range(LAYERS):
            x = self.layer(x, i)
        return self.head(self.norm(x)), x


class WithoutFinalNorm(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(LAYERS):
            x = self.layer(x, i)
        return self.head(x)


STREAMS: dict[str, tuple[type[Network], str, int, int]] = {
    "reshaped-in-mid-stream": (ReshapedInMidStream, "prenorm", 4, 4),
    "reshaped-in-every-layer": (ReshapedInEveryLayer, "prenorm", 4, 4),
    "transposed": (TransposedStream, "prenorm", 4, 4),
    "scaled-skip": (ScaledSkip, "prenorm", 4, 4),
    "learned-skip": (LearnedSkip, "prenorm", 4, 4),
    "scaled-embedding": (ScaledEmbedding, "prenorm", 4, 4),
    "normed-embedding": (NormedEmbedding, "prenorm", 4, 4),
    "embedding-and-positions": (EmbeddingAndPositions, "prenorm", 4, 4),
    "sliced-in-mid-depth": (SlicedInMidDepth, "prenorm", 4, 4),
    "last-token-read": (LastTokenRead, "prenorm", 4, 4),
    "positions-in-mid-depth": (PositionsInMidDepth, "prenorm", 4, 4),
    "broadcast-positions-in-mid-depth": (BroadcastPositionsInMidDepth, "prenorm", 4, 4),
    "parallel-one-after-the-other": (ParallelOneAfterTheOther, "parallel", 4, 4),
    "parallel-with-two-norms": (ParallelWithTwoNorms, "parallel", 4, 4),
    "parallel-summed-first": (ParallelSummedFirst, "parallel", 4, 4),
    "shared-norm": (SharedNorm, "prenorm", 4, 4),
    "norm-used-twice": (NormUsedTwice, "prenorm", 4, 4),
    "sandwich": (Sandwich, "sandwich", 4, 4),
    "attention-and-mlp": (AttentionAndMlp, "prenorm", 8, 8),
    "stream-returned-too": (StreamReturnedToo, "prenorm", 4, 4),
    "without-final-norm": (WithoutFinalNorm, "prenorm", 4, 3),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", STREAMS)
def test_streams(name: str, config: str) -> None:
    cls, kind, num_sublayers, num_sites = STREAMS[name]
    report = assert_same_function(build(cls), CONFIGS[config])
    (chain,) = report.chains
    assert (chain.kind, chain.num_sublayers, chain.num_sites) == (kind, num_sublayers, num_sites)
    assert chain.hidden_size == WIDTH


def test_a_channels_first_stream_attends_over_features_or_not_at_all() -> None:
    """The pseudo-query has one entry per feature: a stream whose last dimension is the sequence has none."""
    model = build(ChannelsFirstStream)
    report = ac.detect(model, (inputs(),))
    assert [chain.hidden_size for chain in report.chains] in ([], [WIDTH])
    assert report.chains or report.refusals
    if report.chains:
        assert_same_function(model, CONFIGS["full"])


def test_shared_norm_gives_every_site_a_query_of_its_own() -> None:
    rewritten = ac.rewrite(build(SharedNorm), CONFIGS["full"], (inputs(),))
    assert [site.module for site in rewritten.report.chains[0].sites] == ["norms.0", "norms.0", "norms.0", "norm"]
    assert len({id(site.query) for site in rewritten.attnres.sites}) == 4


def test_parallel_branches_with_two_norms_share_a_site() -> None:
    (chain,) = ac.detect(build(ParallelWithTwoNorms), (inputs(),)).chains
    assert chain.sites[0].modules == ("norms.1", "norms.5")


def test_an_output_keeps_the_plain_sum() -> None:
    model, x = build(StreamReturnedToo), inputs()
    rewritten = ac.rewrite(model, CONFIGS["full"], (x,))
    with torch.no_grad():
        rewritten.attnres.sites[-1].query.normal_()
        logits, stream = rewritten(x)
        expected_logits, expected = model(x)
    assert (stream - expected).abs().max() <= 1e-12
    assert (logits - expected_logits).abs().max() >= 1e-3


# ------------------------------------------------------------------------- operations on the stream, at random queries

# What the stream passes through before layer i: in front of the layer's norm, or on the skip path of its add alone.
BEFORE_THE_NORM: dict[type[Network], Callable[[Tensor, int, Network], Tensor]] = {
    SlicedInMidDepth: lambda source, i, net: source[:, 1:] if i == 2 else source,
    ReshapedInMidStream: lambda source, i, net: source.reshape(-1, WIDTH) if i == 2 else source,
    TransposedStream: lambda source, i, net: source.transpose(0, 1) if i in (0, 2) else source,
}
ON_THE_SKIP: dict[type[Network], Callable[[Tensor, int, Network], Tensor]] = {
    ScaledSkip: lambda source, i, net: source * 0.7,
    LearnedSkip: lambda source, i, net: source * net.gamma[i],
}


@pytest.mark.parametrize("cls", [*BEFORE_THE_NORM, *ON_THE_SKIP])
def test_sources_pass_through_what_the_stream_passes_through(cls: type[Network]) -> None:
    """Full AttnRes by the definition, with every operation on the stream applied to each source."""
    model, x = build(cls), inputs()
    rewritten = ac.rewrite(model, CONFIGS["full"], (x,))
    with torch.no_grad():
        for site in rewritten.attnres.sites:
            site.query.normal_()
        queries = [site.query for site in rewritten.attnres.sites]
        sources = [model.embed(x)]
        for i in range(LAYERS):
            if cls in BEFORE_THE_NORM:
                sources = [BEFORE_THE_NORM[cls](source, i, model) for source in sources]
            f = model.branch(read_of(sources, queries), i)
            if cls in ON_THE_SKIP:
                sources = [ON_THE_SKIP[cls](source, i, model) for source in sources]
            sources.append(f)
        expected = model.head(model.norm(read_of(sources, queries))).reshape(BATCH, -1, 3)
        assert (rewritten(x) - expected).abs().max() <= 1e-12 * expected.abs().max()


def read_of(sources: list[Tensor], queries: list[Tensor]) -> Tensor:
    """The read of n sources, which is that of site n - 2; a single source is read as it is."""
    return attend(sources, queries[len(sources) - 2], None, EPS, "preserve") if len(sources) > 1 else sources[0]


# ----------------------------------------------------------------------------------------------------------- refusals


class WriteThroughView(Network):
    """After the second layer something is written into the stream, through what the subclass says."""

    def write(self, x: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(LAYERS):
            x = self.layer(x, i)
            if i == 1:
                self.write(x)
        return self.head(self.norm(x))


def writing(write: Callable[[Tensor], Any]) -> type[WriteThroughView]:
    class Writing(WriteThroughView):
        def write(self, x: Tensor) -> None:
            write(x)

    return Writing


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "slice-assignment": lambda x: x.__setitem__((slice(None), 0), 0.0),
    "slice-mul": lambda x: x[:, 1:].mul_(2.0),
    "index-mul": lambda x: x[:, 0].mul_(2.0),
    "select-zero": lambda x: x.select(1, 0).zero_(),
    "view-relu": lambda x: x.view(-1, WIDTH).relu_(),
    "transpose-fill": lambda x: x.transpose(1, 2)[0].fill_(0.5),
    "narrow-copy": lambda x: x.narrow(1, 0, 2).copy_(x.narrow(1, 2, 2)),
    "chunk-div": lambda x: x.chunk(2, -1)[0].div_(3.0),
    "unbind-mul": lambda x: x.unbind(1)[2].mul_(2.0),
    "masked-fill": lambda x: x.masked_fill_(x > 0, 0.0),
    "clamp": lambda x: x.clamp_(-1.0, 1.0),
    "relu-inplace": lambda x: F.relu(x, inplace=True),
    "silu-inplace-of-a-slice": lambda x: F.silu(x[:, 0], inplace=True),
    "out-argument": lambda x: torch.mul(x, 2.0, out=x),
    "index_add": lambda x: x.index_add_(1, torch.tensor([0]), torch.ones(BATCH, 1, WIDTH, dtype=x.dtype)),
    "detach-mul": lambda x: x.detach().mul_(2.0),
    "unsqueeze-mul": lambda x: x.unsqueeze(0).mul_(2.0),
    "flatten-mul": lambda x: x.flatten(0, 1).mul_(2.0),
    "diagonal-mul": lambda x: x.diagonal(dim1=1, dim2=2).mul_(2.0),
    "mT-mul": lambda x: x.mT.mul_(2.0),
    "view-as": lambda x: x.view_as(x).mul_(2.0),
    "data-mul": lambda x: x.data.mul_(2.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_overwritten_streams_are_refused(name: str) -> None:
    with torch.no_grad():
        report = ac.detect(build(writing(WRITES[name])), (inputs(),))
    assert report.chains == (), report
    assert [miss.size for miss in report.near_misses()] == [LAYERS]
    assert "overwritten in place" in report.near_misses()[0].reason


def overwriting(overwrite: Callable[[Tensor, Tensor], Tensor]) -> type[Network]:
    class Overwriting(Network):
        def layer(self, x: Tensor, i: int) -> Tensor:
            f = self.branch(x, i)
            y = x + f
            overwrite(x, f)
            return y

    return Overwriting


@pytest.mark.parametrize(
    "overwrite",
    [
        pytest.param(lambda x, f: f.zero_(), id="branch-zeroed"),
        pytest.param(lambda x, f: f[:, 0].zero_(), id="slice-of-the-branch-zeroed"),
    ],
)
def test_sources_that_are_overwritten_after_their_add_are_refused(overwrite: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The stream's values are intact, but a later site would read the branch or the root as it was."""

    with torch.no_grad():
        report = ac.detect(build(overwriting(overwrite)), (inputs(),))
    assert report.chains == (), report
    assert "overwritten in place" in report.near_misses()[0].reason


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "overwrite",
    [
        pytest.param(lambda x, f: f.mul_(2.0), id="branch"),
        pytest.param(lambda x, f: x.mul_(0.5), id="old-stream"),
        pytest.param(lambda x, f: x.add_(f), id="old-stream-add"),
        pytest.param(lambda x, f: f[:, 0].mul_(2.0), id="slice-of-the-branch"),
        pytest.param(lambda x, f: f.view(-1, WIDTH).mul_(2.0), id="view-of-the-branch"),
        pytest.param(lambda x, f: x[:, 0].mul_(2.0), id="slice-of-the-old-stream"),
    ],
)
def test_arithmetic_that_can_be_made_functional_does_not_reach_the_sources(
    overwrite: Callable[[Tensor, Tensor], Tensor], config: str
) -> None:
    with torch.no_grad():
        (chain,) = assert_same_function(build(overwriting(overwrite)), CONFIGS[config]).chains
    assert (chain.num_sublayers, chain.num_sites) == (LAYERS, LAYERS)


class AddThroughView(Network):
    """The branch is added to a flat view, and the stream goes on as it is."""

    def layer(self, x: Tensor, i: int) -> Tensor:
        flat = x.view(-1, WIDTH)
        flat += self.branch(flat, i)
        return x


class ViewAfterAdd(Network):
    """The branch is added to the stream, and a flat view that was made before goes on."""

    def layer(self, x: Tensor, i: int) -> Tensor:
        flat = x.view(-1, WIDTH)
        x += self.branch(x, i)
        return flat.view(BATCH, TOKENS, WIDTH)


class ViewOfViewAfterAdd(Network):
    def layer(self, x: Tensor, i: int) -> Tensor:
        x = x.view(BATCH, TOKENS, WIDTH)
        other = x.view(BATCH, TOKENS, WIDTH)
        y = x.add_(self.branch(x, i))
        return y + 0.5 * self.mix[i](self.norms[i + LAYERS](other))


class AddToAChunk(Network):
    """Half of the features are updated through a view, before each add."""

    def layer(self, x: Tensor, i: int) -> Tensor:
        f = self.branch(x, i)
        f.chunk(2, -1)[0].add_(1.5 * self.gamma[i][: WIDTH // 2])
        return x + f


class AddToHalfTheBatch(Network):
    """A write through ``unbind`` that a later norm of the same stream value must see."""

    def layer(self, x: Tensor, i: int) -> Tensor:
        x = x + self.branch(x, i)
        x.unbind(0)[0].add_(self.gamma[i] * x[1].detach())
        return x


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("cls", [AddThroughView, ViewAfterAdd, ViewOfViewAfterAdd, AddToAChunk, AddToHalfTheBatch])
def test_in_place_adds_on_aliases_are_right_or_refused(cls: type[Network], config: str) -> None:
    model, x = build(cls), inputs()
    with torch.no_grad():
        expected = model(x)
        try:
            rewritten = ac.rewrite(model, CONFIGS[config], (x,))
        except ac.NoResidualChainError as error:
            assert "in place" in str(error) or "in-place" in str(error)
            return
        assert (rewritten(x) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_writes_into_other_tensors_are_no_obstacle() -> None:
    class InPlaceBranch(Network):
        def branch(self, x: Tensor, i: int) -> Tensor:
            hidden = self.mix[i](self.norms[i](x))
            hidden[:, 0] = 0.0
            return hidden.clamp_(-1.0, 1.0).mul_(2.0)

    (chain,) = assert_same_function(build(InPlaceBranch), CONFIGS["two-blocks"]).chains
    assert (chain.num_sublayers, chain.num_sites) == (LAYERS, LAYERS)
