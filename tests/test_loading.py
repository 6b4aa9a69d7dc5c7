"""Converted checkpoints as models: what was saved is what is loaded, and whatever is not whole is refused with a way out."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import attnres_compile as ac
from attnres_compile.checkpoint.offline import convert_checkpoint

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KIMI = {
    **TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_nope_head_dim": 8, "num_experts_per_tok": 2, "num_local_experts": 4, "linear_head_dim": 8, "linear_num_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}  # tied embeddings
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**TEXT, "head_dim": 8}),
    "kimi_linear": ("KimiLinearForCausalLM", "KimiLinearConfig", KIMI),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
}
SHARDED = "40KB"


def built(family: str) -> transformers.PreTrainedModel:
    model, config, values = FAMILIES[family]
    torch.manual_seed(1)
    return getattr(transformers, model)(getattr(transformers, config)(**values)).eval()


def inputs_of(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    if "pixel_values" in model.main_input_name:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, 97, (2, 9), generator=generator)}


def logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """As the model computes them: rewritten if it is converted."""
    module = ac.rewrite(model, kwargs=inputs) if hasattr(model, "attnres") else model
    with torch.no_grad():
        return module(**inputs).logits


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A converted directory with random queries, in blocks of three sublayers."""
    model = built("llama")
    ac.convert_(model, ac.AttnResConfig(block_size=3), kwargs=inputs_of(model))
    randomize(model)
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def randomize(model: torch.nn.Module) -> None:
    for name, parameter in model.attnres.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("key_norm" in name), std=0.5)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("family", "naming"), [*((family, "attnres") for family in FAMILIES), ("kimi_linear", "kimi-k3"), ("gpt2", "fla")]
)
def test_a_converted_directory_computes_what_the_original_does(family: str, naming: str, tmp_path: Path) -> None:
    model = built(family)
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path / "source", max_shard_size=SHARDED if family == "llama" else "5GB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) == (4 if family == "llama" else 1)
    report, done = convert_checkpoint(tmp_path / "source", tmp_path / "converted", ac.AttnResConfig(block_size=2), naming=naming)
    loaded = ac.from_pretrained(tmp_path / "converted")
    assert len(loaded.attnres.sites) == report.num_sites == 8
    assert done.tensors == 2 * report.num_sites + 2 * (naming != "attnres")
    expected, found = logits(model, inputs), logits(loaded, inputs)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_trained_queries_come_back_to_the_bit(tmp_path: Path) -> None:
    model = built("llama")
    model.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    loaded = ac.from_pretrained(tmp_path / "converted")
    ids = inputs_of(loaded)["input_ids"]
    gm = ac.rewrite(loaded, args=(ids,), kwargs={"labels": ids})
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        gm(ids, labels=ids).loss.backward()
        optimizer.step()
    loss = gm(ids, labels=ids).loss
    assert loaded.attnres.sites[3].query.abs().max() > 0
    loaded.save_pretrained(tmp_path / "trained")
    again = ac.from_pretrained(tmp_path / "trained")
    assert torch.equal(ac.rewrite(again, args=(ids,), kwargs={"labels": ids})(ids, labels=ids).loss, loss)
    # Under the backend, too, both are the same function to the bit.
    first, second = (torch.compile(each, backend="attnres")(ids, labels=ids).loss for each in (loaded, again))
    assert torch.equal(first, second)


def test_saving_leaves_the_model_s_config_as_it_was(llama: Path) -> None:
    model = ac.from_pretrained(llama)
    assert not hasattr(model.config, "attnres_config")
    model.save_pretrained(llama.parent / "again")
    assert not hasattr(model.config, "attnres_config")
    saved = json.loads((llama.parent / "again" / "config.json").read_text())["attnres_config"]
    assert saved == json.loads((llama / "config.json").read_text())["attnres_config"]
    assert (saved["format_version"], saved["block_size"], saved["naming"], len(saved["sites"])) == (1, 3, "attnres", 8)
    last = {"module": "model.norm", "hidden_size": 32, "num_sources": 4, "before": 8, "num_sublayers": 8}
    assert saved["sites"][-1] == last


def test_models_that_share_a_config_do_not_share_what_it_says_of_attnres(tmp_path: Path) -> None:
    first = built("llama")
    second = transformers.LlamaForCausalLM(first.config)
    ac.convert_(first, ac.AttnResConfig(block_size=2))
    ac.convert_(second, ac.AttnResConfig(variant="full"))
    for name, model in (("first", first), ("second", second)):
        model.save_pretrained(tmp_path / name)
    assert ac.from_pretrained(tmp_path / "first").attnres.config == ac.AttnResConfig(block_size=2)
    assert ac.from_pretrained(tmp_path / "second").attnres.config == ac.AttnResConfig(variant="full")


def test_a_copy_saves_itself(llama: Path) -> None:
    model = copy.deepcopy(ac.from_pretrained(llama))
    torch.nn.init.ones_(model.attnres.sites[0].query)
    model.save_pretrained(llama.parent / "copy")
    assert torch.equal(ac.from_pretrained(llama.parent / "copy").attnres.sites[0].query, torch.ones(32))


def test_a_converted_part_of_a_model_is_found(tmp_path: Path) -> None:
    model = built("llama")
    inputs = inputs_of(model)
    ac.convert_(model.model, kwargs=inputs)
    entry = model.model.attnres.stored().to_dict()
    model.save_pretrained(tmp_path)  # by the whole model, which knows nothing of it
    with pytest.raises(ac.CheckpointError, match=r"holds model\.attnres\.sites\.0\.\S+ but its config\.json has no"):
        ac.from_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda config: config.update(attnres_config=entry))
    assert len(ac.from_pretrained(tmp_path).model.attnres.sites) == 8


def test_dtypes_as_transformers_has_them(llama: Path) -> None:
    as_saved, cast = ac.from_pretrained(llama), ac.from_pretrained(llama, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in as_saved.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps_as_transformers_has_them(llama: Path, device_map: Any) -> None:
    model, mapped = ac.from_pretrained(llama), ac.from_pretrained(llama, device_map=device_map, dtype="float32")
    with torch.no_grad():
        found = torch.compile(mapped, backend="attnres")(**inputs_of(mapped)).logits
    torch.testing.assert_close(found, logits(model, inputs_of(model)), rtol=1e-5, atol=1e-5)


def test_queries_keep_a_dtype_of_their_own(tmp_path: Path) -> None:
    built("llama").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted", dtype=torch.float32)
    loaded = ac.from_pretrained(tmp_path / "converted")
    assert (loaded.dtype, loaded.attnres.sites[0].query.dtype) == (torch.bfloat16, torch.float32)
    convert_checkpoint(tmp_path / "source", tmp_path / "alike")
    assert ac.from_pretrained(tmp_path / "alike").attnres.sites[0].query.dtype == torch.bfloat16


class TestRefused:
    """No directory loads as something else than it says."""

    def test_not_converted(self, tmp_path: Path) -> None:
        built("llama").save_pretrained(tmp_path)
        with pytest.raises(ac.CheckpointError, match=r"was not converted.*attnres convert"):
            ac.from_pretrained(tmp_path)

    def test_what_stock_transformers_leaves_when_it_saves_again(self, llama: Path) -> None:
        stock = transformers.AutoModelForCausalLM.from_pretrained(llama)
        with pytest.raises(ac.ConfigError, match="loaded without its AttnRes tensors"):
            ac.convert_(stock)
        stock.save_pretrained(llama.parent / "stock")
        with pytest.raises(ac.CheckpointError, match=r"8 sites, but none of their tensors.*Stock Transformers"):
            ac.from_pretrained(llama.parent / "stock")

    def test_the_backend_converts_no_such_model_silently(self, llama: Path) -> None:
        stock = transformers.AutoModelForCausalLM.from_pretrained(llama)
        with pytest.raises(ac.ConfigError, match="from_pretrained"):
            torch.compile(stock, backend="attnres")(**inputs_of(stock))

    def test_one_tensor_missing(self, llama: Path) -> None:
        self.change_tensors(llama, lambda tensors: tensors.pop("attnres.sites.3.key_norm"))
        with pytest.raises(ac.CheckpointError, match=r"1 of the 16 AttnRes tensors.*attnres\.sites\.3\.key_norm"):
            ac.from_pretrained(llama)

    def test_a_site_too_many(self, llama: Path) -> None:
        self.change_tensors(llama, lambda tensors: tensors.update({"attnres.sites.8.query": torch.zeros(32)}))
        with pytest.raises(ac.CheckpointError, match=r"holds attnres\.sites\.8\.query.*8 sites"):
            ac.from_pretrained(llama)

    def test_another_width(self, llama: Path) -> None:
        self.change_tensors(llama, lambda tensors: tensors.update({"attnres.sites.0.query": torch.zeros(16)}))
        with pytest.raises(ac.CheckpointError, match=r"attnres\.sites\.0\.query has shape \[16\], where .* \[32\]"):
            ac.from_pretrained(llama)

    def test_a_weight_of_the_model_missing(self, llama: Path) -> None:
        self.change_tensors(llama, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
        with pytest.raises(ac.CheckpointError, match=r"lacks 1 of the tensors.*model\.layers\.2\.mlp\.up_proj\.weight"):
            ac.from_pretrained(llama)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param({"block_size": 2}, r"has 2 sources, where its options give 3", id="blocks"),
            pytest.param({"variant": "full", "block_size": None}, "options were edited", id="variant"),
            pytest.param({"format_version": 2}, "format version 2", id="version"),
            pytest.param({"depth": 3}, "unknown option 'depth'", id="unknown option"),
            pytest.param({"sites": []}, "lists no sites", id="no sites"),
            pytest.param({"sites": [{"module": "model.norm"}]}, "site 0 of attnres_config must have", id="half a site"),
            pytest.param({"naming": "theirs"}, "attnres, kimi-k3, fla", id="unknown naming"),
            pytest.param({"naming": 3}, "lists no sites|naming", id="no naming"),
        ],
    )
    def test_an_edited_entry(self, llama: Path, change: dict[str, Any], message: str) -> None:
        edit(llama / "config.json", lambda config: config["attnres_config"].update(change))
        with pytest.raises((ac.CheckpointError, ac.ConfigError), match=message):
            ac.from_pretrained(llama)

    def test_fewer_layers(self, llama: Path) -> None:
        edit(llama / "config.json", lambda config: config.update(num_hidden_layers=3))
        with pytest.raises(ac.CheckpointError, match=r"no module 'model\.layers\.3\.input_layernorm'"):
            ac.from_pretrained(llama)

    def test_other_sites_in_the_graph(self, llama: Path) -> None:
        """The layout is a copy of the other architecture's: what loads without complaint fails when the graph is seen."""
        entry = json.loads((llama / "config.json").read_text())["attnres_config"]
        for site in entry["sites"]:
            site["module"] = site["module"].replace("post_attention_layernorm", "input_layernorm")
        edit(llama / "config.json", lambda config: config.update(attnres_config=entry))
        model = ac.from_pretrained(llama)
        with pytest.raises(ac.ParameterMismatchError, match="The first that differs is site 0"):
            ac.rewrite(model, kwargs=inputs_of(model))

    @staticmethod
    def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


class TestStateDicts:
    """Plain state dicts say with which options they were made, since tensors of other blocks have the same shapes."""

    def test_round_trip_through_torch_save(self, llama: Path, tmp_path: Path) -> None:
        model = ac.from_pretrained(llama)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = built("llama")
        ac.convert_(other, ac.AttnResConfig(block_size=3))
        assert other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)).missing_keys == []
        assert torch.equal(logits(other, inputs_of(other)), logits(model, inputs_of(model)))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            pytest.param(ac.AttnResConfig(block_size=2), "first that differs is site 2", id="blocks"),
            pytest.param(ac.AttnResConfig(block_size=3, scale="paper"), "scale='preserve'", id="scale"),
            pytest.param(ac.AttnResConfig(block_size=3, eps=1e-3), "eps=None", id="eps"),
        ],
    )
    def test_other_options_are_refused(self, llama: Path, config: ac.AttnResConfig, message: str) -> None:
        other = built("llama")
        ac.convert_(other, config)
        with pytest.raises(ac.ParameterMismatchError, match=message):
            other.load_state_dict(ac.from_pretrained(llama).state_dict())

    def test_a_rewritten_module_has_the_same(self, llama: Path) -> None:
        model = ac.from_pretrained(llama)
        rewritten = ac.rewrite(built("llama"), ac.AttnResConfig(block_size=3), kwargs=inputs_of(model))
        rewritten.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(rewritten(**inputs_of(model)).logits, logits(model, inputs_of(model)))
        with pytest.raises(ac.ParameterMismatchError):
            ac.rewrite(built("llama"), ac.AttnResConfig(block_size=2), kwargs=inputs_of(model)).load_state_dict(
                model.state_dict()
            )

    def test_distributed_checkpoints(self, llama: Path, tmp_path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        model, other = ac.from_pretrained(llama), built("llama")
        ac.convert_(other, ac.AttnResConfig(block_size=3))
        dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
        state = other.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
        other.load_state_dict(state)
        assert torch.equal(logits(other, inputs_of(other)), logits(model, inputs_of(model)))


def test_a_model_compiled_in_place_is_rewritten_ahead_of_time_all_the_same(llama: Path) -> None:
    model = ac.from_pretrained(llama)
    expected = logits(model, inputs_of(model))
    model.compile(backend="attnres")
    assert torch.equal(logits(model, inputs_of(model)), expected)
    with torch.no_grad():
        compiled = model(**inputs_of(model)).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)


def test_remote_code_runs_only_when_trusted(llama: Path) -> None:
    shutil.copytree(llama, llama.parent / "remote")
    edit(
        llama.parent / "remote" / "config.json",
        lambda config: config.update(
            model_type="ours", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        ),
    )
    with pytest.raises(ac.CheckpointError, match="--trust-remote-code"):
        ac.from_pretrained(llama.parent / "remote")
