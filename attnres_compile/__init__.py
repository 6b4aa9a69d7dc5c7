"""Attention Residuals for PyTorch models: ``torch.compile(model, backend="attnres")`` rewrites PreNorm residual streams."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    PartitionError,
    PlacementError,
    TransferError,
    VerificationError,
)
from attnres_compile.pipelining.partition import partition
from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.report import Refusal, Report
from attnres_compile.split import SplitModule

if TYPE_CHECKING:
    from attnres_compile.pipeline import BlockCacheStage
    from attnres_compile.pipelining.states import rank_module

__version__ = "0.1.0"

__all__ = [
    "AttnResConfig",
    "AttnResError",
    "BlockCacheStage",
    "CaptureError",
    "ChainCutError",
    "CheckpointError",
    "ConfigError",
    "ModelTypeError",
    "NoResidualChainError",
    "NotRewrittenError",
    "ParameterMismatchError",
    "PartitionError",
    "PipelinePlan",
    "PlacementError",
    "Refusal",
    "Report",
    "SplitModule",
    "TransferError",
    "VerificationError",
    "__version__",
    "compare",
    "convert_",
    "detect",
    "from_pretrained",
    "partition",
    "rank_module",
    "rewrite",
]


def __getattr__(name: str) -> Any:
    """What needs torch.distributed.pipelining, which takes seconds to import and is not in every build of torch."""
    if name == "BlockCacheStage":
        from attnres_compile.pipeline import BlockCacheStage

        return BlockCacheStage
    if name == "rank_module":
        from attnres_compile.pipelining.states import rank_module

        return rank_module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
