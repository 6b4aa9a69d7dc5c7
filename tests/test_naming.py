"""Names of AttnRes tensors in checkpoints: one table for each naming, and what has no such names."""

from __future__ import annotations

import pytest
import transformers

import attnres_compile as ac
from attnres_compile.checkpoint.naming import foreign_entries, site_names, unused_names
from attnres_compile.convert import planned
from attnres_compile.layout import SiteLayout, layout_of

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40, "intermediate_size": 48}
FULL = ac.AttnResConfig(variant="full")


def layout(model: transformers.PreTrainedModel, config: ac.AttnResConfig = FULL) -> tuple[SiteLayout, ...]:
    return layout_of(planned(model, config))


@pytest.fixture
def llama() -> tuple[SiteLayout, ...]:
    return layout(transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **SMALL)))


def test_our_own_names(llama: tuple[SiteLayout, ...]) -> None:
    names = site_names(llama, FULL, "attnres")
    assert [site.tensors["query"] for site in names] == [f"attnres.sites.{i}.query" for i in range(4)]
    assert [site.tensors["key_norm"] for site in names] == [f"attnres.sites.{i}.key_norm" for i in range(4)]
    assert unused_names(llama, FULL, "attnres") == []


def test_our_own_names_below_a_module_and_without_key_norms(llama: tuple[SiteLayout, ...]) -> None:
    names = site_names(llama, ac.AttnResConfig(variant="full", key_norm=False), "attnres", "model.")
    assert [site.tensors["query"] for site in names] == [f"model.attnres.sites.{i}.query" for i in range(4)]
    assert all("key_norm" not in site.tensors for site in names)


def test_the_names_of_kimi_k3(llama: tuple[SiteLayout, ...]) -> None:
    assert [site.tensors["query"] for site in unused_names(llama, FULL, "kimi-k3") + site_names(llama, FULL, "kimi-k3")] == [
        "model.layers.0.self_attention_res_proj.weight",
        "model.layers.0.mlp_res_proj.weight",
        "model.layers.1.self_attention_res_proj.weight",
        "model.layers.1.mlp_res_proj.weight",
        "model.output_attn_res_proj.weight",
    ]
    assert [site.tensors["key_norm"] for site in site_names(llama, FULL, "kimi-k3")] == [
        "model.layers.0.mlp_res_norm.weight",
        "model.layers.1.self_attention_res_norm.weight",
        "model.layers.1.mlp_res_norm.weight",
        "model.output_attn_res_norm.weight",
    ]


def test_the_names_of_flash_linear_attention(llama: tuple[SiteLayout, ...]) -> None:
    assert [site.tensors["query"] for site in unused_names(llama, FULL, "fla") + site_names(llama, FULL, "fla")] == [
        "model.layers.0.attn_res_proj.weight",
        "model.layers.0.mlp_res_proj.weight",
        "model.layers.1.attn_res_proj.weight",
        "model.layers.1.mlp_res_proj.weight",
        "model.res_proj.weight",
    ]
    assert all(site.column for site in site_names(llama, FULL, "fla"))


def test_layers_may_be_called_otherwise_and_hold_more_than_a_norm_deep() -> None:
    sites = layout(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=40)))
    assert [site.tensors["query"] for site in site_names(sites, FULL, "fla")][1:] == [
        "transformer.h.1.attn_res_proj.weight",
        "transformer.h.1.mlp_res_proj.weight",
        "transformer.res_proj.weight",
    ]
    bare = [SiteLayout(module, 8, 2, before, 4) for before, module in enumerate(("0.b.norm", "1.a.norm", "1.b.norm", "norm"), 1)]
    with pytest.raises(ac.ConfigError, match=r"'0\.b\.norm' reads the stream"):  # layers need a list that holds them
        site_names(bare, FULL, "fla")


@pytest.mark.parametrize(
    ("config", "naming", "entries"),
    [
        pytest.param(FULL, "fla", {"attnres_block_size": 1}, id="full"),
        pytest.param(FULL, "kimi-k3", {}, id="full has no whole layers in a block"),
        pytest.param(ac.AttnResConfig(block_size=2), "kimi-k3", {"attn_res_block_size": 1}, id="one layer"),
        pytest.param(ac.AttnResConfig(block_size=4), "kimi-k3", {"attn_res_block_size": 2}, id="two layers"),
        pytest.param(ac.AttnResConfig(block_size=4), "fla", {"attnres_block_size": 4}, id="four sublayers"),
        pytest.param(ac.AttnResConfig(block_size=3), "fla", {}, id="odd blocks"),
        pytest.param(FULL, "attnres", {}, id="own"),
    ],
)
def test_block_sizes_in_the_units_of_their_home(
    llama: tuple[SiteLayout, ...], config: ac.AttnResConfig, naming: str, entries: dict[str, int]
) -> None:
    assert foreign_entries(llama, config, naming) == entries


def test_parallel_sublayers_have_no_such_names() -> None:
    config = transformers.GPTJConfig(n_embd=32, n_head=2, n_layer=2, vocab_size=40, rotary_dim=8)
    sites = layout(transformers.GPTJForCausalLM(config))
    match = r"'transformer\.h\.1\.ln_1' reads the stream after 1 sublayers\. Use naming 'attnres'"
    with pytest.raises(ac.ConfigError, match=match):
        site_names(sites, FULL, "kimi-k3")


def test_two_chains_have_no_such_names() -> None:
    sites = layout(transformers.T5Model(transformers.T5Config(d_model=32, num_heads=2, num_layers=2, d_ff=32, vocab_size=40)))
    with pytest.raises(ac.ConfigError, match="Use naming 'attnres'"):
        site_names(sites, FULL, "fla")


def test_key_norms_are_needed_and_namings_are_listed(llama: tuple[SiteLayout, ...]) -> None:
    with pytest.raises(ac.ConfigError, match="key_norm=True"):
        site_names(llama, ac.AttnResConfig(key_norm=False), "fla")
    with pytest.raises(ac.ConfigError, match="attnres, kimi-k3, fla"):
        site_names(llama, FULL, "k3")
