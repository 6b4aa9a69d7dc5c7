"""PreNorm blocks that differ in how the residual add, the stream or its layout is written, and in nothing else."""

import functools
from collections.abc import Callable

import torch
from entry import Entry
from models import NanoGPT
from own_parts import PRENORM, WIDTH, Adding, Block, Verdict, entry, gpt
from torch import Tensor, nn
from torch.nn import functional as F


def _in_place(x: Tensor, f: Tensor) -> Tensor:
    x += f
    return x


ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add in place": _in_place,
    "add with alpha": lambda x, f: torch.add(x, f, alpha=0.5),
    "add reversed": lambda x, f: f + x,
    "sub": lambda x, f: x - f,
    "rsub of the negative": lambda x, f: torch.rsub(-f, x),
    "lerp towards the sum": lambda x, f: torch.lerp(x, x + f, 0.5),
    "lerp towards the branch": lambda x, f: torch.lerp(x, f, 0.5),
    "stack and sum": lambda x, f: torch.stack([x, f]).sum(0),
    "builtin sum": lambda x, f: sum([x, f]),
    "stream scaled": lambda x, f: 0.9 * x + f,
    "sum scaled": lambda x, f: (x + f) * 0.7,
    "sum divided by root two": lambda x, f: (x + f) / 2**0.5,
}


class Gated(Block):
    """``addcmul(x, gate, f)``: a gate per feature."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self.gate, self.attention(self.ln_1(x)))
        return torch.addcmul(x, self.gate, self.mlp(self.ln_2(x)))


class Masked(Block):
    """Padding is zeroed after every sublayer."""

    def forward(self, x: Tensor) -> Tensor:
        keep = (torch.arange(x.shape[1]) < 9)[None, :, None].float()
        x = (x + self.attention(self.ln_1(x))) * keep
        return (x + self.mlp(self.ln_2(x))) * keep


class TokensSkipped(Block):
    """Every other token passes a layer by."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = (torch.arange(x.shape[1]) % 2 == 0)[None, :, None]
        x = torch.where(chosen, x + self.attention(self.ln_1(x)), x)
        return torch.where(chosen, x + self.mlp(self.ln_2(x)), x)


class FusedProjection(Block):
    """The residual add is the accumulator of the branch's last matrix product: ``addmm(x, h, w)``."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        up, activation, down = self.mlp
        hidden = activation(up(self.ln_2(x)))
        return torch.addmm(x.flatten(0, 1), hidden.flatten(0, 1), down.weight.t()).view_as(x)


class Float32Stream(Block):
    """The stream stays in float32, the sublayers compute in bfloat16, as trainers with mixed precision do by hand."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.linear(self.ln_1(x).bfloat16(), self.qkv.weight[:WIDTH].bfloat16()).float()
        up, activation, down = self.mlp
        hidden = activation(F.linear(self.ln_2(x).bfloat16(), up.weight.bfloat16()))
        return x + F.linear(hidden, down.weight.bfloat16()).float()


class ParallelShared(Block):
    """GPT-J: both sublayers read one norm, and one sum takes both."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        return x + self.attention(normed) + self.mlp(normed)


class ParallelTwoNorms(Block):
    """GPT-NeoX: both sublayers read the same stream, each through its own norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.attention(self.ln_1(x)) + self.mlp(self.ln_2(x)))


class Sandwich(Block):
    """Gemma 2: a norm before each sublayer and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.post_1, self.post_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.post_1(self.attention(self.ln_1(x)))
        return x + self.post_2(self.mlp(self.ln_2(x)))


class ScaledEmbedding(NanoGPT):
    """The embeddings are scaled and normalised, so the stream begins at a norm."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__(tied=tied)
        self.embedding_norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding_norm(self.tokens(ids) * WIDTH**0.5)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class StraightThrough(NanoGPT):
    """The embeddings are rounded, with the gradient of what they were: a sum, but no sublayer."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = x + (x.round() - x).detach()
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class SequenceFirst(NanoGPT):
    """The stream lies ``[T, B, D]``."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids).transpose(0, 1)
        for block in self.blocks:
            x = x + block.attention(block.ln_1(x).transpose(0, 1)).transpose(0, 1)
            x = x + block.mlp(block.ln_2(x))
        return self.head(self.norm(x)).transpose(0, 1)


class NoFinalNorm(NanoGPT):
    """The head reads the raw stream."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


SHELLS: dict[str, type[NanoGPT]] = {
    "embeddings scaled and normed": ScaledEmbedding,
    "embeddings rounded straight through": StraightThrough,
    "sequence first": SequenceFirst,
    "no final norm": NoFinalNorm,
}
BLOCKS: dict[str, type[Block]] = {
    "addcmul with a gate": Gated,
    "stream masked": Masked,
    "tokens skipped": TokensSkipped,
    "addmm onto the stream": FusedProjection,
    "float32 stream, bfloat16 sublayers": Float32Stream,
    "parallel, shared norm": ParallelShared,
    "parallel, two norms": ParallelTwoNorms,
    "sandwich": Sandwich,
}
EXPECTED: dict[str, Verdict] = {
    **dict.fromkeys((*ADDS, *SHELLS, *BLOCKS), PRENORM),
    "parallel, shared norm": (("parallel", 4, 4),),
    "parallel, two norms": (("parallel", 4, 4),),
    "sandwich": (("sandwich", 8, 8),),
    "no final norm": (("prenorm", 8, 7),),
}


def entries() -> list[Entry]:
    return [
        *(entry(name, functools.partial(gpt, functools.partial(Adding, add))) for name, add in ADDS.items()),
        *(entry(name, functools.partial(gpt, block)) for name, block in BLOCKS.items()),
        *(entry(name, functools.partial(gpt, Block, shell)) for name, shell in SHELLS.items()),
    ]
