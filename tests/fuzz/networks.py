"""Recipes of residual networks.

A recipe is plain frozen data: ``modules`` prints it as PyTorch source, ``definition`` computes it with Attention Residuals
by the definition, ``oracle`` says what a detector must find in it.
"""

from __future__ import annotations

import dataclasses

# What a norm computes, by spelling; definition.NORMS holds the formulas.
NORMS = (
    "nn.LayerNorm", "nn.LayerNorm without weight", "nn.RMSNorm", "nn.RMSNorm without weight", "F.layer_norm", "F.rms_norm",
    "rms by rsqrt", "rms by pow", "rms by sqrt", "rms one plus weight", "rms by norm", "rms by einsum", "F.normalize",
    "layer by mean", "layer by var", "layer by var_mean", "layer by std", "mean of abs", "amax", "group of one", "rms upcast",
    "rms in float32",
)  # fmt: skip
# Spellings over one module's parameters or none at all that can stand in the forward method itself.
BRANCHES = ("linear", "mlp", "gated", "in-place mlp", "functional", "attention", "tokens", "conv", "cross", "experts")
TOKENWISE = ("linear", "mlp", "gated", "in-place mlp", "functional", "experts")
ADDS = (
    "x + b", "b + x", "x += b", "x.add_(b)", "torch.add", "x.add", "alpha", "x - b", "x - (-b)", "x -= b", "rsub", "addcmul",
    "addcmul_", "lerp", "lerp to the sum", "where", "where reversed", "stack", "builtin sum", "b += x", "add on tokens",
    "add on transposed", "transposed in place", "add_ with alpha", "weighted", "halved sum", "index_add", "split off",
    "slice in place", "masked sum", "masked after", "squared", "gate scalar", "einsum", "torch.sum",
)  # fmt: skip
# Spellings with operations between tokens or batch that need the shape [batch, tokens, width].
RANK_THREE_ADDS = ("add on transposed", "transposed in place", "index_add", "split off")
IN_PLACE_ADDS = ("x += b", "x.add_(b)", "x -= b", "addcmul_", "transposed in place", "add_ with alpha", "slice in place")
TRANSFORMS = (
    "mask", "mask in place", "scale", "divide", "scale in place", "parameter", "transpose", "flat", "clone", "contiguous",
    "cast", "dropout", "slice all", "square root", "plus zero", "rejoined", "doubled", "unsqueeze",
)  # fmt: skip
IN_PLACE_TRANSFORMS = ("mask in place", "scale in place")
MAYBE_VIEWS = ("flat", "contiguous")  # copies or views, as the strides have it
READERS = (
    "hidden", "hidden view", "hidden clone", "pooled", "router", "normed", "largest", "token", "detached", "squares", "scaled",
    "hidden detached", "statistics",
)  # fmt: skip
EMBEDDINGS = (
    "ids", "ids and positions", "scaled ids", "normed ids", "patches", "patches and cls", "input", "projected input", "latents",
    "straight through", "dropped ids", "masked patches",
)  # fmt: skip
HEADS = ("norm and linear", "norm", "raw", "raw linear", "pooled norm", "norm pooled", "token norm", "sum normed")
GATES = ("", "", "", "", "layer scale", "gate of norm", "scalar", "dropout", "nn.Dropout", "constant", "condition", "rounded")

# Networks whose every sublayer is one of these are to be refused, for the reason in oracle.REASONS.
NEAR_MISSES = (
    "post-norm", "reordered", "highway", "gated recurrent", "raw branches", "soft sign", "tanh norm", "norm over tokens",
    "concatenated", "detached", "norm of two", "no skip", "overwritten", "global maximum", "skip through the norm",
    "sliced overwrite", "depth attention",
)  # fmt: skip


# Sublayers that may stand among others in a wild network: nothing is foretold of it but that it computes what it computed.
WILD = (
    *NEAR_MISSES, "relu behind", "scaled behind", "no grad", "stale view", "masked fill", "flipped tokens", "negated", "clamped",
    "sign", "half detached", "scale given out", "scaled back", "zeroed", "doubled batch", "product", "permuted features",
    "tokens into features", "sum given out", "one add twice", "difference", "where subtracted", "gate of side", "chunked adds",
    "detached norm", "detached branch", "layer over tokens", "shifted", "set rows", "broadcast", "norm of first", "last token",
    "in-place norm", "branch in place", "maximum", "normed branch with skip", "long way round", "written side", "dropped stream",
    "dropped rows", "pooled and back", "skip joined", "noise",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Norm:
    spelling: str
    eps: float
    inline: bool = False


@dataclasses.dataclass(frozen=True)
class Branch:
    kind: str
    norm: Norm | None  # None: it reads what the branch before it reads
    gate: str = ""
    behind: Norm | None = None  # a norm behind the branch


@dataclasses.dataclass(frozen=True)
class Sublayer:
    """One or two parallel branches. ``guard`` puts it under autocast, or under a condition that Dynamo decides as it traces."""

    branches: tuple[Branch, ...]
    add: str
    summed: bool = False  # parallel branches are added to each other first
    guard: str = ""
    raw: bool = False  # the branch reads the stream itself
    wild: str = ""


@dataclasses.dataclass(frozen=True)
class Transform:
    kind: str


@dataclasses.dataclass(frozen=True)
class Reader:
    kind: str
    norm: Norm


@dataclasses.dataclass(frozen=True)
class Injection:
    """A tensor that does not depend on the stream: ``kind`` is "side", "positions" or "projected"."""

    kind: str


@dataclasses.dataclass(frozen=True)
class Remember:
    """Keep the stream's value for a later ``LongSkip`` or ``LateNorm``."""


@dataclasses.dataclass(frozen=True)
class LongSkip:
    """Add the value that was remembered last."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """The stream ends, and another begins at what a "norm", a "linear" or "detach" makes of it."""

    kind: str


Step = Sublayer | Transform | Reader | Injection | Remember | LongSkip | Cut


@dataclasses.dataclass(frozen=True)
class Tower:
    embedding: str
    steps: tuple[Step, ...]
    head: str
    norm: Norm  # the head's
    repeat: int = 1  # how often the same modules run


@dataclasses.dataclass(frozen=True)
class Network:
    """One or two towers; cross branches of the second read what the first one's head gives."""

    towers: tuple[Tower, ...]
    shape: tuple[int, ...]  # of a stream: (batch, tokens, width), (tokens, width) or (batch, height, width of images, width)
    blocks: bool = False  # every step is a module of its own
    shared_norm: bool = False
    training: bool = False
    near_miss: str = ""
    is_dynamic: bool = False  # it is compiled for any size
    checkpointed: bool = False  # sublayers that are modules of their own, under activation checkpointing
    seed: int = 0

    @property
    def is_wild(self) -> bool:
        return any(isinstance(step, Sublayer) and step.wild for tower in self.towers for step in tower.steps)

    @property
    def width(self) -> int:
        return self.shape[-1]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the network is converted with."""

    block_size: int | None  # None is Full; more than there are sublayers is all of them
    scale: str
    key_norm: bool
    eps: float | None
