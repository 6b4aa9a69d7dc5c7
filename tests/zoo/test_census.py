"""The census counts norms without looking at what detection found, so that it notices a site that detection missed."""

import dataclasses
from typing import Any

import pytest
import torch
from census import BRANCH, FIRST, INSIDE, MISSED, RAW, SITE, census_of
from models import NanoGPT, NanoGPTBlock, randomise
from torch import Tensor, nn

import attnres_compile as ac
from attnres_compile.capture import capture
from attnres_compile.passes.base import Program, run_passes
from attnres_compile.passes.pipeline import DETECTION

LAYERS, WIDTH = 4, 32


class Sandwich(NanoGPTBlock):
    """A norm before each sublayer and one behind it, and one on what the MLP has in the middle, as wide as the stream."""

    def __init__(self) -> None:
        super().__init__(WIDTH, num_heads=4)
        self.post_1, self.post_2, self.inner_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.post_1(self.attention(self.ln_1(x)))
        return x + self.post_2(self.mlp[2](self.mlp[0](self.inner_norm(self.ln_2(x)).tanh()).relu()))


class OneRawReader(NanoGPT):
    """The last layer's first norm has an eps too large for a norm: it keeps the plain sum."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[-1].ln_1 = nn.LayerNorm(WIDTH, eps=1.0)


def detected(model: nn.Module) -> Program:
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    captured = capture(randomise(model, seed=0).eval(), (ids,), {})
    program = run_passes(Program(captured.graph_module, ac.AttnResConfig(), captured.parameters), DETECTION)
    assert len(program.chains) == 1
    return program


def sandwich() -> NanoGPT:
    model = NanoGPT()
    model.blocks = nn.ModuleList([Sandwich() for _ in range(LAYERS)])
    return model


def without_read(program: Program, removed: int) -> Program:
    (chain,) = program.chains
    reads = tuple(read for i, read in enumerate(chain.reads) if i != removed)
    return dataclasses.replace(program, chains=(dataclasses.replace(chain, reads=reads),))


def test_a_nanogpt() -> None:
    """Two norms per layer and a final one; the first reads the embeddings."""
    assert census_of(detected(NanoGPT())) == {
        SITE: {"blocks.*.ln_*": 2 * LAYERS - 1, "norm": 1},
        FIRST: {"blocks.*.ln_*": 1},
    }


def test_a_sandwich() -> None:
    assert census_of(detected(sandwich())) == {
        SITE: {"blocks.*.ln_*": 2 * LAYERS - 1, "norm": 1},
        FIRST: {"blocks.*.ln_*": 1},
        BRANCH: {"blocks.*.post_*": 2 * LAYERS},
        INSIDE: {"blocks.*.inner_norm": LAYERS},
    }


def test_a_refused_read_is_no_missed_site() -> None:
    assert census_of(detected(OneRawReader())) == {
        SITE: {"blocks.*.ln_*": 2 * LAYERS - 2, "norm": 1},
        RAW: {"blocks.*.ln_*": 1},
        FIRST: {"blocks.*.ln_*": 1},
    }


@pytest.mark.parametrize(
    ("removed", "missed", "sites"),
    [
        pytest.param(1, {"blocks.*.ln_*": 1}, {"blocks.*.ln_*": 2 * LAYERS - 2, "norm": 1}, id="first-site"),
        pytest.param(4, {"blocks.*.ln_*": 1}, {"blocks.*.ln_*": 2 * LAYERS - 2, "norm": 1}, id="mid-depth"),
        pytest.param(2 * LAYERS, {"norm": 1}, {"blocks.*.ln_*": 2 * LAYERS - 1}, id="final-norm"),
    ],
)
@pytest.mark.parametrize("make", [NanoGPT, sandwich])
def test_a_read_that_is_not_found_is_missed(make: Any, removed: int, missed: dict[str, int], sites: dict[str, int]) -> None:
    program = detected(make())
    found = census_of(without_read(program, removed))
    assert (found[MISSED], found[SITE]) == (missed, sites)
    assert {place: found[place] for place in found if place not in (MISSED, SITE)} == {
        place: count for place, count in census_of(program).items() if place != SITE
    }


def test_the_first_read_is_no_site_even_where_it_is_not_found() -> None:
    program = detected(NanoGPT())
    assert census_of(without_read(program, 0)) == census_of(program)


def test_without_chains_there_is_nothing_to_count() -> None:
    assert census_of(dataclasses.replace(detected(NanoGPT()), chains=())) == {}
