"""Hypothesis strategies that draw recipes of networks, and options to convert them with."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st
from networks import (
    ADDS,
    BRANCHES,
    EMBEDDINGS,
    GATES,
    HEADS,
    IN_PLACE_ADDS,
    IN_PLACE_TRANSFORMS,
    MAYBE_VIEWS,
    NEAR_MISSES,
    NORMS,
    RANK_THREE_ADDS,
    READERS,
    TOKENWISE,
    TRANSFORMS,
    WILD,
    Branch,
    Cut,
    Injection,
    LongSkip,
    Network,
    Norm,
    Options,
    Reader,
    Remember,
    Step,
    Sublayer,
    Tower,
    Transform,
)

norms = st.builds(Norm, st.sampled_from(NORMS), st.sampled_from((1e-5, 1e-6, 1e-8, 1e-3)), st.booleans())


_injections = st.builds(Injection, st.sampled_from(("side", "positions", "projected")))


def _branches(tokenwise: bool, first: bool) -> st.SearchStrategy[Branch]:
    kinds = st.sampled_from(TOKENWISE if tokenwise else BRANCHES)
    behind = st.one_of(st.none(), st.none(), st.none(), norms)
    return st.builds(Branch, kinds, norms if first else st.one_of(st.none(), norms), st.sampled_from(GATES), behind)


def _sublayers(tokenwise: bool) -> st.SearchStrategy[Sublayer]:
    adds = tuple(add for add in ADDS if add not in RANK_THREE_ADDS) if tokenwise else ADDS
    one = st.tuples(_branches(tokenwise, True))
    two = st.tuples(_branches(tokenwise, True), _branches(tokenwise, False))
    guards = st.sampled_from(("", "", "", "", "shape", "flag", "autocast"))
    usual = st.sampled_from(adds) | st.just("x + b")
    return st.builds(Sublayer, st.one_of(one, one, two), usual, st.booleans(), guards)


def _others() -> st.SearchStrategy[Step]:
    return st.one_of(
        st.builds(Transform, st.sampled_from(TRANSFORMS)),
        st.builds(Reader, st.sampled_from(READERS), norms),
        _injections,
        st.just(Remember()),
        st.just(LongSkip()),
        st.builds(Cut, st.sampled_from(("norm", "linear", "detach"))),
    )


@st.composite
def _steps(draw: st.DrawFn, tokenwise: bool, least: int, most: int) -> tuple[Step, ...]:
    """Sublayers with other steps between them, at the most one cut among them, and few branches that read the raw stream."""
    count = draw(st.integers(least, most))
    sublayers = [draw(_sublayers(tokenwise)) for _ in range(count)]
    if count >= 4 and draw(st.integers(0, 5)) == 0:
        raw = draw(st.integers(0, count - 1))
        sublayers[raw] = dataclasses.replace(sublayers[raw], raw=True, branches=sublayers[raw].branches[:1])
    steps: list[Step] = []
    remembered = 0
    cuts = 0
    extras = draw(st.integers(0, 4))
    for sublayer in sublayers:
        while extras and draw(st.booleans()):
            extras -= 1
            step = draw(_others())
            if isinstance(step, LongSkip):
                if not remembered:
                    continue
                remembered -= 1
            remembered += isinstance(step, Remember)
            if isinstance(step, Cut):
                cuts += 1
                if cuts > 1:
                    continue
                remembered = 0
            steps.append(step)
        steps.append(sublayer)
    if draw(st.integers(0, 3)) == 0:
        steps.append(draw(st.builds(Reader, st.sampled_from(READERS), norms) | _injections))
    return tuple(steps)


@st.composite
def _towers(draw: st.DrawFn, rank: int, most: int, least: int = 1) -> Tower:
    steps = draw(_steps(rank != 3, least, most))
    embeddings = EMBEDDINGS if rank == 3 else tuple(e for e in EMBEDDINGS if "cls" not in e and e != "latents")
    heads = HEADS if rank == 3 else ("norm and linear", "norm", "raw", "raw linear", "sum normed")
    has_cut = any(isinstance(step, Cut) for step in steps)
    repeat = 1 if has_cut else draw(st.sampled_from((1, 1, 1, 1, 1, 2, 3)))
    return Tower(draw(st.sampled_from(embeddings)), steps, draw(st.sampled_from(heads)), draw(norms), repeat)


def _wild(step: Step) -> st.SearchStrategy[Step]:
    if not isinstance(step, Sublayer):
        return st.just(step)
    simple = dataclasses.replace(step, branches=(dataclasses.replace(step.branches[0], kind="mlp"),))
    return st.one_of(st.just(step), st.sampled_from(WILD).map(lambda wild: dataclasses.replace(simple, wild=wild)))


def _possible(towers: tuple[Tower, ...]) -> tuple[Tower, ...]:
    """The towers without what eager PyTorch forbids, and without what is a view or a copy as strides have it, if it matters."""
    found = []
    for i, tower in enumerate(towers):
        if i + 1 < len(towers) and tower.head in ("pooled norm", "norm pooled", "token norm"):
            tower = dataclasses.replace(tower, head="norm")
        if any(_is_in_place(step) for step in tower.steps):
            borrowed = tower.embedding in ("input", "latents")  # not the model's own memory
            tower = dataclasses.replace(tower, steps=tuple(_without(step, borrowed) for step in tower.steps))
        found.append(tower)
    return tuple(found)


def _is_in_place(step: Step) -> bool:
    if isinstance(step, Sublayer):
        return step.add in IN_PLACE_ADDS
    return isinstance(step, Transform) and step.kind in IN_PLACE_TRANSFORMS


def _without(step: Step, borrowed: bool) -> Step:
    if isinstance(step, Transform) and step.kind in MAYBE_VIEWS:
        return Transform("clone")
    if borrowed and isinstance(step, Sublayer) and step.add in IN_PLACE_ADDS:
        return dataclasses.replace(step, add="x + b")
    if borrowed and isinstance(step, Transform) and step.kind in IN_PLACE_TRANSFORMS:
        return Transform(step.kind.removesuffix(" in place"))
    return step


@st.composite
def networks(draw: st.DrawFn, near_misses: bool = True) -> Network:
    """Any network; about one in six is a near-miss."""
    width = draw(st.sampled_from((4, 8, 3, 5, 12)))
    rank = draw(st.sampled_from((3, 3, 3, 3, 3, 2, 4)))
    shape = {2: (5, width), 3: (2, draw(st.sampled_from((4, 5, 7))), width), 4: (2, 2, 3, width)}[rank]
    near_miss = ""
    if near_misses and draw(st.integers(0, 5)) == 5:
        near_miss = draw(st.sampled_from(NEAR_MISSES))
        shape = (2, 5, width)
    two = rank == 3 and not near_miss and draw(st.integers(0, 5)) == 5
    deep = not near_miss and not two and draw(st.integers(0, 19)) == 19
    if near_miss:
        norm = draw(norms)
        simple = st.builds(Sublayer, st.tuples(st.builds(Branch, st.sampled_from(("linear", "mlp", "attention")), norms)),
                           st.just("x + b"))  # fmt: skip
        steps = tuple(draw(st.lists(simple, min_size=3, max_size=6)))
        towers: tuple[Tower, ...] = (Tower(draw(st.sampled_from(("ids", "patches"))), steps, "norm and linear", norm),)
    else:
        most = 40 if deep else 6
        towers = tuple(draw(_towers(len(shape), 4 if two else most, 12 if deep else 1)) for _ in range(2 if two else 1))
        if rank == 3 and not two and draw(st.integers(0, 4)) == 4:
            towers = (dataclasses.replace(towers[0], steps=tuple(draw(_wild(step)) for step in towers[0].steps)),)
    return Network(
        _possible(towers),
        shape,
        blocks=draw(st.booleans()),
        shared_norm=draw(st.integers(0, 7)) == 7,
        training=draw(st.integers(0, 3)) == 3,
        near_miss=near_miss,
        is_dynamic=draw(st.integers(0, 2)) == 2,
        checkpointed=draw(st.integers(0, 7)) == 7,
        seed=draw(st.integers(0, 2**16)),
    )


options = st.builds(
    Options,
    st.sampled_from((None, 1, 2, 3, 4, 100)),
    st.sampled_from(("preserve", "preserve", "paper")),
    st.booleans(),
    st.sampled_from((1e-6, 1e-3, None)),
)
