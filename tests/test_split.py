"""A model that is split into blocks is the model that is not, in one process and sharded by FSDP2 over two."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import fsdp_runs
import pytest
import torch
import transformers
from gradients import gradients, loss_of, relative_error
from models import example_inputs, randomise, tiny
from ranks import run_ranks
from torch import nn
from torch.testing import FileCheck
from torch.utils.checkpoint import checkpoint

import attnres_compile as ac

CONFIG = ac.AttnResConfig(num_blocks=3)


def randomised(model: nn.Module, args: Any, kwargs: Any, config: ac.AttnResConfig = CONFIG) -> nn.Module:
    ac.convert_(model, config, args, kwargs)
    for site in model.attnres.sites:
        nn.init.normal_(site.query, std=0.3)
    return model


def error_of(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The relative error of all gradients as one vector: some are zero but for rounding."""
    assert found.keys() == expected.keys()
    return relative_error(*(torch.cat([values[key].flatten() for key in expected]) for values in (found, expected)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_split_is_whole(name: str) -> None:
    model = tiny(name).double().train()
    args, kwargs = example_inputs(name)
    args = tuple(value.double() if value.is_floating_point() else value for value in args)
    randomised(model, args, kwargs)
    whole, split = ac.rewrite(model, args=args, kwargs=kwargs), ac.rewrite(model, args=args, kwargs=kwargs, split=True)
    tied = name == "gpt2"
    # Eight sublayers in blocks of three: the last two are a block, what follows them stands by itself.
    assert len(split.blocks) == 4
    parameters = [parameter for part in split.parts for parameter in part.parameters()]
    assert len(parameters) == len(set(map(id, parameters))) == len(list(model.parameters()))
    assert set(split.shared.state_dict()) == ({"transformer.wte.weight", "lm_head.weight"} if tied else set())
    expected = whole(*args, **kwargs).logits
    gradients_of_whole = gradients(model, loss_of(expected))
    found = split(*args, **kwargs).logits
    gradients_of_split = gradients(model, loss_of(found))
    assert relative_error(found, expected) <= 1e-13  # blocks compute their sites in two phases
    assert error_of(gradients_of_split, gradients_of_whole) <= 1e-13


def test_names_are_those_of_the_model() -> None:
    model = randomised(tiny("gpt2"), *example_inputs("gpt2"))
    args, kwargs = example_inputs("gpt2")
    split = ac.rewrite(model, args=args, kwargs=kwargs, split=True)
    state = split.state_dict()
    assert state.keys() == model.state_dict().keys()
    other = randomised(tiny("gpt2", seed=5), args, kwargs)
    assert other.load_state_dict(state).missing_keys == []
    split.load_state_dict(other.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    missing = {name: value for name, value in state.items() if not name.endswith("sites.3.query")}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"blocks.1.attnres.sites.3.query\""):
        split.load_state_dict(missing)
    elsewhere = tiny("gpt2")
    ac.convert_(elsewhere, ac.AttnResConfig(num_blocks=2), args, kwargs)
    with pytest.raises(ac.ParameterMismatchError, match="converted with 8 sites, this model has 8"):
        split.load_state_dict(elsewhere.state_dict())


def test_two_chains() -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=97, use_cache=False)
    model = randomise(transformers.T5ForConditionalGeneration(config), 0).double().eval()
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    kwargs = {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
    randomised(model, (), kwargs, ac.AttnResConfig(block_size=2))
    whole, split = ac.rewrite(model, kwargs=kwargs), ac.rewrite(model, kwargs=kwargs, split=True)
    assert len(split.blocks) == 6
    assert relative_error(split(**kwargs).logits, whole(**kwargs).logits) <= 1e-13


def test_a_block_compiles_and_is_recomputed_by_itself() -> None:
    """The graph of a block holds its own phases; compiled or under activation checkpointing gradients are the same."""
    model = randomised(tiny("llama").double().train(), *example_inputs("llama"))
    args, kwargs = example_inputs("llama")
    split = ac.rewrite(model, args=args, kwargs=kwargs, split=True)
    text = str(split.blocks[1].graph)
    FileCheck().check("attnres.inter").check("attnres.merge").check("attnres.merge").run(text)
    expected = gradients(model, loss_of(split(*args, **kwargs).logits))
    for block in split.blocks:
        plain = block.forward
        block.forward = lambda *inputs, plain=plain: checkpoint(plain, *inputs, use_reentrant=False)
    recomputed = gradients(model, loss_of(split(*args, **kwargs).logits))
    assert error_of(recomputed, expected) <= 1e-13
    split = ac.rewrite(model, args=args, kwargs=kwargs, split=True)
    torch._dynamo.utils.counters.clear()
    for block in split.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled = gradients(model, loss_of(split(*args, **kwargs).logits))
    assert error_of(compiled, expected) <= 1e-13
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(split.blocks)


def test_refusals() -> None:
    model = tiny("llama")
    (ids,), kwargs = example_inputs("llama")
    split = ac.rewrite(model, CONFIG, (ids,), kwargs, split=True)
    assert relative_error(split.eval()(ids, **kwargs).logits, model.eval()(ids, **kwargs).logits) <= 1e-5
    with pytest.raises(ac.CaptureError, match="this graph was rewritten for an argument of shape"):
        split(ids[:, :5], **kwargs)
    dropping = tiny("gpt2", resid_pdrop=0.1).train()
    training = ac.rewrite(dropping, CONFIG, *example_inputs("gpt2"), split=True)
    with pytest.raises(ac.CaptureError, match="was rewritten in training mode, is called in evaluation mode"):
        training.eval()(*example_inputs("gpt2")[0], **example_inputs("gpt2")[1])
    with pytest.raises(ac.PartitionError, match="a split model can't be copied"):
        copy.deepcopy(training)
    with pytest.raises(ac.PartitionError, match="weights='mhc' computes the weights of all sites at once, which no block can do"):
        ac.rewrite(model, ac.AttnResConfig(variant="full", weights="mhc"), (ids,), kwargs, split=True)


def test_fsdp(tmp_path: Path) -> None:
    """Two optimizer steps, a checkpoint, a third step: as in one process. Losses and parameters to 1e-12 in float64."""
    for found in run_ranks(fsdp_runs.all_of, 2, str(tmp_path), seconds=900):
        for case in ("tied", "untied, compiled"):
            assert found[case]["losses"] <= 1e-12
            assert found[case]["parameters"] <= 1e-10
            assert found[case]["names"]
            assert found[case]["sharded"]
        assert found["plain"] == 0.0
        assert found["bfloat16"]["dtypes"] == {torch.float32}
        assert found["bfloat16"]["error"] <= 1.5 * found["bfloat16"]["alone"] <= 0.1  # 8 bits, sums in another order
        assert "ChainCutError: FSDP shards 4 modules inside" in found["layers"]
        assert "split = attnres_compile.rewrite(model, ..., split=True)" in found["layers"]
        assert found["one unit"] <= 1e-12
