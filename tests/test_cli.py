"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from commands import assert_one_line_on_stderr
from typer.testing import CliRunner, Result

import attnres_compile
from attnres_compile.cli import app

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def saved(config: transformers.PreTrainedConfig, folder: Path, architecture: str | None) -> Path:
    """``folder`` as a Transformers model directory without weights."""
    config.architectures = [architecture] if architecture else None
    config.save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(transformers.LlamaConfig(num_key_value_heads=2, **SMALL), tmp_path / "llama", "LlamaForCausalLM")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return saved(transformers.BertConfig(**SMALL), tmp_path / "bert", "BertModel")


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, attnres_compile.__version__)


def test_env_names_versions_and_the_backend() -> None:
    result = run("env")
    assert result.exit_code == 0
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert facts["attnres_compile"] == attnres_compile.__version__
    assert facts["transformers"] == transformers.__version__
    assert facts["backend"] == "attnres_compile.backend:attnres"


def test_env_as_json_has_the_same_facts() -> None:
    facts = json.loads(run("env", "--json").stdout)
    assert [line.split()[0] for line in run("env").stdout.splitlines()] == list(facts)


def test_detect_prints_the_chain_and_its_readers(llama: Path) -> None:
    result = run("detect", llama)
    assert result.exit_code == 0, result.stderr
    assert "prenorm" in result.stdout
    assert "model.layers.1.post_attention_layernorm" in result.stdout
    assert "model.norm" in result.stdout


def test_detect_as_json_is_the_report(llama: Path) -> None:
    result = run("detect", llama, "--json")
    assert result.exit_code == 0, result.stderr
    (chain,) = json.loads(result.stdout)["chains"]
    # Two layers of two sublayers; every read but the first has a site, and the final norm is the last of them.
    assert (chain["num_sublayers"], chain["num_sites"], chain["hidden_size"]) == (4, 4, 32)
    assert chain["sites"][-1]["module"] == "model.norm"


def test_detect_takes_a_config_file_too(llama: Path) -> None:
    by_file, by_folder = run("detect", llama / "config.json", "--json"), run("detect", llama, "--json")
    assert json.loads(by_file.stdout)["chains"] == json.loads(by_folder.stdout)["chains"]


@pytest.mark.parametrize("architecture", [None, "NoSuchModel", "pipeline"])
def test_detect_without_a_known_architecture_takes_the_class_of_the_model_type(tmp_path: Path, architecture: str | None) -> None:
    folder = saved(transformers.LlamaConfig(num_key_value_heads=2, **SMALL), tmp_path / "llama", architecture)
    result = run("detect", folder, "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["chains"]) == 1


def test_detect_exits_with_1_and_the_reasons_when_nothing_can_be_rewritten(bert: Path) -> None:
    result = run("detect", bert)
    assert result.exit_code == 1, result.stderr
    assert "Refused" in result.stdout
    assert "no residual chain of BertModel can be rewritten" in result.stderr


def test_detect_as_json_exits_with_1_as_well(bert: Path) -> None:
    result = run("detect", bert, "--json")
    assert result.exit_code == 1, result.stderr
    report = json.loads(result.stdout)
    assert report["chains"] == []
    assert report["refusals"]


def test_a_missing_path_is_one_line(tmp_path: Path) -> None:
    assert_one_line_on_stderr(run("detect", tmp_path / "nowhere"), "nowhere", "no such file or directory")


def test_a_folder_without_a_config_is_one_line(tmp_path: Path) -> None:
    assert_one_line_on_stderr(run("detect", tmp_path), "config.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("{", ["not JSON"], id="broken JSON"),
        pytest.param(b"\xff\xfe\x00", ["not JSON"], id="binary"),
        pytest.param("[]", ["model_type"], id="a list"),
        pytest.param("{}", ["model_type"], id="an empty object"),
        pytest.param('{"model_type": "no-such-model"}', ["no-such-model"], id="unknown model_type"),
        pytest.param('{"model_type": "llama", "hidden_size": "wide"}', ["hidden_size"], id="a field of the wrong type"),
        pytest.param('{"model_type": "llama", "hidden_act": "no-such-act"}', ["no-such-act"], id="a model that can't be built"),
    ],
)
def test_a_bad_config_is_one_line(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_one_line_on_stderr(run("detect", path), "config.json", *words)


def test_an_error_of_ours_is_one_line(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: object) -> None:
        raise attnres_compile.CaptureError("the graph breaks\nin two places")

    monkeypatch.setattr(attnres_compile, "detect", fail)
    assert_one_line_on_stderr(run("detect", llama), "the graph breaks in two places")


def test_without_transformers_the_way_to_install_it_is_one_line(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_one_line_on_stderr(run("detect", llama), 'pip install "attnres-compile[transformers]"')


def run_as_module(*arguments: str | Path, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m attnres_compile`` at the root of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | (variables or {})
    command = [sys.executable, "-m", "attnres_compile", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


REMOTE_CODE = """
import pathlib
import transformers

pathlib.Path({marker!r}).touch()

class Config(transformers.LlamaConfig):
    model_type = "ours"

class Model(transformers.LlamaForCausalLM):
    config_class = Config
"""


def test_code_of_a_model_directory_runs_only_when_trusted(llama: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (llama / "code_of_ours.py").write_text(REMOTE_CODE.format(marker=str(marker)))
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "ours", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "code_of_ours.Config", "AutoModelForCausalLM": "code_of_ours.Model"}
    (llama / "config.json").write_text(json.dumps(config))

    assert_one_line_on_stderr(run("detect", llama), "'ours'", "--trust-remote-code")
    assert not marker.exists()
    # Transformers copies the code into its cache, which is not to be the user's.
    trusted = run_as_module("detect", llama, "--json", "--trust-remote-code", variables={"HF_HOME": str(tmp_path / "cache")})
    assert trusted.returncode == 0, trusted.stderr
    assert marker.exists()
    assert len(json.loads(trusted.stdout)["chains"]) == 1


def test_as_a_module_at_the_root_of_a_checkout_it_does_the_same(llama: Path) -> None:
    done = run_as_module("detect", llama, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chains"] == json.loads(run("detect", llama, "--json").stdout)["chains"]


def test_a_process_adds_nothing_to_the_line_about_a_bad_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": -1}')
    done = run_as_module("detect", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == ["attnres"]
