"""Plans and steps as text, word for word where it matters."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.pipelining.shapes import ModelShape, plan_from_shape
from attnres_compile.pipelining.simulation import Link
from attnres_compile.pipelining.step_tables import explain_step, explain_sweep
from attnres_compile.pipelining.tables import explain
from attnres_compile.pipelining.timeline import simulate_step, simulate_sweep
from attnres_compile.pipelining.wording import bytes_text, labels_text, seconds_text

HIDDEN = 2**17  # so that a value of one token in float32 has half a MiB


def small(placement: str = "looped") -> PipelinePlan:
    return plan_from_shape(ModelShape("small", 8, HIDDEN, 3), 2, 2, 1, "fp32", placement)


def cells(text: str) -> list[list[str]]:
    """The rows of all tables, headers left out."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]


def test_hops_carry_what_they_say() -> None:
    """Blocks of three sublayers, stages of four: b1 ends in stage 0, b2 in 1, b3 and b4 in 2."""
    rows = cells(explain(small()))
    assert rows[:3] == [
        ["0 -> 1", "0 -> 1", "b0, b1, p0", "1.5 MiB", "b0, b1, p0", "1.5 MiB"],
        ["1 -> 2", "1 -> 0", "b0-b2, p1", "2 MiB", "b2, p1", "1 MiB"],
        ["2 -> 3", "0 -> 1", "b0-b4", "2.5 MiB", "b3, b4", "1 MiB"],
    ]
    assert [row[:3] + row[4:] for row in rows[3:]] == [
        ["0", "0", "0 to 3", "", "b0, b1", "", "1 MiB"],
        ["1", "1", "4 to 7", "", "b0-b2", "", "1.5 MiB"],
        ["2", "0", "8 to 11", "b0, b1", "", "b0, b1", "1 MiB"],
        ["3", "1", "12 to 15", "b0-b2", "", "b0-b2", "1.5 MiB"],
    ]
    assert {row[3] for row in rows[3:]} == {"824.6 G"}  # 2 * 6 * 4 * HIDDEN^2


def test_header_totals_and_notes() -> None:
    lines = explain(small()).splitlines()
    assert lines[0] == "2 ranks x 2 stages: 16 sublayers, 4 per stage, 6 blocks of up to 3 sublayers, cached transport"
    for line in (
        "forward, all hops: 6 MiB naive, 3.5 MiB cached, 1.71x less",
        "backward, all hops: 6 MiB naive, 3.5 MiB cached, 1.71x less",
        "peak hop: 2.5 MiB naive, 1.5 MiB cached, 1.67x less",
        "peak of a rank's cache with one microbatch in flight: 1.5 MiB, on rank 1",
    ):
        assert line in lines
    assert lines[-1].startswith("note: FLOPs per stage: ")


def test_values_without_gradients_go_one_way() -> None:
    plan = small()
    fixed = dataclasses.replace(plan, values=tuple(dataclasses.replace(value, differentiable=False) for value in plan.values))
    assert "backward, all hops: nothing naive, nothing cached" in explain(fixed).splitlines()


def test_hops_within_a_rank_carry_no_bytes() -> None:
    rows = cells(explain(small("folded")))
    assert rows[1] == ["1 -> 2", "within 1", "b0-b2, p1", "", "b2, p1", ""]


def test_what_was_freed_is_no_longer_in_the_cache() -> None:
    """b0 is made in stage 0 and read, on rank 0, by stage 2 alone; stage 4 has room again."""
    plan = plan_from_shape(ModelShape("three rounds", 6, HIDDEN, 12), 2, 3, 1, "fp32")
    early = dataclasses.replace(plan, values=(dataclasses.replace(plan.values[0], consumers=(2,)),))
    rows = [[row[0], *row[4:]] for row in cells(explain(early))[5:]]
    assert rows[::2] == [["0", "", "b0", "", "512 KiB"], ["2", "b0", "", "b0", "512 KiB"], ["4", "", "", "", ""]]


def test_a_plan_of_one_stage() -> None:
    text = explain(plan_from_shape(ModelShape("one", 2, 4, 2), 1, 1, 1))
    assert text.splitlines()[0] == "1 rank: 4 sublayers, 4 per stage, 2 blocks of up to 2 sublayers, cached transport"
    assert "peak of a rank's cache with one microbatch in flight: nothing" in text


@pytest.mark.parametrize("ranks", [2, 16])
def test_long_labels_stay_within_the_width(ranks: int) -> None:
    plan = plan_from_shape(ModelShape("deep", 64, 1024, 2), ranks, 4, 8)
    named = tuple(dataclasses.replace(value, label=f"chain0.a_rather_long_name_{3 * i}") for i, value in enumerate(plan.values))
    for text in (explain(plan), explain(dataclasses.replace(plan, values=named))):
        assert max(map(len, text.splitlines())) <= 140
        assert all(line == line.rstrip() for line in text.splitlines())
    assert "a_rather_long_name_6" in text


def test_costs_of_every_kind_are_shown() -> None:
    costs = ({"flops": 3 * 10**12, "activation_bytes": 2**30, "parameter_bytes": 3 * 2**20},) * 4
    text = explain(dataclasses.replace(small(), costs=costs))
    assert "FLOPs" in text and "activation bytes" in text and "parameter bytes" in text
    assert cells(text)[3][3:6] == ["3 T", "1 GiB", "3 MiB"]
    assert cells(explain(dataclasses.replace(small(), costs=())))[3][3:] == ["", "b0, b1", "", "1 MiB"]


def test_a_step_side_by_side() -> None:
    """Every hop of naive transport takes 3, 4 and 5 seconds, of cached transport 3, 2 and 2, and computing next to nothing."""
    plan = small()
    step = simulate_step(plan, "LoopedBFS", 1, [1e-3] * 4, Link(bandwidth=2**19))
    rows = {row[0]: row[1:] for row in cells(explain_step(step))}
    assert rows["step"] == ["24.01 s", "14.01 s"]
    assert rows["step with free transfers"] == ["12 ms", "12 ms"]
    assert rows["waiting for transfers"] == ["24 s (200000.00%)", "14 s (116666.67%)"]
    assert rows["bytes between ranks"] == ["12 MiB", "7 MiB"]
    assert rows["peak of a rank's cache"] == ["", "1.5 MiB"]
    assert rows["busiest link"] == ["taken 50.0%", "taken 50.0%"]
    title = "one step simulated: LoopedBFS, 2 ranks, 1 microbatch, 0.000524288 GB/s and 0 us per link"
    assert explain_step(step).splitlines()[0] == title


def test_a_sweep_line_by_line() -> None:
    shape = ModelShape("small", 8, 64, 4)
    swept = simulate_sweep(lambda ranks: plan_from_shape(shape, ranks, 1, 4), (1, 4, 32), "1F1B", 4, 1e9, Link())
    text = explain_sweep(swept)
    assert [row[0] for row in cells(text)] == ["1", "4"]
    assert cells(text)[1][3:5] == ["42.86%", "42.86%"]
    assert text.splitlines()[-1].startswith("left out: 32 ranks: small has 16 sublayers")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, ""),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1008 * 2**20, "1008 MiB"),
        (3 * 2**60, "3072 PiB"),
    ],
)
def test_bytes_in_binary_units(nbytes: int, text: str) -> None:
    assert bytes_text(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 us"), (2.5e-6, "2.5 us"), (0.0125, "12.5 ms"), (1.0, "1 s"), (16.5432, "16.54 s")]
)
def test_seconds_in_their_unit(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([], ""),
        (["b0", "b1", "p2"], "b0, b1, p2"),
        (["b0", "b1", "b2", "p3"], "b0-b2, p3"),
        (["b9", "b10", "b11"], "b9-b11"),
        (["x", "b1", "b2", "b3", "b5"], "x, b1-b3, b5"),
        (["chain0.b0", "chain1.b1", "chain1.b2", "chain1.b3"], "chain0.b0, chain1.b1-chain1.b3"),
        (["mul_1", "mul_1", "mul_2"], "mul_1, mul_1, mul_2"),
    ],
)
def test_runs_of_labels_are_short(labels: list[str], text: str) -> None:
    assert labels_text(labels) == text


@given(st.sets(st.integers(0, 40)))
def test_short_labels_leave_nothing_out(numbers: set[int]) -> None:
    text = labels_text([f"b{number}" for number in sorted(numbers)])
    ends = [[int(end.removeprefix("b")) for end in part.split("-")] for part in text.split(", ") if part]
    assert sorted(itertools.chain.from_iterable(range(part[0], part[-1] + 1) for part in ends)) == sorted(numbers)
