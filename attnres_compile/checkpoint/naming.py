"""The names of AttnRes tensors in checkpoints: our own, and those of Kimi K3 and of flash-linear-attention."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from attnres_compile.config import AttnResConfig
from attnres_compile.errors import CheckpointError, ConfigError
from attnres_compile.layout import OWN_NAMING, SiteLayout

_LAYER = re.compile(r"^(?P<layers>.+?)\.(?P<layer>\d+)\..+$")
OWN_TENSOR = re.compile(r"^(?P<host>(?:.+\.)?)attnres\.sites\.\d+\.(?:query|key_norm|projection|offset|read|write|mix)$")
"""Our own names below the converted module, which is ``host``: "" or a qualified name and a dot."""


@dataclasses.dataclass(frozen=True)
class _Foreign:
    """Names of the attention and MLP sites in a layer, and of the output site beside the layers.

    ``block_key`` is the configuration entry that holds the block size, counted in units of ``unit`` sublayers.
    """

    home: str
    attention: str
    mlp: str
    output: str
    block_key: str
    unit: int


FOREIGN = {
    "kimi-k3": _Foreign("Kimi K3's code", "self_attention_res", "mlp_res", "output_attn_res", "attn_res_block_size", 2),
    "fla": _Foreign("flash-linear-attention", "attn_res", "mlp_res", "res", "attnres_block_size", 1),
}
NAMINGS = (OWN_NAMING, *FOREIGN)


@dataclasses.dataclass(frozen=True)
class SiteNames:
    """Where a checkpoint holds the parameters of one site, each by its own name such as "query".

    ``column`` tells whether the query is stored as ``[1, D]`` and not as ``[D]``.
    """

    tensors: dict[str, str]
    column: bool = False

    def shape(self, parameter: str, own: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape of ``parameter``, which a model holds as ``own``."""
        return (1, *own) if self.column and parameter == "query" else own


def names_in(site: SiteNames) -> list[str]:
    """The names of a site's tensors."""
    return list(site.tensors.values())


def host_in(names: Iterable[str]) -> str:
    """Of a checkpoint's tensors, what stands before our own names: "" or a qualified name and a dot.

    Raises:
        CheckpointError: if several modules were converted.
    """
    hosts = {match["host"] for name in names if (match := OWN_TENSOR.match(name))}
    if len(hosts) > 1:
        raise CheckpointError(f"the checkpoint holds the AttnRes tensors of several modules: {', '.join(sorted(hosts))}.")
    return next(iter(hosts), "")


def site_names(layout: Sequence[SiteLayout], config: AttnResConfig, naming: str, host: str = "") -> list[SiteNames]:
    """The names of every site's tensors, in stream order; ``host`` goes before our own names.

    Raises:
        ConfigError: for an unknown naming, or one that has no names for these sites.
    """
    if naming == OWN_NAMING:
        return [
            SiteNames({name: f"{host}attnres.sites.{i}.{name}" for name in site.parameter_shapes(config)})
            for i, site in enumerate(layout)
        ]
    return [_foreign_names(stem) for stem in _stems(layout, config, naming)]


def unused_names(layout: Sequence[SiteLayout], config: AttnResConfig, naming: str) -> list[SiteNames]:
    """Tensors that a naming wants and no site uses: those of the first read, which has one source."""
    if naming == OWN_NAMING:
        return []
    second = _stems(layout, config, naming)[0]
    foreign = FOREIGN[naming]
    return [_foreign_names(second.removesuffix(foreign.mlp) + foreign.attention)]


def foreign_entries(layout: Sequence[SiteLayout], config: AttnResConfig, naming: str) -> dict[str, int]:
    """The block size as the configuration of the naming's home holds it; empty where that can't express it."""
    if naming == OWN_NAMING:
        return {}
    foreign, size = FOREIGN[naming], config.resolved_block_size(layout[0].num_sublayers)
    expressible = size == 1 or size % 2 == 0 if naming == "fla" else size % foreign.unit == 0
    return {foreign.block_key: size // foreign.unit} if expressible else {}


def _foreign_names(stem: str) -> SiteNames:
    return SiteNames({"query": f"{stem}_proj.weight", "key_norm": f"{stem}_norm.weight"}, column=True)


def _stems(layout: Sequence[SiteLayout], config: AttnResConfig, naming: str) -> list[str]:
    if naming not in FOREIGN:
        raise ConfigError(f"unknown naming {naming!r}; the namings are: {', '.join(NAMINGS)}.")
    foreign = FOREIGN[naming]
    if not config.key_norm:
        raise ConfigError(f"naming {naming!r} has a key norm at every site, so it needs key_norm=True.")
    if not config.is_plain:
        raise ConfigError(f"naming {naming!r} has no names for {config.departures}. Use naming {OWN_NAMING!r}.")
    count = layout[0].num_sublayers
    if count % 2 or [site.before for site in layout] != list(range(1, count + 1)):
        raise ConfigError(
            f"naming {naming!r} needs one attention and one MLP site in every layer of one chain; this model's sites are "
            f"others. Use naming {OWN_NAMING!r}."
        )
    stems, containers = [], set()
    for site in layout[:-1]:
        found = _LAYER.match(site.module)
        if found is None or int(found["layer"]) != site.before // 2:
            raise ConfigError(
                f"naming {naming!r} needs layers that are numbered from 0 and hold an attention and an MLP site each; "
                f"{site.module!r} reads the stream after {site.before} sublayers. Use naming {OWN_NAMING!r}."
            )
        containers.add(found["layers"])
        stems.append(f"{found['layers']}.{found['layer']}.{foreign.mlp if site.before % 2 else foreign.attention}")
    if len(containers) != 1:
        raise ConfigError(f"naming {naming!r} needs one list of layers, not {', '.join(sorted(containers))}.")
    beside = containers.pop().rpartition(".")[0]
    return [*stems, f"{beside}.{foreign.output}" if beside else foreign.output]
