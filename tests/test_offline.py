"""`attnres convert` on Transformers directories: what it adds, renames and takes out, and what it refuses."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

import attnres_compile as ac
from attnres_compile.cli import app

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3,
    "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def done(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def assert_one_line(result: Result, *words: str) -> None:
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("attnres: error: ")
    assert [word for word in words if word not in line] == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sharded Llama of six sublayers, with files beside its weights."""
    torch.manual_seed(0)
    folder = tmp_path / "source"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(folder, max_shard_size="30KB")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("# A model\n")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights")
    return folder


def added_to(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model-attnres.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def randomize(folder: Path) -> dict[str, Tensor]:
    """Train a converted directory, as it were: other values in its added tensors."""
    from safetensors.torch import save_file

    tensors = {name: torch.randn_like(tensor) for name, tensor in added_to(folder).items()}
    save_file(tensors, folder / "model-attnres.safetensors", {"format": "pt"})
    return tensors


def same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    equal, _, _ = filecmp.cmpfiles(first, second, names, shallow=False)
    return sorted(equal) == names == sorted(path.name for path in second.iterdir())


def test_what_is_added(source: Path, tmp_path: Path) -> None:
    facts = done(source, tmp_path / "out", "--num-blocks", "2", "--scale", "paper")
    tensors = added_to(tmp_path / "out")
    assert list(tensors) == sorted(f"attnres.sites.{i}.{kind}" for i in range(6) for kind in ("query", "key_norm"))
    assert all(torch.equal(tensors[f"attnres.sites.{i}.query"], torch.zeros(32)) for i in range(6))
    assert all(torch.equal(tensors[f"attnres.sites.{i}.key_norm"], torch.ones(32)) for i in range(6))
    index, before = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (tmp_path / "out", source))
    assert index["metadata"]["total_size"] == before["metadata"]["total_size"] + 12 * 32 * 4
    assert index["weight_map"] == before["weight_map"] | dict.fromkeys(tensors, "model-attnres.safetensors")
    entry = config_of(tmp_path / "out").pop("attnres_config")
    assert {key: entry[key] for key in ("format_version", "variant", "num_blocks", "block_size", "scale", "naming")} == {
        "format_version": 1, "variant": "block", "num_blocks": 2, "block_size": None, "scale": "paper", "naming": "attnres",
    }  # fmt: skip
    assert [site["num_sources"] for site in entry["sites"]] == [2, 2, 2, 3, 3, 3]
    assert (facts["action"], facts["tensors"], facts["nbytes"], facts["report"]["num_sites"]) == ("added", 12, 12 * 32 * 4, 6)
    assert facts["left_out"] == ["pytorch_model.bin"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"version": "1.0"}'


def test_text_says_what_was_rewritten_and_left_out(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "out", "--block-size", "4")
    assert result.exit_code == 0
    assert "12 tensors (1,536 bytes) added" in result.stdout
    assert "left out: pytorch_model.bin" in result.stdout
    assert "6 sublayers of width 32 in blocks 1 x 4, 1 x 2, 6 sites" in result.stdout


def test_a_dry_run_says_the_same_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    would = done(source, tmp_path / "out", "--dry-run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert would.pop("dry_run")
    did = done(source, tmp_path / "out")
    assert not did.pop("dry_run")
    for facts in (would, did):
        for entry in facts["report"]["passes"]:
            del entry["seconds"]
    assert would == did


def test_links_are_the_source_s_own_bytes(source: Path, tmp_path: Path) -> None:
    facts = done(source, tmp_path / "out", "--link")
    weights = sorted(path.name for path in source.glob("*.safetensors"))
    assert sorted(facts["linked"]) == weights
    assert [os.path.samefile(source / name, tmp_path / "out" / name) for name in weights] == [True] * len(weights)
    assert not os.path.samefile(source / "tokenizer.json", tmp_path / "out" / "tokenizer.json")
    shutil.rmtree(source)
    assert len(ac.from_pretrained(tmp_path / "out").attnres.sites) == 6


@pytest.mark.parametrize("naming", ["attnres", "kimi-k3", "fla"])
def test_there_and_back_is_where_it_began(source: Path, tmp_path: Path, naming: str) -> None:
    (source / "pytorch_model.bin").unlink()
    done(source, tmp_path / "out", "--naming", naming, "--block-size", "2")
    facts = done("--reverse", tmp_path / "out", tmp_path / "back")
    assert facts["lost"] == "all queries are zero: the model computes the same without AttnRes"
    assert same_files(source, tmp_path / "back")


def test_reverting_says_what_is_lost(source: Path, tmp_path: Path) -> None:
    done(source, tmp_path / "out", "--naming", "fla")
    randomize(tmp_path / "out")
    result = run("--reverse", tmp_path / "out", tmp_path / "back")
    assert "6 of 6 sites have queries that are not zero" in result.stdout
    done(source, tmp_path / "paper", "--scale", "paper")
    assert "outputs differ slightly" in run("--reverse", tmp_path / "paper", tmp_path / "back2").stdout


def test_reverting_what_a_model_saved_by_itself(source: Path, tmp_path: Path) -> None:
    """One file then holds both kinds of tensors; what is left is as large as before, and loads."""
    done(source, tmp_path / "out")
    ac.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").glob("*.safetensors")] == ["model.safetensors"]
    done("--reverse", tmp_path / "saved", tmp_path / "back")
    stock, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert (set(info["unexpected_keys"]), set(info["missing_keys"])) == (set(), set())
    before = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())


def test_reverting_where_stock_transformers_lost_the_tensors(source: Path, tmp_path: Path) -> None:
    done(source, tmp_path / "out")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "stock")
    facts = done("--reverse", tmp_path / "stock", tmp_path / "back")
    assert (facts["tensors"], facts["lost"].split(":")[0]) == (0, "the AttnRes tensors were lost before")
    assert "attnres_config" not in config_of(tmp_path / "back")


def test_renaming_keeps_the_values(source: Path, tmp_path: Path) -> None:
    done(source, tmp_path / "own", "--block-size", "2")
    trained = randomize(tmp_path / "own")
    facts = done(tmp_path / "own", tmp_path / "fla", "--naming", "fla")
    assert (facts["action"], facts["tensors"]) == ("renamed", 14)
    theirs = added_to(tmp_path / "fla")
    assert list(theirs["model.layers.0.attn_res_proj.weight"].shape) == [1, 32]
    assert torch.equal(theirs["model.layers.1.attn_res_proj.weight"][0], trained["attnres.sites.1.query"])
    assert torch.equal(theirs["model.res_norm.weight"], trained["attnres.sites.5.key_norm"])
    assert config_of(tmp_path / "fla")["attnres_block_size"] == 2
    done(tmp_path / "fla", tmp_path / "kimi", "--naming", "kimi-k3")
    assert (config_of(tmp_path / "kimi")["attn_res_block_size"], "attnres_block_size" in config_of(tmp_path / "kimi")) == (
        1,
        False,
    )
    done(tmp_path / "kimi", tmp_path / "again", "--naming", "attnres")
    again = added_to(tmp_path / "again")
    assert again.keys() == trained.keys()
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "own")


def test_renaming_what_a_model_saved_by_itself(source: Path, tmp_path: Path) -> None:
    done(source, tmp_path / "own")
    randomize(tmp_path / "own")
    model = ac.from_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "saved")
    done(tmp_path / "saved", tmp_path / "fla", "--naming", "fla")
    renamed = ac.from_pretrained(tmp_path / "fla")
    assert renamed.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in renamed.state_dict().items())
    assert not any(name.startswith("attnres") for name in load_file(tmp_path / "fla" / "model-00001-of-00001.safetensors"))


@pytest.mark.parametrize(("stored", "asked", "expected"), [("bfloat16", None, "bfloat16"), ("bfloat16", "float32", "float32")])
def test_dtypes(source: Path, tmp_path: Path, stored: str, asked: str | None, expected: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, stored))
    model.save_pretrained(tmp_path / "cast")
    done(tmp_path / "cast", tmp_path / "out", *(("--dtype", asked) if asked else ()))
    assert {tensor.dtype for tensor in added_to(tmp_path / "out").values()} == {getattr(torch, expected)}


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            pytest.param(["--num-blocks", "7"], ["num_blocks=7", "at most 6"], id="more blocks than sublayers"),
            pytest.param(["--num-blocks", "2", "--block-size", "2"], ["exclude each other"], id="both"),
            pytest.param(["--variant", "dense"], ["'dense'", "'full'"], id="variant"),
            pytest.param(["--scale", "2"], ["scale", "'paper'"], id="scale"),
            pytest.param(["--dtype", "fp8"], ["float32, bfloat16, float16"], id="dtype"),
            pytest.param(["--naming", "megatron"], ["attnres, kimi-k3, fla"], id="naming"),
            pytest.param(["--variant", "full", "--block-size", "3"], ["contradicts"], id="full has no blocks"),
        ],
    )
    def test_options(self, source: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
        assert_one_line(run(source, tmp_path / "out", *arguments), *words)
        assert not (tmp_path / "out").exists()

    def test_no_chain_is_exit_code_1(self, tmp_path: Path) -> None:
        config = transformers.BertConfig(**{key: SMALL[key] for key in SMALL if key != "num_key_value_heads"})
        transformers.BertModel(config).save_pretrained(tmp_path / "bert")
        result = run(tmp_path / "bert", tmp_path / "out")
        assert (result.exit_code, result.stdout) == (1, "")
        assert "no residual chain that can be rewritten" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_converting_twice(self, source: Path, tmp_path: Path) -> None:
        done(source, tmp_path / "once")
        assert_one_line(run(tmp_path / "once", tmp_path / "twice"), "converted before", "--reverse")
        assert_one_line(run(tmp_path / "once", tmp_path / "twice", "--naming", "fla", "--num-blocks", "2"), "--naming alone")
        assert_one_line(run("--reverse", source, tmp_path / "back"), "was not converted")

    def test_renaming_what_was_edited(self, source: Path, tmp_path: Path) -> None:
        done(source, tmp_path / "once", "--block-size", "2")
        config = config_of(tmp_path / "once")
        config["attnres_config"]["sites"][0]["module"] = "model.norm"
        (tmp_path / "once" / "config.json").write_text(json.dumps(config))
        assert_one_line(run(tmp_path / "once", tmp_path / "fla", "--naming", "fla"), "other sites", "'model.norm'")

    @pytest.mark.parametrize(
        ("prepare", "words"),
        [
            pytest.param(lambda out: out.mkdir(), ["exists already", "--overwrite"], id="a directory"),
            pytest.param(lambda out: out.write_text("text"), ["exists already"], id="a file"),
            pytest.param(lambda out: out.symlink_to("nowhere"), ["exists already"], id="a broken link"),
        ],
    )
    def test_what_exists(self, source: Path, tmp_path: Path, prepare: Callable[[Path], None], words: list[str]) -> None:
        prepare(tmp_path / "out")
        assert_one_line(run(source, tmp_path / "out"), *words)

    def test_overwriting_replaces_checkpoints_alone(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "diary.txt").write_text("mine")
        assert_one_line(run(source, tmp_path / "out", "--overwrite"), "no model directory")
        assert (tmp_path / "out" / "diary.txt").read_text() == "mine"
        done(source, tmp_path / "converted", "--variant", "full")
        done(source, tmp_path / "converted", "--num-blocks", "2", "--overwrite")
        assert config_of(tmp_path / "converted")["attnres_config"]["num_blocks"] == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "out", "source"]

    def test_a_source_that_is_no_model(self, tmp_path: Path) -> None:
        assert_one_line(run(tmp_path / "nowhere", tmp_path / "out"), "nowhere")
        assert_one_line(run(tmp_path, tmp_path / "out"), "config.json")

    def test_one_shard_is_cut(self, source: Path, tmp_path: Path) -> None:
        shard = sorted(source.glob("*.safetensors"))[1]
        os.truncate(shard, shard.stat().st_size - 1)
        assert_one_line(run(source, tmp_path / "out"), shard.name)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    def test_more_layers_than_could_be_built(self, source: Path, tmp_path: Path) -> None:
        done(source, tmp_path / "converted")
        for folder in (source, tmp_path / "converted"):
            (folder / "config.json").write_text(json.dumps(config_of(folder) | {"num_hidden_layers": 10**9}))
        assert_one_line(run(source, tmp_path / "out"), "1,000,000,000 layers", "tensors")
        with pytest.raises(ac.CheckpointError, match="1,000,000,000 layers"):
            ac.from_pretrained(tmp_path / "converted")

    def test_remote_code_needs_trust(self, source: Path, tmp_path: Path) -> None:
        config = config_of(source) | {"model_type": "ours", "auto_map": {"AutoConfig": "code.Config"}}
        (source / "config.json").write_text(json.dumps(config))
        assert_one_line(run(source, tmp_path / "out"), "--trust-remote-code")


def test_the_source_may_be_read_only(source: Path, tmp_path: Path) -> None:
    for path in (*source.iterdir(), source):
        path.chmod(stat.S_IRUSR | stat.S_IXUSR if path.is_dir() else stat.S_IRUSR)
    try:
        done(source, tmp_path / "out")
        assert len(ac.from_pretrained(tmp_path / "out").attnres.sites) == 6
    finally:
        source.chmod(0o700)
