"""The outcome of comparing two checkpoints: plain data, and text for people."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator
from typing import Any

from attnres_compile.comparison.graphs import GraphComparison
from attnres_compile.comparison.numbers import OutputComparison, SiteComparison, is_beyond
from attnres_compile.comparison.streams import Stream
from attnres_compile.config import AttnResConfig

_MOST = 10  # sites that the text shows


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory, the class and dtype of its model, and its AttnRes options and blocks, chain after chain, if converted."""

    path: str
    model: str
    dtype: str
    config: AttnResConfig | None
    block_sizes: tuple[tuple[int, ...], ...] | None

    @property
    def stream(self) -> str:
        """In words, what its sublayers read."""
        counts = dict.fromkeys(len(sizes) for sizes in self.block_sizes or ())
        return self._stream(" and ".join(map(str, counts)))

    def stream_of(self, chain: int) -> str:
        """The same of one chain."""
        return self._stream(str(len(self.block_sizes[chain])) if self.block_sizes else "")

    def _stream(self, blocks: str) -> str:
        if self.config is None:
            return "standard residual stream"
        variant = "Full AttnRes" if self.config.variant == "full" else f"Block AttnRes, {blocks} blocks"
        return f'{variant}, scale="{self.config.scale}"'


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the models ran on: the first ``tokens`` of a ``text``, or random inputs from a ``seed``."""

    text: str | None
    tokens: int
    seed: int | None

    def __str__(self) -> str:
        return f"the first {self.tokens} tokens of {self.text}" if self.text else f"random inputs, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class CheckpointComparison:
    """The original, ``source``, against ``destination``.

    ``sites`` are in stream order, chain after chain. ``rounding`` is the mean error relative to the RMS up to which a site
    counts as equal but for rounding. ``streams`` tells the chains in module names.
    """

    source: Checkpoint
    destination: Checkpoint
    inputs: Inputs
    output: OutputComparison
    sites: tuple[SiteComparison, ...]
    rounding: float
    streams: tuple[Stream, ...]
    graph: GraphComparison

    @property
    def first_different_site(self) -> SiteComparison | None:
        """The first site, in stream order, whose readers read something else by more than rounding."""
        return next((site for site in self.sites if is_beyond(site.mean_rel_error, self.rounding)), None)

    def most_different(self, number: int) -> tuple[SiteComparison, ...]:
        """The sites with the largest mean relative error beyond rounding, in stream order."""
        beyond = [site for site in self.sites if is_beyond(site.mean_rel_error, self.rounding)]
        beyond.sort(key=lambda site: math.inf if math.isnan(site.mean_rel_error) else site.mean_rel_error, reverse=True)
        return tuple(sorted(beyond[:number], key=lambda site: site.site))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; numbers that are not finite become None."""
        first = self.first_different_site
        data = {
            **dataclasses.asdict(self),
            "source": _checkpoint(self.source),
            "destination": _checkpoint(self.destination),
            "sites": [
                {**dataclasses.asdict(site), "max_rel_error": site.max_rel_error, "mean_rel_error": site.mean_rel_error}
                for site in self.sites
            ],
            "first_different_site": first.site if first else None,
        }
        data["graph"]["diff"]["kinds"] = dict(self.graph.diff.kinds)
        finite: dict[str, Any] = _finite(data)
        return finite

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        for role, checkpoint in (("original", self.source), ("other", self.destination)):
            yield escape(f"{role:8}  {checkpoint.path}: {checkpoint.model}, {checkpoint.dtype}, {checkpoint.stream}")
        yield escape(f"on        {self.inputs}")
        yield f"graph     {self.graph.summary()}"
        for difference in self.graph.differences:
            yield Text(f"DIFFERENT {difference}", style="bold red")
        yield ""
        for what, value in self.numbers():
            yield escape(f"{self.output.name} {what}: {value}")
        sites = self.most_different(_MOST)
        if not sites:
            yield f"{len(self.sites)} sites: their readers read the same, but for rounding"
            return
        first = self.first_different_site
        assert first is not None
        many = f"{len(self.sites)} sites; beyond rounding ({self.rounding:.1g}) from site {first.site} on"
        table = Table(title=f"{many}; the {len(sites)} that differ most" if len(sites) > 1 else many, title_justify="left")
        for header in ("site", "reader", "after sublayer", "max error", "mean error", "mean error / RMS"):
            table.add_column(header, justify="left" if header == "reader" else "right", overflow="fold")
        for site in sites:
            numbers = (f"{number:.3g}" for number in (site.max_abs_error, site.mean_abs_error, site.mean_rel_error))
            table.add_row(str(site.site), escape(", ".join(site.modules)), str(site.before), *numbers)
        yield table

    def numbers(self) -> tuple[tuple[str, str], ...]:
        """The figures of the output, each with its name."""
        output = self.output
        found = [
            ("max absolute error", f"{output.max_abs_error:.3g}"),
            ("mean absolute error", f"{output.mean_abs_error:.3g}"),
            ("max relative error", f"{output.max_rel_error:.3g}"),
        ]
        if output.top1_agreement is not None:
            found += [
                ("KL divergence, mean", f"{output.kl_mean:.3g} nats"),
                ("KL divergence, max", f"{output.kl_max:.3g} nats"),
                ("top-1 agreement", f"{output.top1_agreement:.2%}"),
            ]
        return tuple(found)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return text.getvalue()


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    return {**dataclasses.asdict(checkpoint), "config": config.to_dict() if config else None, "stream": checkpoint.stream}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
