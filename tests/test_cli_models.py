"""`attnres detect` on configs of many kinds: example inputs, nearest misses, the shape of its JSON, its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner, Result

from attnres_compile.cli import app


def detect(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["detect", str(folder), *options])


TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40}
VISION = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"image_size": 8, "patch_size": 4}
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 12, "vocab_size": 40,
    "decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
AUDIO = {key: value for key, value in TEXT.items() if key != "vocab_size"}
WAV2VEC2 = {**AUDIO, "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
LLAVA = {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": {**VISION, "model_type": "clip_vision_model"}}

# model_type -> config, and the sublayers of the chains that detect finds.
MODELS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "t5": (T5, [4, 6]),  # encoder and decoder
    "whisper": (WHISPER, [4, 6]),  # spectrogram and ids
    "vit": (VISION, [4]),
    "clip": ({"text_config": TEXT, "vision_config": VISION}, [4, 4]),  # two encoders, both of which must get inputs
    "llava": (LLAVA, [4]),  # its text model, since images stand among the text's tokens
    "wav2vec2": ({**WAV2VEC2, "do_stable_layer_norm": True}, [5]),  # a wave form; positions are a sublayer too
    "audio-spectrogram-transformer": ({**AUDIO, "num_mel_bins": 16, "max_length": 32}, [4]),
}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_bare_config_is_enough(model_type: str, tmp_path: Path) -> None:
    config, expected = MODELS[model_type]
    transformers.CONFIG_MAPPING[model_type](**config).save_pretrained(tmp_path)
    result = detect(tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert sorted(chain["num_sublayers"] for chain in json.loads(result.stdout)["chains"]) == expected


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    transformers.BertConfig(**TEXT).save_pretrained(tmp_path)
    return tmp_path


def test_the_nearest_misses_are_printed_with_reason_module_and_source_line(bert: Path) -> None:
    result = detect(bert)
    assert result.exit_code == 1
    heading, *misses = result.stderr.splitlines()
    assert heading.endswith("can be rewritten; the nearest misses:")
    assert 1 <= len(misses) <= 3
    assert misses[0].startswith("  - post-norm: ")
    assert "module 'bert.encoder.layer.0.attention.output.LayerNorm'" in misses[0]
    assert "modeling_bert.py:" in misses[0]


def test_the_nearest_misses_are_in_the_json(bert: Path) -> None:
    result = detect(bert, "--json")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    miss = json.loads(result.stdout)["near_misses"][0]
    assert miss["reason"].startswith("post-norm: ")
    assert miss["module"] == "bert.encoder.layer.0.attention.output.LayerNorm"
    assert "modeling_bert.py:" in miss["source_line"]


# Fields may be added; those that are here stay, with their types. A list holds the types that its items may have.
REFUSAL = {"subject": str, "reason": str, "node": str, "module": str, "source_line": str, "size": int}
SITE = {
    "index": int, "module": str, "modules": [str], "source_line": str, "hidden_size": int, "before": int,
    "eps": (float, type(None)), "num_sources": (int, type(None)),
}  # fmt: skip
CHAIN = {
    "kind": str, "num_sublayers": int, "num_sites": int, "hidden_size": int, "sites": [SITE],
    "block_sizes": (list, type(None)),
}  # fmt: skip
REPORT = {
    "chains": [CHAIN], "refusals": [REFUSAL], "near_misses": [REFUSAL],
    "passes": [{"name": str, "changes": int, "seconds": float}], "config": (dict, type(None)), "num_sites": int,
    "num_added_parameters": int,
}  # fmt: skip


def assert_fits(value: Any, schema: Any, place: str = "report") -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict), place
        assert set(schema) <= set(value), place
        for key, inner in schema.items():
            assert_fits(value[key], inner, f"{place}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), place
        for i, item in enumerate(value):
            assert_fits(item, schema[0], f"{place}[{i}]")
    else:
        assert isinstance(value, schema), place


def test_the_json_keeps_its_schema(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(**TEXT).save_pretrained(folder)
    for path, is_found in ((bert, False), (folder, True)):
        report = json.loads(detect(path, "--json").stdout)
        assert_fits(report, REPORT)
        assert (bool(report["chains"]), bool(report["near_misses"])) == (is_found, not is_found)


LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16",
}  # fmt: skip
# Linux counts the memory of waited-for children in kilobytes, macOS in bytes.
PEAK = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-P", "-m", "attnres_compile", "detect", sys.argv[1], "--json"], capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.stdout.write(done.stdout.decode())
"""


def test_a_model_of_70_billion_parameters_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_70B))
    done = subprocess.run([sys.executable, "-P", "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=600)
    peak, _, report = done.stdout.partition("\n")
    (chain,) = json.loads(report)["chains"]
    assert (chain["num_sublayers"], chain["num_sites"]) == (160, 160)
    assert int(peak) < 1.5e9
