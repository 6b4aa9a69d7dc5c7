"""The ablation's variants, against definitions written by hand, on every path of a model, and where they are refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from gradients import gradients, loss_of, relative_error
from models import example_inputs, tiny
from reference import llama_logits, promote_to_float64
from reference_variants import SeveralStreams, VariantStream
from torch import nn
from torch.fx import GraphModule

import attnres_compile as ac
from attnres_compile import convert
from attnres_compile.backend import compile_rewritten
from attnres_compile.checkpoint.offline import convert_checkpoint, revert_checkpoint
from attnres_compile.passes.lower import Lower
from attnres_compile.passes.pipeline import PHASING, REWRITING

VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {"weights": "sigmoid"},
    "static": {"weights": "static"},
    "standard": {"weights": "standard"},
    "heads": {"heads": 4},
    "input": {"query": "input"},
    "raw keys": {"normalize_keys": False},
    "many": {"weights": "sigmoid", "query": "input", "heads": 2, "key_norm": False},
}
BLOCK = {name: ac.AttnResConfig(num_blocks=3, **options) for name, options in VARIANTS.items()}
CONFIGS = {**BLOCK, "mhc": ac.AttnResConfig(variant="full", weights="mhc"), "full heads": ac.AttnResConfig("full", heads=4)}


def randomised(parameters: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in parameters.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + noise if name.endswith("key_norm") else noise)


def converted(config: ac.AttnResConfig, **overrides: Any) -> nn.Module:
    model = tiny("llama", **overrides).double()
    ac.convert_(model, config, *example_inputs("llama"))
    randomised(model.attnres)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_function_is_preserved_and_every_gradient_is_the_definition(config: ac.AttnResConfig) -> None:
    model = tiny("llama").train()
    (ids,), kwargs = example_inputs("llama")
    with promote_to_float64(model):
        standard = model(ids, **kwargs).logits
        rewritten = ac.rewrite(model, config, (ids,), kwargs)
        assert relative_error(rewritten(ids, **kwargs).logits, standard) <= 1e-14
        randomised(rewritten.attnres)
        logits = rewritten(ids, **kwargs).logits
        found = gradients(rewritten, loss_of(logits))
        sites, eps = rewritten.attnres.sites, model.config.rms_norm_eps
        size = config.resolved_block_size(len(sites))
        several = functools.partial(SeveralStreams, sites=sites)
        how = {"weights": config.weights, "heads": config.heads, "normalize_keys": config.normalize_keys}
        variant = functools.partial(VariantStream, block_size=size, eps=eps, sites=sites, **how)
        stream = several if config.weights == "mhc" else variant
        expected_logits = llama_logits(model, ids, [], None, size, "preserve", make_stream=stream)
        expected = gradients(rewritten, loss_of(expected_logits))
    assert relative_error(logits, expected_logits) <= 1e-12
    assert found.keys() == expected.keys() == dict(rewritten.named_parameters()).keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert relative_error(found[name], gradient) <= 1e-10, name


@pytest.mark.parametrize("name", ["many", "mhc", "static"])
def test_torch_compile_is_the_rewrite(name: str) -> None:
    model = converted(CONFIGS[name])
    (ids,), kwargs = example_inputs("llama")
    rewritten = ac.rewrite(model, args=(ids,), kwargs=kwargs)
    logits = rewritten(ids, **kwargs).logits
    expected = gradients(rewritten, loss_of(logits))

    def backend(graph_module: GraphModule, inputs: list[Any]) -> Any:
        return compile_rewritten(graph_module, inputs, lambda graph, *_: graph.forward)

    compiled = torch.compile(model, backend=backend)(ids, **kwargs).logits
    found = gradients(model, loss_of(compiled))
    assert relative_error(compiled, logits) <= 1e-13
    assert found.keys() == expected.keys()
    assert max(relative_error(found[key], expected[key]) for key in expected) <= 1e-11


def test_inductor_computes_a_variant() -> None:
    model = converted(CONFIGS["many"], num_hidden_layers=2).float()
    (ids,), kwargs = example_inputs("llama")
    expected = ac.rewrite(model, args=(ids,), kwargs=kwargs)(ids, **kwargs).logits
    found = torch.compile(model, backend="attnres")(ids, **kwargs).logits
    assert relative_error(found, expected) <= 1e-5


def test_autocast_leaves_the_weights_alone() -> None:
    """Scores are float32 under autocast, projections of queries too."""
    generator = torch.Generator().manual_seed(3)
    sources = [torch.randn(2, 5, 8, generator=generator) for _ in range(3)]
    query, projection = torch.randn(8, generator=generator), torch.randn(8, 8, generator=generator)
    call = functools.partial(torch.ops.attnres.site_variant, sources, query, None, 1e-6, 3.0, projection, heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = call()
    assert torch.equal(found, call())
    rounded = torch.ops.attnres.site_variant([source.bfloat16() for source in sources], query, None, 1e-6, 3.0)
    assert rounded.dtype == torch.bfloat16


def test_one_head_of_softmax_is_a_site() -> None:
    sources = [torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(4)]
    query, key_norm = torch.randn(2, 8, dtype=torch.float64)
    arguments = (sources, query, key_norm, 1e-6, 4.0)
    torch.testing.assert_close(
        torch.ops.attnres.site_variant(*arguments), torch.ops.attnres.site(*arguments), rtol=1e-13, atol=1e-13
    )


def test_sites_are_computed_one_by_one_and_the_report_says_why() -> None:
    model = tiny("llama")
    report = ac.convert_(model, BLOCK["sigmoid"], *example_inputs("llama"))
    assert [note.site for note in report.notes] == list(range(8))
    assert {note.reason for note in report.notes} == {
        "two phases compute softmax attention with one learned query, not weights='sigmoid'"
    }
    assert report.num_added_parameters == 8 * 64


def test_fused_kernels_refuse_what_they_lack() -> None:
    fused = (*REWRITING, *PHASING, Lower("fused"))
    with (
        mock.patch.object(convert, "REWRITING", fused),
        pytest.raises(ac.ConfigError, match="there are no fused kernels for heads=4; leave that out"),
    ):
        ac.rewrite(tiny("llama"), BLOCK["heads"], *example_inputs("llama"))


def test_a_width_that_heads_do_not_divide() -> None:
    with pytest.raises(ac.ConfigError, match="a stream of width 32 can't be divided into heads=5 of equal width"):
        ac.convert_(tiny("llama"), ac.AttnResConfig(heads=5, num_blocks=2), *example_inputs("llama"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "tanh"}, "weights must be one of 'softmax', 'sigmoid', 'static', 'mhc', 'standard', not 'tanh'"),
        ({"query": "none"}, "query must be one of 'learned', 'input', not 'none'"),
        ({"heads": 0}, "heads must be a positive integer, not 0"),
        ({"normalize_keys": 1}, "normalize_keys must be True or False, not 1"),
        ({"weights": "static", "heads": 2}, "weights='static' has neither queries nor keys, so heads=2 means nothing there"),
        ({"weights": "mhc"}, "weights='mhc' weighs the outputs of single sublayers; use it with variant='full'"),
    ],
)
def test_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ac.ConfigError, match=message):
        ac.AttnResConfig(**options)


def test_stages_of_a_pipeline() -> None:
    model = tiny("llama")
    args, kwargs = example_inputs("llama")
    plan = ac.partition(model, ranks=2, args=args, kwargs=kwargs, config=BLOCK["static"])
    held = [{name for name, _ in stage.named_parameters() if name.endswith("offset")} for stage in plan.stages]
    assert sum(map(len, held)) == len(set.union(*held)) == 8
    with pytest.raises(ac.PartitionError, match="weights='mhc' computes the weights of all sites at once"):
        ac.partition(model, ranks=2, args=args, kwargs=kwargs, config=CONFIGS["mhc"])


@pytest.mark.parametrize("name", ["many", "mhc", "static"])
def test_trained_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = converted(CONFIGS[name]).float()
    (ids,), kwargs = example_inputs("llama")
    expected = ac.rewrite(model, args=(ids,), kwargs=kwargs)(ids, **kwargs).logits
    model.save_pretrained(tmp_path / "saved")
    loaded = ac.from_pretrained(tmp_path / "saved")
    assert loaded.attnres.config == CONFIGS[name]
    assert torch.equal(ac.rewrite(loaded, args=(ids,), kwargs=kwargs)(ids, **kwargs).logits, expected)
    loss, _ = revert_checkpoint(tmp_path / "saved", tmp_path / "reverted")
    assert "8 of 8 sites have" in loss
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "reverted")


def test_checkpoints_are_converted_offline(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "plain")
    _, done = convert_checkpoint(tmp_path / "plain", tmp_path / "dst", BLOCK["static"])
    assert done.tensors == 8
    assert ac.from_pretrained(tmp_path / "dst").attnres.sites[0].offset.tolist() == [0.0, 0.0]
    with pytest.raises(ac.ConfigError, match="weights='standard' has no parameters: there is nothing to add to a checkpoint"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "none", BLOCK["standard"])
    with pytest.raises(ac.ConfigError, match="naming 'fla' has no names for heads=4"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "none", BLOCK["heads"], naming="fla")
    assert not (tmp_path / "none").exists()


def test_a_state_dict_of_other_weights_is_refused() -> None:
    model = tiny("llama")
    ac.convert_(model, ac.AttnResConfig(num_blocks=3, normalize_keys=False), *example_inputs("llama"))
    other = tiny("llama")
    ac.convert_(other, ac.AttnResConfig(num_blocks=3, key_norm=False), *example_inputs("llama"))
    with pytest.raises(ac.ParameterMismatchError, match="converted with key_norm=False"):
        model.load_state_dict(other.state_dict())
