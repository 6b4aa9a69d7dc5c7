"""``ac.partition`` on real models: the stages together compute what the rewritten model does, each operation once."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import example_inputs, tiny
from reference import promote_to_float64
from staged import TRANSFERS, check_plan, difference_from, run_stages
from streams import Stream, plan_of, tokens, whole_of
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only
from transformers_classes import build

import attnres_compile as ac

TOLERANCE = 1e-12
SIZES = (2, 11)


def padded() -> dict[str, Any]:
    """Two rows of text, the first with padding at its left."""
    (ids,), _ = example_inputs("llama")
    mask = torch.ones(SIZES, dtype=torch.long)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def placed() -> dict[str, Any]:
    return {**padded(), "position_ids": torch.arange(SIZES[1]).expand(SIZES).contiguous()}


def labelled() -> dict[str, Any]:
    return {**padded(), "labels": padded()["input_ids"] + 1}


def untied(**overrides: Any) -> dict[str, Any]:
    return {"tie_word_embeddings": False, **overrides}


def own(name: str, **overrides: Any) -> Callable[[], nn.Module]:
    return lambda: tiny(name, **overrides)


def of_class(name: str, untie: Callable[[Any], None] = lambda model: None) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = build(name).model
        untie(model)
        return model

    return make


def untie_output(model: Any) -> None:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def untie_t5(model: Any) -> None:
    untie_output(model)
    for part in (model.encoder, model.decoder):
        part.embed_tokens = copy.deepcopy(model.shared)


@dataclasses.dataclass(frozen=True)
class Case:
    """``others`` counts the values that cross beside the stream in the first of two plans.

    A model that can't be promoted to float64 is compared in float32, where the same operations give the same bits.
    """

    make: Callable[[], nn.Module]
    call: Callable[[], dict[str, Any]]
    config: ac.AttnResConfig
    others: int = 0
    train: bool = True
    promoted: bool = True


BLOCKS = ac.AttnResConfig(block_size=3)
FULL = ac.AttnResConfig(variant="full")
ONE = ac.AttnResConfig(num_blocks=1)  # a block that is larger than any stage
DROPPED = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}

CASES = {
    "llama": Case(own("llama", **untied(attention_dropout=0.1)), placed, BLOCKS, 2),
    "llama, its own loss": Case(own("llama", **untied()), labelled, FULL, 2, train=False),
    "qwen3": Case(own("qwen3", **untied()), padded, ONE, 1),
    "gemma3": Case(of_class("Gemma3ForCausalLM", untie_output), padded, BLOCKS, 1),
    "gpt_neox": Case(
        own("gpt_neox", **untied(use_parallel_residual=True, hidden_dropout=0.1)), padded, ac.AttnResConfig(block_size=2), 1
    ),
    "gpt2": Case(own("gpt2", **untied(**DROPPED)), padded, BLOCKS, 1),
    "mixtral": Case(own("mixtral", **untied()), padded, ONE, 1),
    "vit": Case(own("vit", hidden_dropout_prob=0.1), lambda: example_inputs("vit")[1], BLOCKS),
    "t5": Case(of_class("T5ForConditionalGeneration", untie_t5), lambda: build("T5ForConditionalGeneration").kwargs, BLOCKS, 4),
    "mamba": Case(of_class("MambaForCausalLM", untie_output), lambda: {"input_ids": padded()["input_ids"][:, :4]}, ONE),
    "kimi_linear": Case(
        of_class("KimiLinearForCausalLM", untie_output), lambda: build("KimiLinearForCausalLM").kwargs, BLOCKS, promoted=False
    ),
    "nanogpt": Case(own("nanogpt", tied=False), lambda: {"ids": padded()["input_ids"]}, FULL),
    "encoder": Case(own("encoder"), lambda: {"ids": padded()["input_ids"]}, BLOCKS, train=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_stages_compute_what_the_whole_does(case: Case) -> None:
    """With queries that are not zero: outputs and gradients of two plans, and what holds of any plan."""
    model = case.make().train(case.train)
    with promote_to_float64(model) if case.promoted else contextlib.nullcontext():
        dtype = next(model.parameters()).dtype
        call = tree_map_only(Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, case.call())
        if hasattr(model, "config"):
            call["use_cache"] = model.config.use_cache = False
        ac.convert_(model, case.config, kwargs=call)
        for site in model.attnres.sites:  # type: ignore[union-attr]
            nn.init.normal_(site.query, std=0.3)
        whole = ac.rewrite(model, kwargs=call)
        sublayers = sum(chain.num_sublayers for chain in whole.report.chains)
        mid_block = plan_of(whole, 2, 2, [1, sublayers // 2, sublayers])
        balanced = plan_of(whole, 3, 1, cached=False, two_phase=case.promoted)
        for plan in (mid_block, balanced):
            check_plan(plan, whole)
            difference = difference_from(whole, plan, kwargs=call)
            # In float32 threads add up gradients in an order of their own.
            assert difference.output <= TOLERANCE
            assert difference.gradient <= (TOLERANCE if case.promoted else 1e-5)
    assert len([value for value in mid_block.values if value.kind == "other"]) == case.others


@pytest.mark.parametrize(
    ("ranks", "virtual", "placement", "boundaries"),
    [
        (1, 1, "looped", None),
        (4, 1, "looped", None),
        (2, 3, "looped", None),
        (3, 2, "folded", None),
        (7, 1, "looped", [1, 2, 3, 4, 5, 6]),
        (2, 2, "looped", ["norms.2", "norms.3", "norm"]),
    ],
)
@pytest.mark.parametrize("block_size", [1, 2, 4, 6])
def test_shapes(ranks: int, virtual: int, placement: str, boundaries: Any, block_size: int) -> None:
    model = Stream().double()
    whole = whole_of(model, block_size=block_size)
    for cached in (True, False):
        for two_phase in (False, True):
            plan = plan_of(whole, ranks, virtual, boundaries, placement, cached, two_phase)
            check_plan(plan, whole)
            difference = difference_from(whole, plan, (tokens(),))
            assert max(difference.output, difference.gradient) <= TOLERANCE
            if boundaries is not None:
                assert plan.boundaries == ((0, 2, 3, 6, 6) if "norm" in boundaries else (0, 1, 2, 3, 4, 5, 6, 6))


# ------------------------------------------------------------------------------------------------------ ac.partition


def test_partition_of_a_model_that_was_not_converted() -> None:
    """Ranks that partition the same weights get the same stages: queries are zero and key norms one."""
    model = Stream().double()
    plans = [ac.partition(copy.deepcopy(model), 2, 2, (tokens(),), config=ac.AttnResConfig(block_size=2)) for _ in range(2)]
    assert plans[0].digest == plans[1].digest
    states = [[stage.state_dict() for stage in plan.stages] for plan in plans]
    for first, second in zip(*states, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    new = {name: value for state in states[0] for name, value in state.items() if name.startswith("attnres.")}
    assert {name.split(".")[-1]: value.unique().tolist() for name, value in new.items()} == {"query": [0.0], "key_norm": [1.0]}
    assert len(new) == 12
    torch.testing.assert_close(run_stages(plans[0], tokens()), model(tokens()), rtol=1e-12, atol=1e-12)
    assert not hasattr(model, "attnres")


def test_the_key_value_cache_is_left_out() -> None:
    model = tiny("llama", tie_word_embeddings=False)
    assert model.config.use_cache is True
    ids = padded()["input_ids"]
    plan = ac.partition(model, 2, kwargs={"input_ids": ids})
    assert model.config.use_cache is True
    assert {value.kind for value in plan.values} == {"block"}
    assert run_stages(plan, input_ids=ids).past_key_values is None


def test_models_that_were_compiled() -> None:
    """A compiled model is partitioned as the model it is; one that was rewritten is refused."""
    model = Stream()
    plan = ac.partition(torch.compile(model), 2, 1, (tokens(),))
    assert plan.stages[0].get_parameter("embedding.weight") is model.embedding.weight
    with pytest.raises(ac.ConfigError, match="was rewritten before; start from the original model"):
        ac.partition(ac.rewrite(model, args=(tokens(),)), 2, 1, (tokens(),))
    with pytest.raises(ac.ConfigError, match="rewrite it with that, or without a config"):
        ac.convert_(model, ac.AttnResConfig(block_size=2), (tokens(),))
        ac.partition(model, 2, 1, (tokens(),), config=ac.AttnResConfig(block_size=3))


REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ac.PartitionError, "has 6 places where a stage may begin, too few for 8 stages; ask for fewer ranks", {"ranks": 8}),
    (ac.PartitionError, "2 boundaries make 3 stages, not 2; give where stages 1 to 1 begin", {"boundaries": [1, 2]}),
    (ac.PartitionError, "boundaries must go up; 2 sublayers come after 3", {"virtual": 2, "boundaries": [1, 3, 2]}),
    (ac.PartitionError, "boundaries must go up; 2 sublayers come after 2", {"virtual": 2, "boundaries": [1, 2, 2]}),
    (ac.PartitionError, "no stage can begin after 0 sublayers; it can after 1, 2, 3, 4, 5, 6", {"boundaries": [0]}),
    (ac.PartitionError, "no stage can begin after 7 sublayers", {"boundaries": [7]}),
    (ac.PartitionError, "no stage can begin after -1 sublayers", {"boundaries": [-1]}),
    (ac.PartitionError, "no norm of module 'mixes.2' reads the stream .* these do: norms.1, ", {"boundaries": ["mixes.2"]}),
    (ac.PartitionError, "no norm of module 'norms.0' reads the stream", {"boundaries": ["norms.0"]}),
    (ac.PartitionError, "no norm of module 'nor' reads the stream", {"boundaries": ["nor"]}),
    (ac.PartitionError, "no norm of module '' reads the stream", {"boundaries": [""]}),
    (ac.ConfigError, "a boundary is a number of sublayers or the name of a module, not True", {"boundaries": [True]}),
    (ac.ConfigError, "a boundary is a number of sublayers or the name of a module, not 2.0", {"boundaries": [2.0]}),
    (ac.ConfigError, "boundaries must be a list of .*, not 'norm'", {"boundaries": "norm"}),
    (ac.ConfigError, "boundaries must be a list of .*, not 3", {"boundaries": 3}),
    (ac.ConfigError, "ranks must be a whole number above zero, not 0", {"ranks": 0}),
    (ac.ConfigError, "ranks must be a whole number above zero, not 2.0", {"ranks": 2.0}),
    (ac.ConfigError, "virtual must be a whole number above zero, not True", {"virtual": True}),
    (ac.ConfigError, "transport must be one of cached, naive, not 'lazy'", {"transport": "lazy"}),
    (ac.ConfigError, "placement must be one of looped, folded, not 'v'", {"placement": "v"}),
    (ac.ConfigError, "two stages per rank, so virtual must be 2, not 1", {"placement": "folded"}),
]


@pytest.mark.parametrize(("kind", "message", "options"), REFUSED, ids=[str(options) for _, _, options in REFUSED])
def test_refused(kind: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(kind, match=message) as refused:
        ac.partition(Stream(), **{"ranks": 2, "args": (tokens(),), **options})
    assert "\n" not in str(refused.value)


def test_a_model_without_inputs_is_refused() -> None:
    class Constant(Stream):
        def forward(self) -> Tensor:  # type: ignore[override]
            return super().forward(torch.arange(10).view(2, 5))

    with pytest.raises(ac.PartitionError, match="the model takes no tensor"):
        ac.partition(Constant(), 2)


def test_shared_embeddings_are_refused_and_named() -> None:
    match = r"'shared.weight' \(tied to .*'lm_head.weight'\) is used in stages 0 and 1, .* Untie it"
    with pytest.raises(ac.PartitionError, match=match):
        ac.partition(build("T5ForConditionalGeneration").model, 2, kwargs=build("T5ForConditionalGeneration").kwargs)


# ---------------------------------------------------------------------------------------------------- the printed graph


def transfers_in(stage: nn.Module) -> list[str]:
    """The lines of a stage's printed graph that move values, without the number of users and the module's path."""
    assert isinstance(stage, GraphModule)
    names = {node.name for kind in TRANSFERS for node in stage.graph.find_nodes(op="call_function", target=kind)}
    lines = [line.strip() for line in str(stage.graph).splitlines()]
    kept = [line for line in lines if line.split(" :")[0].lstrip("%") in names]
    return [f"{line.split(' :')[0]} = {line.split('attnres_compile.passes.transfers.')[1]}" for line in kept]


def test_transfers_in_the_printed_graph() -> None:
    """Six sublayers in blocks of two, cut before sublayers 1, 3 and 5, on two ranks with two stages each.

    Stage 1 relays the embedding and keeps it for stage 3, whose rank it shares; so it does with the block that it completes.
    """
    plan = plan_of(whole_of(Stream()), 2, 2, [1, 3, 5])
    relayed, kept = ", kwargs = {relayed: True})", ", kwargs = {})"
    assert [transfers_in(stage) for stage in plan.stages] == [
        [
            f"%block_send = block_send](args = (%x, b0, 1){kept}",
            f"%block_send_1 = block_send](args = (%tanh, p0, 1){kept}",
            f"%block_cache_put = block_cache_put](args = (%x, b0){kept}",
        ],
        [
            f"%block_recv = block_recv](args = (%x, b0, 0){kept}",
            f"%block_recv_1 = block_recv](args = (%tanh, p0, 0){kept}",
            f"%block_send = block_send](args = (%attnres_sum, b1, 2){kept}",
            f"%block_send_1 = block_send](args = (%tanh_2, p1, 2){kept}",
            f"%block_cache_put = block_cache_put](args = (%block_recv, b0){kept}",
            f"%block_cache_put_1 = block_cache_put](args = (%attnres_sum, b1){kept}",
        ],
        [
            f"%block_recv = block_recv](args = (%attnres_sum, b1, 1){kept}",
            f"%block_recv_1 = block_recv](args = (%tanh_2, p1, 1){kept}",
            f"%block_cache_get = block_cache_get](args = (%x, b0){kept}",
            f"%block_send = block_send](args = (%attnres_sum_1, b2, 3){kept}",
            f"%block_send_1 = block_send](args = (%tanh_4, p2, 3){kept}",
        ],
        [
            f"%block_recv = block_recv](args = (%attnres_sum_1, b2, 2){kept}",
            f"%block_recv_1 = block_recv](args = (%tanh_4, p2, 2){kept}",
            f"%block_cache_get = block_cache_get](args = (%x, b0){kept}",
            f"%block_cache_get_1 = block_cache_get](args = (%attnres_sum, b1){kept}",
        ],
    ]
    naive = plan_of(whole_of(Stream()), 2, 2, [1, 3, 5], cached=False)
    assert transfers_in(naive.stages[1])[2] == f"%block_send = block_send](args = (%block_recv, b0, 2){relayed}"
