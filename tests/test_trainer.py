"""The Transformers Trainer and accelerate on a converted model: a hand-written loop's losses, resuming, saving, and refusals."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_nets import eager, set_queries
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import attnres_compile as ac

STEPS, ROWS, PARTS, LENGTH, RATE = 4, 2, 2, 8, 0.05
# Both add up the same numbers in another order: the Trainer divides by the tokens of all parts, the loop by those of one.
TOLERANCE = 1e-6


class Tokens(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return STEPS * ROWS * PARTS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(31, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its first precision for all of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, use_cache=False,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def converted(compiled: bool = True, num_blocks: int = 2) -> Any:
    model = llama()
    ac.convert_(model, ac.AttnResConfig(num_blocks=num_blocks), args=(torch.zeros(ROWS, LENGTH, dtype=torch.long),))
    set_queries(model, 1)
    if compiled:
        model.compile(backend=eager)
    return model


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    options = {"max_steps": STEPS, "save_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": PARTS} | options
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=ROWS, learning_rate=RATE, optim="sgd", report_to=[],
        lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    return InOrder(model=model, args=arguments, train_dataset=Tokens(), eval_dataset=Tokens())


def losses_of(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def batch(index: int) -> Tensor:
    return torch.stack([Tokens()[index * ROWS + row]["input_ids"] for row in range(ROWS)])


def loop(precision: torch.dtype | None = None) -> tuple[list[float], Any]:
    """The same by hand."""
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for part in range(PARTS):
            ids = batch(step * PARTS + part)
            with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
                loss = model(input_ids=ids, labels=ids).loss / PARTS
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, model


@pytest.mark.parametrize(
    ("options", "precision", "tolerance"),
    [
        pytest.param({}, None, TOLERANCE, id="plain"),
        pytest.param({"gradient_checkpointing": True}, None, TOLERANCE, id="gradient checkpointing"),
        # Autocast to bfloat16, 8 bits: a sum in another order may differ in the last of them.
        pytest.param({"bf16": True}, torch.bfloat16, 2**-8, id="bf16"),
    ],
)
def test_losses_of_a_hand_written_loop(
    options: dict[str, Any], precision: torch.dtype | None, tolerance: float, tmp_path: Path
) -> None:
    expected, by_hand = loop(precision)
    torch.compiler.reset()
    run = trainer(converted(), tmp_path, save_strategy="no", **options)
    run.train()
    assert losses_of(run) == pytest.approx(expected, rel=tolerance)
    for found, wanted, start in zip(run.model.attnres.sites, by_hand.attnres.sites, converted(False).attnres.sites, strict=True):
        torch.testing.assert_close(found.query, wanted.query, rtol=tolerance, atol=tolerance)
        assert (found.query - start.query).abs().max() > 1e-5


def test_resumed_saved_and_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    whole = trainer(converted(), tmp_path, **options)
    whole.train()
    assert whole.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    resumed = trainer(converted(), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(whole)  # the first two come out of the checkpoint
    assert_same_state(resumed.model, whole.model)
    assert_same_state(ac.from_pretrained(tmp_path / "checkpoint-4"), whole.model)
    assert "do not say with which options they were saved" in caplog.text and "num_blocks=2" in caplog.text


def assert_same_state(found: Any, expected: Any) -> None:
    state = expected.state_dict()
    assert sum("attnres" in name for name in state) == 8
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())


class TestRefusals:
    def test_not_compiled(self, tmp_path: Path) -> None:
        with pytest.raises(ac.NotRewrittenError, match=r'being run eagerly.*model\.compile\(backend="attnres"\)'):
            trainer(converted(compiled=False), tmp_path).train()

    def test_compiled_by_another_backend(self, tmp_path: Path) -> None:
        with pytest.raises(ac.NotRewrittenError, match=r'torch\.compile\(model, backend="attnres"\)'):
            trainer(converted(compiled=False), tmp_path, torch_compile_backend="eager").train()

    def test_our_backend_by_its_name(self, tmp_path: Path) -> None:
        """accelerate's own message; what to write instead stands in the README."""
        with pytest.raises(ValueError, match="'ATTNRES' is not a valid DynamoBackend"):
            trainer(converted(compiled=False), tmp_path, torch_compile_backend="attnres")

    def test_a_plain_checkpoint(self, tmp_path: Path) -> None:
        trainer(llama(), tmp_path, max_steps=2).train()
        with pytest.raises(ValueError, match="parameter group that doesn't match the size of optimizer's group"):
            trainer(converted(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile", "compile method"])
def test_accelerate(precision: str, whole: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = converted(compiled=not whole)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    prepared, optimizer = accelerator.prepare(torch.compile(model, backend=eager) if whole else model, optimizer)
    ids = batch(0)
    for _ in range(2):
        accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    loss = prepared(input_ids=ids, labels=ids).loss.detach()
    accelerator.save_state(str(tmp_path))
    set_queries(model, 9)
    assert not torch.equal(prepared(input_ids=ids, labels=ids).loss, loss)
    with caplog.at_level(logging.WARNING):
        accelerator.load_state(str(tmp_path))
    assert torch.equal(prepared(input_ids=ids, labels=ids).loss, loss)
    assert accelerator.unwrap_model(prepared, keep_torch_compile=False) is model
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        rewritten = ac.rewrite(model, args=(ids,), kwargs={"labels": ids})
        tolerance = TOLERANCE if precision == "no" else 2**-8
        torch.testing.assert_close(rewritten(ids, labels=ids).loss.float(), loss, rtol=tolerance, atol=0)
    assert "do not say with which options they were saved" in caplog.text


def test_accelerate_without_our_backend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'ATTNRES' is not a valid DynamoBackend"):
        Accelerator(cpu=True, dynamo_backend="attnres")
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(converted(compiled=False))
    with pytest.raises(ac.NotRewrittenError, match="being run eagerly"):
        prepared(input_ids=torch.zeros(ROWS, LENGTH, dtype=torch.long))
