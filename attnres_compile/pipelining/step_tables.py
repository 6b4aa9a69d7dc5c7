"""Simulated steps as text, both transports side by side."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from attnres_compile.pipelining.timeline import StepComparison, Sweep
from attnres_compile.pipelining.wording import bytes_text, count_text, ratio_text, rendered, seconds_text


def explain_step(step: StepComparison) -> str:
    """Both transports of a simulated step side by side."""
    table = Table("", "naive", "cached")
    for column in table.columns[1:]:
        column.justify = "right"
    pair = (step.naive, step.cached)
    table.add_row("step", *(seconds_text(one.seconds) for one in pair))
    table.add_row("step with free transfers", *(seconds_text(one.free_seconds) for one in pair))
    table.add_row("waiting for transfers", *(f"{seconds_text(one.waiting_seconds)} ({one.overhead:.2%})" for one in pair))
    table.add_row("bubble, mean of ranks", *(f"{one.timeline.bubble:.2%}" for one in pair))
    table.add_row("bubble, least to most", *(f"{min(b):.2%} to {max(b):.2%}" for b in (one.timeline.bubbles for one in pair)))
    table.add_row("busiest link", *(f"taken {one.timeline.busiest_link_seconds / one.seconds:.1%}" for one in pair))
    table.add_row("bytes between ranks", *(bytes_text(one.timeline.nbytes) for one in pair))
    table.add_row("peak of a rank's cache", *(bytes_text(max(one.peak_cache_nbytes)) for one in pair))
    what = f"{step.schedule}, {count_text(step.ranks, 'rank')}, {count_text(step.microbatches, 'microbatch')}"
    title = f"one step simulated: {what}, {_link(step)}"
    return rendered([Text(title, style="bold"), table])


def explain_sweep(swept: Sweep) -> str:
    """Bubble and cost of transfers against the number of ranks."""
    table = Table("ranks", "step, naive", "cached", "bubble, naive", "cached", "transfers add, naive", "cached", "less by")
    for column in table.columns:
        column.justify = "right"
    for step in swept.steps:
        naive, cached = step.naive, step.cached
        table.add_row(
            str(step.ranks), seconds_text(naive.seconds), seconds_text(cached.seconds), f"{naive.timeline.bubble:.2%}",
            f"{cached.timeline.bubble:.2%}", f"{naive.overhead:.2%}", f"{cached.overhead:.2%}",
            ratio_text(naive.waiting_seconds, cached.waiting_seconds),
        )  # fmt: skip
    first = swept.steps[0] if swept.steps else None
    what = (
        f": {first.schedule}, {first.virtual} stages per rank, {first.microbatches} microbatches, {_link(first)}" if first else ""
    )
    left_out = [Text(f"left out: {reason}") for reason in swept.left_out]
    return rendered([Text(f"over numbers of ranks{what}", style="bold"), table, *left_out])


def _link(step: StepComparison) -> str:
    return f"{step.link.bandwidth / 1e9:g} GB/s and {seconds_text(step.link.latency)} per link"
