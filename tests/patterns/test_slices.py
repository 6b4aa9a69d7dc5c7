"""Slices that lie side by side: their ``cat`` is the tensor again, and a branch added to one of them is added to the tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import ReferenceStream
from torch import Tensor, nn
from torch.fx import Node
from torch.testing import FileCheck

import attnres_compile as ac
from attnres_compile.capture import capture
from attnres_compile.passes.base import Program, run_passes
from attnres_compile.passes.normalize import Normalize
from attnres_compile.patterns.operations import argument, name_of
from attnres_compile.patterns.slices import whole_of

BATCH, TOKENS, WIDTH, LAYERS, EPS = 2, 6, 8, 4, 1e-5


class Joined(nn.Module):
    """The ``cat`` of what ``parts`` makes of x, y and f, all ``[B, T, D]``."""

    def __init__(self, parts: Callable[[Tensor, Tensor, Tensor], Any], dim: int = 1) -> None:
        super().__init__()
        self.parts, self.dim = parts, dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.parts(x.sin(), x.cos(), x.tanh()), self.dim)


def program_of(parts: Callable[[Tensor, Tensor, Tensor], Any], dim: int = 1, is_dynamic: bool = False) -> Program:
    x = torch.zeros(BATCH, TOKENS, WIDTH)
    if is_dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    captured = capture(Joined(parts, dim), (x,), {})
    return Program(captured.graph_module, ac.AttnResConfig(), captured.parameters)


def read_off(
    parts: Callable[[Tensor, Tensor, Tensor], Any], dim: int = 1, is_dynamic: bool = False
) -> tuple[str, list[str | None]] | None:
    """The name of the whole, and of each part's branch."""
    graph = program_of(parts, dim, is_dynamic).graph_module.graph
    (joined,) = (node for node in graph.nodes if name_of(node) == "cat")
    elements: Any = joined.args[0]
    found = whole_of(elements, argument(joined, 1, "dim", 0), joined)
    if found is None:
        return None
    assert len(found[1]) == len(elements)
    return name_of(found[0]), [_name(branch) for _, branch in found[1]]


def _name(branch: Node | None) -> str | None:
    return None if branch is None else name_of(branch)


WHOLE: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], int]] = {
    "two-slices": (lambda x, y, f: [x[:, :1], x[:, 1:]], 1),
    "three-slices": (lambda x, y, f: [x[:, :1], x[:, 1:4], x[:, 4:]], 1),
    "counted-from-the-end": (lambda x, y, f: [x[:, :-2], x[:, -2:]], 1),
    "negative-dim": (lambda x, y, f: [x[:, :1], x[:, 1:]], -2),
    "first-dim": (lambda x, y, f: [x[:1], x[1:]], 0),
    "last-dim": (lambda x, y, f: [x[:, :, :3], x[:, :, 3:]], -1),
    "slices-over-all-dims": (lambda x, y, f: [x[:, :1, :], x[:, 1:, :]], 1),
    "split-by-size": (lambda x, y, f: x.split(4, 1), 1),
    "split-by-sizes": (lambda x, y, f: x.split([1, 5], dim=1), 1),
    "split-negative-dim": (lambda x, y, f: torch.split(x, [1, 2, 3], dim=-2), 1),
    "chunk": (lambda x, y, f: x.chunk(3, 1), 1),
    "tensor_split": (lambda x, y, f: torch.tensor_split(x, 4, dim=1), -2),
    "narrow": (lambda x, y, f: [x.narrow(1, 0, 2), x.narrow(1, 2, 4)], 1),
    "narrow-keywords": (lambda x, y, f: [torch.narrow(x, dim=-2, start=0, length=2), x.narrow(-2, 2, 4)], 1),
    "select": (lambda x, y, f: [x.select(1, 0).unsqueeze(1), x[:, 1:]], 1),
    "index": (lambda x, y, f: [x[:, 0].unsqueeze(1), x[:, 1:]], 1),
    "last-index": (lambda x, y, f: [x[:, :-1], x[:, -1].unsqueeze(-2)], 1),
    "every-index": (lambda x, y, f: [x[:, i].unsqueeze(1) for i in range(TOKENS)], 1),
    "aten.slice": (lambda x, y, f: [torch.ops.aten.slice(x, 1, 0, 2), torch.ops.aten.slice(x, -2, 2)], 1),
    "several-spellings": (lambda x, y, f: [x[:, 0].unsqueeze(1), x.narrow(1, 1, 2), *x.split(3, 1)[1:]], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_slices_side_by_side_are_the_tensor(name: str) -> None:
    parts, dim = WHOLE[name]
    whole, branches = read_off(parts, dim) or ("", [])
    assert (whole, set(branches)) == ("sin", {None})
    program = run_passes(program_of(parts, dim), [Normalize()])
    (output,) = (node for node in program.graph_module.graph.nodes if node.op == "output")
    (clone,) = output.args[0]  # type: ignore[misc]
    assert (name_of(clone), name_of(clone.args[0])) == ("clone", "sin")  # type: ignore[union-attr, arg-type]


OF_ANY_LENGTH: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    **{
        name: WHOLE[name][0]
        for name in ("two-slices", "counted-from-the-end", "slices-over-all-dims", "select", "index", "last-index", "aten.slice")
    },
    "at-the-middle": lambda x, y, f: [x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]],
    "to-the-length": lambda x, y, f: [x[:, :1], x[:, 1 : x.shape[1]]],
    "narrow": lambda x, y, f: [x.narrow(1, 0, 2), x.narrow(1, 2, x.shape[1] - 2)],
    "chunk": lambda x, y, f: x.chunk(2, 1),
    "split-by-sizes": lambda x, y, f: x.split([2, x.shape[1] - 2], 1),
}


@pytest.mark.parametrize("name", OF_ANY_LENGTH)
def test_slices_of_a_length_that_varies(name: str) -> None:
    """What is found must not depend on whether sizes are numbers or symbols."""
    assert read_off(OF_ANY_LENGTH[name], is_dynamic=True) == ("sin", [None, None])


OTHER_OF_ANY_LENGTH: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "gap": lambda x, y, f: [x[:, :1], x[:, 2:]],
    "gap-at-the-end": lambda x, y, f: [x[:, :1], x[:, 1:-1]],
    "overlap": lambda x, y, f: [x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 - 1 :]],
    "half-of-the-features": lambda x, y, f: [x[:, :1, :4], x[:, 1:, :4]],
    "wrong-order": lambda x, y, f: [x[:, 1:], x[:, :1]],
    "chunks-reordered": lambda x, y, f: x.chunk(2, 1)[::-1],
}


@pytest.mark.parametrize("name", OTHER_OF_ANY_LENGTH)
def test_other_parts_of_a_length_that_varies(name: str) -> None:
    assert read_off(OTHER_OF_ANY_LENGTH[name], is_dynamic=True) is None


OTHER: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], int]] = {
    "wrong-order": (lambda x, y, f: [x[:, 1:], x[:, :1]], 1),
    "gap": (lambda x, y, f: [x[:, :1], x[:, 2:]], 1),
    "gap-at-the-end": (lambda x, y, f: [x[:, :1], x[:, 1:5]], 1),
    "gap-at-the-beginning": (lambda x, y, f: [x[:, 1:2], x[:, 2:]], 1),
    "overlap": (lambda x, y, f: [x[:, :2], x[:, 1:]], 1),
    "another-tensor": (lambda x, y, f: [x[:, :1], y[:, 1:]], 1),
    "another-dim": (lambda x, y, f: [x[:, :3], x[:, 3:]], 2),
    "steps": (lambda x, y, f: [x[:, ::2], x[:, 1::2]], 1),
    "steps-side-by-side": (lambda x, y, f: [x[:, :3:2], x[:, 3:]], 1),
    "half-of-the-features": (lambda x, y, f: [x[:, :1, :4], x[:, 1:, :4]], 1),
    "one-part": (lambda x, y, f: [x[:, :]], 1),
    "split-reordered": (lambda x, y, f: x.split([1, 5], 1)[::-1], 1),
    "split-along-another-dim": (lambda x, y, f: x.split(4, 2), 1),
    "indices-reordered": (lambda x, y, f: [x[:, 1].unsqueeze(1), x[:, 0].unsqueeze(1), x[:, 2:]], 1),
    "gathered": (lambda x, y, f: [x[:, [0]], x[:, 1:]], 1),
    "unsqueezed-behind-the-features": (lambda x, y, f: [x.unsqueeze(-1), y.unsqueeze(3)], -1),
    "indexed-behind-the-features": (lambda x, y, f: [x[..., None], y[:, :, :, None]], 3),
    "unsqueezed-before-the-batch": (lambda x, y, f: [x.unsqueeze(0), y[None]], 0),
    "a-scaled-slice": (lambda x, y, f: [x[:, :1], 2 * x[:, 1:]], 1),
    "a-scaled-slice-in-the-sum": (lambda x, y, f: [x[:, :1], f[:, 1:].add(x[:, 1:], alpha=2)], 1),
    "a-difference": (lambda x, y, f: [x[:, :1], x[:, 1:] - f[:, 1:]], 1),
    "a-broadcast-sum": (lambda x, y, f: [x[:, :1], x[:, 1:] + f[:, :1]], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_other_parts_are_not(name: str) -> None:
    parts, dim = OTHER[name]
    assert read_off(parts, dim) is None
    program = run_passes(program_of(parts, dim), [Normalize()])
    FileCheck().check("torch.cat]").run(str(program.graph_module.graph))
    assert program.history[0].changes == 0


BRANCHES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], list[str | None]]] = {
    "second": (lambda x, y, f: [x[:, :1], x[:, 1:] + f.exp()[:, 1:].neg()], [None, "neg"]),
    "first": (lambda x, y, f: [f[:, :1].neg() + x[:, :1], x[:, 1:]], ["neg", None]),
    "both": (lambda x, y, f: [x[:, :1] + f[:, :1].neg(), f[:, 1:].abs() + x[:, 1:]], ["neg", "abs"]),
    "of-a-split": (lambda x, y, f: (lambda a, b: [a, torch.add(b, f[:, 2:].neg())])(*x.split([2, 4], 1)), [None, "neg"]),
    "a-slice-of-another-tensor": (lambda x, y, f: [x[:, :1], x[:, 1:] + y[:, 1:]], [None, "getitem"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_are_told_from_slices(name: str) -> None:
    parts, branches = BRANCHES[name]
    assert read_off(parts) == ("sin", branches)


def test_a_sum_of_two_slices_is_read_as_its_neighbours_need_it() -> None:
    """``x[:, 1:] + y[:, 1:]`` beside ``y[:, :1]`` adds to y; where both tensors fit, the first reading is taken."""
    assert read_off(lambda x, y, f: [y[:, :1], x[:, 1:] + y[:, 1:]]) == ("cos", [None, "getitem"])
    assert read_off(lambda x, y, f: [x[:, :1] + y[:, :1], x[:, 1:] + y[:, 1:]]) == ("sin", ["getitem", "getitem"])


def test_the_branch_is_padded_with_zeros() -> None:
    program = run_passes(program_of(lambda x, y, f: [x[:, :1], x[:, 1:] + f[:, 1:]]), [Normalize()])
    (
        FileCheck()
        .check("%zeros_like : ").check_same("torch.zeros_like](args = (%getitem,)")
        .check("%cat_1 : ").check_same("torch.cat](args = ([%zeros_like, %getitem_2], 1)")
        .check("torch.add](args = (%sin, %cat_1)")
        .run(str(program.graph_module.graph))
    )  # fmt: skip
    assert program.history[0].changes == 1


def test_cat_by_keywords() -> None:
    class ByKeywords(Joined):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(tensors=self.parts(x.sin(), x.cos(), x.tanh()), dim=self.dim)

    captured = capture(ByKeywords(*WHOLE["chunk"]), (torch.zeros(BATCH, TOKENS, WIDTH),), {})
    program = run_passes(Program(captured.graph_module, ac.AttnResConfig(), captured.parameters), [Normalize()])
    FileCheck().check("torch.clone](args = (%sin,)").check_not("torch.cat]").run(str(program.graph_module.graph))


# ------------------------------------------------------------------------------------------------- a stream in two parts


class Network(nn.Module):
    """Every layer cuts the stream, adds to its tokens what the branch gives, and joins it again; the CLS token waits."""

    def __init__(self, cut_and_add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.cut_and_add = cut_and_add
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH, eps=EPS) for _ in range(LAYERS)])
        self.mix = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH, eps=EPS)

    def branch(self, x: Tensor, i: int) -> Tensor:
        return self.mix[i](self.norms[i](x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(LAYERS):
            x = self.cut_and_add(x, self.branch(x, i)[:, 1:])
        return self.norm(x)


def add_to_parts_of_split(x: Tensor, f: Tensor) -> Tensor:
    cls, patches = x.split([1, TOKENS - 1], dim=1)
    return torch.cat([cls, f + patches], dim=1)


def add_to_both(x: Tensor, f: Tensor) -> Tensor:
    return torch.cat((x[:, 0].unsqueeze(1) + f.mean(1, keepdim=True), x[:, 1:] + f), -2)


CUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "slices": lambda x, f: torch.cat([x[:, :1], x[:, 1:] + f], dim=1),
    "split": add_to_parts_of_split,
    "narrow": lambda x, f: torch.cat([x.narrow(1, 0, 1), x.narrow(1, 1, TOKENS - 1) + f], 1),
    "both-parts": add_to_both,
    "joined-before-the-add": lambda x, f: torch.cat([x[:, :1], x[:, 1:]], 1) + torch.cat([torch.zeros_like(f[:, :1]), f], 1),
}


@pytest.mark.parametrize("variant", ["full", "block"])
@pytest.mark.parametrize("name", CUTS)
def test_a_stream_that_is_cut_and_joined_in_every_layer(name: str, variant: str) -> None:
    """Equal at zero queries; at random ones the definition, and every gradient with it."""
    config = ac.AttnResConfig(variant="full") if variant == "full" else ac.AttnResConfig(num_blocks=2)
    model, x = Network(CUTS[name]).double(), torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    rewritten = ac.rewrite(model, config, (x,))
    (chain,) = rewritten.report.chains
    assert (chain.kind, chain.num_sublayers, chain.num_sites) == ("prenorm", LAYERS, LAYERS)
    assert ac.compare(model, rewritten, (x,)).max_rel_error <= 1e-13
    with torch.no_grad():
        for site in rewritten.attnres.sites:
            site.query.normal_()
    queries = [site.query for site in rewritten.attnres.sites]
    stream = ReferenceStream(model.embed(x), 1 if variant == "full" else 2, "preserve", EPS, queries, None)
    for i in range(LAYERS):
        f = model.branch(stream.read(), i)
        stream.add(CUTS[name](torch.zeros_like(f), f[:, 1:]))
    expected = model.norm(stream.read())
    found = rewritten(x)
    assert (found - expected).abs().max() <= 1e-13 * expected.abs().max()
    assert (found - model(x)).abs().max() >= 1e-3
    projection = torch.randn_like(found)
    wanted = torch.autograd.grad((expected * projection).sum(), queries)
    for query, gradient in zip(torch.autograd.grad((found * projection).sum(), queries), wanted, strict=True):
        assert query.abs().max() > 0
        assert (query - gradient).abs().max() <= 1e-12 * gradient.abs().max()


@pytest.mark.parametrize(
    "cut_and_add",
    [
        pytest.param(lambda x, f: torch.cat([x[:, 1:2], x[:, 1:] + f], dim=1), id="another-token"),
        pytest.param(lambda x, f: torch.cat([x[:, 1:] + f, x[:, :1]], dim=1), id="another-order"),
    ],
)
def test_a_stream_that_is_joined_otherwise_is_no_chain(cut_and_add: Callable[[Tensor, Tensor], Tensor]) -> None:
    report = ac.detect(Network(cut_and_add), (torch.randn(BATCH, TOKENS, WIDTH),))
    assert report.chains == ()
    assert "'cat'" in report.near_misses()[0].reason
