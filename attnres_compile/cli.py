"""The command line ``attnres``. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 1 the model has no residual chain that can be rewritten, 2 bad input.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

import attnres_compile
from attnres_compile import env as environment
from attnres_compile.errors import AttnResError
from attnres_compile.structure import build_on_meta

logger = logging.getLogger(__name__)

NOT_REWRITABLE = 1
BAD_INPUT = 2
_PIPE_WIDTH = 140

# Plain tracebacks: whoever sees one reports a defect, and wants to copy it.
app = typer.Typer(name="attnres", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Source = Annotated[Path, typer.Argument(metavar="SRC", help="A Transformers model directory, or its config.json.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model directory ships.")]


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="attnres")


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
    try:
        model = build_on_meta(src, trust_remote_code)
        with warnings.catch_warnings(action="ignore"):  # torch's advice is for those who run the model
            report = attnres_compile.detect(model)
    except AttnResError as error:
        _fail(str(error), error)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, _PIPE_WIDTH)
        console.print(report)
    if not report.chains:
        misses = () if as_json else report.near_misses()
        lines = [f"attnres: {src}: no residual chain of {type(model).__name__} can be rewritten"]
        lines[0] += "; the nearest misses:" if misses else ""
        typer.echo("\n".join([*lines, *(f"  - {miss}" for miss in misses)]), err=True)
        raise typer.Exit(NOT_REWRITABLE)


def _fail(message: str, cause: Exception | None = None) -> NoReturn:
    """One line on stderr and exit code 2. TORCH_LOGS="+attnres_compile" shows the traceback of ``cause``."""
    logger.debug("bad input", exc_info=cause)
    typer.echo(f"attnres: error: {' '.join(message.split())}", err=True)
    raise typer.Exit(BAD_INPUT)
