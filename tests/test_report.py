"""Reports: plain data for programs, and tables for people."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

import attnres_compile
from attnres_compile import AttnResConfig, Refusal, Report
from attnres_compile.report import ChainReport, PassReport, SiteNote, SiteReport


def site(index: int, module: str, before: int, num_sources: int | None = None, width: int = 16) -> SiteReport:
    return SiteReport(index, module, (module,), f"model.py:{10 + index}: x = x + f(norm(x))", width, before, 1e-6, num_sources)


CHAIN = ChainReport(
    "prenorm", 5, 16, (site(0, "layers.1.norm", 1, 2), site(1, "layers.2.norm", 2, 2), site(2, "norm", 5, 4)), (2, 2, 1)
)
REFUSALS = (
    Refusal("add", "a single residual add", "add_7", "router", "model.py:40: y = y + z"),
    Refusal("chain", "post-norm", "add", "encoder.norm", "model.py:50: x = norm(x + f(x))", size=6),
    Refusal("read", "reads the raw stream", "tanh", "gate", "model.py:60: g = tanh(x)"),
    Refusal("chain", "reordered norm", "add_1", "decoder", "model.py:70: x = x + norm(f(x))", size=12),
    Refusal("chain", "fragmented", "add_2", "stages", "model.py:80: x = x + f(x)", size=6),
    Refusal("chain", "short", "add_3", "tail", "model.py:90: x = x + f(x)", size=2),
)
REPORT = Report((CHAIN,), REFUSALS, (PassReport("normalize", 3, 0.25),), AttnResConfig(num_blocks=3))


def test_to_dict_is_json() -> None:
    data = REPORT.to_dict()
    read = json.loads(json.dumps(data, allow_nan=False))
    assert read["num_sites"] == 3
    assert read["num_added_parameters"] == 3 * 16 * 2
    assert read["config"] == AttnResConfig(num_blocks=3).to_dict()
    assert read["passes"] == [{"name": "normalize", "changes": 3, "seconds": 0.25}]
    (chain,) = read["chains"]
    assert {key: chain[key] for key in ("kind", "num_sublayers", "num_sites", "hidden_size", "block_sizes")} == {
        "kind": "prenorm", "num_sublayers": 5, "num_sites": 3, "hidden_size": 16, "block_sizes": [2, 2, 1],
    }  # fmt: skip
    assert chain["sites"][2] == {
        "index": 2, "module": "norm", "modules": ["norm"], "source_line": "model.py:12: x = x + f(norm(x))",
        "hidden_size": 16, "before": 5, "eps": 1e-6, "num_sources": 4,
    }  # fmt: skip
    assert read["refusals"][1] == {
        "subject": "chain", "reason": "post-norm", "node": "add", "module": "encoder.norm",
        "source_line": "model.py:50: x = norm(x + f(x))", "size": 6,
    }  # fmt: skip


def test_an_empty_report() -> None:
    assert Report().to_dict() == {
        "chains": [], "refusals": [], "near_misses": [], "passes": [], "notes": [], "config": None, "num_sites": 0,
        "num_added_parameters": 0,
    }  # fmt: skip
    assert Report().near_misses() == ()
    assert "Residual chains" in str(Report())


def test_sites_computed_by_themselves_are_listed_by_reason() -> None:
    report = Report(notes=(SiteNote(3, "its sources differ in dtype"), SiteNote(7, "its sources differ in dtype")))
    assert report.to_dict()["notes"][1] == {"site": 7, "reason": "its sources differ in dtype"}
    assert "3, 7" in str(report) and "differ in dtype" in str(report)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(None, 96, id="unplanned"),
        pytest.param(AttnResConfig(), 96, id="key-norm"),
        pytest.param(AttnResConfig(key_norm=False), 48, id="no-key-norm"),
    ],
)
def test_added_parameters(config: AttnResConfig | None, expected: int) -> None:
    assert Report((CHAIN,), config=config).num_added_parameters == expected


def test_near_misses_are_the_longest_refused_chains() -> None:
    assert [miss.reason for miss in REPORT.near_misses()] == ["reordered norm", "post-norm", "fragmented"]
    assert [miss.size for miss in REPORT.near_misses(limit=9)] == [12, 6, 6, 2]
    assert [miss.reason for miss in REPORT.near_misses(limit=1)] == ["reordered norm"]


def rows(text: str) -> list[list[str]]:
    """The cells of every line of the tables."""
    lines = [line.replace("┃", "│") for line in text.splitlines()]
    return [[cell.strip() for cell in line.strip()[1:-1].split("│")] for line in lines if "│" in line]


def test_text_shows_chains_and_sites() -> None:
    cells = rows(str(REPORT))
    assert ["0", "prenorm", "5", "3", "2 x 2, 1 x 1", "16", "96"] in cells
    assert ["0", "0", "layers.1.norm", "1", "2"] in cells
    assert ["2", "0", "norm", "5", "4"] in cells


def test_text_shows_refusals_with_module_and_source_line() -> None:
    cells = rows(str(REPORT))
    for refusal in REFUSALS:
        assert [refusal.subject, refusal.reason, refusal.module, refusal.source_line] in cells


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((3, 3), "2 x 3"), ((3, 3, 2), "2 x 3, 1 x 2"), ((4,), "1 x 4"), ((1,) * 12, "12 x 1")],
    ids=["even", "shorter-last", "one", "full"],
)
def test_text_of_blocks(sizes: tuple[int, ...], expected: str) -> None:
    report = Report((dataclasses.replace(CHAIN, block_sizes=sizes),))
    assert rows(str(report))[1][4] == expected


def test_sites_of_several_chains_name_their_chain() -> None:
    second = ChainReport("parallel", 2, 8, (site(3, "vision.norm", 2, 3, width=8),), (1, 1))
    report = Report((CHAIN, second), config=AttnResConfig(num_blocks=2))
    cells = rows(str(report))
    assert ["1", "parallel", "2", "1", "2 x 1", "8", "16"] in cells
    assert ["3", "1", "vision.norm", "2", "3"] in cells
    assert report.num_sites == 4
    assert report.num_added_parameters == 96 + 16


def test_source_code_in_brackets_is_shown_as_it_is() -> None:
    line = "model.py:8: x = x + y[i] + z[/a] + w[bold]"
    refusal = Refusal("chain", "fed by m[red]", "add", "layers[i]", line, size=2)
    assert ["chain", "fed by m[red]", "layers[i]", line] in rows(str(Report(refusals=(refusal,))))


def test_long_names_are_folded_not_cut() -> None:
    module = ".".join(["a_rather_long_module_name"] * 6)
    line = "/a/long/path/to/a/model.py:123: hidden_states = residual + self.mlp(self.post_attention_layernorm(hidden_states))"
    cells = rows(str(Report(refusals=(Refusal("chain", "reordered norm", "add", module, line, size=2),))))
    start = cells.index(["what", "reason", "module", "source line"])
    columns = ["".join(column) for column in zip(*cells[start + 1 :], strict=True)]
    assert columns[2] == module
    assert columns[3].replace(" ", "") == line.replace(" ", "")


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("layers.0", "model.py:3: x + y", "too short [module 'layers.0', model.py:3: x + y]"),
        ("", "model.py:3: x + y", "too short [model.py:3: x + y]"),
        ("layers.0", "", "too short [module 'layers.0']"),
        ("", "", "too short [add_3]"),
    ],
    ids=["both", "line", "module", "node"],
)
def test_a_refusal_in_one_line(module: str, line: str, expected: str) -> None:
    assert str(Refusal("add", "too short", "add_3", module, line)) == expected


class Gated(nn.Module):
    """Three sublayers of which the last one reads the stream raw, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.norms = nn.ModuleList([nn.RMSNorm(8, eps=1e-6) for _ in range(4)])
        self.mix = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, mix in zip(self.norms, self.mix, strict=False):
            x = x + mix(norm(x))
        gate = torch.tanh(x)
        return self.norms[3](x) * gate


def test_report_of_a_model() -> None:
    report = attnres_compile.detect(Gated(), (torch.randn(2, 3, 8),))
    assert report.config is None
    (chain,) = report.chains
    assert (chain.kind, chain.num_sublayers, chain.num_sites, chain.hidden_size, chain.block_sizes) == ("prenorm", 3, 3, 8, None)
    assert [(s.index, s.module, s.before, s.eps, s.num_sources) for s in chain.sites] == [
        (0, "norms.1", 1, 1e-6, None), (1, "norms.2", 2, 1e-6, None), (2, "norms.3", 3, 1e-6, None),
    ]  # fmt: skip
    (refusal,) = report.refusals
    assert (refusal.subject, refusal.module) == ("read", "")
    assert refusal.reason == "reads the stream but is not scale invariant (tanh): it keeps the plain sum"
    path, number, code = refusal.source_line.split(":", 2)
    assert path.endswith("test_report.py")
    assert int(number) > 0
    assert code == " gate = torch.tanh(x)"
    assert [entry.name for entry in report.passes] == ["normalize", "find_chains"]
    assert json.loads(json.dumps(report.to_dict()))["num_sites"] == 3


def test_sources_per_site_after_planning() -> None:
    report = attnres_compile.convert_(Gated(), AttnResConfig(num_blocks=2), (torch.randn(2, 3, 8),))
    (chain,) = report.chains
    assert chain.block_sizes == (2, 1)
    assert [s.num_sources for s in chain.sites] == [2, 2, 3]
    assert ["0", "prenorm", "3", "3", "1 x 2, 1 x 1", "8", "48"] in rows(str(report))
