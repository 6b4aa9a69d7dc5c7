"""Attention Residuals for PyTorch models: ``torch.compile(model, backend="attnres")`` rewrites PreNorm residual streams."""

from pathlib import Path

# In a checkout, passes/, kernels/ and patterns/ stand beside this folder, where an installed package has them inside.
if not Path(__file__).with_name("passes").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from attnres_compile.checkpoint.loading import from_pretrained
from attnres_compile.compare import compare
from attnres_compile.config import AttnResConfig
from attnres_compile.convert import convert_, detect, rewrite
from attnres_compile.errors import (
    AttnResError,
    CaptureError,
    ChainCutError,
    CheckpointError,
    ConfigError,
    ModelTypeError,
    NoResidualChainError,
    NotRewrittenError,
    ParameterMismatchError,
    VerificationError,
)
from attnres_compile.report import Refusal, Report

__version__ = "0.1.0"

__all__ = [
    "AttnResConfig",
    "AttnResError",
    "CaptureError",
    "ChainCutError",
    "CheckpointError",
    "ConfigError",
    "ModelTypeError",
    "NoResidualChainError",
    "NotRewrittenError",
    "ParameterMismatchError",
    "Refusal",
    "Report",
    "VerificationError",
    "__version__",
    "compare",
    "convert_",
    "detect",
    "from_pretrained",
    "rewrite",
]
