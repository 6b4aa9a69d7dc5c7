"""``attnres plan``: what it prints where, its files, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import assert_one_line_on_stderr
from typer.testing import CliRunner, Result

from attnres_compile.cli import app


def run(*arguments: str | Path | int | float) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.fixture
def k3(repository: Path) -> Path:
    return repository / "examples" / "kimi_k3_plan.json"


def test_kimi_k3_by_default(k3: Path) -> None:
    result = run(k3)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Kimi K3 on 8 ranks x 4 stages: 186 sublayers, 4 to 6 per stage, 8 blocks of up to 24 sublayers")
    assert "forward, all hops: 18.16 GiB naive, 8.859 GiB cached, 2.05x less" in lines
    assert "peak hop: 1008 MiB naive, 336 MiB cached, 3.00x less" in lines
    assert "peak of a rank's cache with one microbatch in flight: 672 MiB, on ranks 4, 5, 6, 7" in lines
    assert "one step simulated: Interleaved1F1B, 8 ranks, 16 microbatches, 50 GB/s and 10 us per link" in lines
    assert max(map(len, lines)) <= 140


def test_json_has_the_plan_and_the_step(k3: Path) -> None:
    result = run(
        k3, "--ranks", 16, "--virtual", 2, "--schedule", "LoopedBFS", "--microbatches", 4, "--bandwidth", "inf", "--json"
    )
    found = json.loads(result.stdout)
    assert (found["name"], list(found)) == ("Kimi K3", ["name", "plan", "step"])
    assert (found["plan"]["ranks"], found["plan"]["virtual"], len(found["plan"]["hops"])) == (16, 2, 31)
    step = found["step"]
    assert (step["schedule"], step["microbatches"], step["bandwidth"], step["latency"]) == ("LoopedBFS", 4, None, 1e-5)
    assert step["naive"]["nbytes"] == 4 * found["plan"]["nbytes"]["naive"]
    assert step["cached"]["nbytes"] == 4 * found["plan"]["nbytes"]["cached"]
    assert len(step["cached"]["bubbles"]) == len(step["cached"]["peak_cache_nbytes"]) == 16


def test_options_reach_the_plan(k3: Path) -> None:
    options = ("--ranks", 2, "--virtual", 2, "--tokens", 10, "--dtype", "fp32", "--block-size", 50, "--boundaries", "7, 50,90")
    plan = json.loads(run(k3, *options, "--json").stdout)["plan"]
    assert plan["boundaries"] == [0, 7, 50, 90, 186]
    assert plan["block_sizes"] == [50, 50, 50, 36]
    assert [(value["label"], value["producer"]) for value in plan["values"]] == [("b0", 0), ("p0", 0), ("b1", 1), ("p2", 2)]
    assert {(tuple(value["shape"]), value["dtype"]) for value in plan["values"]} == {((10, 7168), "float32")}


def test_times_follow_flops_bandwidth_and_latency(k3: Path) -> None:
    """Two stages of 93 sublayers with 6 * 7168^2 parameters each; two microbatches go one way, and their gradients the other."""
    options = ("--ranks", 2, "--virtual", 1, "--microbatches", 2, "--boundaries", 93, "--flops", 100, "--json")
    step = json.loads(run(k3, *options, "--bandwidth", 10, "--latency", 1e6).stdout)["step"]
    forward = 93 * 2 * 8192 * 6 * 7168**2 / 1e14
    assert step["schedule"] == "1F1B"
    assert step["cached"]["free_seconds"] == pytest.approx(3 * 3 * forward)
    transfer = 1 + 5 * 8192 * 7168 * 2 / 1e10  # b0 to b3 and a partial sum
    assert step["cached"]["busiest_link_seconds"] == pytest.approx(2 * transfer)


def test_v_schedules_fold_the_stages(k3: Path) -> None:
    found = json.loads(run(k3, "--ranks", 4, "--virtual", 2, "--schedule", "ZBVZeroBubble", "--json").stdout)
    assert found["plan"]["placement"] == [0, 1, 2, 3, 3, 2, 1, 0]


def test_a_sweep_goes_as_far_as_there_are_sublayers(k3: Path) -> None:
    result = run(k3, "--sweep")
    assert result.exit_code == 0
    assert "over numbers of ranks: Interleaved1F1B, 4 stages per rank, 16 microbatches" in result.stdout
    assert "left out: 64 ranks: Kimi K3 has 186 sublayers, too few for 256 stages" in result.stdout
    swept = json.loads(run(k3, "--sweep", "--json").stdout)["sweep"]
    assert [step["ranks"] for step in swept["steps"]] == [2, 4, 8, 16, 32]
    for step in swept["steps"]:
        assert step["cached"]["overhead"] < step["naive"]["overhead"]
        assert step["cached"]["bubble"] < step["naive"]["bubble"]


def test_a_transformers_configuration(tmp_path: Path) -> None:
    """The graph itself is cut: embedding and head count, and a partial sum crosses where the user cuts a block."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 16, "hidden_size": 64,
        "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--ranks", 4, "--virtual", 2, "--tokens", 64)
    first = run(tmp_path, *options).stdout.splitlines()[0]
    assert first == (
        "LlamaForCausalLM on 4 ranks x 2 stages: 32 sublayers, 4 per stage, 8 blocks of up to 4 sublayers, cached transport"
    )
    cuts = "2,model.layers.2,8,12,16,20,model.layers.12"
    found = json.loads(run(tmp_path / "config.json", *options, "--num-blocks", 2, "--boundaries", cuts, "--json").stdout)["plan"]
    assert (found["boundaries"], found["block_sizes"]) == ([0, 2, 4, 8, 12, 16, 20, 24, 32], [16, 16])
    assert [hop["naive"] for hop in found["hops"]] == [
        ["b0", "p0"], ["b0", "p1"], ["b0", "p2"], ["b0", "p3"], ["b0", "b1"], ["b0", "b1", "p5"], ["b0", "b1", "p6"]
    ]  # fmt: skip
    layer = 4 * 64**2 + 3 * 64 * 96 + 6 * 64  # two norms, two queries and two key norms
    # In stage 7 the head and the final norm's site come on top.
    assert [cost["parameter_bytes"] for cost in found["costs"]][3::4] == [2 * 2 * layer, 2 * (4 * layer + 256 * 64 + 3 * 64)]


def test_weights_that_are_tied_across_stages_are_noted(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 4,
        "n_embd": 32,
        "n_head": 2,
        "vocab_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run(tmp_path, "--ranks", 2, "--virtual", 1, "--tokens", 8)
    assert result.exit_code == 0, result.stderr
    assert "transformer.wte.weight is read in stages 0, 1" in result.stdout


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_picture_is_written(k3: Path, tmp_path: Path, suffix: str, begins: bytes) -> None:
    path = tmp_path / f"plan{suffix}"
    path.write_text("old")
    result = run(k3, "--ranks", 2, "--virtual", 2, "--microbatches", 2, "--plot", path)
    assert result.exit_code == 0, result.stderr
    assert path.read_bytes().startswith(begins)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ranks", "0"), ("ranks", "above zero")),
        (("--ranks", "64"), ("186 sublayers", "256 stages")),
        (("--dtype", "int4"), ("int4", "bfloat16")),
        (("--tokens", "-1"), ("tokens",)),
        (("--schedule", "none"), ("none", "Interleaved1F1B")),
        (("--virtual", "1", "--schedule", "LoopedBFS"), ("virtual can't be 1",)),
        (("--virtual", "4", "--schedule", "DualPipeV"), ("virtual must be 2",)),
        (("--virtual", "1", "--microbatches", "4"), ("1F1B can't run 4 microbatches on 8 ranks",)),
        (("--boundaries", "6;12"), ("1 boundaries make 2 stages",)),
        (("--boundaries", ""), ("0 boundaries make 1 stages",)),
        (("--boundaries", "6,12"), ("2 boundaries make 3 stages",)),
        (("--num-blocks", "2", "--block-size", "2"), ("exclude each other",)),
        (("--block-size", "187"), ("187", "186 sublayers")),
        (("--bandwidth", "0"), ("bandwidth",)),
        (("--latency", "-1"), ("latency",)),
        (("--flops", "nan"), ("FLOPs per second",)),
        (("--flops", "inf"), ("forward times",)),
        (("--bandwidth", "1e-320"), ("bandwidth",)),
        (("--plot", "plan.pdf"), ("plan.pdf", ".png, .svg")),
    ],
)
def test_bad_options_end_in_one_line(k3: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_line_on_stderr(run(k3, *options), *words)


def test_bad_sources_end_in_one_line(tmp_path: Path) -> None:
    assert_one_line_on_stderr(run(tmp_path / "nothing"), "nothing")
    assert_one_line_on_stderr(run(tmp_path), "config.json")
    (tmp_path / "shape.json").write_text('{"num_layers": 4}')
    assert_one_line_on_stderr(run(tmp_path / "shape.json"), "shape.json", "name")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert_one_line_on_stderr(run(tmp_path), "24 places where a stage may begin", "32 stages")
    assert_one_line_on_stderr(run(tmp_path, "--virtual", 1, "--boundaries", "1,2,3,4,5,6,vit.nothing"), "vit.nothing")


def test_a_bad_option_leaves_the_picture_alone(k3: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    path.write_text("old")
    assert_one_line_on_stderr(run(k3, "--ranks", "0", "--plot", path))
    assert path.read_text() == "old"


def test_without_matplotlib_only_pictures_fail(k3: Path, tmp_path: Path) -> None:
    code = """
import sys
sys.modules["matplotlib"] = None
from typer.testing import CliRunner
from attnres_compile.cli import app
for options in ([], ["--plot", sys.argv[2]]):
    result = CliRunner().invoke(app, ["plan", sys.argv[1], *options])
    print(result.exit_code, len(result.stdout.splitlines()) > 1, result.stderr)
"""
    command = [sys.executable, "-c", code, k3, tmp_path / "plan.png"]
    plain, picture, *rest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert plain == "0 True "
    assert picture.startswith("2 False attnres: error: matplotlib can't be imported")
    assert 'pip install "attnres-compile[plots]"' in picture
    assert rest == [""]
