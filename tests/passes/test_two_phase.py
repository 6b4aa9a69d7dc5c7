"""The two phases: which sites are computed together, what the graph then holds, and that it computes the same."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from interpreter import make_faithful
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.nn import functional as F
from torch.testing import FileCheck
from torch.utils.checkpoint import checkpoint

import attnres_compile.kernels.ops  # noqa: F401  (registers the attnres:: operators)
from attnres_compile import AttnResConfig
from attnres_compile.capture import capture
from attnres_compile.passes.base import Program, run_passes
from attnres_compile.passes.lower import Lower
from attnres_compile.passes.pipeline import DETECTION, PHASING, PLANNING, REWRITING
from attnres_compile.passes.two_phase import FULL_CHUNK

make_faithful()
WIDTH = 8
TOKENS = (2, 3)


class Stream(nn.Module):
    """``depth`` sublayers ``x + linear(norm(x))`` and a final norm."""

    def __init__(self, depth: int, norm: Callable[[], nn.Module] = lambda: nn.RMSNorm(WIDTH, eps=1e-6)) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norms = nn.ModuleList([norm() for _ in range(depth)])
        self.mix = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth)])
        self.norm = norm()

    def branch(self, x: Tensor, i: int) -> Tensor:
        return self.mix[i](self.norms[i](x))

    def layer(self, x: Tensor, i: int) -> Tensor:
        return x + self.branch(x, i)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(len(self.mix)):
            x = self.layer(x, i)
        return self.norm(x)


class Parallel(Stream):
    def layer(self, x: Tensor, i: int) -> Tensor:
        y = self.norms[i](x)
        return x + self.mix[i](y) + torch.tanh(self.mix[i - 1](y))


class Sandwich(Stream):
    def branch(self, x: Tensor, i: int) -> Tensor:
        return F.rms_norm(super().branch(x, i), (WIDTH,), eps=1e-6)


class Checkpointed(Stream):
    """Two sublayers to a checkpoint, as in a Transformer's layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(0, len(self.mix), 2):
            x = checkpoint(lambda x, i: self.layer(self.layer(x, i), i + 1), x, i, use_reentrant=False)
        return self.norm(x)


class Tapped(Stream):
    """A reader of the raw stream in mid-block, and of the stream before it: the sums are needed beside the merges."""

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.embed(x)
        for i in range(len(self.mix)):
            x = self.layer(x, i)
            if i == 1:
                middle = x
        return self.norm(x) + middle.sin() + first


class Masked(Stream):
    """The stream is masked in mid-depth: from there on all sources are other tensors."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(*TOKENS, 1, dtype=x.dtype)
        x = self.embed(x)
        for i in range(len(self.mix)):
            x = self.layer(x, i) if i != 4 else mask * x + self.branch(mask * x, i)
        return self.norm(x)


class TwoEps(Stream):
    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        for i in range(0, depth, 2):
            self.norms[i].eps = 1e-5


class SpelledNorm(nn.Module):
    """RMSNorm as Gemma spells it: the weight is one more than the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = x.double()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.double())).type_as(x)


class DividingNorm(nn.Module):
    """RMSNorm as a quotient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.weight


def program_of(model: nn.Module, dtype: torch.dtype = torch.float64, **config: object) -> Program:
    torch.manual_seed(0)
    model.to(dtype).train()
    captured = capture(model, (torch.zeros(*TOKENS, WIDTH, dtype=dtype),), {})
    program = Program(captured.graph_module, AttnResConfig(**config), captured.parameters)  # type: ignore[arg-type]
    return run_passes(program, DETECTION + PLANNING + REWRITING)


def text_of(program: Program) -> str:
    lines = str(program.graph_module.graph).splitlines()
    return "\n".join(line for line in lines if " = placeholder[" not in line)


def count(program: Program, operator_name: str) -> int:
    return text_of(program).count(f"torch.ops.attnres.{operator_name}.default]")


def changes(program: Program) -> dict[str, int]:
    return {entry.name: entry.changes for entry in program.history}


def inputs_of(program: Program, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random values for every placeholder: queries and key-norm weights too."""
    torch.manual_seed(1)
    shapes = [node.meta["example_value"].shape for node in program.graph_module.graph.find_nodes(op="placeholder")]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def outputs_and_gradients(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    outputs = function(*inputs)
    torch.manual_seed(2)
    total = sum((output * torch.randn_like(output)).sum() for output in outputs)
    assert isinstance(total, Tensor)
    return [*outputs, *torch.autograd.grad(total, inputs)]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm().clamp(min=1.0)).item() for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------ graphs


def test_a_block_becomes_one_inter_and_a_merge_per_partial_sum() -> None:
    program = run_passes(program_of(Stream(8), block_size=4), PHASING[:1])
    # Sites behind 1 to 3 sublayers read the root, behind 4 to 7 the root and a block, behind 8 all three by itself.
    assert (count(program, "inter"), count(program, "merge"), count(program, "site")) == (2, 6, 1)
    assert changes(program)["two_phase"] == 7
    check = FileCheck()
    check.check("%attnres_inter_1 : ").check_same("([%x, %attnres_sum_")
    check.check_same("[%attnres_sites_3_query, %attnres_sites_4_query, %attnres_sites_5_query, %attnres_sites_6_query]")
    check.check("%attnres_read : ").check_same("torch.mul](args = (%attnres_inter_1_mixed, 2.0)")
    check.run(text_of(program))


def test_the_merge_adds_the_branch_and_hands_the_sum_on() -> None:
    program = run_passes(program_of(Stream(4), block_size=4), PHASING[:1])
    check = FileCheck()
    check.check("%attnres_merge : ").check_same("(%linear_1, None, %attnres_inter_mixed, %attnres_inter_lse, ")
    check.check("%attnres_merge_total : ").check_same("operator.getitem](args = (%attnres_merge, 0)")
    check.check("%attnres_merge_1 : ").check_same("(%attnres_merge_total, %linear_2, ")
    check.check("%attnres_merge_2 : ").check_same("(%attnres_merge_1_total, %linear_3, ")
    check.check("torch.add](args = (%attnres_merge_2_total, %linear_4)")
    check.run(text_of(program))
    FileCheck().check_count("torch.add]", 1, exactly=True).run(text_of(program))


def test_full_is_computed_in_chunks() -> None:
    program = run_passes(program_of(Stream(2 * FULL_CHUNK + 1), variant="full"), PHASING[:1])
    assert count(program, "inter") == 2
    assert count(program, "merge") == 2
    assert count(program, "site_with_prior") == 2 * (FULL_CHUNK - 2)
    assert [note.site for note in program.notes] == [2 * FULL_CHUNK]


@pytest.mark.parametrize(
    ("model", "sites", "reason"),
    [
        pytest.param(Stream(8), [7], "no other site reads the same complete blocks", id="output"),
        pytest.param(Masked(8), [3, 7], "the stream is scaled or laid out anew", id="mask"),
        pytest.param(TwoEps(8), [0, 1, 2, 3, 4, 5, 6, 7], "the norms that read the block's sites differ in eps", id="eps"),
    ],
)
def test_what_stays_by_itself_is_noted(model: nn.Module, sites: list[int], reason: str) -> None:
    program = run_passes(program_of(model, block_size=4), PHASING)
    assert [note.site for note in program.notes] == sites
    assert any(note.reason.startswith(reason) for note in program.notes)
    assert count(program, "site") == len(sites)


@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(lambda: nn.RMSNorm(WIDTH, eps=1e-6), id="RMSNorm"),
        pytest.param(lambda: nn.RMSNorm(WIDTH, eps=1e-6, elementwise_affine=False), id="RMSNorm-without-weight"),
        pytest.param(lambda: nn.LayerNorm(WIDTH), id="LayerNorm"),
        pytest.param(lambda: nn.LayerNorm(WIDTH, bias=False), id="LayerNorm-without-bias"),
        pytest.param(SpelledNorm, id="spelled-out"),
        pytest.param(DividingNorm, id="by-division"),
        pytest.param(lambda: nn.RMSNorm(WIDTH), id="RMSNorm-without-eps"),
    ],
)
def test_the_sublayers_norm_joins_the_merge(norm: Callable[[], nn.Module]) -> None:
    program = run_passes(program_of(Stream(6, norm), block_size=3), PHASING)
    merges = count(program, "merge")
    assert merges == changes(program)["fuse_norms"] == 4
    # The first sublayer's, that behind the first mixture, and the final one are the model's own still.
    left = [line for line in text_of(program).splitlines() if any(f"{name}](args" in line for name in ("norm", "sqrt"))]
    assert len(left) == 7 - merges


@pytest.mark.parametrize(
    "reader",
    [
        pytest.param(lambda x, norm: norm(x) + x.shape[-1] * F.normalize(x, dim=-1), id="two-readers"),
        pytest.param(lambda x, norm: F.normalize(x, dim=-1), id="another-norm"),
        pytest.param(lambda x, norm: norm(x.float()).double(), id="fewer-bits"),
        pytest.param(lambda x, norm: F.rms_norm(x, x.shape[-2:], eps=1e-6), id="two-dimensions"),
    ],
)
def test_other_readers_get_the_merged_stream(reader: Callable[..., Tensor]) -> None:
    class Other(Stream):
        def branch(self, x: Tensor, i: int) -> Tensor:
            return self.mix[i](reader(x, lambda y: F.rms_norm(y, (WIDTH,), eps=1e-6)))

    program = run_passes(program_of(Other(4), block_size=4), PHASING)
    assert changes(program)["fuse_norms"] == 0


# ----------------------------------------------------------------------------------------------------------- numbers


def relatives(depth: int) -> list[object]:
    found: list[object] = [
        pytest.param(lambda: Stream(depth), {"block_size": size}, id=f"block-size-{size}") for size in range(1, depth + 1)
    ]
    for name, config in {"full": {"variant": "full"}, "blocks": {"num_blocks": 3}}.items():
        found.append(pytest.param(lambda: Stream(2 * depth), config, id=f"deep-{name}"))
        for model in (Parallel, Sandwich, Checkpointed, Tapped, Masked, TwoEps):
            found.append(pytest.param(lambda model=model: model(depth), config, id=f"{model.__name__}-{name}"))
    found.append(pytest.param(lambda: Stream(depth, SpelledNorm), {"num_blocks": 2}, id="spelled-norm"))
    found.append(pytest.param(lambda: Stream(depth, DividingNorm), {"num_blocks": 2}, id="norm-by-division"))
    found.append(pytest.param(lambda: Stream(depth, lambda: nn.RMSNorm(WIDTH)), {"num_blocks": 2}, id="norm-without-eps"))
    found.append(pytest.param(lambda: Stream(depth, lambda: nn.LayerNorm(WIDTH)), {"num_blocks": 2}, id="layer-norm"))
    found.append(pytest.param(lambda: Stream(depth), {"num_blocks": 2, "scale": "paper"}, id="paper"))
    found.append(pytest.param(lambda: Stream(depth), {"num_blocks": 2, "key_norm": False}, id="no-key-norm"))
    return found


@pytest.mark.parametrize(("model", "config"), relatives(8))
def test_outputs_and_all_gradients_are_those_of_sites_by_themselves(
    model: Callable[[], nn.Module], config: dict[str, object]
) -> None:
    program = program_of(model(), **config)
    inputs = inputs_of(program)
    expected = outputs_and_gradients(program.graph_module, inputs)
    program = run_passes(program, PHASING)
    assert difference(outputs_and_gradients(program.graph_module, inputs), expected) <= 1e-13
    program = run_passes(program, [Lower()])
    assert difference(outputs_and_gradients(program.graph_module, inputs), expected) <= 1e-13


def test_gradients_do_not_cross_a_region_without_them() -> None:
    """A site read without gradients hands no source on to sites that need them."""

    class Peeked(Stream):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for i in range(len(self.mix)):
                with torch.set_grad_enabled(i != 4):
                    f = self.branch(x, i)
                x = x + f
            return self.norm(x)

    program = program_of(Peeked(8), block_size=4)
    inputs = inputs_of(program)
    needed = [i for i, node in enumerate(program.graph_module.graph.find_nodes(op="placeholder")) if "query" not in node.name]
    expected = torch.autograd.grad(program.graph_module(*inputs)[0].sum(), [inputs[i] for i in needed], allow_unused=True)
    program = run_passes(program, (*PHASING, Lower()))
    found = torch.autograd.grad(program.graph_module(*inputs)[0].sum(), [inputs[i] for i in needed], allow_unused=True)
    assert [grad is None for grad in found] == [grad is None for grad in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    assert difference([a for a, _ in pairs], [b for _, b in pairs]) <= 1e-13


# ---------------------------------------------------------------------------------------------- what AOTAutograd sees


def traced(program: Program) -> tuple[Graph, Graph]:
    """The forward and the backward graph that a compiler gets, split by the min-cut partitioner."""
    graphs: list[Graph] = []

    def keep(graph_module: GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph_module.graph)
        return make_boxed_func(graph_module.forward)

    function = aot_function(
        torch.fx.Interpreter(program.graph_module).run, keep, keep, partition_fn=min_cut_rematerialization_partition
    )
    outputs_and_gradients(function, inputs_of(program, torch.float32))
    return graphs[0], graphs[1]


def of_stream_size(graph: Graph, name: str) -> int:
    """Operations called ``name`` that give a tensor with the elements of the stream."""
    size = WIDTH * TOKENS[0] * TOKENS[1]
    named = [node for node in graph.nodes if node.op == "call_function" and str(node.target).split(".")[1:2] == [name]]
    return sum(isinstance(node.meta.get("val"), Tensor) and node.meta["val"].numel() >= size for node in named)


def saved(graph: Graph) -> Counter[str]:
    """What the forward graph keeps for the backward that has the elements of the stream, by the operation that made it."""
    size = WIDTH * TOKENS[0] * TOKENS[1]
    kept: Counter[str] = Counter()
    for node in list(next(iter(graph.find_nodes(op="output"))).args[0])[1:]:  # type: ignore[arg-type]
        value = node.meta["val"]
        if node.op == "call_function" and value.numel() == size and value.shape[-1] == WIDTH:
            while node.target is operator.getitem:
                node = node.args[0]
            kept[str(node.target).split(".")[1]] += 1
    return kept


def test_fused_kernels_leave_no_adds_and_no_copies_of_the_stream() -> None:
    program = program_of(Stream(12), torch.float32, block_size=4)
    expected = outputs_and_gradients(program.graph_module, inputs_of(program, torch.float32))
    program = run_passes(program, (*PHASING, Lower("fused")))
    assert difference(outputs_and_gradients(program.graph_module, inputs_of(program, torch.float32)), expected) <= 1e-5
    forward, backward = traced(program)
    for graph in (forward, backward):
        assert {name: of_stream_size(graph, name) for name in ("cat", "stack", "clone")} == {"cat": 0, "stack": 0, "clone": 0}
    # Forward: the sums that complete the three blocks.
    assert of_stream_size(forward, "add") == 3
    # Backward: one inside each norm that is the model's own still, and one where the first sublayer reads the root by itself.
    norms_left = 13 - changes(program)["fuse_norms"]
    assert of_stream_size(backward, "add") == norms_left + 1 == 5


def test_what_fused_kernels_keep_for_the_backward() -> None:
    """Per merge the mixture, the partial sum, and the norm's output that the next product needs anyway."""
    forward, _ = traced(run_passes(program_of(Stream(12), torch.float32, block_size=4), (*PHASING, Lower("fused"))))
    inputs_of_products, mixtures, partial_sums, first_partial_sums_and_root = 13, 6, 6, 4
    assert saved(forward) == {
        "view": inputs_of_products,
        "fused_inter": mixtures,  # of two blocks; those of the first are the root itself
        "detach": partial_sums,
        "_unsafe_view": first_partial_sums_and_root,
        "add": 3,  # the blocks
        "mul": 2,  # what the first norm of a block reads
        "fused_site": 1,
    }


@pytest.mark.parametrize("kernels", ["naive", "fused"])
def test_checkpointing_keeps_what_it_keeps_of_the_standard_residual(kernels: str) -> None:
    """Sites, phases and norms are recomputed; a layer's boundary is kept, in whatever sum the rewritten graph holds it."""
    plain = capture(Checkpointed(12), (torch.zeros(*TOKENS, WIDTH),), {})
    standard = run_passes(Program(plain.graph_module, AttnResConfig(), plain.parameters), DETECTION[:1])
    program = run_passes(program_of(Checkpointed(12), torch.float32, block_size=4), (*PHASING, Lower(kernels)))
    found, expected = saved(traced(program)[0]), saved(traced(standard)[0])
    assert found["add"] == expected["add"] == 5
    # One more in the whole model: the output site lies outside of the checkpoints, and the norm behind it keeps what it reads.
    assert found.total() == expected.total() + 1
