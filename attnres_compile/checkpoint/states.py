"""State dicts of models outside Transformers, whatever they are stored in."""

from __future__ import annotations

from pathlib import Path

from attnres_compile.checkpoint.files import problem
from attnres_compile.checkpoint.state_files import METADATA, SafetensorsFile, StateFile, TorchFile


def open_state(path: Path) -> StateFile:
    """Open a file of safetensors or ``torch.save``, or a directory of torch.distributed.checkpoint.

    Raises:
        CheckpointError: if it is none of these.
    """
    if not path.is_dir():
        return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
    if not (path / METADATA).is_file():
        raise problem(
            path,
            f"has no {METADATA}, so it is no torch.distributed.checkpoint directory; give the file of a state dict, or leave "
            "--model out for a Transformers directory",
        )
    from attnres_compile.checkpoint.distributed import DistributedState  # importing torch.distributed.checkpoint takes its time

    return DistributedState(path)
