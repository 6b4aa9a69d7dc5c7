"""A plan as text: what every hop carries, and what every stage finds in its rank's cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.pipelining.wording import bytes_text, count_text, flops_text, labels_text, ratio_text, rendered
from attnres_compile.transport import CutValue, Hop, plan_transport

_HEADERS = {"flops": "FLOPs"}


def explain(plan: PipelinePlan) -> str:
    """What every hop carries and every rank keeps, naive and cached, with totals and peaks; in bytes of one microbatch."""
    naive, cached = plan.hops(False), plan.hops(True)
    parts: list[RenderableType] = [Text(_header(plan), style="bold")]
    if naive:
        parts += [_hops(naive, cached), *_totals(naive, cached)]
    parts += [Text("stages, and their ranks' caches with cached transport", style="bold"), *_stages(plan)]
    parts += [Text(f"note: {note}") for note in plan.notes]
    return rendered(parts)


def _header(plan: PipelinePlan) -> str:
    sizes = sorted({stop - start for start, stop in itertools.pairwise(plan.boundaries)})
    per_stage = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    stages = count_text(plan.ranks, "rank") + (f" x {plan.virtual} stages" if plan.virtual > 1 else "")
    blocks = (
        f"{count_text(len(plan.block_sizes), 'block')} of up to {max(plan.block_sizes)} sublayers"
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
        costs = [bytes_text(plan.costs[stage][key]) if "bytes" in key else flops_text(plan.costs[stage][key]) for key in keys]
        contents = [_labels([plan.value(name) for name in names]) for names in (before, does.keeps, does.frees)]
        table.add_row(
            str(stage), str(rank), f"{start} to {stop - 1}" if start < stop else "output", *costs, *contents, bytes_text(nbytes)
        )
    most = [str(rank) for rank, peak in peaks.items() if peak == max(peaks.values())]
    where = f", on rank{'s' if len(most) > 1 else ''} {', '.join(most)}" if len(most) < plan.ranks else ""
    return [table, Text(f"peak of a rank's cache with one microbatch in flight: {_bytes_or_none(max(peaks.values()))}{where}")]


def _labels(values: Sequence[CutValue]) -> str:
    return escape(labels_text([value.label for value in values]))


def _bytes_or_none(nbytes: int) -> str:
    return bytes_text(nbytes) or "nothing"


def _less(naive: float, cached: float) -> str:
    return f", {ratio_text(naive, cached)} less" if naive > cached > 0 else ""
