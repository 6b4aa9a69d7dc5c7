"""What an inspection found, and how it reads as text: one table per chain, a line for every place along the stream."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from attnres_compile.config import AttnResConfig
from attnres_compile.inspection.results import ROOT, ChainInspection, ReadInspection, fields_of

_HEAVIEST = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """What :func:`inspect_model` found. ``config`` is None in a model without AttnRes.

    ``token_ids`` are the integer arguments of the call whose names end in "input_ids", where every token was asked for.
    """

    model: str
    config: AttnResConfig | None
    chains: tuple[ChainInspection, ...]
    token_ids: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only: finite numbers or None."""
        return fields_of(self)

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from tables(self)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return text.getvalue()


def tables(inspection: Inspection) -> Iterator[RenderableType]:
    """A table per chain, and one more of its tokens where they were kept, each between its title and its legend."""
    for chain in inspection.chains:
        title = title_of(inspection, chain)
        yield Text(f"{title}; means over {chain.num_tokens} tokens", style="bold")
        yield _stream(chain)
        entropy = "; entropy: of a token's weights, in nats and of log n" if chain.block_sizes else ""
        yield Text(f"after: sublayers before the read; reads, adds: root mean square over features{entropy}\n", style="dim")
        if any(site.token_weights is not None for site in chain.sites):
            yield Text(f"{title}; means over sites", style="bold")
            yield _tokens(inspection, chain)
            yield Text("embedding, newest: weights of the first and the last source; entropy: of log n\n", style="dim")


def title_of(inspection: Inspection, chain: ChainInspection) -> str:
    """Model, chain and variant with its blocks, in a line."""
    sizes = chain.block_sizes or ()
    if not sizes:
        what = "standard residual"
    elif max(sizes) == 1:
        what = "Full AttnRes"
    else:
        last = f", the last of {sizes[-1]}" if sizes[-1] != sizes[0] else ""
        what = f"Block AttnRes, {len(sizes)} blocks of {sizes[0]} sublayers{last}"
    return f"{f'{inspection.model} {chain.name}'.rstrip()}: {what}"


def _stream(chain: ChainInspection) -> Table:
    """Down the stream: what every read reads, and what the sublayer that it feeds adds."""
    converted = chain.block_sizes is not None
    table = Table()
    table.add_column("after", justify="right")
    table.add_column("reader", overflow="fold")
    if converted:
        table.add_column("reads most from", overflow="fold")
        table.add_column("entropy", justify="right")
    table.add_column("reads", justify="right")
    table.add_column("adds", justify="right")
    blank = ("", "") if converted else ()
    table.add_row("", ROOT, *blank, "", f"{chain.root_magnitude:.3g}", end_section=True)
    ends = {sum(chain.block_sizes[: i + 1]) for i in range(len(chain.block_sizes))} if chain.block_sizes else set()
    for before in range(len(chain.sublayers) + 1):
        # The sublayer stands in the line of the read that feeds it, or has a line of its own where no norm does.
        sublayer = chain.sublayers[before] if before < len(chain.sublayers) else None
        added = f"{sublayer.magnitude:.3g}" if sublayer else ""
        reads = [read for read in chain.reads if read.before == before]
        for read in reads:
            depth = (_heaviest(read), _entropy(read)) if converted else ()
            table.add_row(str(before), escape(read.name), *depth, f"{read.magnitude:.3g}", added if read is reads[-1] else "")
        if sublayer and not reads:
            table.add_row(str(before), escape(sublayer.name), *blank, "", added)
        if before + 1 in ends and len(ends) < len(chain.sublayers):
            table.add_section()
    return table


def _heaviest(read: ReadInspection) -> str:
    return escape(", ".join(f"{name} {weight:.0%}" for name, weight in read.heaviest(_HEAVIEST)))


def _entropy(read: ReadInspection) -> str:
    return "" if read.entropy is None or read.entropy_fraction is None else f"{read.entropy:.2f} ({read.entropy_fraction:4.0%})"


def _tokens(inspection: Inspection, chain: ChainInspection) -> Table:
    """What every token reads, averaged over the sites that read all tokens of the chain."""
    table = Table()
    for header in ("token", "id", "embedding", "newest", "entropy"):
        table.add_column(header, justify="right")
    kept = [site.token_weights.flatten(1) for site in chain.sites if site.token_weights is not None]
    kept = [weights for weights in kept if weights.shape[1] == chain.num_tokens]
    ids = [found.flatten().tolist() for found in inspection.token_ids.values() if found.numel() == chain.num_tokens]
    if kept:
        first = torch.stack([weights[0] for weights in kept]).mean(0).tolist()
        newest = torch.stack([weights[-1] for weights in kept]).mean(0).tolist()
        entropies = [torch.special.entr(weights).sum(0) / math.log(len(weights)) for weights in kept]
        spread = torch.stack(entropies).mean(0).tolist()
        for i in range(chain.num_tokens):
            known = str(ids[0][i]) if ids else ""
            table.add_row(str(i), known, f"{first[i]:.0%}", f"{newest[i]:.0%}", f"{spread[i]:.0%}")
    return table
