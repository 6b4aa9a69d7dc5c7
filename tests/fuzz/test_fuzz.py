"""Random residual networks: each is rewritten as its recipe says, or refused, and is Attention Residuals by the definition."""

from __future__ import annotations

import hypothesis
from check import check
from hypothesis import HealthCheck, strategies
from modules import source_of
from networks import Network, Options
from strategies import networks, options


@hypothesis.settings(max_examples=300, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
@hypothesis.given(networks(), options, strategies.integers(0, 4))
def test_random_networks(network: Network, drawn: Options, thorough: int) -> None:
    """A failure shrinks to a small network, whose source can be pasted into a file."""
    hypothesis.note(source_of(network))
    check(network, drawn, thorough == 4)
