"""Random networks that were rewritten otherwise than by the definition, as small as they get."""

from __future__ import annotations

import pytest
from check import check
from networks import Branch, Injection, Network, Norm, Options, Sublayer, Tower, Transform

NORM = Norm("rms by pow", 0.001)
BRANCH = Branch("mlp", NORM)
PLAIN = Sublayer((BRANCH,), "x + b")
TRANSPOSED = Sublayer((Branch("tokens", NORM), Branch("tokens", None)), "add on transposed")
RECIPES = {
    # A condition was taken for the root of the stream, and the embedding for a part of the first sublayer: the stream had taken
    # up what was computed from the condition, and then the condition itself.
    "a condition in two forms": (PLAIN, Injection("projected"), Injection("side"), PLAIN, PLAIN, PLAIN),
    "a condition in two forms, a sublayer between them": (PLAIN, Injection("projected"), PLAIN, Injection("side"), PLAIN, PLAIN),
    # Sources were scaled before they were attended to, so that eps was another: the read was sought behind the scaling, where
    # it is only the layout that has to be sought.
    "scaled in another layout than that of the adds": (TRANSPOSED, Transform("scale"), PLAIN),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_rewritten_by_the_definition(name: str) -> None:
    network = Network((Tower("ids and positions", RECIPES[name], "raw", NORM),), (2, 7, 12), seed=10847)
    outcome = check(network, Options(None, "preserve", key_norm=False, eps=1e-3), thorough=False)
    assert outcome.kind == "converted"
    assert outcome.sites >= 1
