"""The parameters of a site, which depend on how it weighs its sources."""

from __future__ import annotations

from attnres_compile.config import AttnResConfig
from attnres_compile.errors import ConfigError

MHC_STREAMS = 4
"""Residual streams of ``weights="mhc"``: the expansion rate of the paper on manifold-constrained hyper-connections."""


def parameter_shapes(config: AttnResConfig, hidden_size: int, num_sources: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of a site of width D with n sources, in the order in which graphs take them.

    ``query`` and ``key_norm`` are ``[D]``, ``projection`` of queries that depend on the input ``[D, D]``. ``offset``, ``[n]``, is
    what static weights add to equal ones. ``read`` and ``write``, ``[streams]``, and ``mix``, ``[streams, streams]``, are those
    of several streams, see :func:`attnres_compile.kernels.naive_variants.multi_stream_offsets`.

    Raises:
        ConfigError: if the width is no multiple of the number of heads.
    """
    if config.weights == "standard":
        return {}
    if config.weights == "static":
        return {"offset": (num_sources,)}
    if config.weights == "mhc":
        return {"read": (MHC_STREAMS,), "write": (MHC_STREAMS,), "mix": (MHC_STREAMS, MHC_STREAMS)}
    if hidden_size % config.heads:
        raise ConfigError(f"a stream of width {hidden_size} can't be divided into heads={config.heads} of equal width.")
    shapes: dict[str, tuple[int, ...]] = {"query": (hidden_size,)}
    if config.key_norm and config.normalize_keys:
        shapes["key_norm"] = (hidden_size,)
    if config.query == "input":
        shapes["projection"] = (hidden_size, hidden_size)
    return shapes


def initial_value(name: str) -> float:
    """What fills a new parameter: with these a model computes what it computed before."""
    return 1.0 if name == "key_norm" else 0.0
