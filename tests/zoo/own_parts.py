"""What the models written for the zoo share: a shell around blocks, sublayers, and how a case is made of a model."""

from collections.abc import Callable
from typing import Any

import torch
from entry import Case, Entry
from models import VOCABULARY, NanoGPT, NanoGPTBlock, randomise
from torch import Tensor, nn

GROUP = "written here"
WIDTH = 32
LAYERS = 4
SUBLAYERS = 2 * LAYERS  # attention and MLP count separately

# What a chain is expected to be: kind, sublayers, sites.
Chain = tuple[str, int, int]
# The chains that should be rewritten, or a word that the reason of a refusal must contain ("" is in every reason).
Verdict = tuple[Chain, ...] | str

PRENORM: Verdict = (("prenorm", SUBLAYERS, SUBLAYERS),)


def case(model: nn.Module, *args: Any, **kwargs: Any) -> Case:
    return Case(randomise(model, seed=0).eval(), args, kwargs)


def entry(name: str, build: Callable[[], Case]) -> Entry:
    return Entry(name, GROUP, build)


def token_ids(seed: int = 1, length: int = 11) -> Tensor:
    """Ids ``[2, length]``."""
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gpt(make_block: Callable[[], nn.Module], shell: type[NanoGPT] = NanoGPT) -> Case:
    """A GPT of the given blocks ``[B, T, D]`` to ``[B, T, D]``, on ids."""
    model = shell(tied=False)
    model.blocks = nn.ModuleList([make_block() for _ in range(LAYERS)])
    return case(model, token_ids())


class Block(NanoGPTBlock):
    """The block whose sublayers the models here arrange differently; its own order is PreNorm."""

    def __init__(self, hidden_size: int = WIDTH) -> None:
        super().__init__(hidden_size, num_heads=4)


class Adding(Block):
    """A PreNorm block that combines stream and branch by the given function."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, self.attention(self.ln_1(x)))
        return self.add(x, self.mlp(self.ln_2(x)))
