"""Exported programs: what detect reads from them, and what they can't be used for."""

from __future__ import annotations

import pytest
import torch
from models import example_inputs, tiny
from torch import Tensor, nn

import attnres_compile as ac


@pytest.fixture(scope="module")
def llama() -> torch.export.ExportedProgram:
    return torch.export.export(tiny("llama"), *example_inputs("llama"))


def test_names_and_source_lines_are_those_of_a_capture(llama: torch.export.ExportedProgram) -> None:
    (found,), (expected,) = ac.detect(llama).chains, ac.detect(tiny("llama"), *example_inputs("llama")).chains
    assert found.sites == expected.sites
    assert "modeling_llama.py:" in found.sites[0].source_line


def test_a_refusal_names_module_and_line() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)
    (refusal,) = ac.detect(torch.export.export(model.train(), (torch.randn(2, 5, 16),))).near_misses()
    assert refusal.reason.startswith("post-norm")
    assert refusal.module.startswith("layers.0.norm")
    assert ".py:" in refusal.source_line


def test_the_program_stays_as_it_was(llama: torch.export.ExportedProgram) -> None:
    before = str(llama.graph_module.graph)
    ac.detect(llama)
    assert str(llama.graph_module.graph) == before
    llama.module()


@pytest.mark.parametrize("decomposed", [False, True])
def test_dynamic_shapes(decomposed: bool) -> None:
    model, ((ids,), kwargs) = tiny("llama", attn_implementation="eager"), example_inputs("llama")
    shapes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    program = torch.export.export(model, (), {"input_ids": ids, **kwargs}, dynamic_shapes=shapes)
    (chain,) = ac.detect(program.run_decompositions() if decomposed else program).chains
    assert (chain.kind, chain.num_sublayers, chain.num_sites) == ("prenorm", 8, 8)


class Accumulating(nn.Module):
    """A module named L, in-place adds, and a layer that runs without gradients and without autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.L = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        for i, layer in enumerate(self.L):
            if i == 1:
                with torch.no_grad():
                    x = x + layer(x)
            elif i == 2:
                with torch.autocast("cpu", enabled=False):
                    x = x + layer(x)
            else:
                x += layer(x)
        return self.norm(x)


def test_regions_and_in_place_adds_are_seen_through() -> None:
    (chain,) = ac.detect(torch.export.export(Accumulating(), (torch.randn(2, 3, 8),))).chains
    assert [site.module for site in chain.sites] == ["L.1.0", "L.2.0", "L.3.0", "norm"]


def test_an_exported_program_is_for_looking_only(llama: torch.export.ExportedProgram) -> None:
    model, (args, kwargs) = tiny("llama"), example_inputs("llama")
    for use in (ac.rewrite, ac.convert_, lambda program: ac.compare(model, program, args, kwargs)):
        with pytest.raises(ac.ModelTypeError, match=r"detect alone.*module that it was exported from"):
            use(llama)


def test_arguments_beside_an_exported_program_are_an_error(llama: torch.export.ExportedProgram) -> None:
    with pytest.raises(ac.ConfigError, match="holds its graph already"):
        ac.detect(llama, (torch.ones(1, 3, dtype=torch.int64),))


def test_a_program_of_a_rewritten_module_is_an_error() -> None:
    model, ((ids,), kwargs) = tiny("llama"), example_inputs("llama")
    rewritten = ac.rewrite(model, None, (ids,), kwargs)
    graph_module = torch.fx.GraphModule(rewritten, rewritten.graph)
    with pytest.raises(ac.ConfigError, match="rewritten module"):
        ac.detect(torch.export.export(graph_module, (ids,)))
