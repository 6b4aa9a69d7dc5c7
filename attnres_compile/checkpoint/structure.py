"""Models without their weights: what a Transformers directory, or a function of the user's, describes, on the meta device."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnres_compile.checkpoint.files import in_one_line, problem, quoted
from attnres_compile.errors import CheckpointError

_SHARED_LAYERS = 1000  # so many may use the same tensors


def read_config(source: Path) -> tuple[Path, dict[str, Any]]:
    """The config.json of the directory ``source``, or that file itself, and its content as far as that goes without Transformers.

    Raises:
        CheckpointError: if there is none, or if it is no Transformers configuration.
    """
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or directory")
    path = source / "config.json" if source.is_dir() else source
    if not path.is_file():
        raise CheckpointError(f"{source}: has no config.json, so it is no Transformers model directory")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise problem(path, f"not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise CheckpointError(f"{path}: has no model_type, so it is no Transformers configuration")
    return path, content


def transformers_config(source: Path, trust_remote_code: bool) -> Any:
    """The Transformers configuration of a directory or of its config.json.

    Raises:
        CheckpointError: if Transformers is missing, does not know the model, or refuses the values.
    """
    path, content = read_config(source)
    transformers = _transformers()
    if content["model_type"] not in transformers.CONFIG_MAPPING and not (trust_remote_code and "auto_map" in content):
        way_out = "; it ships its own code, which --trust-remote-code would run" if "auto_map" in content else ""
        version = transformers.__version__
        raise problem(path, f"Transformers {version} knows no model_type {quoted(content['model_type'])}{way_out}")
    # Whatever Transformers raises here is about a file that the user gave: a field of the wrong type, a value out of range,
    # code that is not there. It documents no classes for these errors, so all are caught.
    try:
        with quietly():
            name = path.parent if source.is_dir() else path
            return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise problem(path, f"Transformers can't read it: {in_one_line(error)}") from error


def check_depth(config: Any, num_tensors: int, source: Path) -> None:
    """Hold the number of layers against that of the tensors: building a model of a billion layers would take forever.

    Raises:
        CheckpointError: if there can't be so many.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > max(num_tensors, _SHARED_LAYERS):
        raise problem(
            source, f"its config.json speaks of {layers:,} layers, its weights are {num_tensors:,} tensors; one is damaged"
        )


def build_on_meta(source: Path, trust_remote_code: bool = False, num_tensors: int | None = None) -> nn.Module:
    """The model that a Transformers directory describes, on the meta device, in evaluation mode.

    Args:
        num_tensors: how many its weights are, where they are known.

    Raises:
        CheckpointError: if Transformers can't build it, or if it has more layers than tensors.
    """
    config = transformers_config(source, trust_remote_code)
    if num_tensors is not None:
        check_depth(config, num_tensors, source)
    for part in (config, config.get_text_config()):
        part.use_cache = False  # an empty key-value cache on the meta device can't be captured, and holds no residuals
    try:
        with quietly(), torch.device("meta"):
            model: nn.Module = _instantiate(config, trust_remote_code)
    except Exception as error:
        raise problem(source, f"Transformers can't build this model: {in_one_line(error)}") from error
    return model.eval().to("meta")  # some parameters are made by constructors that ignore the device


def model_class(config: Any) -> Any:
    """The class that ``architectures`` names where Transformers has it, else the auto class for ``model_type``."""
    transformers = _transformers()
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    remote = getattr(config, "auto_map", None) or {}
    causal = "AutoModelForCausalLM" in remote if remote else type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    causal = causal and not config.is_encoder_decoder  # of which it would be the decoder alone
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence advice of Transformers, which is for those who run the model that is being built, and bars that nobody sees."""
    logging = _transformers().logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _instantiate(config: Any, trust_remote_code: bool) -> Any:
    chosen = model_class(config)
    is_auto = not issubclass(chosen, _transformers().PreTrainedModel)
    return chosen.from_config(config, trust_remote_code=trust_remote_code) if is_auto else chosen(config)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f'Transformers can\'t be imported ({error}); install it with: pip install "attnres-compile[transformers]"'
        ) from error
    return transformers
