"""What to rewrite into: the options of a conversion, validated once and stored as versioned JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from attnres_compile.errors import ConfigError

FORMAT_VERSION = 1
VARIANTS = ("block", "full")
SCALES = ("preserve", "paper")
WEIGHTS = ("softmax", "sigmoid", "static", "mhc", "standard")
QUERIES = ("learned", "input")


class _DefaultBlocks(int):
    """The default number of blocks. It bends to models with fewer sublayers; a number that a user wrote does not."""


DEFAULT_NUM_BLOCKS = _DefaultBlocks(8)


@dataclasses.dataclass(frozen=True)
class AttnResConfig:
    """Options of Attention Residuals (arXiv 2603.15031).

    Args:
        variant: ``"block"`` or ``"full"`` (Full is Block with one sublayer per block).
        num_blocks: number N of blocks; a block has ``ceil(L / N)`` of a chain's L sublayers. Ignored by ``"full"``.
        block_size: sublayers per block, instead of ``num_blocks``.
        scale: ``"preserve"`` lets the weights of n sources add up to n, so that zero queries give the standard
            residual stream exactly; ``"paper"`` lets them add up to 1.
        key_norm: whether keys carry a learned RMSNorm weight, initialised to one.
        eps: added to the mean square of a key; ``None`` takes the eps of the norm that reads the site. Less than 1e-12 counts as
            that, as a source may be zero.
        weights: how a site weighs its sources. ``"softmax"`` over depth is Attention Residuals; the others are what the paper
            compares it with: ``"sigmoid"`` of each score by itself, ``"static"`` learned numbers that no input changes
            (DenseFormer), ``"mhc"`` those of four residual streams with doubly stochastic mixing (manifold-constrained
            hyper-connections, without their dependence on the input; Full alone), ``"standard"`` the residual sum, with nothing
            learned.
        query: ``"learned"`` is a vector; ``"input"`` adds a learned projection of the latest source, normalised.
        heads: number H of heads, each with weights of its own for its ``D / H`` features.
        normalize_keys: whether keys go through RMSNorm at all; without it there is no key-norm weight either.

    Raises:
        ConfigError: for an unknown value or a contradiction.
    """

    variant: str = "block"
    num_blocks: int | None = DEFAULT_NUM_BLOCKS
    block_size: int | None = None
    scale: str = "preserve"
    key_norm: bool = True
    eps: float | None = None
    weights: str = "softmax"
    query: str = "learned"
    heads: int = 1
    normalize_keys: bool = True

    def __post_init__(self) -> None:
        _require_one_of("variant", self.variant, VARIANTS)
        _require_one_of("scale", self.scale, SCALES)
        _require_one_of("weights", self.weights, WEIGHTS)
        _require_one_of("query", self.query, QUERIES)
        for name in ("num_blocks", "block_size", "heads"):
            value = getattr(self, name)
            optional = name != "heads"
            if not (value is None and optional) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a positive integer{' or None' if optional else ''}, not {value!r}.")
        for name in ("key_norm", "normalize_keys"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        if self.eps is not None and (
            isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not 0 <= self.eps < 1
        ):
            raise ConfigError(f"eps must be a number in [0, 1) or None, not {self.eps!r}.")
        self._check_weighting()
        if self.variant == "full" and self.block_size not in (None, 1):
            raise ConfigError(
                f"variant='full' has one sublayer per block, so block_size={self.block_size} contradicts it; use variant='block'."
            )
        if self.variant == "block":
            if self.block_size is not None and self.num_blocks is not None:
                if not isinstance(self.num_blocks, _DefaultBlocks):
                    raise ConfigError("num_blocks and block_size exclude each other; give one of them.")
                object.__setattr__(self, "num_blocks", None)
            if self.block_size is None and self.num_blocks is None:
                raise ConfigError("variant='block' needs num_blocks or block_size.")

    def _check_weighting(self) -> None:
        if not self.has_queries:
            for name, value in (("query", "learned"), ("heads", 1), ("normalize_keys", True)):
                if getattr(self, name) != value:
                    raise ConfigError(
                        f"weights={self.weights!r} has neither queries nor keys, so {name}={getattr(self, name)!r} means nothing "
                        "there; leave it out."
                    )
        if self.weights == "mhc" and self.variant != "full":
            raise ConfigError("weights='mhc' weighs the outputs of single sublayers; use it with variant='full'.")

    @property
    def has_queries(self) -> bool:
        """Whether sites weigh their sources by scores of queries and keys."""
        return self.weights in ("softmax", "sigmoid")

    @property
    def is_plain(self) -> bool:
        """Whether sites compute Attention Residuals as such, for which there are two phases and fused kernels."""
        return not self.departures

    @property
    def departures(self) -> str:
        """The options that make a site something else, such as ``"weights='sigmoid'"``; "" if there are none."""
        plain = {"weights": "softmax", "query": "learned", "heads": 1, "normalize_keys": True}
        return ", ".join(f"{name}={getattr(self, name)!r}" for name, value in plain.items() if getattr(self, name) != value)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> AttnResConfig:
        """A config from plain options, such as those of ``torch.compile``. Unknown names are errors that list the known."""
        options = dict(options or {})
        unknown = [name for name in options if name not in cls.field_names()]
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}; the options are: {', '.join(cls.field_names())}.")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.field_names()}
        if fields["num_blocks"] is not None:
            fields["num_blocks"] = int(fields["num_blocks"])
        return {"format_version": FORMAT_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttnResConfig:
        """Inverse of :meth:`to_dict`. Raises ConfigError for another format version or an unknown field."""
        data = dict(data)
        version = data.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(f"this AttnRes config has format version {version!r}; this release reads version {FORMAT_VERSION}.")
        if data.get("block_size") is None and data.get("num_blocks") == DEFAULT_NUM_BLOCKS:
            data["num_blocks"] = DEFAULT_NUM_BLOCKS
        return cls.from_options(data)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> AttnResConfig:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"this AttnRes config is not JSON: {error}.") from None
        if not isinstance(data, dict):
            raise ConfigError(f"an AttnRes config is a JSON object, not {type(data).__name__}.")
        return cls.from_dict(data)

    def resolved_block_size(self, num_sublayers: int) -> int:
        """Sublayers per block in a chain of ``num_sublayers``.

        Raises:
            ConfigError: if more blocks, or larger blocks, are asked for than there are sublayers.
        """
        if self.variant == "full":
            return 1
        if self.block_size is not None:
            if self.block_size > num_sublayers:
                raise ConfigError(f"block_size={self.block_size} exceeds the {num_sublayers} sublayers of the chain.")
            return self.block_size
        assert self.num_blocks is not None
        if self.num_blocks > num_sublayers:
            if isinstance(self.num_blocks, _DefaultBlocks):
                return 1
            raise ConfigError(
                f"num_blocks={self.num_blocks} is more than the {num_sublayers} sublayers of the chain; use at most "
                f"{num_sublayers}."
            )
        return -(-num_sublayers // self.num_blocks)


def _require_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}.")
