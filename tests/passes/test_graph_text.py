"""Every pass as a before and an after: the graph's text, the number of changes, and what the checks between passes catch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.testing import FileCheck
from torch.utils.checkpoint import checkpoint

import attnres_compile.kernels.ops  # noqa: F401  (registers the attnres:: operators)
from attnres_compile import AttnResConfig, ConfigError, VerificationError
from attnres_compile.capture import capture
from attnres_compile.passes.base import PASSES, Pass, Program, check_graph, run_passes
from attnres_compile.passes.find_chains import FindChains
from attnres_compile.passes.lower import Lower
from attnres_compile.passes.normalize import Normalize
from attnres_compile.passes.pipeline import DETECTION, LOWERING, PHASING, PLANNING, REWRITING
from attnres_compile.passes.plan_blocks import PlanBlocks
from attnres_compile.passes.rewrite import Rewrite
from attnres_compile.passes.two_phase import TwoPhase
from attnres_compile.passes.verify import Verify

WIDTH = 8
ALL = (*DETECTION, *PLANNING, *REWRITING, *PHASING, *LOWERING)


class Network(nn.Module):
    """Four sublayers ``x + linear(rms_norm(x))`` and a final norm, ``[2, 3, 8]`` to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(4)])
        self.mix = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)])
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def add(self, x: Tensor, f: Tensor) -> Tensor:
        return x + f

    def branch(self, x: Tensor, i: int) -> Tensor:
        return self.mix[i](self.norms[i](x))

    def layer(self, x: Tensor, i: int) -> Tensor:
        return self.add(x, self.branch(x, i))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(4):
            x = self.layer(x, i)
        return self.norm(x)


def spelled(add: Callable[[Tensor, Tensor], Tensor]) -> Network:
    class Spelled(Network):
        def add(self, x: Tensor, f: Tensor) -> Tensor:
            return add(x, f)

    return Spelled()


def program_of(model: nn.Module | None = None, config: AttnResConfig | None = None) -> Program:
    captured = capture(model or Network(), (torch.zeros(2, 3, WIDTH),), {})
    return Program(captured.graph_module, config or AttnResConfig(num_blocks=2), captured.parameters)


def text_of(program: Program) -> str:
    """The graph without its inputs."""
    lines = str(program.graph_module.graph).splitlines()
    return "\n".join(line for line in lines if " = placeholder[" not in line)


def changes(program: Program) -> dict[str, int]:
    return {entry.name: entry.changes for entry in program.history}


def node(program: Program, name: str) -> Node:
    return next(node for node in program.graph_module.graph.nodes if node.name == name)


# --------------------------------------------------------------------------------------------------------- normalize


def test_normalize_leaves_plain_adds_alone() -> None:
    program = program_of()
    before = str(program.graph_module.graph)
    program = run_passes(program, [Normalize()])
    assert str(program.graph_module.graph) == before
    assert changes(program) == {"normalize": 0}


def in_place_operator(x: Tensor, f: Tensor) -> Tensor:
    x += f
    return x


@pytest.mark.parametrize(
    ("add", "before", "after"),
    [
        pytest.param(in_place_operator, "operator.iadd", "torch.add", id="+="),
        pytest.param(lambda x, f: x.add_(f), "call_method[target=add_]", "torch.add", id="add_"),
        pytest.param(lambda x, f: x.sub_(f), "call_method[target=sub_]", "torch.sub", id="sub_"),
    ],
)
def test_normalize_makes_adds_functional(add: Callable[[Tensor, Tensor], Tensor], before: str, after: str) -> None:
    program = program_of(spelled(add))
    FileCheck().check_count(before, 4, exactly=True).run(text_of(program))
    program = run_passes(program, [Normalize()])
    FileCheck().check_not(before).run(text_of(program))
    FileCheck().check_count(f"call_function[target={after}]", 4, exactly=True).run(text_of(program))
    assert changes(program) == {"normalize": 4}
    assert program.refusals == ()


def test_later_readers_read_the_functional_sum() -> None:
    program = run_passes(program_of(spelled(in_place_operator)), [Normalize()])
    (
        FileCheck()
        .check("%x : ").check("%rms_norm : ").check_same("(%x, (8,)")
        .check("%x_1 : ").check_same("torch.add](args = (%x, %linear_1)")
        .check("%rms_norm_1 : ").check_same("(%x_1, (8,)")
        .check("%x_2 : ").check_same("torch.add](args = (%x_1, %linear_2)")
        .check("return (rms_norm_4,)")
        .run(text_of(program))
    )  # fmt: skip


def test_normalize_leaves_writes_into_aliases_alone() -> None:
    class Aliased(Network):
        def layer(self, x: Tensor, i: int) -> Tensor:
            flat = x.view(-1, WIDTH)
            x += self.branch(x, i)
            return flat.view(2, 3, WIDTH)

    program = run_passes(program_of(Aliased()), [Normalize()])
    FileCheck().check_count("operator.iadd", 4, exactly=True).run(text_of(program))
    assert changes(program) == {"normalize": 0}
    assert {refusal.subject for refusal in program.refusals} == {"add"}
    assert len(program.refusals) == 4
    assert all("in-place arithmetic" in refusal.reason for refusal in program.refusals)


def test_normalize_expands_addcmul() -> None:
    program = program_of(spelled(lambda x, f: torch.addcmul(x, f, f, value=0.5)))
    FileCheck().check_count("target=torch.addcmul]", 4, exactly=True).run(text_of(program))
    program = run_passes(program, [Normalize()])
    (
        FileCheck()
        .check("%mul : ").check_same("torch.mul](args = (%linear_1, %linear_1)")
        .check("%x_1 : ").check_same("torch.add](args = (%x, %mul), kwargs = {alpha: 0.5})")
        .check_not("addcmul]")
        .check_count("target=torch.mul]", 3, exactly=True)
        .run(text_of(program))
    )  # fmt: skip
    assert changes(program) == {"normalize": 4}


def test_normalize_inlines_checkpoints_and_keeps_their_tags() -> None:
    class Checkpointed(Network):
        def layer(self, x: Tensor, i: int) -> Tensor:
            return checkpoint(super().layer, x, i, use_reentrant=False)

    program = program_of(Checkpointed())
    FileCheck().check_count("tag_activation_checkpoint]", 4, exactly=True).run(text_of(program))
    program = run_passes(program, [Normalize()])
    FileCheck().check_not("tag_activation_checkpoint").check_not("get_attr").run(text_of(program))
    assert changes(program) == {"normalize": 4}
    adds = [n for n in program.graph_module.graph.nodes if n.op == "call_function" and n.target.__name__ == "add"]
    assert [n.meta["ac_graph_id"] for n in adds] == [1, 2, 3, 4]
    assert all("recompute" in n.meta for n in adds)
    assert "recompute" not in node(program, "x").meta
    program = run_passes(program, [FindChains()])
    assert [(chain.num_sublayers, len(chain.sites)) for chain in program.chains] == [(4, 4)]


def test_normalize_removes_the_marker_of_converted_models() -> None:
    class Marked(Network):
        def forward(self, x: Tensor) -> Tensor:
            torch.ops.attnres.only_rewritten.default(x)
            return super().forward(x)

    program = program_of(Marked())
    FileCheck().check_count("attnres.only_rewritten", 1, exactly=True).run(text_of(program))
    program = run_passes(program, [Normalize()])
    assert changes(program) == {"normalize": 1}
    assert "only_rewritten" not in text_of(program)
    assert text_of(program).replace("l_x_", "l_args_0_") == text_of(program_of())


def test_normalize_takes_fused_encoder_layers_apart() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    )
    with torch.no_grad():
        program = program_of(model.eval())
        FileCheck().check_count("_transformer_encoder_layer_fwd", 2).run(text_of(program))
        program = run_passes(program, DETECTION)
    FileCheck().check_not("_transformer_encoder_layer_fwd").check_count("torch.add]", 4, exactly=True).run(text_of(program))
    assert changes(program) == {"normalize": 2, "find_chains": 1}
    assert [(chain.num_sublayers, len(chain.sites)) for chain in program.chains] == [(4, 4)]


# ----------------------------------------------------------------------------------------- find_chains, plan_blocks


def test_find_chains_changes_no_graph() -> None:
    program = run_passes(program_of(), [Normalize()])
    before = str(program.graph_module.graph)
    program = run_passes(program, [FindChains()])
    assert str(program.graph_module.graph) == before
    assert changes(program) == {"normalize": 0, "find_chains": 1}
    (chain,) = program.chains
    assert (chain.root.name, chain.kind, chain.hidden_size) == ("x", "prenorm", WIDTH)
    assert [[(a.node.name, a.skip.name, a.branch.name) for a in sublayer] for sublayer in chain.sublayers] == [
        [("x_1", "x", "linear_1")], [("x_2", "x_1", "linear_2")], [("x_3", "x_2", "linear_3")], [("x_4", "x_3", "linear_4")],
    ]  # fmt: skip
    assert [(read.stream.name, before, read.modules) for read, before in chain.reads] == [
        ("x", 0, ("norms.0",)), ("x_1", 1, ("norms.1",)), ("x_2", 2, ("norms.2",)), ("x_3", 3, ("norms.3",)),
        ("x_4", 4, ("norm",)),
    ]  # fmt: skip
    assert [before for _, before in chain.sites] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("config", "blocks", "sources"),
    [
        pytest.param(AttnResConfig(num_blocks=2), ((0, 2), (2, 4)), [2, 2, 3, 3], id="two-blocks"),
        pytest.param(AttnResConfig(block_size=3), ((0, 3), (3, 4)), [2, 2, 2, 3], id="size-three"),
        pytest.param(AttnResConfig(num_blocks=1), ((0, 4),), [2, 2, 2, 2], id="one-block"),
        pytest.param(AttnResConfig(variant="full"), ((0, 1), (1, 2), (2, 3), (3, 4)), [2, 3, 4, 5], id="full"),
        pytest.param(AttnResConfig(), ((0, 1), (1, 2), (2, 3), (3, 4)), [2, 3, 4, 5], id="default"),
    ],
)
def test_plan_blocks_changes_no_graph(config: AttnResConfig, blocks: tuple[tuple[int, int], ...], sources: list[int]) -> None:
    program = run_passes(program_of(config=config), DETECTION)
    before = str(program.graph_module.graph)
    program = run_passes(program, [PlanBlocks()])
    assert str(program.graph_module.graph) == before
    assert changes(program)["plan_blocks"] == len(blocks)
    (plan,) = program.plans
    assert plan.blocks == blocks
    assert [site.num_sources for site in plan.sites] == sources


# ----------------------------------------------------------------------------------------------------------- rewrite


def rewritten(config: AttnResConfig | None = None, model: nn.Module | None = None) -> Program:
    return run_passes(program_of(model, config), (*DETECTION, *PLANNING, Rewrite()))


def test_rewrite_into_two_blocks() -> None:
    program = rewritten(AttnResConfig(num_blocks=2))
    (
        FileCheck()
        .check("%x : [num_users=5]")
        .check("%rms_norm : ").check_same("(%x, (8,)")
        .check("%attnres_sites_0 : ").check_same("torch.ops.attnres.site.default]")
        .check_same("([%x, %linear_1], %attnres_sites_0_query, %attnres_sites_0_key_norm, 1e-06, 2.0)")
        .check("%rms_norm_1 : ").check_same("(%attnres_sites_0, (8,)")
        .check("%attnres_sum : ").check_same("torch.add](args = (%linear_1, %linear_2)")
        .check("%attnres_sites_1 : ")
        .check_same("([%x, %attnres_sum], %attnres_sites_1_query, %attnres_sites_1_key_norm, 1e-06, 2.0)")
        .check("%rms_norm_2 : ").check_same("(%attnres_sites_1, (8,)")
        .check("%attnres_sites_2 : ")
        .check_same("([%x, %attnres_sum, %linear_3], %attnres_sites_2_query, %attnres_sites_2_key_norm, 1e-06, 3.0)")
        .check("%attnres_sum_1 : ").check_same("torch.add](args = (%linear_3, %linear_4)")
        .check("%attnres_sites_3 : ")
        .check_same("([%x, %attnres_sum, %attnres_sum_1], %attnres_sites_3_query, %attnres_sites_3_key_norm, 1e-06, 3.0)")
        .check("%rms_norm_4 : ").check_same("(%attnres_sites_3, (8,)")
        .check_next("return (rms_norm_4,)")
        .run(text_of(program))
    )  # fmt: skip
    FileCheck().check_not("operator.add").run(text_of(program))  # the plain stream is gone
    assert changes(program) == {"normalize": 0, "find_chains": 1, "plan_blocks": 2, "rewrite": 4}
    assert [site.call.name for site in program.sites] == [f"attnres_sites_{i}" for i in range(4)]


def test_rewrite_into_full() -> None:
    program = rewritten(AttnResConfig(variant="full", scale="paper", key_norm=False, eps=1e-3))
    (
        FileCheck()
        .check("([%x, %linear_1], %attnres_sites_0_query, None, 0.001, 1.0)")
        .check("([%x, %linear_1, %linear_2], %attnres_sites_1_query, None, 0.001, 1.0)")
        .check("([%x, %linear_1, %linear_2, %linear_3], %attnres_sites_2_query, None, 0.001, 1.0)")
        .check("([%x, %linear_1, %linear_2, %linear_3, %linear_4], %attnres_sites_3_query, None, 0.001, 1.0)")
        .run(text_of(program))
    )  # fmt: skip
    FileCheck().check_not("torch.add]").check_not("operator.add").check_not("key_norm").run(text_of(program))
    assert changes(program)["rewrite"] == 4


def test_rewrite_appends_its_inputs() -> None:
    program = rewritten()
    inputs = [n.target for n in program.graph_module.graph.find_nodes(op="placeholder")]
    parameters = [f"attnres_sites_{i}_{name}" for i in range(4) for name in ("query", "key_norm")]
    assert inputs[-8:] == parameters
    assert len(inputs) == 1 + 1 + 4 + 4 + 1 + 8
    assert {tuple(n.meta["example_value"].shape) for site in program.sites for n in site.parameters.values()} == {(WIDTH,)}


def test_new_nodes_know_where_they_come_from() -> None:
    program = rewritten()
    for name in ("attnres_sites_1", "attnres_sum"):
        made = node(program, name)
        assert made.meta["attnres_pass"] == "rewrite"
        assert "test_graph_text.py" in made.meta["stack_trace"]
        assert made.meta["example_value"].shape == (2, 3, WIDTH)


def test_rewrite_gives_in_place_arithmetic_in_branches_its_spelling_back() -> None:
    class InPlaceBranch(Network):
        def branch(self, x: Tensor, i: int) -> Tensor:
            return self.mix[i](self.norms[i](x).mul_(2.0))

    program = run_passes(program_of(InPlaceBranch()), [Normalize()])
    assert changes(program) == {"normalize": 4}
    FileCheck().check_count("torch.mul]", 4, exactly=True).run(text_of(program))
    program = run_passes(program, (FindChains(), PlanBlocks(), Rewrite(), Verify()))
    FileCheck().check_count("call_method[target=mul_]", 4, exactly=True).check_not("torch.mul]").run(text_of(program))


def test_raw_readers_keep_the_plain_sum() -> None:
    class Gated(Network):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for i in range(4):
                x = self.layer(x, i)
            return self.norm(x) * torch.tanh(x)

    program = rewritten(model=Gated())
    FileCheck().check("%x_4 : ").check_same("operator.add](args = (%x_3, %linear_4)").run(text_of(program))
    FileCheck().check("torch.tanh](args = (%x_4,)").run(text_of(program))
    FileCheck().check("%rms_norm_4 : ").check_same("(%attnres_sites_3, (8,)").run(text_of(program))
    FileCheck().check_count("operator.add]", 4, exactly=True).run(text_of(program))


# ------------------------------------------------------------------------------------------------------------- lower


def test_lower_replaces_the_operator() -> None:
    program = rewritten()
    FileCheck().check_count("torch.ops.attnres.site.default]", 4, exactly=True).run(text_of(program))
    program = run_passes(program, [Lower()])
    FileCheck().check_count("attnres_compile.kernels.differentiable.site]", 4, exactly=True).run(text_of(program))
    assert "torch.ops.attnres" not in text_of(program)
    assert changes(program)["lower"] == 4


def test_the_lowered_graph_computes_the_same() -> None:
    program = rewritten()
    inputs = [torch.randn(n.meta["example_value"].shape) for n in program.graph_module.graph.find_nodes(op="placeholder")]
    expected = program.graph_module(*inputs)[0]
    found = run_passes(program, [Lower()]).graph_module(*inputs)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_lower_hands_every_source_on_to_its_next_reader() -> None:
    text = text_of(run_passes(rewritten(config=AttnResConfig(variant="full")), [Lower()]))
    check = FileCheck()
    check.check("%x_again : ").check_same("operator.getitem](args = (%attnres_sites_0, 1)")
    check.check("%attnres_sites_1 : ").check_same("([%x_again, %linear_1_again, %linear_2]")
    check.check("%attnres_sites_2 : ").check_same("([%x_again_1, %linear_1_again_1, %linear_2_again, %linear_3]")
    check.run(text)
    assert "_again_3" not in text  # the last site has no one to hand them to


# ---------------------------------------------------------------------------------------------------------- pipeline


def test_the_whole_pipeline() -> None:
    program = run_passes(program_of(), ALL)
    assert changes(program) == {
        "normalize": 0,
        "find_chains": 1,
        "plan_blocks": 2,
        "rewrite": 4,
        "verify": 0,
        "localize": 0,
        "two_phase": 2,
        "fuse_norms": 1,
        "lower": 4,
        "policies": 0,
    }
    assert all(entry.seconds >= 0 for entry in program.history)


def test_passes_are_frozen_and_named() -> None:
    assert [step.name for step in ALL] == [
        "normalize", "find_chains", "plan_blocks", "rewrite", "verify", "localize", "two_phase", "fuse_norms", "lower",
        "policies",
    ]  # fmt: skip
    assert [step.name for step in ALL] == [name for name in PASSES if name != "shard_sequence"]  # that one is asked for
    assert [name for name, may_be_left_out in PASSES.items() if may_be_left_out] == [
        "verify", "shard_sequence", "two_phase", "fuse_norms", "lower", "policies",
    ]  # fmt: skip
    with pytest.raises(AttributeError):
        ALL[0].name = "other"  # type: ignore[misc]


def test_the_hook_sees_every_pass_and_its_program() -> None:
    seen: list[tuple[str, int, int]] = []

    def hook(step: Pass, program: Program) -> None:
        seen.append((step.name, len(program.history), len(program.sites)))

    run_passes(program_of(), ALL, hook)
    assert seen == [
        ("normalize", 1, 0), ("find_chains", 2, 0), ("plan_blocks", 3, 0), ("rewrite", 4, 4), ("verify", 5, 4),
        ("localize", 6, 4), ("two_phase", 7, 4), ("fuse_norms", 8, 4), ("lower", 9, 4), ("policies", 10, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("disabled", "left_out"),
    [
        pytest.param("verify", ["verify"], id="verify"),
        pytest.param("lower", ["lower"], id="lower"),
        pytest.param("two_phase", ["two_phase"], id="two_phase"),
        pytest.param(" lower, verify,", ["verify", "lower"], id="both-with-spaces"),
        pytest.param("", [], id="none"),
    ],
)
def test_optional_passes_can_be_disabled(monkeypatch: pytest.MonkeyPatch, disabled: str, left_out: list[str]) -> None:
    monkeypatch.setenv("ATTNRES_DISABLE_PASSES", disabled)
    hooked: list[str] = []
    program = run_passes(program_of(), ALL, lambda step, _: hooked.append(step.name))
    expected = [step.name for step in ALL if step.name not in left_out]
    assert [entry.name for entry in program.history] == expected == hooked
    assert ("torch.ops.attnres" in text_of(program)) == ("lower" in left_out)
    assert ("inter" in text_of(program)) == ("two_phase" not in left_out)


@pytest.mark.parametrize("name", ["normalize", "find_chains", "plan_blocks", "rewrite"])
def test_other_passes_can_not_be_disabled(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ATTNRES_DISABLE_PASSES", f"verify,{name}")
    with pytest.raises(ConfigError) as caught:
        run_passes(program_of(), ALL)
    assert str(caught.value) == (
        f"ATTNRES_DISABLE_PASSES names {name!r}, without which the model would run un-rewritten; those that can be left out "
        "are: verify, shard_sequence, two_phase, fuse_norms, lower, policies."
    )


@pytest.mark.parametrize("name", ["verfiy", "Lower", "lower verify"])
def test_a_pass_that_does_not_exist_can_not_be_disabled(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ATTNRES_DISABLE_PASSES", name)
    with pytest.raises(ConfigError, match="ATTNRES_DISABLE_PASSES"):
        run_passes(program_of(), ALL)


def test_each_pass_is_logged_with_its_graph(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="attnres_compile"):
        run_passes(program_of(), [Normalize(), FindChains()])
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("attnres_compile")]
    assert [message.split(":")[0] for message in messages] == [
        "pass normalize", "graph after normalize", "pass find_chains", "graph after find_chains",
    ]  # fmt: skip
    assert messages[1].endswith(str(program_of().graph_module.graph))


# -------------------------------------------------------------------------------------------------------- check_graph


class Breaking:
    """A pass that does what it is told to do to a graph."""

    name = "breaking"

    def __init__(self, act: Callable[[Program], object]) -> None:
        self.act = act

    def run(self, program: Program) -> tuple[Program, int]:
        self.act(program)
        return program, 1


def one_source(program: Program) -> None:
    call = program.sites[0].call
    call.args = (call.args[0][:1], *call.args[1:])  # type: ignore[index]


def no_query(program: Program) -> None:
    call = program.sites[0].call
    call.args = (call.args[0], None, *call.args[2:])


def use_before_definition(program: Program) -> None:
    node(program, "rms_norm").replace_input_with(node(program, "x"), node(program, "linear_4"))


def test_a_broken_phase_is_noticed_after_the_pass() -> None:
    def one_query(program: Program) -> None:
        (inter,) = program.graph_module.graph.find_nodes(op="call_function", target=torch.ops.attnres.inter.default)
        inter.args = (inter.args[0], inter.args[1][:1], *inter.args[2:])

    program = run_passes(rewritten(), [TwoPhase()])
    with pytest.raises(VerificationError, match=r"pass 'breaking' left 'attnres_\w*inter\w*', a phase 1 of fewer than two sites"):
        run_passes(program, [Breaking(one_query)])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        pytest.param(one_source, "'attnres_sites_0', a site with fewer than two sources or without a query", id="one-source"),
        pytest.param(no_query, "'attnres_sites_0', a site with fewer than two sources or without a query", id="no-query"),
        pytest.param(use_before_definition, "pass 'breaking' left a malformed graph", id="use-before-definition"),
    ],
)
def test_a_broken_graph_is_noticed_after_the_pass(act: Callable[[Program], object], message: str) -> None:
    program = rewritten()
    check_graph(program.graph_module, "rewrite")
    with pytest.raises(VerificationError) as caught:
        run_passes(program, [Breaking(act)])
    assert message in str(caught.value)
    assert "'breaking'" in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- verify


def with_sources(program: Program, site: int, names: Sequence[str]) -> None:
    call = program.sites[site].call
    call.args = ([node(program, name) for name in names], *call.args[1:])


def drop_operation(program: Program) -> None:
    norm = node(program, "rms_norm_2")
    norm.replace_all_uses_with(norm.args[0])
    program.graph_module.graph.erase_node(norm)


def double_branch(program: Program) -> None:
    """The second branch is computed twice; the second result goes to the sites, the first one to nobody."""
    graph, linear = program.graph_module.graph, node(program, "linear_2")
    with graph.inserting_after(linear):
        copy = graph.node_copy(linear)
    node(program, "attnres_sum").replace_input_with(linear, copy)


def double_operation(program: Program) -> None:
    """A norm is computed twice; the branch reads the second result, and nobody the first one."""
    graph, norm = program.graph_module.graph, node(program, "rms_norm_1")
    with graph.inserting_after(norm):
        copy = graph.node_copy(norm)
    node(program, "linear_2").replace_input_with(norm, copy)


def share_query(program: Program) -> None:
    first, second = program.sites[:2]
    second.call.replace_input_with(second.parameters["query"], first.parameters["query"])


def share_key_norm(program: Program) -> None:
    first, second = program.sites[:2]
    second.call.replace_input_with(second.parameters["key_norm"], first.parameters["key_norm"])


def orphan_site(program: Program) -> None:
    reader = node(program, "rms_norm_1")
    reader.replace_input_with(program.sites[0].call, node(program, "x"))


def extra_site(program: Program) -> None:
    graph, call = program.graph_module.graph, program.sites[0].call
    with graph.inserting_after(call):
        copy = graph.node_copy(call)
    node(program, "rms_norm_1").replace_input_with(call, copy)


def other_dtype(program: Program) -> None:
    call = program.sites[1].call
    call.meta["example_value"] = call.meta["example_value"].double()


def other_total_weight(program: Program) -> None:
    call = program.sites[2].call
    call.args = (*call.args[:4], 2.0, *call.args[5:])


def other_function(program: Program) -> None:
    node(program, "rms_norm_1").target = torch.sigmoid


TAMPERING: dict[str, tuple[Callable[[Program], object], str]] = {
    "another-total-weight": (other_total_weight, "the weights of site 'attnres_sites_2' add up to 2.0, not 3"),
    "a-source-replaced": (lambda p: with_sources(p, 2, ["x", "attnres_sum", "linear_1"]), "sources miss [linear_3]"),
    "a-source-twice": (lambda p: with_sources(p, 2, ["x", "attnres_sum", "attnres_sum"]), "sources miss [linear_3]"),
    "a-block-for-its-part": (lambda p: with_sources(p, 2, ["x", "linear_1", "linear_3"]), "sources miss [linear_2]"),
    "the-root-replaced": (lambda p: with_sources(p, 0, ["rms_norm", "linear_1"]), "sources miss [x]"),
    "one-source-too-many": (lambda p: with_sources(p, 0, ["x", "linear_1", "linear_1"]), "planned sites with [2, 2, 3, 3]"),
    "one-source-too-few": (lambda p: with_sources(p, 3, ["x", "attnres_sum"]), "planned sites with [2, 2, 3, 3]"),
    "an-operation-dropped": (drop_operation, "were lost: ['rms_norm_2:rms_norm']"),
    "an-operation-changed": (other_function, "were lost: ['rms_norm_1:rms_norm']"),
    "a-branch-doubled": (double_branch, "sources miss [linear_2]"),
    "an-operation-doubled": (double_operation, "new without a pass's name: ['rms_norm_5:rms_norm']"),
    "a-query-used-twice": (share_query, "parameter 'attnres_sites_0_query' is not used by its own site alone"),
    "a-key-norm-used-twice": (share_key_norm, "parameter 'attnres_sites_0_key_norm' is not used by its own site alone"),
    "a-site-that-nothing-reads": (orphan_site, "nothing reads the site 'attnres_sites_0'"),
    "one-site-too-many": (extra_site, "the graph has 5 sites"),
    "another-dtype": (other_dtype, "site 'attnres_sites_1' differs from the stream 'x_2' in shape or dtype"),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_verify_notices(name: str) -> None:
    act, message = TAMPERING[name]
    program = rewritten()
    Verify().run(program)
    act(program)
    with pytest.raises(VerificationError) as caught:
        Verify().run(program)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(AttnResConfig(num_blocks=2), id="two-blocks"),
        pytest.param(AttnResConfig(block_size=3), id="size-three"),
        pytest.param(AttnResConfig(num_blocks=1), id="one-block"),
        pytest.param(AttnResConfig(variant="full", key_norm=False), id="full"),
    ],
)
@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda x, f: x + f, id="plain"),
        pytest.param(lambda x, f: x - 0.5 * f, id="scaled-branch"),
        pytest.param(lambda x, f: 0.5 * x + f, id="scaled-skip"),
        pytest.param(lambda x, f: (x.view(-1, WIDTH) + f.view(-1, WIDTH)).view(2, 3, WIDTH), id="reshaped"),
    ],
)
def test_verify_passes_what_rewrite_made(add: Callable[[Tensor, Tensor], Tensor], config: AttnResConfig) -> None:
    program, found = Verify().run(rewritten(config, spelled(add)))
    assert found == 0
    assert len(program.sites) == 4
