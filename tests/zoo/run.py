"""The whole zoo, in shards: ``python tests/zoo/run.py``. Writes verdicts.json and RESULTS.md.

Every model is built, captured, rewritten and checked in a worker process, within a time limit. With ``--only`` the rows of
the chosen models are renewed and the others kept.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
sys.path.insert(0, str(HERE.parent / "support"))

VERDICTS = HERE / "verdicts.json"
RESULTS = HERE / "RESULTS.md"


class Shard:
    """A worker process, and the model that it is busy with."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.name: str | None = None
        self.deadline = 0.0

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(connection: Connection) -> None:
    """Measure each model that is named on ``connection`` until nothing more comes."""
    import warnings

    import torch
    import transformers
    from entries import all_entries
    from interpreter import make_faithful
    from measure import measure

    make_faithful()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    entries = {entry.name: entry for entry in all_entries()}
    while (name := connection.recv()) is not None:
        try:
            row: dict[str, Any] = json.loads(measure(entries[name]).to_json())
        except Exception as error:  # a fault of ours: the parent reports it and goes on with the others
            row = {"failure": f"{type(error).__name__}: {error}"}
        connection.send(row)


def measure_all(names: list[str], shards: int, limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, fields of its row) as they come; {"failure": why} where the check itself failed, died or took too long."""
    pending = list(reversed(names))
    workers: list[Shard] = []
    while pending or workers:
        while pending and len(workers) < shards:
            workers.append(Shard())
        for shard in workers:
            if shard.name is None and pending:
                shard.name, shard.deadline = pending.pop(), time.monotonic() + limit
                shard.connection.send(shard.name)
        for shard in [shard for shard in workers if shard.name is None]:
            shard.kill()
            workers.remove(shard)
        ready = wait([shard.connection for shard in workers], timeout=1.0)
        for shard in list(workers):
            assert shard.name is not None
            if shard.connection in ready:
                try:
                    yield shard.name, shard.connection.recv()
                    shard.name = None
                except EOFError:
                    yield shard.name, {"failure": "the process died (out of memory?)"}
                    shard.kill()
                    workers.remove(shard)
            elif time.monotonic() > shard.deadline:
                yield shard.name, {"failure": f"took more than {limit:.0f} s"}
                shard.kill()
                workers.remove(shard)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names or groups; all models without it")
    parser.add_argument("--shards", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds per model")
    options = parser.parse_args()

    from entries import all_entries
    from measure import Row
    from rich.console import Console
    from rich.progress import Progress
    from table import faults_of

    entries = all_entries()
    wanted = [e.name for e in entries if not options.only or any(o in e.name or o in e.group for o in options.only)]
    rows: dict[str, Any] = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
    failures: dict[str, str] = {}
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("zoo", total=len(wanted))
        for name, fields in measure_all(wanted, options.shards, options.limit):
            if "failure" in fields:
                failures[name] = fields["failure"]
                progress.console.print(f"{name}: {fields['failure']}", style="red", markup=False, highlight=False)
            else:
                rows[name] = fields
                for fault in faults_of(Row.from_dict(fields)):
                    failures[name] = fault
                    progress.console.print(f"{name}: {fault}", style="red", markup=False, highlight=False)
            progress.advance(task)
            if len(rows) % 50 == 0:
                _save(entries, rows)
            if not console.is_terminal:
                console.print(f"{int(progress.tasks[0].completed)}/{len(wanted)} {name}", highlight=False)
    _save(entries, rows)
    console.print(f"{len(wanted)} models, {len(failures)} faults; the table is in {RESULTS.name}")
    sys.exit(1 if failures else 0)


def _save(entries: list[Any], rows: dict[str, Any]) -> None:
    from measure import Row
    from table import render

    known = {entry.name: rows[entry.name] for entry in entries if entry.name in rows}
    lines = (f"{json.dumps(name)}: {json.dumps(fields)}" for name, fields in known.items())
    VERDICTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line each, for the sake of diffs
    RESULTS.write_text(render([Row.from_dict(fields) for fields in known.values()]))


if __name__ == "__main__":
    main()
