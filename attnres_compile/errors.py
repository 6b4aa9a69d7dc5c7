"""What can go wrong, one class per way out. Every message names the thing, the place and the way out."""

from __future__ import annotations


class AttnResError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(AttnResError, ValueError):
    """An option that is unknown, has a bad value, or contradicts the model or another option."""


class NoResidualChainError(AttnResError, ValueError):
    """No residual chain in the model can be rewritten; the message lists the nearest misses."""


class ChainCutError(AttnResError, ValueError):
    """The captured graph holds only a part of the model: a graph break or DDP's graph splitting cut the chain."""


class ParameterMismatchError(AttnResError, ValueError):
    """The graph and the attached AttnRes parameters do not describe the same chain."""


class CheckpointError(AttnResError, ValueError):
    """A checkpoint that can't be read or written, is damaged, or lacks what its configuration speaks of."""


class CaptureError(AttnResError, ValueError):
    """The model can't be captured, or a captured graph is called with arguments that it was not captured for."""


class NotRewrittenError(AttnResError, RuntimeError):
    """A converted model ran, or was about to run, with its standard residual stream."""


class VerificationError(AttnResError, RuntimeError):
    """A pass left a graph that breaks an invariant: a defect of this package, never a user's mistake."""


class ModelTypeError(AttnResError, TypeError):
    """What was given is no module that can be captured."""


class PartitionError(AttnResError, ValueError):
    """The rewritten graph can't be cut into the pipeline stages that were asked for."""


class PlacementError(AttnResError, ValueError):
    """Ranks hold the residual stream, or the AttnRes parameters, in a way that depth attention can't be computed on."""


class TransferError(AttnResError, RuntimeError):
    """A value between pipeline stages was lost, doubled, of another shape or dtype, or did not arrive."""
