"""Whole architectures in plain torch, written for the zoo. ``EXPECTED`` is derived from the architecture, by hand."""

import functools

import own_refusals
import own_spellings
import torch
from entry import Case, Entry
from models import VOCABULARY, NanoGPT, example_inputs, tiny
from own_parts import LAYERS, PRENORM, WIDTH, Block, Verdict, case, entry, gpt, normal, token_ids
from torch import Tensor, nn
from torch.nn import functional as F


class DiTBlock(Block):
    """adaLN-zero: norms without weights, shifted and scaled by the condition ``[B, D]``, which also gates the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = self.ln_2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate_1 * self.attention(self.ln_1(x) * (1 + scale_1) + shift_1)
        return x + gate_2 * self.mlp(self.ln_2(x) * (1 + scale_2) + shift_2)


class DiT(nn.Module):
    """Noisy images ``[B, 3, 16, 16]``, times and labels ``[B]`` to patches ``[B, 16, 48]``."""

    def __init__(self) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)
        self.positions = nn.Parameter(torch.zeros(1, 16, WIDTH))
        self.time = nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.labels = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList([DiTBlock() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.head = nn.Linear(WIDTH, 48)

    def forward(self, images: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        angles = times[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        condition = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1)) + self.labels(labels)
        x = self.patchify(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class DropPath(nn.Module):
    """Leaves whole branches out in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(x.shape[0], 1, 1).bernoulli_(0.9).div_(0.9) if self.training else x


class ViTBlock(Block):
    """Branches scaled per feature (LayerScale) and left out at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attention(self.ln_1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.ln_2(x)))


class ViT(nn.Module):
    """Images ``[B, 3, 16, 16]`` to 7 classes, read off the CLS token."""

    def __init__(self, hidden_size: int = WIDTH) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(3, hidden_size, kernel_size=4, stride=4)
        self.cls = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.positions = nn.Parameter(torch.zeros(1, 17, hidden_size))
        self.blocks = nn.ModuleList([ViTBlock() if hidden_size == WIDTH else Block(hidden_size) for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, 7)

    def features(self, images: Tensor) -> Tensor:
        patches = self.patchify(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(images.shape[0], -1, -1), patches], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images)[:, 0])


class ConvolvedPositions(nn.Module):
    """Positions by a residual convolution on the stream as an image (CPVT), before the given block; the rest is a ViT."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before = before
        self.patchify = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)
        self.positions = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patchify(images)
        size = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            if i == self.before:
                image = x.transpose(1, 2).unflatten(2, size)
                x = (image + self.positions(image)).flatten(2).transpose(1, 2)
            x = block(x)
        return self.norm(x)


class VisionAndText(nn.Module):
    """A vision encoder of width 48 whose projected patches stand before the text in a decoder of width 32."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = ViT(48)
        self.project = nn.Linear(48, WIDTH)
        self.text = NanoGPT(tied=False)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        x = torch.cat([self.project(self.vision.features(images)), self.text.tokens(ids)], dim=1)
        for block in self.text.blocks:
            x = block(x)
        return self.text.head(self.text.norm(x))


class EncoderDecoder(nn.Module):
    """torch's own PreNorm encoder, and a decoder with three sublayers per layer that attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        options = {"dim_feedforward": 64, "dropout": 0.0, "batch_first": True, "norm_first": True}
        encoder, decoder = nn.TransformerEncoderLayer(WIDTH, 4, **options), nn.TransformerDecoderLayer(WIDTH, 4, **options)
        self.encoder = nn.TransformerEncoder(encoder, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, LAYERS, nn.LayerNorm(WIDTH))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder(self.tokens(source))
        return self.decoder(self.tokens(target), memory)


class DecoderOnMemory(nn.Module):
    """torch's own PreNorm decoder on a memory ``[B, S, D]`` from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, 4, dim_feedforward=64, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, LAYERS, nn.LayerNorm(WIDTH))

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        return self.decoder(self.tokens(ids), memory)


class MoEBlock(Block):
    """Four routed experts and a shared one, all on ``[tokens, D]``; the residual add is done there too."""

    def __init__(self, routes_raw: bool = False) -> None:
        super().__init__()
        self.routes_raw = routes_raw
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        tokens = x.view(-1, WIDTH)
        normed = self.ln_2(tokens)
        weights = F.softmax(self.router(tokens if self.routes_raw else normed), dim=-1)
        top, chosen = weights.topk(2, dim=-1)
        weights = torch.zeros_like(weights).scatter(1, chosen, top)
        routed = torch.stack([expert(normed) for expert in self.experts], dim=1)
        mixed = (weights.unsqueeze(-1) * routed).sum(1) + F.gelu(self.shared(normed))
        return (tokens + mixed).view(x.shape)


class ScatteringMoEBlock(Block):
    """Two experts take every other token each and write what they give into zeros, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        normed = self.ln_2(x).flatten(0, 1)
        mixed = torch.zeros_like(normed)
        for i, expert in enumerate(self.experts):
            chosen = torch.arange(i, normed.shape[0], 2)
            mixed.index_add_(0, chosen, expert(normed[chosen]))
        return x + mixed.view_as(x)


class FirstStreamReader(Block):
    """Values also come from the stream behind the first layer, through a norm of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_first = nn.LayerNorm(WIDTH)

    def with_first(self, x: Tensor, first: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x) + self.ln_first(first))
        return x + self.mlp(self.ln_2(x))


class ValueResidual(NanoGPT):
    """Every layer but the first also reads the first layer's output."""

    def forward(self, ids: Tensor) -> Tensor:
        x = first = self.blocks[0](self.tokens(ids))
        for block in self.blocks[1:]:
            x = block.with_first(x, first)
        return self.head(self.norm(x))


class LongSkips(NanoGPT):
    """The upper half adds the lower half's streams again: whatever they hold counts twice from there on."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        skips = []
        for block in self.blocks[:2]:
            x = block(x)
            skips.append(x)
        for block in self.blocks[2:]:
            x = block(x + skips.pop())
        return self.head(self.norm(x))


class Looped(NanoGPT):
    """A universal transformer: one layer, four times."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for _ in range(LAYERS):
            x = self.blocks[0](x)
        return self.head(self.norm(x))


def _reused(name: str) -> Case:
    args, kwargs = example_inputs(name)
    return Case(tiny(name), args, kwargs)


def _images() -> Tensor:
    return normal(2, 3, 16, 16)


EXPECTED: dict[str, Verdict] = {
    **own_spellings.EXPECTED,
    **own_refusals.EXPECTED,
    **dict.fromkeys(
        (
            "nanoGPT",
            "torch encoder",
            "DiT",
            "ViT",
            "MoE",
            "MoE written in place",
            "MoE routed by the raw stream",
            "value residual",
            "long skips",
        ),
        PRENORM,
    ),
    "looped": PRENORM,
    "torch decoder": (("prenorm", 12, 12),),  # self-attention, cross-attention, MLP
    "torch encoder-decoder": (("prenorm", 8, 8), ("prenorm", 12, 12)),
    # The convolution is a ninth sublayer, which reads the raw stream: the root, or a value behind an MLP that nobody else reads.
    "positions by convolution, first": (("prenorm", 9, 9),),
    "positions by convolution, mid-depth": (("prenorm", 9, 8),),
    "vision and text": (("prenorm", 8, 8), ("prenorm", 8, 8)),
}


def entries() -> list[Entry]:
    return [
        entry("nanoGPT", lambda: _reused("nanogpt")),
        entry("torch encoder", lambda: _reused("encoder")),
        entry("torch decoder", lambda: case(DecoderOnMemory(), token_ids(), normal(2, 7, WIDTH))),
        entry("torch encoder-decoder", lambda: case(EncoderDecoder(), token_ids(), token_ids(2, 7))),
        entry("DiT", lambda: case(DiT(), _images(), torch.tensor([3.0, 50.0]), torch.tensor([1, 4]))),
        entry("ViT", lambda: case(ViT(), _images())),
        entry("vision and text", lambda: case(VisionAndText(), _images(), token_ids())),
        entry("positions by convolution, first", lambda: case(ConvolvedPositions(0), normal(2, 3, 16, 24))),
        entry("positions by convolution, mid-depth", lambda: case(ConvolvedPositions(1), normal(2, 3, 16, 24))),
        entry("MoE", lambda: gpt(MoEBlock)),
        entry("MoE written in place", lambda: gpt(ScatteringMoEBlock)),
        entry("MoE routed by the raw stream", lambda: gpt(functools.partial(MoEBlock, routes_raw=True))),
        entry("value residual", lambda: gpt(FirstStreamReader, ValueResidual)),
        entry("long skips", lambda: gpt(Block, LongSkips)),
        entry("looped", lambda: gpt(Block, Looped)),
        *own_spellings.entries(),
        *own_refusals.entries(),
    ]
