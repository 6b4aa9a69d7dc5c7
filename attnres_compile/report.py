"""What was found, what was refused and why, and what each pass did: plain data that outlives the graph."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

from attnres_compile.chain import ResidualChain
from attnres_compile.config import AttnResConfig
from attnres_compile.plan import AttnResPlan
from attnres_compile.site_parameters import parameter_shapes


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why an add, a read or a whole chain is not rewritten, and where it stands in the model.

    ``subject`` is "chain", "add" or "read"; ``size`` is the number of residual adds concerned, by which near misses
    are ranked; ``source_line`` reads ``file:line: code``.
    """

    subject: str
    reason: str
    node: str
    module: str
    source_line: str
    size: int = 1

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.module and f"module {self.module!r}", self.source_line) if part)
        return f"{self.reason} [{place or self.node}]"


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One site: ``module`` reads it, ``before`` sublayers precede it; ``num_sources`` is None before planning."""

    index: int
    module: str
    modules: tuple[str, ...]
    source_line: str
    hidden_size: int
    before: int
    eps: float | None
    num_sources: int | None = None


@dataclasses.dataclass(frozen=True)
class ChainReport:
    """One chain that can be, or was, rewritten. ``kind`` is "prenorm", "parallel" or "sandwich"."""

    kind: str
    num_sublayers: int
    hidden_size: int
    sites: tuple[SiteReport, ...]
    block_sizes: tuple[int, ...] | None = None

    @property
    def num_sites(self) -> int:
        return len(self.sites)


@dataclasses.dataclass(frozen=True)
class SiteNote:
    """Why a site is computed by itself and not in two phases with the others of its block."""

    site: int
    reason: str


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one pass did: number of changes, or of findings, and time in seconds."""

    name: str
    changes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of detection, conversion or rewriting."""

    chains: tuple[ChainReport, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    passes: tuple[PassReport, ...] = ()
    config: AttnResConfig | None = None
    notes: tuple[SiteNote, ...] = ()

    @property
    def num_sites(self) -> int:
        return sum(chain.num_sites for chain in self.chains)

    @property
    def num_added_parameters(self) -> int:
        """Elements of the queries, key-norm weights and so on that the sites carry."""
        return sum(self._added_to(chain) for chain in self.chains)

    def _added_to(self, chain: ChainReport) -> int:
        config = self.config or AttnResConfig()
        shapes = (parameter_shapes(config, site.hidden_size, site.num_sources or 0) for site in chain.sites)
        return sum(math.prod(shape) for of_site in shapes for shape in of_site.values())

    def near_misses(self, limit: int = 3) -> tuple[Refusal, ...]:
        """The refused chains that came closest, the longest first; where no chain was refused, lone adds and reads."""
        chains = [refusal for refusal in self.refusals if refusal.subject == "chain"]
        return tuple(sorted(chains or self.refusals, key=lambda refusal: -refusal.size)[:limit])

    def summary(self) -> str:
        """One line for each chain."""
        return "\n".join(
            f"chain {i}: {chain.kind}, {chain.num_sublayers} sublayers of width {chain.hidden_size}"
            + (f" in blocks {_describe_blocks(chain.block_sizes)}" if chain.block_sizes else "")
            + f", {chain.num_sites} sites from {chain.sites[0].module} to {chain.sites[-1].module}"
            for i, chain in enumerate(self.chains)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {
            "chains": [{**dataclasses.asdict(chain), "num_sites": chain.num_sites} for chain in self.chains],
            "refusals": [dataclasses.asdict(refusal) for refusal in self.refusals],
            "near_misses": [dataclasses.asdict(refusal) for refusal in self.near_misses()],
            "notes": [dataclasses.asdict(note) for note in self.notes],
            "passes": [dataclasses.asdict(entry) for entry in self.passes],
            "config": self.config.to_dict() if self.config else None,
            "num_sites": self.num_sites,
            "num_added_parameters": self.num_added_parameters,
        }

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.markup import escape
        from rich.table import Table

        chains = Table(title="Residual chains", title_justify="left")
        for header in ("chain", "kind", "sublayers", "sites", "blocks", "hidden size", "added parameters"):
            chains.add_column(header, justify="left" if header == "kind" else "right")
        for i, chain in enumerate(self.chains):
            blocks = "" if chain.block_sizes is None else _describe_blocks(chain.block_sizes)
            added = self._added_to(chain)
            chains.add_row(
                str(i), chain.kind, str(chain.num_sublayers), str(chain.num_sites), blocks, str(chain.hidden_size), f"{added:,}"
            )
        yield chains
        if self.chains:
            sites = Table(title="Sites", title_justify="left")
            for header in ("site", "chain", "reader", "after sublayer", "sources"):
                sites.add_column(header, justify="left" if header == "reader" else "right", overflow="fold")
            for i, chain in enumerate(self.chains):
                for site in chain.sites:
                    sites.add_row(
                        str(site.index), str(i), escape(", ".join(site.modules)), str(site.before), str(site.num_sources or "")
                    )
            yield sites
        if self.notes:
            alone = Table(title="Sites computed by themselves, not in two phases", title_justify="left")
            for header in ("sites", "reason"):
                alone.add_column(header, overflow="fold")
            for reason in dict.fromkeys(note.reason for note in self.notes):
                alone.add_row(", ".join(str(note.site) for note in self.notes if note.reason == reason), escape(reason))
            yield alone
        if self.refusals:
            refused = Table(title="Refused", title_justify="left")
            for header in ("what", "reason", "module", "source line"):
                refused.add_column(header, overflow="fold")
            for refusal in self.refusals:
                refused.add_row(*map(escape, (refusal.subject, refusal.reason, refusal.module, refusal.source_line)))
            yield refused

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return text.getvalue()


def _describe_blocks(sizes: tuple[int, ...]) -> str:
    """Block sizes in few characters: "8 x 2", or "3 x 3, 1 x 2" with a shorter last block."""
    first = sizes[0]
    whole = sum(size == first for size in sizes)
    tail = [size for size in sizes if size != first]
    return ", ".join([f"{whole} x {first}", *(f"1 x {size}" for size in tail)])


def describe_chain(chain: ResidualChain, first_index: int, plan: AttnResPlan | None = None) -> ChainReport:
    """The graph-free description of ``chain``, its sites numbered from ``first_index``."""
    sites = tuple(
        SiteReport(
            index=first_index + i,
            module=read.modules[0],
            modules=read.modules,
            source_line=read.source_line,
            hidden_size=chain.hidden_size,
            before=before,
            eps=read.eps,
            num_sources=plan.sites[i].num_sources if plan else None,
        )
        for i, (read, before) in enumerate(chain.sites)
    )
    sizes = tuple(stop - start for start, stop in plan.blocks) if plan else None
    return ChainReport(chain.kind, chain.num_sublayers, chain.hidden_size, sites, sizes)


def describe_chains(chains: tuple[ResidualChain, ...], plans: tuple[AttnResPlan, ...] = ()) -> tuple[ChainReport, ...]:
    """Descriptions of all chains; sites are numbered in stream order, chain after chain."""
    described: list[ChainReport] = []
    for i, chain in enumerate(chains):
        first = sum(earlier.num_sites for earlier in described)
        described.append(describe_chain(chain, first, plans[i] if plans else None))
    return tuple(described)


def block_size_of(report: Report, chain: ChainReport) -> int:
    """Sublayers per block of ``chain`` in a planned report."""
    assert report.config is not None
    return report.config.resolved_block_size(chain.num_sublayers)
