"""The cost of segments against torch's own counter, against hand counts, and against graphs captured at other sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from models import PLAIN, NanoGPT, example_inputs, tiny
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import attnres_compile as ac
from attnres_compile.errors import ConfigError
from attnres_compile.pipelining.balance import stage_totals
from attnres_compile.pipelining.cost import ITEMSIZE, D, S, SegmentCost, T, matrix_product_flops, segment_costs, transfer_bytes
from attnres_compile.pipelining.work import Meter

CONFIG = ac.AttnResConfig(num_blocks=2)


def rewritten(model: nn.Module, batch: int, sequence: int, masked: bool = False) -> GraphModule:
    ids = torch.randint(3, 90, (batch, sequence))
    kwargs: dict[str, Any] = {} if isinstance(model, tuple(PLAIN.values())) else {"use_cache": False}
    if masked:
        kwargs["attention_mask"] = torch.ones(batch, sequence, dtype=torch.long)
    return ac.rewrite(model, CONFIG, args=(ids,), kwargs=kwargs)


def sites(graph: Graph) -> list[Node]:
    return list(graph.find_nodes(op="call_function", target=torch.ops.attnres.site.default))


def costs_of(graph_module: GraphModule, batch: int, sequence: int) -> tuple[SegmentCost, ...]:
    return segment_costs(graph_module.graph, sites(graph_module.graph), batch * sequence, sequence)


def growing(expression: sympy.Expr) -> sympy.Expr:
    """Without what no input enters: positions, masks, rotary tables, all of them in the first segment."""
    return expression - expression.as_independent(T, S, as_Add=True)[0]


# ------------------------------------------------------------------------------------------------------- whole models


# Batch, heads, head and hidden size are as large as the sequence in some.
SIZES = [(3, 4), (8, 8), (1, 32)]
# Nothing tells a padding mask [8, 8] from pairs of positions.
MASKED_SIZES = [(3, 4), (5, 8), (1, 32)]


@pytest.mark.parametrize(
    ("name", "options", "masked"),
    [
        ("llama", {}, False),
        ("gpt2", {"attn_implementation": "eager"}, True),
        ("nanogpt", {}, False),
        ("encoder", {}, False),
        ("mixtral", {}, False),
    ],
)
def test_costs_are_those_of_a_graph_captured_at_another_size(name: str, options: dict[str, Any], masked: bool) -> None:
    model = tiny(name, **options)
    first, *rest = costs_of(rewritten(model, 2, 11, masked), 2, 11)
    for batch, sequence in MASKED_SIZES if masked else SIZES:
        other_first, *others = costs_of(rewritten(model, batch, sequence, masked), batch, sequence)
        assert rest == others
        assert growing(first.flops) == growing(other_first.flops)
        assert growing(first.activation_bytes) == growing(other_first.activation_bytes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "nanogpt", "encoder", "mixtral"])
def test_matrix_products_are_those_that_the_model_runs(name: str) -> None:
    """The graph has fused attention; the model computes it by matrix products, which torch counts while they run."""
    args, kwargs = example_inputs(name)
    graph_module = ac.rewrite(tiny(name), CONFIG, args=args, kwargs=kwargs)
    if name in PLAIN:  # these run without data, where torch takes fused attention apart by itself
        model, args = tiny(name).to("meta"), (args[0].to("meta"),)
    else:
        model = tiny(name, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    assert matrix_product_flops(graph_module.graph) == counter.get_total_flops()


@pytest.mark.parametrize(("name", "layers", "hidden"), [("llama", 4, 32), ("gpt2", 4, 32)])
def test_the_textbook_formula(name: str, layers: int, hidden: int) -> None:
    """2 N T for the N weights of matrices, the tied head's but no embedding's, and 4 T S D per layer for attention."""
    model = tiny(name, tie_word_embeddings=True)
    graph_module = rewritten(model, 2, 11)
    positions = sum(p.numel() for name, p in model.named_parameters() if name.endswith("wpe.weight"))
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2) - positions
    products = matrix_product_flops(graph_module.graph)
    assert products == 2 * weights * 22 + layers * 4 * 22 * 11 * hidden
    total = stage_totals(costs_of(graph_module, 2, 11), ())[0]
    assert total.flops.coeff(T * S) == layers * 4 * hidden
    assert products < total.at(22, 11)["flops"] < 1.15 * products  # norms, activations and sites beside narrow matrices


def test_a_segment_counted_by_hand() -> None:
    """The MLP of nanoGPT's first block: its site, norm, two products with GELU between, and the sum for the next site."""
    cost = costs_of(rewritten(tiny("nanogpt"), 2, 11), 2, 11)[1]
    hidden, inner = 32, 64
    products = 2 * 2 * hidden * inner
    assert cost.flops == (6 * 2 * hidden + 7 * hidden + products + inner + hidden) * T
    assert cost.activation_bytes == 4 * (hidden + hidden + inner + inner + hidden + hidden) * T
    assert cost.parameter_bytes == 4 * (2 * hidden + 2 * hidden + hidden * inner + inner + inner * hidden + hidden)


def test_every_parameter_belongs_to_the_segment_that_uses_it_first() -> None:
    model = NanoGPT(tied=True)
    graph_module = rewritten(model.eval(), 2, 11)
    costs = costs_of(graph_module, 2, 11)
    assert sum(cost.parameter_bytes for cost in costs) == sum(p.numel() * 4 for p in graph_module.parameters())
    assert costs[-1].parameter_bytes == 4 * (32 + 32 + 32 + 32)  # query, key norm, final norm; the head is the embedding
    untied = costs_of(rewritten(NanoGPT(tied=False).eval(), 2, 11), 2, 11)
    assert untied[-1].parameter_bytes - costs[-1].parameter_bytes == model.tokens.weight.nbytes


def test_autocast_changes_bytes_and_no_flops() -> None:
    class Autocast(NanoGPT):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(ids)

    plain, cast = (stage_totals(costs_of(rewritten(c().eval(), 2, 11), 2, 11), ())[0] for c in (NanoGPT, Autocast))
    assert plain.flops == cast.flops
    assert plain.activation_bytes.coeff(T) > cast.activation_bytes.coeff(T)


# ------------------------------------------------------------------------------------------------------- single nodes


def node_of(function: Any, arguments: tuple[Any, ...], **keywords: Any) -> Node:
    """A call in a graph of its own, with tensors as inputs; a method is given by its name."""
    graph = Graph()

    def as_input(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder("x")
        node.meta["example_value"] = value
        return node

    nodes = tuple(map(as_input, arguments))
    node = graph.create_node("call_method" if isinstance(function, str) else "call_function", function, nodes, keywords)
    method = getattr(Tensor, function) if isinstance(function, str) else function
    node.meta["example_value"] = method(*arguments, **keywords)
    return node


def r(*shape: int) -> Tensor:
    return torch.randn(shape)


def attention_module(query: Tensor, key: Tensor) -> Any:
    weights = (r(24, 8), r(24), None, None, False, 0.0, r(8, 8), r(8))
    return node_of(F.multi_head_attention_forward, (query, key, key, 8, 2, *weights), need_weights=False)


PRODUCTS: dict[str, tuple[Callable[[], Node], int]] = {
    "linear": (lambda: node_of(F.linear, (r(2, 5, 8), r(6, 8), r(6))), 2 * 10 * 8 * 6),
    "matmul": (lambda: node_of(torch.matmul, (r(2, 5, 8), r(8, 6))), 2 * 10 * 8 * 6),
    "@": (lambda: node_of("__matmul__", (r(2, 5, 8), r(8, 6))), 2 * 10 * 8 * 6),
    "mm": (lambda: node_of("mm", (r(5, 8), r(8, 6))), 2 * 5 * 8 * 6),
    "addmm": (lambda: node_of(torch.addmm, (r(6), r(5, 8), r(8, 6))), 2 * 5 * 8 * 6),
    "mv": (lambda: node_of(torch.matmul, (r(5, 8), r(8))), 2 * 5 * 8),
    "dot": (lambda: node_of(torch.dot, (r(8), r(8))), 2 * 8),
    "bmm": (lambda: node_of(torch.bmm, (r(3, 5, 8), r(3, 8, 6))), 2 * 3 * 5 * 8 * 6),
    "baddbmm": (lambda: node_of(torch.baddbmm, (r(3, 5, 6), r(3, 5, 8), r(3, 8, 6))), 2 * 3 * 5 * 8 * 6),
    "addbmm": (lambda: node_of(torch.addbmm, (r(5, 6), r(3, 5, 8), r(3, 8, 6))), 2 * 3 * 5 * 8 * 6),
    "addmv": (lambda: node_of(torch.addmv, (r(5), r(5, 8), r(8))), 2 * 5 * 8),
    "einsum": (lambda: node_of(torch.einsum, ("bsd,nd->bsn", r(2, 5, 8), r(6, 8))), 2 * 10 * 8 * 6),
    "tensordot": (lambda: node_of(torch.tensordot, (r(2, 5, 8), r(8, 6)), dims=1), 2 * 10 * 8 * 6),
    "conv1d": (lambda: node_of(F.conv1d, (r(2, 8, 9), r(6, 8, 3))), 2 * 2 * 7 * 6 * 8 * 3),
    "conv2d": (lambda: node_of(F.conv2d, (r(2, 3, 8, 8), r(6, 3, 4, 4), None, 4)), 2 * 2 * 4 * 6 * 3 * 16),
    "conv3d": (lambda: node_of(F.conv3d, (r(1, 3, 4, 4, 4), r(6, 3, 2, 2, 2), None, 2)), 2 * 8 * 6 * 3 * 8),
    "attention": (
        lambda: node_of(F.scaled_dot_product_attention, (r(2, 4, 5, 8), r(2, 4, 7, 8), r(2, 4, 7, 8))), 4 * 2 * 4 * 5 * 7 * 8,
    ),
    "grouped queries": (
        lambda: node_of(F.scaled_dot_product_attention, (r(2, 4, 5, 8), r(2, 2, 7, 8), r(2, 2, 7, 8)), enable_gqa=True),
        4 * 2 * 4 * 5 * 7 * 8,
    ),
    "multi-head attention": (
        lambda: attention_module(r(5, 2, 8), r(7, 2, 8)), 2 * 8 * 8 * (2 * 10 + 2 * 14) + 4 * 2 * 5 * 7 * 8,
    ),
    "grouped_mm": (
        lambda: node_of(F.grouped_mm, (r(16, 8).bfloat16(), r(3, 8, 16).bfloat16()), offs=torch.tensor([4, 8, 16]).int()),
        2 * 16 * 8 * 16,
    ),
    "operands of different dtypes": (
        lambda: _recorded(node_of(F.linear, (r(5, 8), r(6, 8))), 0, torch.bfloat16), 2 * 5 * 8 * 6,
    ),
    "embedding": (lambda: node_of(F.embedding, (torch.arange(5), r(9, 8))), 0),
    "mul": (lambda: node_of(torch.mul, (r(5, 8), r(8))), 0),
}  # fmt: skip


def _recorded(node: Node, position: int, dtype: torch.dtype) -> Node:
    """As a graph has it whose operations run under autocast."""
    operand = node.all_input_nodes[position]
    operand.meta["example_value"] = operand.meta["example_value"].to(dtype)
    return node


@pytest.mark.parametrize(("make", "flops"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_in_every_spelling(make: Callable[[], Node], flops: int) -> None:
    assert Meter().measure(make()).product_flops == flops


OTHERS: dict[str, tuple[Callable[[], Node], int, int]] = {
    "an addition": (lambda: node_of(torch.add, (r(2, 5, 8), r(8))), 80, 320),
    "an addition in place": (lambda: node_of("add_", (r(5, 8), r(8))), 40, 0),
    "a sum": (lambda: node_of("sum", (r(5, 8), -1)), 40, 20),
    "softmax": (lambda: node_of(F.softmax, (r(5, 8), -1)), 200, 160),
    "layer norm": (lambda: node_of(F.layer_norm, (r(5, 8), (8,), r(8), r(8))), 280, 160),
    "a view": (lambda: node_of("view", (r(5, 8), 40)), 0, 0),
    "a transposition": (lambda: node_of("transpose", (r(5, 8), 0, 1)), 0, 0),
    "parts": (lambda: node_of("chunk", (r(6, 8), 2)), 0, 0),
    "a cast to the same dtype": (lambda: node_of("to", (r(5, 8), torch.float32)), 0, 0),
    "a cast": (lambda: node_of("to", (r(5, 8), torch.bfloat16)), 0, 80),
    "a cast with a device": (lambda: node_of("to", (r(5, 8), torch.device("cpu"))), 0, 0),
    "a reshape that copies": (lambda: node_of("reshape", (r(5, 8).t(), 40)), 0, 160),
    "contiguous memory made contiguous": (lambda: node_of("contiguous", (r(5, 8),)), 0, 0),
    "idle dropout": (lambda: node_of(F.dropout, (r(5, 8), 0.5, False)), 0, 0),
    "dropout": (lambda: node_of(F.dropout, (r(5, 8), 0.5, True)), 40, 160),
    "a look-up": (lambda: node_of(F.embedding, (torch.arange(5), r(9, 8))), 0, 160),
    "a number": (lambda: node_of("size", (r(5, 8), 0)), 0, 0),
}  # fmt: skip


@pytest.mark.parametrize(("make", "flops", "nbytes"), OTHERS.values(), ids=OTHERS)
def test_other_work(make: Callable[[], Node], flops: int, nbytes: int) -> None:
    work = Meter().measure(make())
    assert (work.flops, work.nbytes, work.product_flops) == (flops, nbytes, 0)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_costs_add_up() -> None:
    costs = costs_of(rewritten(tiny("nanogpt"), 2, 11), 2, 11)
    stages = stage_totals(costs, (3, 5))
    assert stages[1] == costs[3] + costs[4]
    assert sum(stage.flops for stage in stages) == sum(cost.flops for cost in costs)


def test_figures_are_whole_numbers() -> None:
    figures = SegmentCost(3 * T * S + T / 3, 4 * T, sympy.Integer(5)).at(8, 4)
    assert json.loads(json.dumps(figures)) == {"flops": 99, "activation_bytes": 32, "parameter_bytes": 5}


def test_a_hop() -> None:
    """Kimi K3 in bfloat16 after 60 sublayers in blocks of 24: the embedding, two blocks and a partial sum."""
    assert transfer_bytes(3, 1) == 4 * T * D * ITEMSIZE
    assert transfer_bytes(3, 1).subs({T: 4096, D: 7168, ITEMSIZE: 2}) == 4 * 4096 * 7168 * 2


def test_bad_requests_are_refused() -> None:
    graph = rewritten(tiny("nanogpt"), 2, 11).graph
    with pytest.raises(ConfigError, match="22 tokens are no batch of sequences of 4"):
        segment_costs(graph, sites(graph), 22, 4)
    with pytest.raises(ConfigError, match="attnres_sites_6 does not begin a segment"):
        segment_costs(graph, sites(graph)[::-1], 22, 11)
