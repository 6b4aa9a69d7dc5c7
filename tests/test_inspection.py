"""What an inspection says, against the real graph's own sums and against weights and magnitudes computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import example_inputs, randomise, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import attnres_compile as ac
from attnres_compile.cli import app
from attnres_compile.inspection.measure import inspect_model, mixing_row
from attnres_compile.inspection.report import Inspection
from attnres_compile.observe import Observer, observe
from attnres_compile.plan import plan_site

BLOCK, FULL = ac.AttnResConfig(num_blocks=3), ac.AttnResConfig(variant="full")
CONFIGS = {
    "block": BLOCK,
    "full": FULL,
    "block, paper": ac.AttnResConfig(num_blocks=3, scale="paper"),
    "full, paper": ac.AttnResConfig(variant="full", scale="paper"),
}
VARIANTS = {
    "heads": ac.AttnResConfig(num_blocks=3, heads=4, query="input"),
    "sigmoid": ac.AttnResConfig(num_blocks=3, weights="sigmoid", normalize_keys=False),
    "mhc": ac.AttnResConfig(variant="full", weights="mhc"),
}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97, "intermediate_size": 48}
_IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def model_and_inputs(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model in evaluation mode and float64, every weight random, and the keyword arguments of a call."""
    if name in ("llama", "gpt2"):
        model, kwargs = tiny(name), {"input_ids": _IDS, "use_cache": False}
    elif name == "vit":
        model, kwargs = tiny(name), example_inputs(name)[1]
    elif name == "gemma2":
        config = transformers.Gemma2Config(num_key_value_heads=2, head_dim=8, **_SMALL)
        model, kwargs = randomise(transformers.Gemma2ForCausalLM(config), 0), {"input_ids": _IDS, "use_cache": False}
    elif name == "gptj":
        special = {"bos_token_id": 1, "eos_token_id": 2}
        config = transformers.GPTJConfig(n_embd=32, n_layer=4, n_head=4, vocab_size=97, rotary_dim=4, **special)
        model, kwargs = randomise(transformers.GPTJForCausalLM(config), 0), {"input_ids": _IDS, "use_cache": False}
    else:
        config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=97)
        model = randomise(transformers.T5ForConditionalGeneration(config), 0)
        kwargs = {"input_ids": _IDS, "decoder_input_ids": _IDS[:, :7], "use_cache": False}
    kwargs = {key: value.double() if key == "pixel_values" else value for key, value in kwargs.items()}
    return model.eval().double(), kwargs


def converted(name: str, config: ac.AttnResConfig, std: float = 0.3) -> tuple[nn.Module, dict[str, Any]]:
    """The same, converted, with random queries and key-norm weights; a ``std`` of zero leaves queries at zero."""
    model, kwargs = model_and_inputs(name)
    ac.convert_(model, config, kwargs=kwargs)
    for name, parameter in model.attnres.named_parameters():
        if name.endswith("key_norm"):
            nn.init.uniform_(parameter, 0.7, 1.3)
        else:
            nn.init.normal_(parameter, std=std)
    return model, kwargs


class Recorder(Observer):
    """Keeps everything."""

    def __init__(self) -> None:
        self.sources: dict[tuple[int, int], Tensor] = {}
        self.reads: dict[int, Tensor] = {}
        self.depth: dict[int, Tensor] = {}

    def source(self, chain: int, index: int, value: Tensor) -> None:
        self.sources[chain, index] = value.clone()

    def read(self, chain: int, site: int, value: Tensor) -> None:
        self.reads[site] = value.clone()

    def weights(self, chain: int, site: int, value: Tensor) -> None:
        self.depth[site] = value.clone()


# Every variant and scale on one model, and each of them once on the others.
GRID = [
    *(("llama", config) for config in (*CONFIGS, *VARIANTS)),
    *((name, config) for name in ("gpt2", "gemma2", "gptj", "t5", "vit") for config in ("block", "full, paper")),
]


@pytest.mark.parametrize(("name", "config_name"), GRID)
def test_every_read_is_the_sum_that_the_mixing_matrix_says(name: str, config_name: str) -> None:
    config = {**CONFIGS, **VARIANTS}[config_name]
    model, kwargs = converted(name, config)
    seen = Recorder()
    observed = observe(model, seen, kwargs=kwargs)
    assert not any(output.requires_grad for output in observed.outputs if isinstance(output, Tensor))
    found = inspect_model(model, kwargs=kwargs)
    assert len(found.chains) == len(observed.report.chains) == (2 if name == "t5" else 1)
    for i, (report, chain) in enumerate(zip(observed.report.chains, found.chains, strict=True)):
        count, size = report.num_sublayers, report.block_sizes[0]
        values = torch.stack([seen.sources[i, j] for j in range(count + 1)])
        assert chain.mixing.shape == (len(report.sites) + 1, count + 1)
        torch.testing.assert_close(chain.mixing[0], torch.eye(count + 1, dtype=torch.float64)[0], rtol=0, atol=0)
        for site, mean in zip(report.sites, chain.mixing[1:], strict=True):
            scale = float(site.num_sources) if config.scale == "preserve" else 1.0
            row = mixing_row(seen.depth[site.index], plan_site(site.before, size, count), size, count, scale)
            assert not row[site.before + 1 :].any()
            by_head = row.unsqueeze(-1) * values.unflatten(-1, (config.heads, -1))
            torch.testing.assert_close(by_head.sum(0).flatten(-2), seen.reads[site.index], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(mean, row.flatten(1).mean(1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_standard_residual_is_the_sum_that_its_matrix_says(name: str) -> None:
    model, kwargs = model_and_inputs(name)
    seen = Recorder()
    report = observe(model, seen, kwargs=kwargs).report
    found = inspect_model(model, kwargs=kwargs)
    assert found.config is None
    for i, (chain, inspected) in enumerate(zip(report.chains, found.chains, strict=True)):
        assert torch.equal(inspected.mixing, inspected.standard_mixing)
        assert inspected.block_sizes is None
        values = torch.stack([seen.sources[i, j] for j in range(chain.num_sublayers + 1)])
        for site, row in zip(chain.sites, inspected.mixing[1:], strict=True):
            torch.testing.assert_close(torch.einsum("i,i...->...", row, values), seen.reads[site.index], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_zero_queries_give_equal_weights_and_the_standard_matrix(config: ac.AttnResConfig) -> None:
    model, kwargs = converted("llama", config, std=0.0)
    (chain,) = inspect_model(model, kwargs=kwargs).chains
    for site in chain.sites:
        n = len(site.sources)
        torch.testing.assert_close(site.weights, torch.full((n,), 1 / n, dtype=torch.float64))
        assert (site.entropy, site.entropy_of_mean) == (pytest.approx(math.log(n)), pytest.approx(math.log(n)))
        assert site.entropy_fraction == pytest.approx(1.0)
    expected = chain.standard_mixing.clone()
    if config.scale == "paper":
        expected[1:] /= torch.tensor([[len(site.sources)] for site in chain.sites])
    torch.testing.assert_close(chain.mixing, expected)


def rms(value: Tensor) -> float:
    return float(value.square().mean(-1).sqrt().mean())


def hooked(model: nn.Module, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """A plain Llama's embedding and sublayer outputs, and the inputs of its norms, by hooks on its modules."""
    outputs, inputs = [], []
    adding = [model.model.embed_tokens, *(part for layer in model.model.layers for part in (layer.self_attn.o_proj, layer.mlp))]
    norms = [norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(model.model.norm)
    handles = [module.register_forward_hook(lambda _, __, output: outputs.append(output)) for module in adding]
    handles += [module.register_forward_hook(lambda _, given, __: inputs.append(given[0])) for module in norms]
    with torch.no_grad():
        model(**kwargs)
    for handle in handles:
        handle.remove()
    return outputs, inputs


def test_magnitudes_are_those_of_the_modules() -> None:
    model, kwargs = model_and_inputs("llama")
    outputs, inputs = hooked(model, kwargs)
    (chain,) = inspect_model(model, kwargs=kwargs).chains
    assert chain.num_tokens == 22
    assert [chain.root_magnitude, *(sublayer.magnitude for sublayer in chain.sublayers)] == pytest.approx([*map(rms, outputs)])
    assert [read.magnitude for read in chain.reads] == pytest.approx([*map(rms, inputs)])
    assert [sublayer.modules for sublayer in chain.sublayers[:2]] == [
        ("model.layers.0.self_attn.o_proj",), ("model.layers.0.mlp.down_proj",),
    ]  # fmt: skip
    assert [read.module for read in chain.reads[:2]] == [
        "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm",
    ]  # fmt: skip
    assert [read.site for read in chain.reads] == [None, *range(8)]


@pytest.mark.parametrize("config", [BLOCK, FULL], ids=["block", "full"])
def test_a_query_trained_towards_a_source_by_hand(config: ac.AttnResConfig) -> None:
    """All queries but the output site's are zero, so the streams are the plain model's and hooks on it see the sources."""
    model, kwargs = model_and_inputs("llama")
    outputs, _ = hooked(model, kwargs)
    report = ac.convert_(model, config, kwargs=kwargs)
    size, count = report.chains[0].block_sizes[0], report.chains[0].num_sublayers
    blocks = [sum(outputs[1 + start : 1 + min(start + size, count)]) for start in range(0, count, size)]
    values = torch.stack([outputs[0], *blocks])
    keys = values * (values.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    target = 2
    query = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    for _ in range(20):
        loss = -(keys @ query).log_softmax(0)[target].mean()
        (slope,) = torch.autograd.grad(loss, query)
        query = (query - slope).detach().requires_grad_()
    model.attnres.sites[-1].query.data.copy_(query.detach())
    alpha = (keys @ query.detach()).softmax(0)
    entropies = -(alpha * alpha.log()).sum(0)
    mixture = len(values) * (alpha.unsqueeze(-1) * values).sum(0)

    (chain,) = inspect_model(model, kwargs=kwargs, per_token=True).chains
    output = chain.sites[-1]
    torch.testing.assert_close(output.token_weights, alpha, rtol=1e-6, atol=1e-9)  # eager and captured sums round apart
    torch.testing.assert_close(output.weights, alpha.flatten(1).mean(1), rtol=1e-6, atol=1e-9)
    assert output.heaviest(1) == [(output.sources[target], pytest.approx(float(alpha[target].mean())))]
    assert float(alpha[target].mean()) > 1.5 / len(values)
    assert output.entropy == pytest.approx(float(entropies.mean()))
    assert output.entropy_fraction == pytest.approx(float(entropies.mean()) / math.log(len(values)))
    assert output.entropy_of_mean > output.entropy
    assert output.magnitude == pytest.approx(rms(mixture))
    owners = [0, *(1 + i // size for i in range(count))]
    expected = len(values) * alpha.flatten(1).mean(1)[owners]
    torch.testing.assert_close(chain.mixing[-1], expected, rtol=1e-6, atol=1e-9)


def test_names_of_sites_sources_and_chains() -> None:
    model, kwargs = converted("gemma2", ac.AttnResConfig(block_size=3))
    (chain,) = inspect_model(model, kwargs=kwargs).chains
    assert [read.name for read in chain.reads] == [
        "layer 0 attention", "layer 0 MLP", "layer 1 attention", "layer 1 MLP", "output",
    ]  # fmt: skip
    assert chain.block_sizes == (3, 1)
    assert chain.sources == ("embedding", "block 1", "block 2", "partial sum")
    assert chain.sites[1].sources == ("embedding", "partial sum")
    assert chain.sites[2].sources == ("embedding", "block 1")
    assert chain.depth_attention.isnan().tolist() == [
        [False, True, True, False], [False, True, True, False], [False, False, True, True], [False, False, False, True],
    ]  # fmt: skip
    model, kwargs = converted("gptj", FULL)
    (chain,) = inspect_model(model, kwargs=kwargs).chains
    assert [read.name for read in chain.reads][-2:] == ["layer 3 attention + MLP", "output"]
    assert chain.sources[:2] == ("embedding", "layer 0 attention + MLP")


def test_values_of_every_token_only_where_asked_for() -> None:
    model, kwargs = converted("t5", BLOCK)
    bare, full = inspect_model(model, kwargs=kwargs), inspect_model(model, kwargs=kwargs, per_token=True)
    assert bare.token_ids == {}
    assert all(site.token_weights is None for chain in bare.chains for site in chain.sites)
    assert {name: ids.tolist() for name, ids in full.token_ids.items()} == {
        "input_ids": _IDS.tolist(), "decoder_input_ids": _IDS[:, :7].tolist(),
    }  # fmt: skip
    for chain, shape in zip(full.chains, [(2, 11), (2, 7)], strict=True):
        for site in chain.sites:
            assert site.token_weights.shape == (len(site.sources), *shape)
            torch.testing.assert_close(site.token_weights.sum(0), torch.ones(shape, dtype=torch.float64))
            torch.testing.assert_close(site.token_weights.flatten(1).mean(1), site.weights)
    assert str(_IDS[1, 5].item()) in str(full)
    encoder, decoder = full.chains
    assert (encoder.name, decoder.name) == ("encoder", "decoder")
    assert (encoder.num_tokens, decoder.num_tokens) == (22, 14)
    assert decoder.reads[1].name == "layer 0 cross-attention"


def test_json_has_every_number_and_none_that_is_not_finite() -> None:
    model, kwargs = converted("llama", BLOCK)
    facts = json.loads(json.dumps(inspect_model(model, kwargs=kwargs).to_dict(), allow_nan=False))
    (chain,) = facts["chains"]
    assert facts["config"]["num_blocks"] == 3
    assert len(chain["mixing"]) == len(chain["standard_mixing"]) == len(chain["reads"]) == 9
    assert sum(chain["reads"][4]["weights"]) == pytest.approx(1.0)
    assert chain["reads"][0]["weights"] is None
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    (broken,) = json.loads(json.dumps(inspect_model(model, kwargs=kwargs).to_dict(), allow_nan=False))["chains"]
    assert broken["sublayers"][3]["magnitude"] is None
    assert broken["reads"][-1]["entropy"] is None


def test_the_table_has_a_line_for_every_place() -> None:
    model, kwargs = converted("llama", BLOCK)
    lines = str(inspect_model(model, kwargs=kwargs)).splitlines()
    assert lines[0] == "LlamaForCausalLM: Block AttnRes, 3 blocks of 3 sublayers, the last of 2; means over 22 tokens"
    assert [line.split("│")[2].strip() for line in lines if "│" in line] == [
        "embedding", *(f"layer {i} {part}" for i in range(4) for part in ("attention", "MLP")), "output",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 140


def test_what_can_not_be_inspected_says_why() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SMALL))
    with pytest.raises(ac.ConfigError, match="meta device"):
        inspect_model(model)
    model, kwargs = model_and_inputs("llama")
    with pytest.raises(ac.ConfigError, match="rewritten"):
        inspect_model(ac.rewrite(model, BLOCK, kwargs=kwargs), kwargs=kwargs)
    ac.convert_(model.model, BLOCK, kwargs=kwargs)
    with pytest.raises(ac.ConfigError, match="part of the model"):
        inspect_model(model, kwargs=kwargs)
    with pytest.raises(ac.NoResidualChainError):
        inspect_model(nn.Linear(3, 3), (torch.ones(2, 3),))


# ------------------------------------------------------------------------------------------------------ command line


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["inspect", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories ``plain`` and ``converted`` of one Llama, the latter with a tokenizer."""
    root = tmp_path_factory.mktemp("folders")
    model = tiny("llama")
    model.save_pretrained(root / "plain")
    ac.convert_(model, BLOCK)
    torch.manual_seed(0)
    for site in model.attnres.sites:
        nn.init.normal_(site.query)
    model.save_pretrained(root / "converted")
    words = Tokenizer(WordLevel({"unknown": 0, "one": 1, "two": 2, "three": 3}, unk_token="unknown"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="unknown").save_pretrained(root / "converted")
    (root / "text").write_text("three two one two three")
    return root


def test_command_prints_what_a_checkpoint_attends_to(folders: Path) -> None:
    result = run(folders / "converted", "--tokens", "8")
    assert result.exit_code == 0, result.stderr
    assert "3 blocks of 3 sublayers, the last of 2; means over 8 tokens" in result.stdout
    plain = run(folders / "plain")
    assert plain.exit_code == 0, plain.stderr
    assert "standard residual; means over 32 tokens" in plain.stdout  # as many as the model has positions for


def test_command_gives_json_of_a_text_and_of_a_seed(folders: Path) -> None:
    result = run(folders / "converted", "--text", folders / "text", "--tokens", "4", "--per-token", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["token_ids"] == {"input_ids": [[3, 2, 1, 2]]}
    loaded: Inspection = inspect_model(
        ac.from_pretrained(folders / "converted"), kwargs={"input_ids": torch.tensor([[3, 2, 1, 2]])}, per_token=True
    )
    assert facts["chains"] == json.loads(json.dumps(loaded.to_dict()))["chains"]
    first, again, other = (run(folders / "converted", "--tokens", "5", "--seed", seed, "--json").stdout for seed in "112")
    assert first == again != other


def test_command_fails_in_one_line(folders: Path, tmp_path: Path) -> None:
    bert = tmp_path / "bert"
    transformers.BertModel(transformers.BertConfig(**_SMALL)).save_pretrained(bert)
    result = run(bert)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "post-norm" in result.stderr
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for arguments, words in [
        ((tmp_path / "nowhere",), "no such file or directory"),
        ((folders / "plain", "--text", tmp_path / "nothing"), "can't be read"),
        ((folders / "plain", "--plot", tmp_path / "picture.pdf"), ".png, .svg"),
        ((folders / "plain", "--plot", tmp_path / "nowhere" / "picture.png"), "create it first"),
        ((folders / "plain", "--plot", folder), str(folder)),
        ((folders / "plain", "--plot", bert), "no format"),
    ]:
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        (line,) = (line for line in result.stderr.splitlines() if line and "Loading weights" not in line)  # a progress bar
        assert line.startswith("attnres: error: ") and words in line


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_command_writes_a_picture(folders: Path, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"picture{suffix}"
    result = run(folders / "converted", "--tokens", "8", "--plot", picture)
    assert result.exit_code == 0, result.stderr
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in content
    assert run(folders / "nowhere", "--plot", picture).exit_code == 2
    assert picture.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [picture.name]
