"""What must be found in a network: known from how it was made, by the rules of the README ("What is rewritten")."""

from __future__ import annotations

import dataclasses

from networks import Network
from values import Structure

# A piece of the reason for which a near-miss is refused.
REASONS = {
    "post-norm": "post-norm",
    "reordered": "reordered norm",
    "highway": "gated residual",
    "gated recurrent": "gated residual",
    "raw branches": "",
    "soft sign": "not scale invariant",
    "tanh norm": "not scale invariant",
    "norm over tokens": "another dimension",
    "concatenated": "",
    "detached": "",
    "norm of two": "not scale invariant",
    "no skip": "",
    "overwritten": "overwritten in place",
    "sliced overwrite": "place",
    "global maximum": "another dimension",
    "skip through the norm": "",
    "depth attention": "",
}
LAYER = "a layer, not a model"
# What else is said of a stream of few adds or reads depends on what stands around it.
SHORT = ""


@dataclasses.dataclass(frozen=True)
class ExpectedChain:
    """One stream to rewrite. ``kind`` is None where sublayers are of several kinds; sites are (sublayers before, readers)."""

    kind: str | None
    num_sublayers: int
    sites: tuple[tuple[int, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Expected:
    """Chains in the order in which they begin; the streams that are refused, with a piece of the reason, and the plan of either.

    ``order`` holds the indices of the structures of the chains. ``is_fragile``: a stream is written to in place while views of
    it exist, and may be refused for that, or rewritten as expected.
    """

    chains: tuple[ExpectedChain, ...]
    order: tuple[int, ...]
    refused: tuple[str, ...]
    is_fragile: bool


def expected_of(network: Network, structures: list[Structure]) -> Expected:
    if network.near_miss:
        return Expected((), (), (REASONS[network.near_miss],), False)
    reasons = [refusal(structure) for structure in structures]
    accepted = [i for i, reason in enumerate(reasons) if reason is None]
    # A stream that begins at an input of the model begins before all others.
    accepted.sort(key=lambda i: (not structures[i].is_input, i))
    return Expected(
        tuple(_chain(structures[i]) for i in accepted),
        tuple(accepted),
        tuple(reason for reason in reasons if reason is not None),
        any(structure.is_fragile for structure in structures),
    )


def refusal(structure: Structure) -> str | None:
    """A piece of the reason against a stream, or None."""
    count, raw, normed = len(structure.added), structure.added.count("raw"), structure.added.count("norm")
    if count < 2:
        return SHORT
    if normed <= raw or 2 * (count - raw) < count:
        return "branches read the raw stream"
    if not structure.sites:
        return SHORT
    if structure.is_input and count < 4:
        return LAYER
    return None


def _chain(structure: Structure) -> ExpectedChain:
    kinds = set(structure.kinds)
    kind = kinds.pop() if len(kinds) == 1 and "" not in structure.added else None
    sites = tuple((structure.sublayers_before(adds), tuple(structure.readers(adds))) for adds in structure.sites)
    return ExpectedChain(kind, len(structure.ends), sites)
