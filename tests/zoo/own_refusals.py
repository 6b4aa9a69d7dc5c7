"""Models whose stream must not be rewritten, and the word that says why."""

import functools

import torch
from entry import Case, Entry
from models import NanoGPT, NanoGPTBlock
from own_parts import WIDTH, Block, Verdict, case, entry, gpt, normal, token_ids
from torch import Tensor, nn


class PostNorm(Block):
    """BERT: a norm behind each residual add."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_1(x + self.attention(x))
        return self.ln_2(x + self.mlp(x))


class Reordered(Block):
    """OLMo 2: sublayers read the raw stream, and a norm takes what they give."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ln_1(self.attention(x))
        return x + self.ln_2(self.mlp(x))


class GatedByGRU(Block):
    """GTrXL: a recurrent cell combines stream and branch, not a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_1, self.gate_2 = nn.GRUCell(WIDTH, WIDTH), nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate_1(self.attention(self.ln_1(x)).flatten(0, 1), x.flatten(0, 1)).view_as(x)
        return self.gate_2(self.mlp(self.ln_2(x)).flatten(0, 1), x.flatten(0, 1)).view_as(x)


class Highway(Block):
    """A learned gate per token weighs the stream against the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for sublayer, norm in ((self.attention, self.ln_1), (self.mlp, self.ln_2)):
            gate = self.gate(x).sigmoid()
            x = gate * sublayer(norm(x)) + (1 - gate) * x
        return x


class WrittenThroughView(Block):
    """The first token of the stream is scaled through a view after every residual add."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        x[:, 0].mul_(0.5)
        x = x + self.mlp(self.ln_2(x))
        x[:, 0].mul_(0.5)
        return x


class CloneWritten(Block):
    """Features are added to the first tokens of a copy of the stream, which goes on as the stream (as in DeepStack)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.zeros(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x).clone()
        x[:, :3] = x[:, :3] + self.features
        return x


class Conditional(Block):
    """A whole layer runs inside ``torch.cond``, which hides the residual adds."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.mean() > -100, lambda y: NanoGPTBlock.forward(self, y), lambda y: y.clone(), (x,))


class RawReader(Block):
    """No norm at all: sublayers read the raw stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class TanhNorm(nn.Module):
    """Dynamic tanh in the place of a norm: it is not scale invariant."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight


class Squashed(Block):
    """PreNorm in all but the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = self.ln_2 = TanhNorm()  # type: ignore[assignment]


class HyperConnections(NanoGPT):
    """Four streams, mixed by a learned matrix at every sublayer; each sublayer reads and feeds all of them."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__(tied=tied)
        self.read = nn.Parameter(torch.zeros(8, 4))
        self.mix = nn.Parameter(torch.zeros(8, 4, 4))
        self.feed = nn.Parameter(torch.zeros(8, 4))

    def forward(self, ids: Tensor) -> Tensor:
        streams = self.tokens(ids).unsqueeze(2).expand(-1, -1, 4, -1)
        for layer, block in enumerate(self.blocks):
            for half, (norm, sublayer) in enumerate(((block.ln_1, block.attention), (block.ln_2, block.mlp))):
                i = 2 * layer + half
                branch = sublayer(norm(torch.einsum("s,btsd->btd", self.read[i], streams)))
                mixed = torch.einsum("rs,btsd->btrd", self.mix[i], streams)
                streams = mixed + self.feed[i][:, None] * branch.unsqueeze(2)
        return self.head(self.norm(streams.sum(2)))


class DepthAttention(NanoGPT):
    """Attention Residuals written by hand: every read is a softmax over all sources; nothing is added up."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__(tied=tied)
        self.queries = nn.Parameter(torch.zeros(9, WIDTH))
        self.key_norm = nn.RMSNorm(WIDTH)

    def mix(self, sources: list[Tensor], query: Tensor) -> Tensor:
        values = torch.stack(sources)
        weights = torch.einsum("d,sbtd->sbt", query, self.key_norm(values)).softmax(0)
        return torch.einsum("sbt,sbtd->btd", weights, values)

    def forward(self, ids: Tensor) -> Tensor:
        sources = [self.tokens(ids)]
        for i, block in enumerate(self.blocks):
            sources.append(block.attention(block.ln_1(self.mix(sources, self.queries[2 * i]))))
            sources.append(block.mlp(block.ln_2(self.mix(sources, self.queries[2 * i + 1]))))
        return self.head(self.norm(self.mix(sources, self.queries[8])))


class BlockDepthAttention(DepthAttention):
    """The same over sums of two sublayers: within a block there are residual adds, but reads go through a softmax."""

    def forward(self, ids: Tensor) -> Tensor:
        complete = [self.tokens(ids)]
        for i, block in enumerate(self.blocks):
            partial = block.attention(block.ln_1(self.mix(complete, self.queries[2 * i])))
            partial = partial + block.mlp(block.ln_2(self.mix([*complete, partial], self.queries[2 * i + 1])))
            complete.append(partial)
        return self.head(self.norm(self.mix(complete, self.queries[8])))


class UViT(NanoGPT):
    """The upper half concatenates the lower half's streams and projects back: the stream is cut at every projection."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__(tied=tied)
        self.merge = nn.ModuleList([nn.Linear(2 * WIDTH, WIDTH) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        skips = []
        for block in self.blocks[:2]:
            x = block(x)
            skips.append(x)
        for block, merge in zip(self.blocks[2:], self.merge, strict=True):
            x = block(merge(torch.cat([x, skips.pop()], dim=-1)))
        return self.head(self.norm(x))


class ChannelsFirst(nn.Module):
    """A convolutional stream ``[B, D, T]`` whose norms transpose: features are not its last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, WIDTH, 1)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(9)])
        self.convolutions = nn.ModuleList([nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(8)])

    def forward(self, signal: Tensor) -> Tensor:
        x = self.stem(signal)
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            x = x + convolution(norm(x.transpose(1, 2)).transpose(1, 2)).relu()
        return self.norms[-1](x.transpose(1, 2))


class GroupNormed(nn.Module):
    """A ResNet ``[B, D, H, W]`` with norms in front: they normalise groups of channels over all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 1)
        self.norms = nn.ModuleList([nn.GroupNorm(4, WIDTH) for _ in range(8)])
        self.convolutions = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(8)])

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = x + convolution(norm(x).relu())
        return x.mean((2, 3))


def _torch_post_norm() -> Case:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, dim_feedforward=64, dropout=0.0, batch_first=True)
    return case(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), normal(2, 11, WIDTH))


BLOCKS: dict[str, tuple[type[Block], str]] = {
    "post-norm": (PostNorm, "post-norm"),
    "reordered norm": (Reordered, "reordered"),
    "GRU gate on the stream": (GatedByGRU, ""),
    "highway gate on the stream": (Highway, ""),
    "stream written through a view": (WrittenThroughView, "overwritten in place"),
    "stream's clone written": (CloneWritten, "overwritten in place"),
    "layers inside torch.cond": (Conditional, "cond"),
    "no norms": (RawReader, "norm"),
    "dynamic tanh": (Squashed, "scale invariant"),
}
SHELLS: dict[str, tuple[type[NanoGPT], str]] = {
    "hyper-connections": (HyperConnections, ""),
    "depth attention, full": (DepthAttention, ""),
    "depth attention, block": (BlockDepthAttention, ""),
    "U-ViT": (UViT, "fragmented"),
}
EXPECTED: dict[str, Verdict] = {
    **{name: reason for name, (_, reason) in {**BLOCKS, **SHELLS}.items()},
    "torch encoder, post-norm": "post-norm",
    "channels first": "another dimension",
    "GroupNorm over pixels": "another dimension",
    "a layer alone": "a layer, not a model",
}


def entries() -> list[Entry]:
    return [
        *(entry(name, functools.partial(gpt, block)) for name, (block, _) in BLOCKS.items()),
        *(entry(name, functools.partial(_whole, shell)) for name, (shell, _) in SHELLS.items()),
        entry("torch encoder, post-norm", _torch_post_norm),
        entry("channels first", lambda: case(ChannelsFirst(), normal(2, 3, 11))),
        entry("GroupNorm over pixels", lambda: case(GroupNormed(), normal(2, 3, 8, 12))),
        entry("a layer alone", lambda: case(Block(), normal(2, 11, WIDTH))),
    ]


def _whole(shell: type[NanoGPT]) -> Case:
    return case(shell(), token_ids())
