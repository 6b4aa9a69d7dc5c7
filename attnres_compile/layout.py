"""Which sites a conversion made: what parameters, checkpoints and captured graphs are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from attnres_compile.config import AttnResConfig
from attnres_compile.errors import CheckpointError, ConfigError, ParameterMismatchError
from attnres_compile.plan import plan_site
from attnres_compile.report import Report
from attnres_compile.site_parameters import parameter_shapes

CONFIG_KEY = "attnres_config"
"""Where a checkpoint's configuration speaks of AttnRes."""
OWN_NAMING = "attnres"


@dataclasses.dataclass(frozen=True)
class SiteLayout:
    """What identifies a site: its reader, its width, the number of its sources, and its place in its chain."""

    module: str
    hidden_size: int
    num_sources: int
    before: int
    num_sublayers: int = dataclasses.field(compare=False)  # what differs with it shows in the sites

    def parameter_shapes(self, config: AttnResConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the site's parameters."""
        return parameter_shapes(config, self.hidden_size, self.num_sources)


def layout_of(report: Report) -> tuple[SiteLayout, ...]:
    """The layout of all sites of a planned report, in stream order, chain after chain."""
    return tuple(
        SiteLayout(site.module, site.hidden_size, site.num_sources or 0, site.before, chain.num_sublayers)
        for chain in report.chains
        for site in chain.sites
    )


def difference(expected: Sequence[SiteLayout], found: Sequence[SiteLayout]) -> str:
    """The first site that differs, in a sentence, or ""."""
    for i, (old, new) in enumerate(zip(expected, found, strict=False)):
        if old != new:
            return f"The first that differs is site {i}: {_describe(old)} then, {_describe(new)} now."
    if len(found) < len(expected):
        return f"The first missing is the read by {expected[len(found)].module!r}."
    if len(found) > len(expected):
        return f"The first extra one is the read by {found[len(expected)].module!r}."
    return ""


def _describe(site: SiteLayout) -> str:
    return f"{site.module!r} with {site.num_sources} sources of width {site.hidden_size}"


@dataclasses.dataclass(frozen=True)
class StoredConversion:
    """What a checkpoint's configuration says of its AttnRes: the options, the sites, and the naming of their tensors."""

    config: AttnResConfig
    layout: tuple[SiteLayout, ...]
    naming: str = OWN_NAMING

    def to_dict(self) -> dict[str, Any]:
        return {**self.config.to_dict(), "naming": self.naming, "sites": [dataclasses.asdict(site) for site in self.layout]}

    @classmethod
    def from_dict(cls, data: Any, place: str) -> StoredConversion:
        """Inverse of :meth:`to_dict`; ``place`` names the file in errors.

        Raises:
            CheckpointError: for another format version, unknown or missing entries, or sites that are not those that the
                options give.
        """
        if not isinstance(data, Mapping):
            raise CheckpointError(f"{place}: {CONFIG_KEY} is no JSON object.")
        options = dict(data)
        naming, sites = options.pop("naming", OWN_NAMING), options.pop("sites", None)
        try:
            config = AttnResConfig.from_dict(options)
        except ConfigError as error:
            raise CheckpointError(f"{place}: {error}") from None
        if not isinstance(naming, str) or not isinstance(sites, list) or not sites:
            raise CheckpointError(f"{place}: {CONFIG_KEY} lists no sites; convert the original checkpoint anew.")
        layout = tuple(_site(entry, i, place) for i, entry in enumerate(sites))
        for i, site in enumerate(layout):
            _check_sources(config, site, f"{place}: site {i} of {CONFIG_KEY}")
        return cls(config, layout, naming)


def check_same(mine: StoredConversion, its: StoredConversion) -> None:
    """Hold a model's conversion against a checkpoint's.

    Raises:
        ParameterMismatchError: naming the option or the first site that differs.
    """
    for name in ("scale", "key_norm", "eps", "weights", "query", "heads", "normalize_keys"):
        here, there = getattr(mine.config, name), getattr(its.config, name)
        if here != there:
            raise ParameterMismatchError(
                f"the checkpoint was converted with {name}={there!r}, this model with {name}={here!r}; convert the model with "
                "the checkpoint's options."
            )
    if its.layout != mine.layout:
        raise ParameterMismatchError(
            f"the checkpoint was converted with {len(its.layout)} sites, this model has {len(mine.layout)}. "
            f"{difference(its.layout, mine.layout)} Convert the model with the checkpoint's options: {its.config}."
        )


_FIELDS = {field.name: str if field.name == "module" else int for field in dataclasses.fields(SiteLayout)}


def _site(entry: Any, index: int, place: str) -> SiteLayout:
    fits = isinstance(entry, Mapping) and set(entry) == set(_FIELDS)
    if not fits or not all(type(entry[name]) is kind and (kind is str or entry[name] > 0) for name, kind in _FIELDS.items()):
        raise CheckpointError(f"{place}: site {index} of {CONFIG_KEY} must have {', '.join(_FIELDS)}, numbers above zero.")
    return SiteLayout(**entry)


def _check_sources(config: AttnResConfig, site: SiteLayout, what: str) -> None:
    try:
        planned = plan_site(site.before, config.resolved_block_size(site.num_sublayers), site.num_sublayers)
    except ConfigError as error:
        raise CheckpointError(f"{what}: {error}") from None
    if site.before > site.num_sublayers or planned.num_sources != site.num_sources:
        raise CheckpointError(
            f"{what} has {site.num_sources} sources, where its options give {planned.num_sources}: the options were edited. Undo "
            "that, or convert the original checkpoint anew."
        )
