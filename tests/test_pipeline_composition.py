"""Stages with what people train with: each combination is held against the same model in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pipeline_compositions as compositions
import pipelines
import pytest
import torch
from ranks import run_ranks
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import attnres_compile as ac
from attnres_compile.pipelining.gradients import StepGradients
from attnres_compile.pipelining.states import check_ties

TOLERANCE = 1e-13
# Sums of 16-bit gradients are rounded in another order: up to three units of 2^-8 in the largest element.
SIXTEEN_BITS = 2**-6


def cases(name: str, *arguments: tuple[Any, ...], ranks: int = 2) -> list[list[Any]]:
    """For each case what the ranks returned."""
    return list(map(list, zip(*run_ranks(compositions.each, ranks, name, *arguments), strict=True)))


def test_recomputation_draws_the_same_random_numbers() -> None:
    for ranked in cases("recomputed", ("Interleaved1F1B", 2), ("ZBVZeroBubble", 2, "folded", False)):
        for found in ranked:
            assert (found["error"], found["loss"], found["state"]) == (0, 0, True)
            assert found["others"] > 0.01


def test_sixteen_bits() -> None:
    (ranked,) = cases("sixteen_bits", (False,))
    for found in ranked:
        for kind in ("autocast", "pure"):
            assert (found[kind]["loss"], found[kind]["output"], found[kind]["held"]) == (0, 0, 0)
            assert found[kind]["gradients"] <= SIXTEEN_BITS


def test_another_autocast_than_planned() -> None:
    without, under = cases("wrong_autocast", (False,), (True,))
    for stage in range(2):
        for text in without[stage]:
            assert text.startswith(
                f"stage {stage} runs under autocast to bfloat16; its plan was made without autocast and has b0 in"
            )
        for text in under[stage]:
            assert text.startswith(
                f"stage {stage} runs without autocast; its plan was made under autocast to bfloat16 and has b0 in"
            )
        assert "b0 in float32" in without[stage][0] and "Call partition under the autocast" in under[stage][0]


def test_autocast_has_no_effect_on_the_meta_device() -> None:
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), pytest.raises(ac.PartitionError, match="autocast has no"):
        ac.partition(pipelines.Transformer(2), 2, args=(pipelines.example(),))


def test_nothing_is_compiled_after_the_warm_up() -> None:
    kinds = ((False, True, "Interleaved1F1B", 2, False), (False, False, "1F1B", 1, True), (True, True, "1F1B", 1, False))
    for (_, _, _, virtual, _), ranked in zip(kinds, cases("compiled", *kinds), strict=True):
        for found in ranked:
            trained, evaluated = (virtual, virtual), (2 * virtual, virtual)
            # Warm-up, two steps; warm-up without gradients, evaluation with and without them, a step.
            assert found["counts"] == [trained] * 3 + [evaluated] * 4
            assert found["untouched"] and found["error"] <= TOLERANCE


def test_zero_bubble_through_compiled_stages() -> None:
    (errors,) = cases("compiled_zero_bubble", ())
    assert max(errors) <= TOLERANCE


def test_sharded_stages() -> None:
    kinds = (("1F1B", 1, False, False), ("Interleaved1F1B", 2, True, True))
    for ranked in cases("sharded", *kinds, ranks=4):
        for found in ranked:
            assert found["sharded"] and max(found["gradients"], found["loss"]) <= TOLERANCE


def test_accumulated_and_frozen_gradients() -> None:
    kinds = (
        ("Interleaved1F1B", 2, "looped", True, "all"),
        ("ZBVZeroBubble", 2, "folded", False, "body"),
        ("1F1B", 1, "looped", True, "queries"),
    )
    for kind, ranked in zip(kinds, cases("accumulated", *kinds), strict=True):
        assert max(found["error"] for found in ranked) <= TOLERANCE
        assert [found["held"] for found in ranked] == [0, 0]
        names = [name for found in ranked for name in found["names"]]
        assert all(name.endswith("query") for name in names) == (kind[-1] == "queries")
        assert ("embedding.weight" in names) == (kind[-1] == "all")


def test_gradients_are_scaled_once_and_kept_when_a_step_fails() -> None:
    shared, own = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    shared.grad = torch.tensor([1.0, 2.0])
    gradients = StepGradients()
    for finish in (True, False, True):
        gradients.begin(0, [shared])
        gradients.begin(3, [shared, own])
        shared.grad, own.grad = torch.full((2,), 8.0), torch.full((2,), 4.0)
        gradients.finish(3, 4)
        if finish:
            gradients.finish(0, 4)
        # The step that did not end leaves no trace when the next begins.
    assert shared.grad.tolist() == [5.0, 6.0] and own.grad.tolist() == [2.0, 2.0]


def test_value_that_only_the_cache_takes() -> None:
    for transport, ranked in zip(("cached", "naive"), cases("skipping", ("cached",), ("naive",)), strict=True):
        for found in ranked:
            assert found["only_kept"] == (["gate"] if transport == "cached" else [])
            assert found["error"] <= TOLERANCE


def test_arguments_by_name_and_a_padding_mask() -> None:
    for ranked in cases("llama", (True,), (False,)):
        assert max(max(found["gradients"], found["loss"]) for found in ranked) <= TOLERANCE


def test_tied_embeddings() -> None:
    for ranked in cases("gpt2", ("ZBVZeroBubble",), ("DualPipeV",)):
        for found in ranked:
            for last, refusal in zip((1, 3), found["refusals"], strict=True):
                name = "'transformer.wte.weight' (tied to 'lm_head.weight')"
                assert refusal.startswith(f"{name} is used in stages 0 and {last}, on different ranks")
            assert max(found["gradients"], found["loss"]) <= TOLERANCE
        assert "transformer.wte.weight" in ranked[0]["names"]


def test_ties_that_came_apart() -> None:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=8)
    with torch.device("meta"):
        example = {"input_ids": pipelines.example()}
        plan = ac.partition(GPT2LMHeadModel(config), 2, 2, kwargs=example, placement="folded")
    check_ties(plan, 0)
    for stage in plan.stages:
        stage.to_empty(device="cpu")
    check_ties(plan, 1)
    with pytest.raises(ac.ConfigError, match=r"'transformer.wte.weight' of stages 0 and 3 was one parameter and is two now"):
        check_ties(plan, 0)


def test_checkpoint_fits_other_layouts(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    saved = run_ranks(compositions.saved, 2, folder)
    expected = {key: value for _, own in saved for key, value in own.items()}
    resumed = [run_ranks(compositions.loaded, ranks, folder) for ranks in (2, 4)]
    for found in (*resumed, [compositions.loaded_alone(folder)]):
        merged = {key: value for _, own in found for key, value in own.items()}
        assert merged.keys() == expected.keys()
        assert max(float(np.abs(merged[key] - value).max()) for key, value in expected.items()) <= TOLERANCE
        assert abs(found[-1][0] - saved[-1][0]) <= TOLERANCE


def test_failures_leave_nothing_behind() -> None:
    kinds = ("forward", "backward", "interrupt", "loss")
    for kind, (other, failed) in zip(kinds, cases("failing", *((k, "Interleaved1F1B", 2) for k in kinds)), strict=True):
        names, text = other["found"]
        assert names[0] == "TransferError" and "Timed out waiting" in text
        assert failed["found"][0][-1] == ("KeyboardInterrupt" if kind == "interrupt" else "ArithmeticError")
        assert (other["held"], other["kept"], other["later"]) == (0, True, 0)
        # torch calls the loss function outside of the stage, which then learns of the failure when the next step begins.
        assert (failed["held"] == 0 and failed["kept"]) == (kind != "loss")
        assert failed["later"] == 0 and failed["kept_later"]


@pytest.mark.parametrize("training", [False, True])
def test_another_mode_than_planned(training: bool) -> None:
    (texts,) = cases("wrong_mode", (training,))
    found, made = ("training", "evaluation") if training else ("evaluation", "training")
    for stage, text in enumerate(texts):
        assert text.startswith(f"stage {stage} was captured in {made} mode, which its graph keeps, and is set to {found} mode.")
