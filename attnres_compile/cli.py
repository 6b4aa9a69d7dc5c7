"""The command line ``attnres``. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 1 the model has no residual chain that can be rewritten, 2 bad input.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

import attnres_compile
from attnres_compile import env as environment
from attnres_compile.checkpoint import offline, offline_states
from attnres_compile.checkpoint.factory import import_factory, parse_input
from attnres_compile.checkpoint.new_tensors import dtype_named
from attnres_compile.checkpoint.progress import working
from attnres_compile.checkpoint.structure import build_on_meta
from attnres_compile.config import AttnResConfig
from attnres_compile.errors import AttnResError, ConfigError, NoResidualChainError

logger = logging.getLogger(__name__)

NOT_REWRITABLE = 1
BAD_INPUT = 2
_PIPE_WIDTH = 140

# Plain tracebacks: whoever sees one reports a defect, and wants to copy it.
app = typer.Typer(name="attnres", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Source = Annotated[Path, typer.Argument(metavar="SRC", help="A Transformers model directory, or its config.json.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model directory ships.")]
Seed = Annotated[int, typer.Option(help="Of the random inputs.", min=-(2**63), max=2**63 - 1)]


_MODEL_HELP = "For models outside Transformers: a function that returns the model, or the model and its example arguments."
_INPUT_HELP = "With --model: an example argument, such as int64[1,16]; once for each."


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="attnres")
    except OSError as error:  # results can't be printed; of closed pipes typer takes care
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try it again at exit
        print(f"attnres: error: the results can't be printed: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(attnres_compile.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Rewrite PreNorm residual streams into Attention Residuals."""


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print versions and devices, for a bug report."""
    facts = environment.report()
    typer.echo(json.dumps(facts, indent=2) if as_json else environment.format_report(facts))


@app.command()
def detect(src: Source, as_json: AsJson = False, trust_remote_code: TrustRemoteCode = False) -> None:
    """Show the residual chains that can be rewritten, and why others can't. No weights are needed."""
    with _one_line_errors():
        model = build_on_meta(src, trust_remote_code)
        report = attnres_compile.detect(model)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)
    if not report.chains:
        misses = () if as_json else report.near_misses()
        lines = [f"attnres: {src}: no residual chain of {type(model).__name__} can be rewritten"]
        lines[0] += "; the nearest misses:" if misses else ""
        typer.echo("\n".join([*lines, *(f"  - {miss}" for miss in misses)]), err=True)
        raise typer.Exit(NOT_REWRITABLE)


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A Transformers model directory; with --model, a state dict.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The directory, or with --model the file, to write.")],
    variant: Annotated[str | None, typer.Option(help="block (the default) or full.")] = None,
    num_blocks: Annotated[int | None, typer.Option(help="Number of blocks; 8 where --block-size is not given.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Sublayers per block, instead of --num-blocks.")] = None,
    scale: Annotated[str | None, typer.Option(help="preserve (the default), or paper: weights add up to one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the new tensors: float32, bfloat16 or float16.")] = None,
    naming: Annotated[str, typer.Option(help="Names of the new tensors: attnres, kimi-k3 or fla.")] = "attnres",
    model: Annotated[str | None, typer.Option(metavar="PACKAGE.MODULE:FACTORY", help=_MODEL_HELP)] = None,
    inputs: Annotated[list[str] | None, typer.Option("--input", metavar="DTYPE[SHAPE]", help=_INPUT_HELP)] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Take AttnRes out of a converted checkpoint.")] = False,
    link: Annotated[bool, typer.Option("--link", help="Hard links instead of copies for weights.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model directory DST.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a checkpoint with AttnRes that computes what the original computes. No weights are read."""
    with _one_line_errors():
        files = {"overwrite": overwrite, "dry_run": dry_run}
        if is_state := model is not None or offline_states.is_state(src):
            offline_states.require_plain_options(naming, link, trust_remote_code)
        elif inputs:
            raise ConfigError("--input describes the arguments of a model outside Transformers; give --model, too.")
        else:
            files["link"] = link
        if reverse:
            lost, done = (
                offline_states.revert_state(src, dst, **files) if is_state else offline.revert_checkpoint(src, dst, **files)
            )
            facts: dict[str, Any] = {"lost": lost}
            lines = [lost]
        else:
            given = {"variant": variant, "num_blocks": num_blocks, "block_size": block_size, "scale": scale}
            options = {name: value for name, value in given.items() if value is not None}
            config = AttnResConfig.from_options(options) if options else None
            of_tensors = dtype_named(dtype)
            if is_state:
                factory, examples = import_factory(model), [parse_input(text) for text in inputs or ()]
                report, done = offline_states.convert_state(
                    src, dst, config, model=factory, inputs=examples, dtype=of_tensors, **files
                )
            else:
                report, done = offline.convert_checkpoint(
                    src, dst, config, naming=naming, dtype=of_tensors, trust_remote_code=trust_remote_code, **files
                )
            facts, lines = {"report": report.to_dict()}, [report.summary()]
    typer.echo(json.dumps({**done.to_dict(), **facts}, indent=2) if as_json else "\n".join([str(done), *lines]))


@app.command()
def inspect(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A Transformers model directory, converted or not.")],
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="A text to run on; random inputs without.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to run on, or as many as the model has positions for.")] = 128,
    seed: Seed = 0,
    per_token: Annotated[bool, typer.Option("--per-token", help="The values of every token too.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture, by suffix .png or .svg.")] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what a checkpoint attends to over depth: weights, mixing matrix, magnitudes, entropies."""
    with _one_line_errors(), contextlib.ExitStack() as stack:
        from attnres_compile.inspection.measure import inspect_checkpoint  # here, since loading models takes Transformers

        place = stack.enter_context(_picture(plot)) if plot is not None else None
        with working("inspecting"):
            found = inspect_checkpoint(src, text, tokens, seed, per_token, trust_remote_code)
        if place is not None:
            from attnres_compile.inspection import plots

            plots.save(plots.overview(found), place)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        _print(found)


@app.command()
def compare(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="The original: a Transformers model directory.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="What it was converted to, or trained into.")],
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="A text to run both on; random inputs without.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to run on, or as many as the model has positions for.")] = 128,
    seed: Seed = 0,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the comparison as a page, with a drawing.")] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare two checkpoints: outputs, what the norms on the residual streams read, and graphs."""
    with _one_line_errors(), contextlib.ExitStack() as stack:
        from attnres_compile.comparison.checkpoints import compare_checkpoints  # here, since loading models takes Transformers

        if html is not None:
            from attnres_compile.checkpoint.staging import staged_file
            from attnres_compile.comparison.page import page

            place = stack.enter_context(staged_file(html, overwrite=True))
        with working("comparing"):
            found = compare_checkpoints(src, dst, text=text, tokens=tokens, seed=seed, trust_remote_code=trust_remote_code)
        if html is not None:
            place.write_text(page(found), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        _print(found)


@app.command()
def plan(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A model's shape as JSON, a Transformers directory or config.json.")],
    ranks: Annotated[int, typer.Option(help="Pipeline ranks P.")] = 8,
    virtual: Annotated[int, typer.Option(help="Stages per rank V.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of a microbatch.")] = 8192,
    dtype: Annotated[str, typer.Option(help="Of the stream: float32 (fp32), bfloat16 (bf16) or float16 (fp16).")] = "bfloat16",
    num_blocks: Annotated[int | None, typer.Option(help="Blocks, instead of those of SRC.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Sublayers per block, instead of --num-blocks.")] = None,
    boundaries: Annotated[str | None, typer.Option(metavar="N,N,...", help="Where stages 1, 2, ... begin.")] = None,
    schedule: Annotated[str | None, typer.Option(help="As torch names it; 1F1B or Interleaved1F1B by default.")] = None,
    microbatches: Annotated[int, typer.Option(help="Microbatches of a step.")] = 16,
    bandwidth: Annotated[float, typer.Option(help="Of a link between two ranks, each way, in GB/s.")] = 50.0,
    latency: Annotated[float, typer.Option(help="Of a transfer, in microseconds.")] = 10.0,
    flops: Annotated[float, typer.Option(help="That a rank computes, in TFLOP/s.")] = 400.0,
    sweep: Annotated[bool, typer.Option("--sweep", help="Over 2 to 64 ranks, too.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture, by suffix .png or .svg.")] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what moves between pipeline ranks, naive and with cross-stage caching, and simulate a training step."""
    with _one_line_errors(), contextlib.ExitStack() as stack:
        from attnres_compile.pipelining import preview

        place = stack.enter_context(_picture(plot)) if plot is not None else None
        request = preview.Request(
            src, ranks, virtual, tokens, dtype, num_blocks, block_size, preview.places(boundaries), schedule, microbatches,
            bandwidth * 1e9, latency / 1e6, flops * 1e12, trust_remote_code,
        )  # fmt: skip
        with working("simulating"):
            found = preview.preview(request, sweep)
        if place is not None:
            from attnres_compile.pipelining import plots

            plots.save(plots.overview(found.step, found.sweep), place)
    typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else str(found))


def _print(found: Any) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    console.print(found)


@contextlib.contextmanager
def _picture(path: Path) -> Iterator[Path]:
    """Where to write a picture that becomes ``path`` once all went well. It is told before any work if that can't be."""
    from attnres_compile.checkpoint.staging import staged_file
    from attnres_compile.inspection.plots import check_format

    check_format(path)
    with staged_file(path, overwrite=True) as place:
        yield place


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors of ours end the command: exit code 1 where the model has nothing to rewrite, 2 for bad input."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's advice is for those who run the model
            yield
    except NoResidualChainError as error:
        typer.echo(f"attnres: {error}", err=True)
        raise typer.Exit(NOT_REWRITABLE) from error
    except AttnResError as error:
        _fail(str(error), error)
    except BrokenPipeError:
        raise  # typer ends the command quietly
    except OSError as error:
        _fail(str(error), error)


def _fail(message: str, cause: Exception | None = None) -> NoReturn:
    """One line on stderr and exit code 2. TORCH_LOGS="+attnres_compile" shows the traceback of ``cause``."""
    logger.debug("bad input", exc_info=cause)
    typer.echo(f"attnres: error: {' '.join(message.split())}", err=True)
    raise typer.Exit(BAD_INPUT)
