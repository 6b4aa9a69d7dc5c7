"""Offline conversion of state dicts, of models outside Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnres_compile.checkpoint.factory import Factory, build, guess_inputs
from attnres_compile.checkpoint.folders import Conversion
from attnres_compile.checkpoint.naming import OWN_TENSOR, host_in, site_names
from attnres_compile.checkpoint.new_tensors import common_dtype, new_tensors, what_is_lost
from attnres_compile.checkpoint.progress import working
from attnres_compile.checkpoint.staging import check_destination
from attnres_compile.checkpoint.state_files import METADATA, StateFile, prefix_of
from attnres_compile.checkpoint.states import open_state
from attnres_compile.config import AttnResConfig
from attnres_compile.convert import planned
from attnres_compile.errors import CheckpointError, ConfigError
from attnres_compile.layout import OWN_NAMING, StoredConversion, layout_of
from attnres_compile.report import Report


def convert_state(
    source: str | Path, destination: str | Path, config: AttnResConfig | None = None, *, model: Factory,
    inputs: Sequence[Tensor] = (), dtype: torch.dtype | None = None, overwrite: bool = False, dry_run: bool = False,
) -> tuple[Report, Conversion]:  # fmt: skip
    """Write a state dict with AttnRes: a file of safetensors or ``torch.save``, or a torch.distributed.checkpoint directory.

    Args:
        model: builds the model that the state dict belongs to; see :func:`attnres_compile.checkpoint.factory.build`.
        inputs: the model's example arguments, on the meta device, where ``model`` returns none.

    The others, and what it returns and raises, are those of :func:`attnres_compile.checkpoint.offline.convert_checkpoint`.
    """
    state, destination = open_state(Path(source)), Path(destination)
    check_destination(destination, overwrite, directory=state.is_directory)
    if state.stored is not None:
        raise CheckpointError(f"{source}: was converted before; undo that first: attnres convert --reverse SRC DST")
    built, args, kwargs = build(model, "meta")
    prefix = prefix_of(built, state)
    if not args and not kwargs:
        args = tuple(inputs) or guess_inputs(built)
    with working(f"capturing {type(built).__name__}"):
        report = planned(built, config, args, kwargs)
    assert report.config is not None
    stored = StoredConversion(report.config, layout_of(report))
    tensors = new_tensors(stored, dtype or common_dtype(state.dtypes.values()), prefix)
    if not dry_run:
        state.write(destination, (), tensors, stored, overwrite)
    return report, _done(state, destination, "added", list(tensors.values()), dry_run)


def revert_state(
    source: str | Path, destination: str | Path, *, overwrite: bool = False, dry_run: bool = False
) -> tuple[str, Conversion]:
    """The inverse of :func:`convert_state`, as ``revert_checkpoint`` is that of ``convert_checkpoint``."""
    state, destination = open_state(Path(source)), Path(destination)
    check_destination(destination, overwrite, directory=state.is_directory)
    if state.stored is None:
        raise CheckpointError(f"{source}: was not converted: it says nothing of AttnRes.")
    tensors = state.read([name for name in state.dtypes if OWN_TENSOR.match(name)])
    names = site_names(state.stored.layout, state.stored.config, state.stored.naming, host_in(tensors))
    loss = what_is_lost(tensors, names, state.stored)
    if not dry_run:
        state.write(destination, tensors.keys(), {}, None, overwrite)
    done = _done(state, destination, "removed", list(tensors.values()), dry_run)
    return loss, done


def is_state(source: Path) -> bool:
    """Whether ``source`` is a state dict and no Transformers directory: a file, or a torch.distributed.checkpoint directory."""
    return source.is_file() or ((source / METADATA).is_file() and not (source / "config.json").is_file())


def require_plain_options(naming: str, link: bool, trust_remote_code: bool) -> None:
    """Raises ConfigError for options that mean something for Transformers directories alone."""
    given = {"--naming": naming != OWN_NAMING, "--link": link, "--trust-remote-code": trust_remote_code}
    for name, is_given in given.items():
        if is_given:
            raise ConfigError(f"{name} is for Transformers directories; leave it out for a state dict.")


def _done(state: StateFile, destination: Path, action: str, tensors: Sequence[Tensor], dry_run: bool) -> Conversion:
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return Conversion(state.path, destination, dry_run, action, len(tensors), nbytes, (), (), (destination.name,), (), ())
