"""The command line ``attnres``. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 1 the model has no residual chain that can be rewritten, 2 bad input.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

import attnres_compile
from attnres_compile import env as environment
from attnres_compile.errors import AttnResError

if TYPE_CHECKING:
    from torch import nn

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
    model = _build_on_meta(src, trust_remote_code)
    try:
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


def _read_config(src: Path) -> tuple[Path, dict[str, Any]]:
    """The config.json that ``src`` names and its content, checked as far as that goes without Transformers."""
    if not src.exists():
        _fail(f"{src}: no such file or directory")
    path = src / "config.json" if src.is_dir() else src
    if not path.is_file():
        _fail(f"{src}: has no config.json, so it is no Transformers model directory")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _fail(f"{path}: not JSON: {error}", error)
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        _fail(f"{path}: has no model_type, so it is no Transformers configuration")
    return path, content


def _build_on_meta(src: Path, trust_remote_code: bool) -> nn.Module:
    """The model that ``src`` describes, on the meta device: its structure without its memory."""
    path, content = _read_config(src)
    try:
        import transformers
    except ImportError as error:
        _fail(f'Transformers can\'t be imported ({error}); install it with: pip install "attnres-compile[transformers]"', error)
    import torch

    if content["model_type"] not in transformers.CONFIG_MAPPING and not (trust_remote_code and "auto_map" in content):
        way_out = "; it ships its own code, which --trust-remote-code would run" if "auto_map" in content else ""
        _fail(f"{path}: Transformers {transformers.__version__} knows no model_type {content['model_type']!r}{way_out}")
    transformers.logging.set_verbosity_error()  # its advice is for those who run the model
    # Whatever Transformers raises here is about a file that the user gave: a field of the wrong type, a value out of range,
    # code that is not there. It documents no classes for these errors, so all are caught.
    try:
        name = path.parent if src.is_dir() else path
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        for part in (config, config.get_text_config()):
            part.use_cache = False  # an empty key-value cache on the meta device can't be captured, and holds no residuals
        with torch.device("meta"):
            model: nn.Module = _instantiate(transformers, config, trust_remote_code)
    except Exception as error:
        _fail(f"{path}: Transformers can't build this model: {type(error).__name__}: {error}", error)
    return model.eval().to("meta")  # some parameters are made by constructors that ignore the device


def _instantiate(transformers: Any, config: Any, trust_remote_code: bool) -> Any:
    """The class that ``architectures`` names where Transformers has it, else the class that ``model_type`` maps to."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named(config)
    remote = getattr(config, "auto_map", None) or {}
    causal = "AutoModelForCausalLM" in remote if remote else type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    causal = causal and not config.is_encoder_decoder  # of which it would be the decoder alone
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    return auto.from_config(config, trust_remote_code=trust_remote_code)
