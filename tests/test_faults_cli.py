"""The command line: garbage in every option, files that can't be written, full disks, interrupts."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from interrupted import FULL_DISK, Outcome, run_alone
from typer.testing import CliRunner

from attnres_compile.cli import app

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "kimi_k3_plan.json"
SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40,
    "max_position_embeddings": 16, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with weights."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(folder)
    return folder


def arguments_of(command: str, source: Path, tmp_path: Path) -> list[str]:
    return {
        "detect": ["detect", str(source)],
        "inspect": ["inspect", str(source), "--tokens", "4"],
        "compare": ["compare", str(source), str(source), "--tokens", "4"],
        "plan": ["plan", str(EXAMPLE)],
        "convert": ["convert", str(source), str(tmp_path / "dst"), "--dry-run"],
    }[command]


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Something that would run for ever fails instead."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------------------------------- garbage

NO_INTEGER = ["", "x", "1.5", "nan", "1e400", "ü☃", "None", "\x00", "--", "--json"]
NO_NAME = ["", "x", "-1", "nan", "ü☃", "None", "\x00", "BLOCK ", "../.."]
NO_AMOUNT = ["", "x", "nan", "-1", "-inf", "ü☃", "\x00"]
GARBAGE: dict[str, dict[str, list[str]]] = {
    "plan": {
        "--ranks": [*NO_INTEGER, "0", "-1", "99999999999999999999", "1000000000"],
        "--virtual": [*NO_INTEGER, "0", "-1", "99999999999999999999", "1000000000"],
        "--tokens": [*NO_INTEGER, "0", "-1"],
        "--dtype": NO_NAME,
        "--num-blocks": [*NO_INTEGER, "0", "-1", "99999999999999999999"],
        "--block-size": [*NO_INTEGER, "0", "-1", "99999999999999999999"],
        "--boundaries": ["", ",", "x", "-1", "1,", "1,1", "nan", "99999999999999999999", "ü☃", "\x00"],
        "--schedule": NO_NAME[1:],
        "--microbatches": [*NO_INTEGER, "0", "-1"],
        "--bandwidth": [*NO_AMOUNT, "0"],
        "--latency": [*NO_AMOUNT, "inf"],
        "--flops": [*NO_AMOUNT, "0", "inf"],
        "--plot": ["", "x", "/", "ü☃", "\x00.png", "x" * 300 + ".png"],
    },
    "convert": {
        "--variant": NO_NAME,
        "--num-blocks": [*NO_INTEGER, "0", "-1", "5", "99999999999999999999"],
        "--block-size": [*NO_INTEGER, "0", "-1", "5", "99999999999999999999"],
        "--scale": NO_NAME,
        "--dtype": [*NO_NAME, "int64"],
        "--naming": NO_NAME,
        "--model": ["", "x", ":", "x:", ":x", "os:path", "os:nothing", "no.such:thing", "ü☃:ü", "\x00:\x00", "os.path:join"],
        "--input": ["", "x", "int64", "int64[", "int64[-1]", "ü[1]", "\x00"],
    },
    "detect": {"": ["", "x", "/", "/dev/null", "ü☃", "\x00", "x" * 300]},
    "inspect": {
        "--tokens": [*NO_INTEGER, "0", "-1"],
        "--seed": [*NO_INTEGER, "-1", "99999999999999999999", "-99999999999999999999"],
        "--text": ["", "x", "/", "/dev/null", "\x00"],
        "--plot": ["", "x", "/", "\x00.png", "x" * 300 + ".png"],
    },
    "compare": {
        "--tokens": ["x", "0", "-1"],
        "--seed": ["x", "99999999999999999999", "-99999999999999999999"],
        "--text": ["", "x", "/", "/dev/null", "\x00"],
        "--html": ["", "/", "\x00.html", "x" * 300 + ".html", "/dev/null", "/dev/full"],
    },
}  # fmt: skip
RIGHT = {("inspect", "--seed", "-1")}


@pytest.mark.parametrize(("command", "option"), [(command, option) for command in GARBAGE for option in GARBAGE[command]])
def test_garbage_in_an_option_is_bad_input(command: str, option: str, source: Path, tmp_path: Path) -> None:
    """One line of ours, or the usage that typer prints, and nothing on stdout or on disk."""
    wrong: list[str] = []
    for value in GARBAGE[command][option]:
        base = arguments_of(command, source, tmp_path)
        arguments = [*base, option, value] if option else [command, value]
        with within(15):
            result = CliRunner().invoke(app, arguments)
        lines = result.stderr.splitlines()
        is_ours = len([line for line in lines if "Loading weights" not in line]) == 1 and "attnres: error: " in result.stderr
        is_right = (result.exit_code, result.stdout) == (2, "") and (is_ours or lines[0].startswith("Usage: "))
        if (command, option, value) in RIGHT:
            is_right = result.exit_code == 0
        if not is_right or "Traceback" in result.stderr:
            wrong.append(f"{value!r}: {result.exit_code} {result.exception!r} {lines[:3]}")
    assert wrong == []
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ files and disks

PICTURES = {"inspect": ("--plot", "picture.svg"), "compare": ("--html", "page.html"), "plan": ("--plot", "plan.png")}


def assert_one_line(outcome: Outcome, code: int, *words: str) -> None:
    assert outcome.code == code, outcome
    (line,) = (line for line in outcome.stderr.splitlines() if line.strip() and "Loading weights" not in line)
    assert line.startswith("attnres: ")
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("command", PICTURES)
def test_a_full_disk_leaves_what_was_there(command: str, is_there: bool, source: Path, tmp_path: Path) -> None:
    option, name = PICTURES[command]
    target = tmp_path / "pictures" / name
    target.parent.mkdir()
    if is_there:
        target.write_text("old")
    outcome = run_alone([*arguments_of(command, source, tmp_path), option, str(target)], FULL_DISK)
    assert_one_line(outcome, 2, name)
    assert [path.name for path in target.parent.iterdir()] == [name] * is_there
    assert not is_there or target.read_text() == "old"


@pytest.mark.parametrize("place", ["a file", "nowhere", "a directory", "/proc"])
@pytest.mark.parametrize("command", PICTURES)
def test_places_that_take_no_file(command: str, place: str, source: Path, tmp_path: Path) -> None:
    option, name = PICTURES[command]
    (tmp_path / "a file").touch()
    (tmp_path / "a directory" / name).mkdir(parents=True)
    target = Path(place) / name if place.startswith("/") else tmp_path / place / name
    result = CliRunner().invoke(app, [*arguments_of(command, source, tmp_path), option, str(target)])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = (line for line in result.stderr.splitlines() if line.strip() and "Loading weights" not in line)
    assert line.startswith("attnres: error: ")
    assert name in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["a file", "a directory", name])


@pytest.mark.parametrize("command", ["detect", "plan", "inspect"])
def test_results_that_can_not_be_printed(command: str, source: Path, tmp_path: Path) -> None:
    outcome = run_alone(arguments_of(command, source, tmp_path), stdout="/dev/full")
    assert outcome.code != 0
    assert "Traceback" not in outcome.stderr
    assert len([line for line in outcome.stderr.splitlines() if "Loading weights" not in line]) <= 1


# ------------------------------------------------------------------------------------------------------------ interrupts


@pytest.mark.parametrize("command", ["detect", "inspect", "compare", "plan"])
def test_an_interrupt_ends_the_command_quietly(command: str, source: Path, tmp_path: Path) -> None:
    place = {
        "detect": "attnres_compile:detect",
        "inspect": "attnres_compile.inspection.plots:overview",
        "compare": "attnres_compile.comparison.page:page",
        "plan": "attnres_compile.pipelining.preview:preview",
    }[command]
    arguments = arguments_of(command, source, tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    if command in PICTURES:
        option, file = PICTURES[command]
        arguments += [option, str(folder / file)]
    outcome = run_alone(arguments, place)
    assert outcome.code == 130
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert len([line for line in outcome.stderr.splitlines() if line.strip() and "Loading weights" not in line]) <= 1
    assert list(folder.iterdir()) == []
