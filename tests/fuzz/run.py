"""The long run: random networks through everything, in chunks, with a table at the end.

    python tests/fuzz/run.py --networks 2000 --seed 7 --failures FOLDER --record FILE

Chunk k of seed s is hypothesis seeded with (s, k), so that a failure comes again from the numbers in its file, and a run that was
interrupted goes on with the chunks that its record lacks.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import multiprocessing
import resource
import time
import traceback
from pathlib import Path
from typing import Annotated

import hypothesis
import torch
import typer
from check import Mismatch, Outcome, check
from hypothesis import HealthCheck, Phase
from modules import source_of
from networks import Network, Options
from rich.console import Console
from rich.table import Table
from strategies import networks, options

CHUNK = 50
_THOROUGH = 5  # one network in so many goes through detect, convert_ and torch.compile as well


@dataclasses.dataclass
class Failure:
    place: str
    error: str
    recipe: str
    source: str


@dataclasses.dataclass
class Tally:
    """What became of the networks of a chunk, or of all."""

    job: tuple[int, ...] = ()  # of a chunk: see run_chunk
    networks: int = 0
    seconds: float = 0.0
    memory: int = 0  # peak resident set of a process, KiB
    kinds: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    sites: int = 0
    zero_error: float = 0.0
    error: float = 0.0
    gradient_error: float = 0.0
    failures: list[Failure] = dataclasses.field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.kinds[outcome.kind, outcome.reason] += 1
        self.sites += outcome.sites
        self.zero_error = max(self.zero_error, outcome.zero_error)
        self.error = max(self.error, outcome.error)
        self.gradient_error = max(self.gradient_error, outcome.gradient_error)

    def merge(self, other: Tally) -> None:
        self.networks += other.networks
        self.seconds += other.seconds
        self.memory = max(self.memory, other.memory)
        self.kinds += other.kinds
        self.sites += other.sites
        self.zero_error = max(self.zero_error, other.zero_error)
        self.error = max(self.error, other.error)
        self.gradient_error = max(self.gradient_error, other.gradient_error)
        self.failures += other.failures

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        return json.dumps({**fields, "kinds": [[*key, count] for key, count in self.kinds.items()]})

    @classmethod
    def from_json(cls, text: str) -> Tally:
        fields = json.loads(text)
        kinds = collections.Counter({(kind, reason): count for kind, reason, count in fields.pop("kinds")})
        failures = [Failure(**failure) for failure in fields.pop("failures")]
        return cls(**fields, kinds=kinds, failures=failures)


def run_chunk(job: tuple[int, int, int]) -> Tally:
    """Networks of one chunk: (seed, chunk, how many)."""
    seed, chunk, count = job
    torch.set_num_threads(1)
    tally = Tally(job)
    start = time.perf_counter()

    @hypothesis.seed(seed * 1_000_003 + chunk)
    @hypothesis.settings(
        database=None, max_examples=count, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @hypothesis.given(networks(), options)
    def each(network: Network, drawn: Options) -> None:
        tally.networks += 1
        try:
            tally.add(check(network, drawn, thorough=tally.networks % _THOROUGH == 0))
        except Exception as error:
            place = f"seed {seed}, chunk {chunk}, network {tally.networks}"
            kind = "" if isinstance(error, Mismatch) else traceback.format_exc(limit=-6)
            recipe = f"{network!r}\n{drawn!r}"
            tally.failures.append(Failure(place, f"{type(error).__name__}: {error}\n{kind}", recipe, source_of(network)))
            tally.kinds["failed", f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"] += 1

    each()
    tally.seconds = time.perf_counter() - start
    tally.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return tally


def table_of(tally: Tally) -> Table:
    table = Table(title=f"{tally.networks} networks, {tally.seconds / max(1, tally.networks):.2f} s each", title_justify="left")
    table.add_column("outcome")
    table.add_column("reason")
    table.add_column("networks", justify="right")
    for (kind, reason), count in sorted(tally.kinds.items(), key=lambda entry: (entry[0][0], -entry[1])):
        table.add_row(kind, reason.replace("[", r"\["), str(count))
    table.add_section()
    for name, value in (
        ("sites", str(tally.sites)),
        ("largest relative error, zero queries", f"{tally.zero_error:.1e}"),
        ("largest relative error, random queries", f"{tally.error:.1e}"),
        ("largest relative error of a gradient", f"{tally.gradient_error:.1e}"),
        ("peak memory of a process", f"{tally.memory / 1024:.0f} MiB"),
    ):
        table.add_row(name, "", value)
    return table


def main(
    networks: Annotated[int, typer.Option(help="How many networks.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    failures: Annotated[Path | None, typer.Option(help="A folder for the sources of networks that fail.")] = None,
    record: Annotated[Path | None, typer.Option(help="A file of outcomes by chunk: what it has is not run again.")] = None,
) -> None:
    """Check random networks; exit code 1 if one fails."""
    jobs = [(seed, chunk, min(CHUNK, networks - chunk * CHUNK)) for chunk in range(-(-networks // CHUNK))]
    total = Tally()
    if record is not None and record.exists():
        known = {tuple(tally.job): tally for tally in map(Tally.from_json, record.read_text().splitlines())}
        for job in [job for job in jobs if job in known]:
            total.merge(known[job])
            jobs.remove(job)
    progress = Console(stderr=True)
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=8) as pool:  # Dynamo keeps a part of every capture
        for tally in pool.imap_unordered(run_chunk, jobs):
            for failure in tally.failures:
                progress.print(f"{failure.place}: {failure.error.splitlines()[0][:200]}", markup=False, highlight=False)
                if failures is not None:
                    failures.mkdir(parents=True, exist_ok=True)
                    comment = "".join(
                        f"# {line}\n" for line in f"{failure.place}\n{failure.error}\n{failure.recipe}".splitlines()
                    )
                    name = failure.place.replace(", ", "_").replace(" ", "")
                    (failures / f"{name}.py").write_text(comment + "\n" + failure.source)
            total.merge(tally)
            if record is not None:
                with record.open("a") as file:
                    file.write(tally.to_json() + "\n")
            progress.print(
                f"{total.networks} of {networks}, {len(total.failures)} failed, {tally.seconds / tally.networks:.2f} s each, "
                f"{tally.memory / 1024:.0f} MiB"
            )
        pool.close()
        pool.join()
    Console().print(table_of(total))
    raise typer.Exit(1 if total.failures else 0)


if __name__ == "__main__":
    typer.run(main)
