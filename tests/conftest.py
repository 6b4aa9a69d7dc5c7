"""Set-up of the tests: no network, no shadowing, the same numbers every time."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels then run on the CPU

ROOT = Path(__file__).resolve().parent.parent
# On sys.path, the root would let our kernels/ pass for the package `kernels` that Transformers imports.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("support", "zoo", "fuzz")]

import hypothesis
import pytest
import torch

# Compiling takes seconds, so there is no deadline; a failure must show again on the next run.
hypothesis.settings.register_profile("attnres", deadline=None, derandomize=True)
hypothesis.settings.load_profile("attnres")


@pytest.fixture(autouse=True)
def fresh_torch():
    """Every test starts without compiled code and with the same random numbers."""
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT
