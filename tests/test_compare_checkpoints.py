"""Two checkpoint directories against each other: numbers, graphs, what is refused, and the command."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import attnres_compile as ac
from attnres_compile.cli import app
from attnres_compile.comparison import checkpoints as module
from attnres_compile.comparison.checkpoints import compare_checkpoints
from attnres_compile.comparison.numbers import compare_outputs, compare_reads
from attnres_compile.comparison.report import CheckpointComparison
from attnres_compile.inputs import random_inputs

TOKENS = 12
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 61}


def llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **{**SMALL, **changes}))


def gpt2() -> nn.Module:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=61, n_positions=32, **ids)
    return transformers.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    sizes = {**SMALL, "image_size": 16, "patch_size": 4, "num_labels": 7}
    del sizes["vocab_size"]
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, vocab_size=61)
    return transformers.T5ForConditionalGeneration(config)


def gemma2() -> nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(num_key_value_heads=1, head_dim=16, **SMALL))


def saved(model: nn.Module, folder: Path, **options: Any) -> Path:
    model.eval().save_pretrained(folder, **options)
    return folder


def queries(model: nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in model.attnres.sites:
            site.query.copy_(scale * torch.randn(site.query.shape, generator=generator))


def converted(model: nn.Module, folder: Path, config: ac.AttnResConfig, scale: float = 0.0) -> Path:
    ac.convert_(model.eval(), config, kwargs=random_inputs(model, TOKENS, 0))
    queries(model, scale)
    return saved(model, folder)


def compared(source: Path, destination: Path, **options: Any) -> CheckpointComparison:
    return compare_checkpoints(source, destination, tokens=TOKENS, **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small Llama, and the same with random queries; kept, as others are made of them."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = llama()
    return saved(model, folder / "plain"), converted(model, folder / "converted", ac.AttnResConfig(num_blocks=2), 0.5)


@pytest.fixture(scope="module")
def found(pair: tuple[Path, Path]) -> CheckpointComparison:
    return compared(*pair)


@pytest.mark.parametrize(
    ("make", "config", "options", "chains"),
    [
        pytest.param(llama, ac.AttnResConfig(), {"max_shard_size": "20KB"}, 1, id="llama in shards"),
        pytest.param(gpt2, ac.AttnResConfig(variant="full"), {}, 1, id="gpt2, tied"),
        pytest.param(vit, ac.AttnResConfig(num_blocks=3), {}, 1, id="vit"),
        pytest.param(t5, ac.AttnResConfig(num_blocks=2), {}, 2, id="t5, two chains"),
        pytest.param(gemma2, ac.AttnResConfig(block_size=2), {}, 1, id="gemma2, sandwich"),
    ],
)
def test_zero_queries_change_nothing_but_rounding(
    tmp_path: Path, make: Callable[[], nn.Module], config: ac.AttnResConfig, options: dict[str, Any], chains: int
) -> None:
    torch.manual_seed(0)
    model = make()
    source = saved(model, tmp_path / "plain", **options)
    assert not options or len(list(source.glob("*.safetensors"))) > 1
    found = compared(source, converted(model, tmp_path / "converted", config))
    output = found.output
    assert output.name == "logits"
    assert output.max_rel_error <= 1e-6
    assert output.top1_agreement == 1.0
    assert output.kl_max is not None and output.kl_max < 1e-10
    assert found.first_different_site is None and found.most_different(5) == ()
    assert max(site.max_rel_error for site in found.sites) < 1e-5
    assert found.graph.differences == ()
    assert len(found.streams) == chains
    assert len(found.graph.replaced) == len(found.sites) == len(model.attnres.sites)
    assert [site.modules[0] for site in found.sites] == [site.module for site in model.attnres.layout]
    assert found.graph.diff.kept == sum(count for _, count in found.graph.diff.kinds)
    assert "but for rounding" in str(found)


def test_figures_are_those_of_an_independent_computation(pair: tuple[Path, Path]) -> None:
    found = compared(*pair, seed=3)
    plain = transformers.LlamaForCausalLM.from_pretrained(pair[0]).eval()
    ids = random_inputs(plain, TOKENS, 3)["input_ids"]
    model = ac.from_pretrained(pair[1])
    norms = [site.modules[0] for site in found.sites]
    with torch.no_grad():
        expected, before = inputs_of(plain, norms, ids)
        actual, after = mixed(plain, model, norms, ids)

    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    divergence = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    output = found.output
    assert (output.kl_mean, output.kl_max) == pytest.approx((divergence.mean().item(), divergence.max().item()), rel=1e-4)
    assert output.max_abs_error == pytest.approx((expected - actual).abs().max().item(), rel=1e-4)
    assert output.mean_abs_error == pytest.approx((expected - actual).abs().mean().item(), rel=1e-4)
    assert output.max_rel_error == pytest.approx(output.max_abs_error / expected.abs().max().item(), rel=1e-4)
    assert output.top1_agreement == (expected.argmax(-1) == actual.argmax(-1)).double().mean().item()
    for site, a, b in zip(found.sites, before, after, strict=True):
        rms = a.square().mean().sqrt().item()
        assert site.original_rms == pytest.approx(rms, rel=1e-4)
        assert site.max_abs_error == pytest.approx((a - b).abs().max().item(), rel=1e-3)
        assert site.mean_rel_error == pytest.approx((a - b).abs().mean().item() / rms, rel=1e-3)
        assert site.weights is not None and sum(site.weights) == pytest.approx(1, abs=1e-5)


def inputs_of(model: nn.Module, norms: list[str], ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits of a plain model, and what its norms read."""
    reads: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: reads.update({name: args[0].clone()}))
        for name in norms
    ]
    logits = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    return logits, [reads[name] for name in norms]


def mixed(plain: nn.Module, model: nn.Module, norms: list[str], ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The same with Attention Residuals in two blocks of three sublayers, written down sublayer by sublayer."""
    decoder, block = plain.model, 3
    sources, partial, reads = [decoder.embed_tokens(ids)], [], []
    positions = decoder.rotary_emb(sources[0], torch.arange(ids.shape[1])[None])

    def read(site: int) -> Tensor:
        parameters, eps = model.attnres.sites[site], plain.get_submodule(norms[site]).variance_epsilon
        values = torch.stack([*sources, *([sum(partial)] if partial else [])])
        keys = values * (values.square().mean(-1, keepdim=True) + eps).rsqrt() * parameters.key_norm
        reads.append(len(values) * ((keys @ parameters.query).softmax(0)[..., None] * values).sum(0))
        return reads[-1]

    def add(output: Tensor) -> None:
        partial.append(output)
        if len(partial) == block:
            sources.append(sum(partial))
            partial.clear()

    for i, layer in enumerate(decoder.layers):
        stream = sources[0] if i == 0 else read(2 * i - 1)
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None]
        add(layer.self_attn(layer.input_layernorm(stream), positions, mask)[0])
        add(layer.mlp(layer.post_attention_layernorm(read(2 * i))))
    return plain.lm_head(decoder.norm(read(2 * len(decoder.layers) - 1))), reads


def test_a_paper_mixture_is_compared_times_its_number_of_sources(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    source = saved(model, tmp_path / "plain")
    found = compared(source, converted(model, tmp_path / "paper", ac.AttnResConfig(num_blocks=3, scale="paper")))
    # The first site reads the sum of unchanged sources; the others feel what eps did to the norms before them.
    assert found.sites[0].max_rel_error < 1e-6
    assert max(site.mean_rel_error for site in found.sites) < 0.5


@pytest.mark.parametrize("is_converted", [False, True], ids=["plain", "converted"])
def test_a_damaged_weight_shows_first_at_the_site_behind_it(pair: tuple[Path, Path], tmp_path: Path, is_converted: bool) -> None:
    folder = pair[is_converted]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1.0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = compared(folder, tmp_path)
    first = found.first_different_site
    assert first is not None and first.modules == ("model.layers.2.input_layernorm",)
    assert all(site.max_abs_error == 0 for site in found.sites[: first.site])
    assert found.graph.differences == () and found.graph.diff.removed == found.graph.diff.added == ()
    assert len(found.graph.replaced) == (len(found.sites) if is_converted else 0)
    assert (found.sites[0].weights is not None) == is_converted
    assert "model.layers.2.input_layernorm" in str(found)


def test_replaced_reads_name_their_sources(found: CheckpointComparison) -> None:
    replaced = found.graph.replaced
    assert replaced[0].sources == ("embedding", "partial sum (sublayer 1)")
    assert replaced[1].sources == ("embedding", "partial sum (sublayers 1 to 2)")
    assert replaced[2].sources == ("embedding", "block 1 (sublayers 1 to 3)")
    assert replaced[-1].sources == ("embedding", "block 1 (sublayers 1 to 3)", "block 2 (sublayers 4 to 6)")
    assert replaced[-1].modules == ("model.norm",)


def test_sublayers_are_named_by_the_modules_around_their_last_projections(found: CheckpointComparison, tmp_path: Path) -> None:
    (stream,) = found.streams
    parts = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")]
    assert stream.sublayers == tuple((part,) for part in parts)
    assert stream.root == "model.embed_tokens"
    folder = saved(gemma2(), tmp_path)
    assert compared(folder, folder).streams[0].sublayers == stream.sublayers  # behind which stand norms


def test_whatever_differs_beside_the_weights_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name, change in {"eps": {"rms_norm_eps": 1e-3}, "activation": {"hidden_act": "gelu"}}.items():
        (tmp_path / name).mkdir()
        for file in pair[0].iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        config = json.loads((pair[0] / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
    found = compared(pair[0], tmp_path / "eps")
    assert any("arguments" in difference and "0.001" in difference for difference in found.graph.differences)
    assert "DIFFERENT" in str(found)
    assert any("silu" in difference for difference in compared(pair[0], tmp_path / "activation").graph.differences)


def test_other_options_and_another_dtype_are_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(pair[0])
    full = converted(model, tmp_path / "full", ac.AttnResConfig(variant="full"))
    (difference,) = compared(pair[1], full).graph.differences
    assert "num_blocks=2" in difference and "variant='full'" in difference
    half = saved(transformers.LlamaForCausalLM.from_pretrained(pair[0], dtype=torch.bfloat16), tmp_path / "half")
    assert "float32 in the original, bfloat16 in the other" in compared(pair[0], half).graph.differences[0]


def test_the_other_way_round_is_the_same(pair: tuple[Path, Path], found: CheckpointComparison) -> None:
    there, back = found, compared(*reversed(pair))
    assert there.output.max_abs_error == back.output.max_abs_error
    assert len(there.graph.diff.removed) == len(back.graph.diff.added)
    assert back.graph.differences == () and back.graph.replaced == ()


def test_json_has_no_number_that_json_lacks(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for file in pair[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = compared(pair[1], tmp_path)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["output"]["max_abs_error"] is None and data["sites"][0]["max_abs_error"] == 0
    assert data["first_different_site"] == 3
    assert data["sites"][5]["modules"] == ["model.norm"]
    assert data["destination"]["config"]["num_blocks"] == 2
    assert data["graph"]["diff"]["kinds"]["linear"] == 22
    assert "nan" in str(found)


def test_the_first_model_is_gone_before_the_second_is_loaded(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    load = module.load_plain_or_converted

    def watched(folder: Path, trust_remote_code: bool) -> nn.Module:
        gc.collect()
        assert [reference for reference in alive if reference() is not None] == []
        model = load(folder, trust_remote_code)
        alive.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    monkeypatch.setattr(module, "load_plain_or_converted", watched)
    compared(*pair)
    assert len(alive) > 50


def test_masked_logits_and_certain_tokens() -> None:
    infinity = float("inf")
    found = compare_outputs("logits", torch.tensor([[0.0, -infinity]]), torch.tensor([[1.0, -infinity]]), True)
    assert (found.max_abs_error, found.kl_max, found.top1_agreement) == (1.0, 0.0, 1.0)
    assert compare_outputs("logits", torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -infinity]]), True).kl_max == infinity
    assert compare_reads(torch.zeros(2, 3), torch.ones(2, 3)) == (1.0, 1.0, 0.0)


def test_outputs_that_are_no_distribution_have_no_divergence(tmp_path: Path) -> None:
    folder = saved(llama().model, tmp_path)
    found = compared(folder, folder)
    assert found.output.name == "last_hidden_state"
    assert (found.output.kl_mean, found.output.top1_agreement, found.output.max_abs_error) == (None, None, 0.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(gpt2, "its model type is gpt2", id="another model"),
        pytest.param(lambda: llama(vocab_size=62), "its vocabulary size is 62", id="another vocabulary"),
        pytest.param(lambda: llama().model, "its architecture is LlamaModel", id="another head"),
        pytest.param(lambda: llama(num_hidden_layers=2), "The first", id="another depth"),
        pytest.param(lambda: llama(hidden_size=16), "width 16", id="another width"),
    ],
)
def test_another_model_is_refused_in_a_line(pair: tuple[Path, Path], tmp_path: Path, make: Any, words: str) -> None:
    with pytest.raises(ac.CheckpointError, match=words) as caught:
        compared(pair[0], saved(make(), tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def said(result: Result) -> list[str]:
    """Lines on stderr but for the bars that Transformers shows while it loads."""
    return [line for line in result.stderr.splitlines() if line and "Loading weights" not in line]


def test_the_command_prints_text_json_and_a_page(pair: tuple[Path, Path], tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    place.write_text("an older one")
    result = run(*pair, "--tokens", "8", "--html", place)
    assert (result.exit_code, said(result)) == (0, [])
    assert "top-1 agreement" in result.stdout and "model.norm" in result.stdout
    assert place.read_text().startswith("<!DOCTYPE html>") and list(tmp_path.iterdir()) == [place]
    result = run(*pair, "--tokens", "8", "--json")
    assert json.loads(result.stdout)["output"]["shape"] == [1, 8, 61]


def test_bad_input_of_the_command_is_one_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments, word in (
        ((pair[0], tmp_path / "nowhere"), "nowhere"),
        ((*pair, "--html", tmp_path / "nowhere" / "page.html"), "page.html"),
        ((*pair, "--html", tmp_path), "no regular file"),
        ((*pair, "--text", tmp_path / "missing.txt"), "missing.txt"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        (line,) = said(result)
        assert line.startswith("attnres: error: ") and word in line
    assert list(tmp_path.iterdir()) == []


def test_a_text_goes_through_the_tokenizer_of_the_original(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    (tmp_path / "text").write_text("one two three two one")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "three": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for file in pair[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    found = compare_checkpoints(tmp_path, pair[1], text=tmp_path / "text", tokens=4)
    assert found.output.shape == (1, 4, 61)
    assert "the first 4 tokens of" in str(found)
