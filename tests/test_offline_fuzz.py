"""Configurations that somebody edited or damaged: converted, reverted, renamed or loaded faithfully, or refused in one line."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import transformers
from folders import snapshot
from mutations import as_text, mutated_text, mutated_value

import attnres_compile as ac
from attnres_compile.checkpoint.offline import convert_checkpoint, revert_checkpoint

SECONDS = 60  # that a single case may take; capturing one takes half a second
CONFIG = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "converted"
    convert_checkpoint(plain, folder, ac.AttnResConfig(block_size=2))
    return folder


@pytest.fixture
def timed() -> Iterator[Callable[[], None]]:
    """A function to call before every case, which then may not take longer than it may."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"a case took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    yield lambda: signal.alarm(SECONDS) and None
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused_or_done(work: Callable[[], Any]) -> bool:
    """Whether ``work`` was refused as users are told about it."""
    try:
        work()
    except ac.AttnResError as error:
        assert str(error).isprintable() or not isinstance(error, ac.CheckpointError), repr(str(error))
        return True
    return False


def with_config(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)


@pytest.mark.parametrize("seed", range(4))
def test_what_config_json_says_of_attnres(converted: Path, tmp_path: Path, timed: Callable[[], None], seed: int) -> None:
    """Of 1,000 each, reverted; every fourth of those that are taken is loaded, too."""
    draw = random.Random(seed)
    source = shutil.copytree(converted, tmp_path / "source")
    config = json.loads((converted / "config.json").read_text())
    done = loaded = 0
    for case in range(250):
        timed()
        entry = mutated_value(config["attnres_config"], draw)
        with_config(source, as_text({**config, "attnres_config": entry}))
        before = snapshot(tmp_path)
        if refused_or_done(lambda: revert_checkpoint(source, tmp_path / "back", dry_run=True)):
            assert snapshot(tmp_path) == before, case
            continue
        done += 1
        if done % 4 == 0 and not refused_or_done(lambda: ac.from_pretrained(source)):
            loaded += 1
    assert (done > 0, loaded <= done) == (True, True)


@pytest.mark.parametrize("seed", range(2))
def test_what_config_json_says_of_the_model(plain: Path, tmp_path: Path, timed: Callable[[], None], seed: int) -> None:
    draw = random.Random(100 + seed)
    source = shutil.copytree(plain, tmp_path / "source")
    text = (plain / "config.json").read_bytes()
    refused = 0
    for case in range(100):
        timed()
        changed = mutated_text(text, draw) if case % 2 else as_text(mutated_value(json.loads(text), draw))
        with_config(source, changed)
        before = snapshot(tmp_path)
        refused += refused_or_done(lambda: convert_checkpoint(source, tmp_path / "out", dry_run=True))
        assert snapshot(tmp_path) == before, case
    assert 10 < refused < 100
