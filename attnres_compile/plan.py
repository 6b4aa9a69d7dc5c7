"""Where blocks begin and end, and what every site attends to (section "Block AttnRes" of arXiv 2603.15031)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from attnres_compile.config import AttnResConfig


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """The sources of one site: the root, ``complete`` whole blocks, and the partial sum of ``partial`` sublayers."""

    before: int
    complete: int
    partial: int

    @property
    def num_sources(self) -> int:
        return 1 + self.complete + (self.partial > 0)


@dataclasses.dataclass(frozen=True)
class AttnResPlan:
    """Block boundaries of one chain and the sources of its sites.

    ``blocks`` are half-open ranges of sublayers; ``sites`` follow the stream.
    """

    block_size: int
    blocks: tuple[tuple[int, int], ...]
    sites: tuple[SitePlan, ...]


def plan_chain(num_sublayers: int, sites: Sequence[int], config: AttnResConfig) -> AttnResPlan:
    """Plan a chain of ``num_sublayers`` whose site i reads the stream after ``sites[i]`` sublayers.

    Raises:
        ConfigError: if the config asks for more blocks than there are sublayers.
    """
    size = config.resolved_block_size(num_sublayers)
    blocks = tuple((start, min(start + size, num_sublayers)) for start in range(0, num_sublayers, size))
    return AttnResPlan(size, blocks, tuple(plan_site(before, size, num_sublayers) for before in sites))


def plan_site(before: int, size: int, num_sublayers: int) -> SitePlan:
    """The sources of a site that reads the stream after ``before`` sublayers, with blocks of ``size`` sublayers."""
    # The last block may be shorter; once its last sublayer is done it is complete all the same.
    complete = before // size if before < num_sublayers else -(-num_sublayers // size)
    return SitePlan(before, complete, max(0, before - complete * size))
