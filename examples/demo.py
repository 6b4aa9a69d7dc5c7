"""Train a small Llama, turn it into Block Attention Residuals, and go on training both side by side.

The text is the Python standard library's own source, byte by byte. Both models start from one checkpoint, see the same
batches in the same order for the same number of steps, and each gets a fresh AdamW. What comes out is printed as it is,
better or worse: one seed and minutes of training on a processor show how the tool works, not how good the architecture is.

    python examples/demo.py [--num-blocks 8] [--seed 1] [--quick]
"""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

# Threads that wait by spinning stall each other where other programs use the cores too. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from demo_data import Text, standard_library
from demo_plots import draw
from demo_training import AT_LEAST, Run, console, train, working
from rich.table import Table
from small_llama import small_llama
from torch import Tensor, nn

import attnres_compile as ac
from attnres_compile.inspection.measure import inspect_model
from attnres_compile.inspection.results import ChainInspection


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of the model and of its training, and the seconds after which training stops."""

    layers: int = 8
    hidden: int = 128
    num_blocks: int = 4
    length: int = 128
    batch: int = 16
    validation_batches: int = 16
    steps_pretrain: int = 400
    steps: int = 320
    evaluations: int = 8
    time_limit: float = 440.0


QUICK = Setting(
    layers=2, hidden=64, num_blocks=2, length=64, batch=8, validation_batches=4, steps_pretrain=60, steps=40, evaluations=4
)


def main(
    steps_pretrain: Annotated[int | None, typer.Option(help="Steps before the conversion.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each model after it.", min=1)] = None,
    num_blocks: Annotated[int | None, typer.Option(help="Blocks of Block AttnRes.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the data.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model and few steps: shows that it runs, no more.")] = False,
) -> None:
    """Train a small Llama on the standard library's source, convert it to Block AttnRes, and train both on."""
    started = time.perf_counter()
    setting = QUICK if quick else Setting()
    wanted = {"steps_pretrain": steps_pretrain, "steps": steps, "num_blocks": num_blocks}
    setting = dataclasses.replace(setting, **{name: value for name, value in wanted.items() if value is not None})
    if setting.num_blocks > 2 * setting.layers:
        raise typer.BadParameter(f"{setting.layers} layers are {2 * setting.layers} sublayers: no more blocks than that.")
    out.parent.mkdir(parents=True, exist_ok=True)
    deadline = started + setting.time_limit
    torch.manual_seed(seed)

    text = standard_library()
    validation = text.validation_batches(setting.validation_batches, setting.batch, setting.length)
    batches = stream(text, setting, seed)
    model = small_llama(setting.layers, setting.hidden, setting.length)
    console.print(
        f"Text: the standard library, {len(text.train) / 1e6:.1f} MB in {text.train_files} files for training, "
        f"{len(text.validation) / 1e6:.1f} MB in {text.validation_files} others for validation."
    )

    pretraining = Run("pretraining", model, torch.compile(model))
    console.print(f"Model: Llama with {setting.layers} layers and {pretraining.num_parameters:,} parameters.")
    with working("compiling"):
        pretraining.compile(next(batches))
    pretrain(pretraining, batches, validation, setting, deadline)
    console.print(
        f"It has learned: {pretraining.validation[-1][1]:.3f} nats per byte of validation text; the frequencies of bytes alone "
        f"would give {text.unigram_entropy():.3f}.\n"
    )

    # The baseline goes on in the compiled form that it has. The copy is converted before its optimizer is built.
    baseline = Run("baseline", model, pretraining.compiled, pretraining.compile_seconds)
    converted = copy.deepcopy(model)
    ids = validation[0][:, :-1]
    with working("converting a copy"):
        config = ac.AttnResConfig(variant="block", num_blocks=setting.num_blocks)
        report = ac.convert_(converted, config, args=(ids,), kwargs={"use_cache": False})
    console.print(report)
    attnres = Run("block AttnRes", converted, torch.compile(converted, backend="attnres"))
    with working("compiling the converted model"):
        attnres.compile(next(batches))
    tell_logits(model, baseline, attnres, ids)

    runs = [baseline, attnres]
    # What a step of the baseline takes over a longer time is known; what the other takes beside it is measured now.
    batch = next(batches)
    pair_of_steps = statistics.mean(pretraining.seconds) * (1 + attnres.measure(batch) / baseline.measure(batch))
    count = affordable(setting, pair_of_steps, deadline - time.perf_counter())
    console.print(f"Both train for {count} steps on the same batches, each with a fresh AdamW, step by step in turns.")
    if train(runs, batches, validation, count, setting.evaluations, deadline) < count:
        console.print(f"The machine has become slower: both stopped after {len(baseline.losses)} steps.")

    with working("reading the depth attention"):
        (depth,) = inspect_model(converted, kwargs={"input_ids": ids, "use_cache": False}).chains
    draw(runs, depth, out)
    tell_depth(depth)
    tell_results(runs)
    console.print(f"Picture: {out}. All of this took {time.perf_counter() - started:.0f} s.")


def stream(text: Text, setting: Setting, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield text.batch(generator, setting.batch, setting.length)


def pretrain(run: Run, batches: Iterator[Tensor], validation: list[Tensor], setting: Setting, deadline: float) -> None:
    """Until the steps are done, or a third of the time that is left: the conversion, and two runs, are still to come."""
    now = time.perf_counter()
    done = train([run], batches, validation, setting.steps_pretrain, 1, now + (deadline - now) / 3, decay=False)
    if done < setting.steps_pretrain:
        console.print(f"This machine is slow: {done} instead of {setting.steps_pretrain} steps.")


def affordable(setting: Setting, pair_of_steps: float, available: float) -> int:
    """As many of the wanted steps of both models as fit the time that is left, with some to spare."""
    # An evaluation is forward passes, which take a third of a step or so.
    evaluating = (setting.evaluations + 1) * setting.validation_batches * pair_of_steps / 3
    count = min(setting.steps, max(AT_LEAST, int((0.85 * available - evaluating) / pair_of_steps)))
    if count < setting.steps:
        console.print(f"A step of both takes {pair_of_steps:.2f} s here: time for {count} instead of {setting.steps} steps.")
    return count


def tell_logits(original: nn.Module, baseline: Run, attnres: Run, ids: Tensor) -> None:
    """Zero queries leave the function as it was. What compiling alone changes stands beside it."""
    with torch.no_grad():
        expected = original(input_ids=ids, use_cache=False).logits
    table = Table("against the original, run eagerly", "max difference", "relative", title="Logits on validation text")
    for name, run in (("original under Inductor", baseline), ("converted under attnres", attnres)):
        error = float((run.logits(ids).detach() - expected).abs().max())
        table.add_row(name, f"{error:.1e}", f"{error / float(expected.abs().max()):.1e}")
    console.print(table)


def tell_depth(depth: ChainInspection) -> None:
    table = Table("reader", "reads most from", "equal shares", title="Depth attention on validation text")
    for site in depth.sites:
        heaviest = ", ".join(f"{source} {weight:.0%}" for source, weight in site.heaviest(2))
        table.add_row(site.name, heaviest, f"{1 / len(site.sources):.0%}")
    console.print(table)


def tell_results(runs: list[Run]) -> None:
    baseline, attnres = runs
    table = Table("", title=f"{len(baseline.losses)} more steps: validation loss in nats per byte, time, size")
    for header in ("before", "after", "per step", "compile", "parameters", "added"):
        table.add_column(header, justify="right")
    for run in runs:
        added = run.num_parameters - baseline.num_parameters
        table.add_row(
            run.name,
            f"{run.validation[0][1]:.4f}",
            f"{run.validation[-1][1]:.4f}",
            f"{1000 * statistics.median(run.seconds):.0f} ms",
            f"{run.compile_seconds:.0f} s",
            f"{run.num_parameters:,}",
            f"{added:,}",
        )
    console.print(table)
    difference = attnres.windows - baseline.windows
    mean, error = float(difference.mean()), float(difference.std()) / len(difference) ** 0.5
    on_the_way = [b - a for (_, a), (_, b) in zip(baseline.validation[1:-1], attnres.validation[1:-1], strict=True)]
    between = f"; on the way the difference was between {min(on_the_way):+.4f} and {max(on_the_way):+.4f}" if on_the_way else ""
    slowdown = statistics.median(attnres.seconds) / statistics.median(baseline.seconds)
    size = attnres.num_parameters / baseline.num_parameters - 1
    console.print(
        f"Block AttnRes ends {abs(mean):.4f} nats per byte {'below' if mean < 0 else 'above'} the baseline "
        f"(standard error {error:.4f} over {len(difference)} validation windows{between}). "
        f"It takes {slowdown:.2f} times the time per step and {size:.2%} more parameters. "
        "This is one seed: what another would change is not in the standard error.\n"
        "The baseline's compile time includes the start of Inductor, since it was compiled first."
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except KeyboardInterrupt:
        sys.exit(130)
