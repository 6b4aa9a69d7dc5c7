"""Inputs for looking at a checkpoint: a text through the directory's own tokenizer, or random ones from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnres_compile.dummies import dummy_inputs
from attnres_compile.errors import CheckpointError


def checkpoint_inputs(folder: Path, model: nn.Module, text: Path | None, tokens: int, seed: int) -> dict[str, Any]:
    """Arguments for the model of a Transformers directory: random ones from ``seed``, its text from a file if one is given.

    Args:
        tokens: how many, or as many as the model has positions for.

    Raises:
        CheckpointError: if there is a text and the model takes none, or if it gives no tokens.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
    tokens = min(tokens, positions) if isinstance(positions, int) and positions > 0 else tokens
    inputs = random_inputs(model, tokens, seed)
    if text is not None:
        if "input_ids" not in inputs:
            raise CheckpointError(f"{folder}: {type(model).__name__} takes no text; leave it out for random inputs")
        inputs |= text_inputs(folder, text, tokens)
    return inputs


def text_inputs(folder: Path, text: Path, tokens: int) -> dict[str, Tensor]:
    """The first ``tokens`` tokens of a UTF-8 file: ``input_ids``, ``[1, tokens]`` or fewer, int64.

    Raises:
        CheckpointError: if the file can't be read or is empty, or if the directory has no tokenizer.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{text}: can't be read as UTF-8 text: {error}") from error
    import transformers

    # Transformers documents no classes for what a tokenizer file may hold or lack, so all are caught.
    try:
        ids = transformers.AutoTokenizer.from_pretrained(folder)(content)["input_ids"][:tokens]
    except Exception as error:
        raise CheckpointError(
            f"{folder}: has no tokenizer that can be loaded ({type(error).__name__}: {error}); leave the text out for random "
            "inputs"
        ) from error
    if not ids:
        raise CheckpointError(f"{text}: gives no tokens")
    return {"input_ids": torch.tensor([ids])}


def random_inputs(model: nn.Module, tokens: int, seed: int) -> dict[str, Any]:
    """Random arguments of a Transformers model: ids uniform over the vocabulary, ``[1, tokens]``, floats from N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    given = {name: value for name, value in dummy_inputs(model).items() if not name.endswith("attention_mask")}
    return {name: _random(name, value, model, tokens, generator) for name, value in given.items()}


def _random(name: str, value: Any, model: nn.Module, tokens: int, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)  # type: ignore[operator, union-attr]
    if name.endswith("input_ids") and isinstance(vocabulary, int):
        return torch.randint(vocabulary, (1, tokens), generator=generator).to(value.device)
    return value
