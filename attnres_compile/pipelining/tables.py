"""Plans and simulated steps as text: tables in plain characters, up to 140 columns wide."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.pipelining.timeline import StepComparison, Sweep
from attnres_compile.transport import CutValue, Hop, plan_transport

_WIDTH = 140
_HEADERS = {"flops": "FLOPs"}
_LABEL = re.compile(r"(.*\D)(\d+)")


def explain(plan: PipelinePlan) -> str:
    """What every hop carries and every rank keeps, naive and cached, with totals and peaks; in bytes of one microbatch."""
    naive, cached = plan.hops(False), plan.hops(True)
    parts: list[RenderableType] = [Text(_header(plan), style="bold")]
    if naive:
        parts += [_hops(naive, cached), *_totals(naive, cached)]
    parts += [Text("stages, and their ranks' caches with cached transport", style="bold"), *_stages(plan)]
    parts += [Text(f"note: {note}") for note in plan.notes]
    return rendered(parts)


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
    what = f"{step.schedule}, {_count(step.ranks, 'rank')}, {_count(step.microbatches, 'microbatch')}"
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
            _ratio(naive.waiting_seconds, cached.waiting_seconds),
        )  # fmt: skip
    first = swept.steps[0] if swept.steps else None
    what = (
        f": {first.schedule}, {first.virtual} stages per rank, {first.microbatches} microbatches, {_link(first)}" if first else ""
    )
    left_out = [Text(f"left out: {reason}") for reason in swept.left_out]
    return rendered([Text(f"over numbers of ranks{what}", style="bold"), table, *left_out])


def rendered(parts: Iterable[RenderableType]) -> str:
    """Plain text, without spaces at the ends of lines."""
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def bytes_text(nbytes: float) -> str:
    """``nbytes`` in the largest binary unit of which there is one at least; nothing for none."""
    return _scaled(nbytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def seconds_text(seconds: float) -> str:
    """Four digits of seconds, milliseconds or microseconds."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds / 1e-6:.4g} us"


def labels_text(labels: Sequence[str]) -> str:
    """Labels with three or more in a row that count up by one as "b0-b7"."""
    split = [(found[1], int(found[2])) if (found := _LABEL.fullmatch(label)) else (label, None) for label in labels]
    runs: list[list[int]] = []
    for i, (stem, number) in enumerate(split):
        follows = number is not None and i > 0 and split[i - 1] == (stem, number - 1)
        if follows:
            runs[-1].append(i)
        else:
            runs.append([i])
    texts = [[f"{labels[run[0]]}-{labels[run[-1]]}"] if len(run) > 2 else [labels[i] for i in run] for run in runs]
    return ", ".join(itertools.chain.from_iterable(texts))


def _header(plan: PipelinePlan) -> str:
    sizes = sorted({stop - start for start, stop in itertools.pairwise(plan.boundaries)})
    per_stage = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    stages = _count(plan.ranks, "rank") + (f" x {plan.virtual} stages" if plan.virtual > 1 else "")
    blocks = (
        f"{_count(len(plan.block_sizes), 'block')} of up to {max(plan.block_sizes)} sublayers"
        if plan.block_sizes
        else "no blocks"
    )
    transport = "cached" if plan.cached else "naive"
    return f"{stages}: {plan.boundaries[-1]} sublayers, {per_stage} per stage, {blocks}, {transport} transport"


def _hops(naive: Sequence[Hop], cached: Sequence[Hop]) -> Table:
    table = Table("stages", "ranks", "naive", "bytes", "cached", "bytes")
    table.columns[3].justify = table.columns[5].justify = "right"
    for one, other in zip(naive, cached, strict=True):
        ranks = f"within {one.ranks[0]}" if one.is_local else f"{one.ranks[0]} -> {one.ranks[1]}"
        carried = [text for hop in (one, other) for text in (_labels(hop.values), bytes_text(hop.nbytes))]
        table.add_row(f"{one.source} -> {one.source + 1}", ranks, *carried)
    return table


def _totals(naive: Sequence[Hop], cached: Sequence[Hop]) -> list[Text]:
    lines = []
    for what, of in (("forward", lambda hop: hop.nbytes), ("backward", lambda hop: hop.gradient_nbytes)):
        one, other = sum(map(of, naive)), sum(map(of, cached))
        lines.append(f"{what}, all hops: {_bytes_or_none(one)} naive, {_bytes_or_none(other)} cached{_less(one, other)}")
    one, other = max(hop.nbytes for hop in naive), max(hop.nbytes for hop in cached)
    lines.append(f"peak hop: {_bytes_or_none(one)} naive, {_bytes_or_none(other)} cached{_less(one, other)}")
    return [Text(line) for line in lines]


def _stages(plan: PipelinePlan) -> list[RenderableType]:
    """Every stage with its costs, as far as they are known, and its rank's cache while one microbatch goes through."""
    keys = list(plan.costs[0]) if plan.costs else []
    headers = [_HEADERS.get(key, key.replace("_", " ").replace("nbytes", "bytes")) for key in keys]
    table = Table("stage", "rank", "sublayers", *headers, "in the cache", "put there", "freed", "cache bytes")
    for column in (*table.columns[:2], *table.columns[3 : 3 + len(keys)], table.columns[-1]):
        column.justify = "right"
    held: dict[int, list[str]] = {rank: [] for rank in range(plan.ranks)}
    peaks = dict.fromkeys(held, 0)
    for stage, does in enumerate(plan_transport(plan.values, plan.placement)):
        rank, start, stop = plan.placement[stage], plan.boundaries[stage], plan.boundaries[stage + 1]
        before, together = held[rank], [*held[rank], *does.keeps]
        nbytes = sum(plan.value(name).nbytes for name in together)
        peaks[rank] = max(peaks[rank], nbytes)
        held[rank] = [name for name in together if name not in does.frees]
        costs = [bytes_text(plan.costs[stage][key]) if "bytes" in key else _flops_text(plan.costs[stage][key]) for key in keys]
        contents = [_labels([plan.value(name) for name in names]) for names in (before, does.keeps, does.frees)]
        table.add_row(
            str(stage), str(rank), f"{start} to {stop - 1}" if start < stop else "output", *costs, *contents, bytes_text(nbytes)
        )
    most = [str(rank) for rank, peak in peaks.items() if peak == max(peaks.values())]
    where = f", on rank{'s' if len(most) > 1 else ''} {', '.join(most)}" if len(most) < plan.ranks else ""
    return [table, Text(f"peak of a rank's cache with one microbatch in flight: {_bytes_or_none(max(peaks.values()))}{where}")]


def _labels(values: Sequence[CutValue]) -> str:
    return escape(labels_text([value.label for value in values]))


def _flops_text(flops: float) -> str:
    return _scaled(flops, 1000, ("", "K", "M", "G", "T", "P", "E"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    if not number:
        return ""
    power = 0
    while abs(number) >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{number:.4g} {units[power]}".rstrip()


def _bytes_or_none(nbytes: int) -> str:
    return bytes_text(nbytes) or "nothing"


def _less(naive: float, cached: float) -> str:
    return f", {_ratio(naive, cached)} less" if naive > cached > 0 else ""


def _ratio(naive: float, cached: float) -> str:
    """How many times smaller; nothing where both are zero, but for rounding."""
    return f"{naive / cached:.2f}x" if cached > 1e-12 else ""


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _link(step: StepComparison) -> str:
    return f"{step.link.bandwidth / 1e9:g} GB/s and {seconds_text(step.link.latency)} per link"
