"""Graph breaks anywhere, storms of recompilations and torch's stances: a right result or an error, never the plain stream."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_model import PLACES, SITES, STATEMENTS, broken_model
from small_nets import BATCH, Net, assert_untouched, assert_whole, converted, eager, expected_of, ids_of, set_queries
from torch import Tensor, nn

import attnres_compile as ac

# As many as there are places: each place and, in turn, each statement.
_DRAW = random.Random(0)
BREAKS = [(place, statement) for place, statement in zip(PLACES, _DRAW.choices(list(STATEMENTS), k=len(PLACES)), strict=True)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Dynamo logs eight lines for each recompilation beyond the limit."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def hosts(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "attnres" in module._modules]


# ---------------------------------------------------------------------------------------------------------------- breaks


@pytest.mark.parametrize(("place", "statement"), BREAKS, ids=lambda value: str(value))
def test_a_break_in_a_converted_model(place: int, statement: str, tmp_path: Path) -> None:
    """Converted whole, and broken since: each of the calls says where."""
    source = broken_model(tmp_path, place, statement)
    model = source.Model()
    assert ac.convert_(model, args=(BATCH,)).num_sites == SITES
    set_queries(model, 1)
    compiled = torch.compile(model, backend=eager)
    source.broken = True
    for _ in range(2):
        with pytest.raises(ac.ChainCutError, match=rf"broken_{statement}_{place}\.py:\d+"):
            compiled(BATCH)
    source.broken = False
    torch.compiler.reset()
    expected = ac.rewrite(model, args=(BATCH,))(BATCH)
    torch.testing.assert_close(compiled(BATCH), expected)


@pytest.mark.parametrize(("place", "statement"), BREAKS, ids=lambda value: str(value))
def test_a_break_in_a_plain_model(place: int, statement: str, tmp_path: Path) -> None:
    """A break around the module that holds the whole chain may leave the chain whole: then all of it is rewritten."""
    source = broken_model(tmp_path, place, statement)
    model = source.Model()
    expected = model(BATCH)
    source.broken = True
    compiled = torch.compile(model, backend=eager)
    try:
        found = [compiled(BATCH) for _ in range(2)]
    except ac.ChainCutError as error:
        assert f"broken_{statement}_{place}.py:" in str(error)
        assert hosts(model) == []
    else:
        (host,) = hosts(model)
        assert len(host.attnres.sites) == SITES
        for result in found:
            torch.testing.assert_close(result, expected)
    for function in (ac.detect, ac.convert_, ac.rewrite):
        with pytest.raises(ac.ChainCutError, match=rf"graph break.*broken_{statement}_{place}\.py:\d+"):
            function(source.Model(), args=(BATCH,))


# ---------------------------------------------------------------------------------------------------------------- storms

SHAPES = [(batch, length) for batch in range(1, 6) for length in range(1, 11)]


def storm(compiled: Any, model: nn.Module) -> tuple[int, list[BaseException]]:
    """Calls with fifty shapes: how many gave the right result, and what the others raised."""
    right, raised = 0, []
    for shape in SHAPES:
        try:
            found = compiled(ids_of(*shape))
        except Exception as error:
            raised.append(error)
        else:
            torch.testing.assert_close(found, expected_of(model, ids_of(*shape)))
            right += 1
    return right, raised


def unique_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"fullgraph": True}], ids=lambda options: str(options))
def test_fifty_shapes_take_few_graphs(options: dict[str, Any]) -> None:
    model = converted()
    before = unique_graphs()
    assert storm(torch.compile(model, backend=eager, **options), model) == (50, [])
    assert unique_graphs() - before <= 5


@pytest.mark.parametrize(
    ("options", "limits", "right"),
    [
        pytest.param({"dynamic": False}, {}, 8, id="static"),
        pytest.param({"dynamic": False}, {"recompile_limit": 1}, 1, id="static, one graph"),
        pytest.param({}, {"recompile_limit": 1}, 1, id="dynamic, one graph"),
        pytest.param({}, {"accumulated_recompile_limit": 2}, 10, id="dynamic, two graphs in all"),
        pytest.param({"dynamic": False}, {"suppress_errors": True}, 8, id="suppressed errors"),
    ],
)
def test_beyond_the_recompile_limit_every_call_raises(options: dict[str, Any], limits: dict[str, Any], right: int) -> None:
    model = converted()
    with torch._dynamo.config.patch(**limits):
        done, raised = storm(torch.compile(model, backend=eager, **options), model)
    assert (done, len(raised)) == (right, 50 - right)
    assert {type(error) for error in raised} == {ac.NotRewrittenError}
    assert "TORCH_LOGS=recompiles" in str(raised[0])


@pytest.mark.parametrize(
    ("options", "limits"),
    [({"fullgraph": True}, {"recompile_limit": 1}), ({}, {"recompile_limit": 1, "fail_on_recompile_limit_hit": True})],
    ids=["fullgraph", "fail_on_recompile_limit_hit"],
)
def test_where_torch_itself_raises_at_the_limit(options: dict[str, Any], limits: dict[str, Any]) -> None:
    model = converted()
    with torch._dynamo.config.patch(**limits):
        done, raised = storm(torch.compile(model, backend=eager, **options), model)
    assert (done, len(raised)) == (1, 49)
    assert {type(error) for error in raised} == {torch._dynamo.exc.FailOnRecompileLimitHit}


def test_a_plain_model_is_converted_once_and_held_to_the_limit_thereafter() -> None:
    model = Net()
    compiled = torch.compile(model, backend=eager, dynamic=False)
    compiled(ids_of(*SHAPES[0]))
    set_queries(model, 1)
    done, raised = storm(compiled, model)
    assert (done, len(raised)) == (8, 42)
    assert {type(error) for error in raised} == {ac.NotRewrittenError}


# --------------------------------------------------------------------------------------------------------------- stances

STANCES = ["fail_on_recompile", "eager_on_recompile", "force_eager", "eager_then_compile", "aot_eager_then_compile"]


@pytest.mark.parametrize("stance", STANCES)
@pytest.mark.parametrize("is_warm", [False, True], ids=["first call", "later call"])
def test_a_converted_model_under_a_stance(stance: str, is_warm: bool) -> None:
    """Whatever torch does not compile with our backend raises; what it has compiled already may run. Then all is as before."""
    model = converted()
    compiled = torch.compile(model, backend=eager, dynamic=False)
    if is_warm:
        compiled(BATCH)
    right = 0
    with torch.compiler.set_stance(stance):
        for ids in (BATCH, ids_of(3, 4), ids_of(4, 2)):
            try:
                found = compiled(ids)
            except (ac.NotRewrittenError, ac.ChainCutError):
                assert stance != "fail_on_recompile"
            except RuntimeError as error:
                assert stance == "fail_on_recompile"
                assert "Detected recompile" in str(error)
            else:
                torch.testing.assert_close(found, expected_of(model, ids))
                right += 1
    if stance.endswith("then_compile"):
        assert right >= 2  # the first call of all is torch's to run eagerly
    else:
        assert right == (0 if stance == "force_eager" else int(is_warm))
    for ids in (BATCH, ids_of(5, 4)):
        torch.testing.assert_close(compiled(ids), expected_of(model, ids))
    assert_whole(model)


@pytest.mark.parametrize("stance", STANCES)
@pytest.mark.parametrize("function", [ac.detect, ac.convert_, ac.rewrite])
def test_captures_do_not_follow_the_stance(function: Any, stance: str) -> None:
    """They are no compilations of the user's."""
    model = Net()
    with torch.compiler.set_stance(stance):
        found = function(model, args=(BATCH,))
    assert (found.report if function is ac.rewrite else found).num_sites == 4
    if function is ac.convert_:
        assert_whole(model)
    else:
        assert_untouched(model)


def test_captures_do_not_follow_a_forced_backend() -> None:
    with torch.compiler.set_stance("default", force_backend="eager"):
        assert ac.detect(Net(), args=(BATCH,)).num_sites == 4


def test_another_backend_by_force_raises() -> None:
    model = converted()
    with torch.compiler.set_stance("default", force_backend="eager"), pytest.raises(RuntimeError, match='backend="attnres"'):
        torch.compile(model, backend=eager)(BATCH)


def test_a_disabled_compilation_raises() -> None:
    with pytest.raises(ac.NotRewrittenError):
        torch.compile(converted(), backend=eager, disable=True)(BATCH)


def test_a_stance_that_skips_guards_keeps_models_apart(models: int = 3) -> None:
    """The guards of one model's graph are all that keeps it from another instance; here they are checked once."""
    nets = [converted(seed) for seed in range(models)]
    compiled = [torch.compile(net, backend=eager) for net in nets]
    results: list[Tensor] = [call(BATCH) for call in compiled]
    for net, result in zip(nets, results, strict=True):
        torch.testing.assert_close(result, expected_of(net))
