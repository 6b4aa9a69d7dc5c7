"""DistributedDataParallel on two processes, in float64: equal to one process on the whole batch, or refused with the way out."""

from __future__ import annotations

from typing import Any

import data_parallel
import pytest
from data_parallel import ORDERS, WIDE
from ranks import run_ranks

TOLERANCE = 1e-12
BEFORE = "was wrapped for distributed training before it had AttnRes parameters"
INSIDE = "DistributedDataParallel wraps a model, which had no AttnRes parameters when it was wrapped"
SPLIT = "DDP's graph splitting, which hands the model over in buckets: set torch._dynamo.config.optimize_ddp = False"

EQUAL: dict[str, tuple[Any, ...]] = {
    # A model that fits into DDP's first bucket, of one megabyte, is not split.
    **{f"one bucket, {order}": ("equal", order, True) for order in ORDERS},
    **{f"no splitting, {order}": ("equal", order, False, WIDE) for order in ORDERS},
    "Python's reducer, DDP(compile)": ("equal", "DDP(compile)", "python_reducer", WIDE),
    "Python's reducer, compile(DDP)": ("equal", "compile(DDP)", "python_reducer", WIDE),
    "Python's reducer, forward not compiled": ("equal", "DDP(compile)", "python_reducer_without_compiled_forward", WIDE),
    "accumulation under no_sync": ("accumulating", "compile(DDP)"),
    "unused parameters": ("with_unused", "DDP(compile)"),
    "static graph": ("static", "compile(DDP)"),
}
REFUSED: dict[str, tuple[tuple[Any, ...], str, str]] = {
    **{f"several buckets, {order}": (("equal", order, True, WIDE), "ChainCutError", SPLIT) for order in ORDERS},
    "a piece with all parameters": (("tied_at_the_end",), "ChainCutError", SPLIT),
    **{f"unconverted, {order}": (("unconverted", order, False), "ConfigError", BEFORE) for order in ORDERS},
    "unconverted, Python's reducer": (("unconverted", "DDP(compile)", "python_reducer"), "ConfigError", BEFORE),
    "unconverted around Python's reducer": (("unconverted", "compile(DDP)", "python_reducer"), "ConfigError", INSIDE),
    "converted late": (("converted_after_wrapping", "compile(DDP)", False), "ConfigError", BEFORE),
    "converted late, Python's reducer": (("converted_after_wrapping", "DDP(compile)", "python_reducer"), "ConfigError", BEFORE),
    "converted late, compiled before": (("compiled_before_ddp_runs",), "ConfigError", BEFORE),
    "convert_ of the wrapper": (("on_the_wrapper", "convert_", False), "ConfigError", INSIDE),
    "rewrite of the wrapper": (("on_the_wrapper", "rewrite", "python_reducer"), "ConfigError", INSIDE),
}
OTHERS = {
    "teacher": ("a_teacher_of_its_own",),
    "split after rewriting": ("split_after_rewriting",),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What both ranks give for every case, out of one process group."""
    calls = {**EQUAL, **{name: call for name, (call, _, _) in REFUSED.items()}, **OTHERS}
    calls["accelerate"] = ("accelerated", str(tmp_path_factory.mktemp("accelerate")))
    # Making a DDP with Python's reducer lets Dynamo trace DDP's own code from then on, in all of the process.
    calls = dict(sorted(calls.items(), key=lambda item: any("python" in str(part) for part in item[1])))
    ranks = run_ranks(data_parallel.each, 2, *calls.values())
    return {name: list(outcomes) for name, outcomes in zip(calls, zip(*ranks, strict=True), strict=True)}


@pytest.mark.parametrize("case", EQUAL)
def test_equals_one_process(found: dict[str, list[Any]], case: str) -> None:
    for outcome in found[case]:
        assert outcome["error"] <= TOLERANCE, outcome
        assert outcome["moved"] > 1e-3  # every query learnt


@pytest.mark.parametrize("case", REFUSED)
def test_refused(found: dict[str, list[Any]], case: str) -> None:
    _, kind, message = REFUSED[case]
    for name, text in found[case]:
        assert name == kind and message in text, text


def test_a_rewritten_graph_may_be_split(found: dict[str, list[Any]]) -> None:
    for outcome in found["split after rewriting"]:
        assert outcome["graphs"] > 1
        assert outcome["error"] <= TOLERANCE


def test_a_model_that_is_no_part_of_what_ddp_wraps(found: dict[str, list[Any]]) -> None:
    assert found["teacher"] == [0.0, 0.0]


def test_accelerate(found: dict[str, list[Any]]) -> None:
    for outcome in found["accelerate"]:
        assert outcome["kind"] == "DistributedDataParallel" and outcome["unwrapped"] and outcome["same"]
        assert outcome["error"] <= TOLERANCE
