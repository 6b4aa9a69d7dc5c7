"""plan_chain against the definition of Block AttnRes, for any chain and any config."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_compile import AttnResConfig, ConfigError
from attnres_compile.plan import AttnResPlan, SitePlan, plan_chain


@st.composite
def chains(draw: st.DrawFn) -> tuple[int, list[int], AttnResConfig]:
    """A number of sublayers, the sublayers before each site, and a config that fits them."""
    num_sublayers = draw(st.integers(1, 40))
    sites = sorted(draw(st.sets(st.integers(1, num_sublayers))))
    count = st.integers(1, num_sublayers)
    config = draw(
        st.one_of(
            st.builds(AttnResConfig, num_blocks=count),
            st.builds(AttnResConfig, block_size=count),
            st.just(AttnResConfig(variant="full")),
            st.just(AttnResConfig()),
        )
    )
    return num_sublayers, sites, config


def sources_by_definition(before: int, block_size: int, num_sublayers: int) -> list[list[int]]:
    """The sublayers in every source after the root: a block is done with its last sublayer; what is left is the partial sum."""
    sources: list[list[int]] = []
    block: list[int] = []
    for sublayer in range(before):
        block.append(sublayer)
        if len(block) == block_size or sublayer == num_sublayers - 1:
            sources.append(block)
            block = []
    return [*sources, block] if block else sources


def sources_of(plan: AttnResPlan, site: SitePlan) -> list[list[int]]:
    """The same, as the plan describes it."""
    complete = [list(range(start, stop)) for start, stop in plan.blocks[: site.complete]]
    start = sum(map(len, complete))
    return [*complete, list(range(start, start + site.partial))] if site.partial else complete


@given(chains())
def test_blocks_tile_the_sublayers(chain: tuple[int, list[int], AttnResConfig]) -> None:
    num_sublayers, sites, config = chain
    plan = plan_chain(num_sublayers, sites, config)
    assert [sublayer for start, stop in plan.blocks for sublayer in range(start, stop)] == list(range(num_sublayers))
    *whole, last = [stop - start for start, stop in plan.blocks]
    assert set(whole) <= {plan.block_size}
    assert 1 <= last <= plan.block_size
    assert plan.block_size == config.resolved_block_size(num_sublayers)


@given(chains())
def test_sources_are_those_of_the_definition(chain: tuple[int, list[int], AttnResConfig]) -> None:
    num_sublayers, sites, config = chain
    plan = plan_chain(num_sublayers, sites, config)
    assert [site.before for site in plan.sites] == sites
    for site in plan.sites:
        sources = sources_of(plan, site)
        assert sources == sources_by_definition(site.before, plan.block_size, num_sublayers)
        assert site.num_sources == 1 + len(sources)  # the root
        assert [sublayer for source in sources for sublayer in source] == list(range(site.before))


@given(st.integers(1, 40))
def test_full_is_block_of_size_one(num_sublayers: int) -> None:
    sites = range(1, num_sublayers + 1)
    full = plan_chain(num_sublayers, sites, AttnResConfig(variant="full"))
    assert full == plan_chain(num_sublayers, sites, AttnResConfig(block_size=1))
    assert [site.num_sources for site in full.sites] == [1 + before for before in sites]


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_output_site_sees_every_block(num_sublayers: int, size: int) -> None:
    size = min(size, num_sublayers)
    plan = plan_chain(num_sublayers, [num_sublayers], AttnResConfig(block_size=size))
    assert plan.sites == (SitePlan(before=num_sublayers, complete=len(plan.blocks), partial=0),)
    assert plan.sites[0].num_sources == 1 + len(plan.blocks)


@pytest.mark.parametrize(
    ("config", "blocks", "num_sources"),
    [
        pytest.param(AttnResConfig(block_size=3), ((0, 3), (3, 6), (6, 7)), [2, 2, 2, 3, 3, 3, 4], id="short-last-block"),
        pytest.param(AttnResConfig(num_blocks=2), ((0, 4), (4, 7)), [2, 2, 2, 2, 3, 3, 3], id="two-blocks"),
        pytest.param(AttnResConfig(num_blocks=1), ((0, 7),), [2, 2, 2, 2, 2, 2, 2], id="one-block"),
        pytest.param(AttnResConfig(variant="full"), tuple((i, i + 1) for i in range(7)), [2, 3, 4, 5, 6, 7, 8], id="full"),
    ],
)
def test_seven_sublayers(config: AttnResConfig, blocks: tuple[tuple[int, int], ...], num_sources: list[int]) -> None:
    plan = plan_chain(7, range(1, 8), config)
    assert plan.blocks == blocks
    assert [site.num_sources for site in plan.sites] == num_sources


def test_a_chain_without_sites_has_blocks_all_the_same() -> None:
    assert plan_chain(4, [], AttnResConfig(num_blocks=2)) == AttnResPlan(2, ((0, 2), (2, 4)), ())


@pytest.mark.parametrize("config", [AttnResConfig(num_blocks=5), AttnResConfig(block_size=5)], ids=["blocks", "size"])
def test_a_config_that_does_not_fit(config: AttnResConfig) -> None:
    with pytest.raises(ConfigError, match="4 sublayers of the chain"):
        plan_chain(4, [1], config)
