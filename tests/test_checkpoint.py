"""Converting a model directory and taking that back: files, figures, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import CONFIG, names_in, new_tensors, sharded, single, snapshot, tensors, write_json
from safetensors.torch import load_file, save_file

from attnres_compile.checkpoint import folders
from attnres_compile.checkpoint.copying import write_shard
from attnres_compile.checkpoint.folders import ADDED, ONLY_SHARD, Conversion, NewTensors, write_converted, write_reverted
from attnres_compile.checkpoint.shards import ModelFolder, read_folder, read_shard
from attnres_compile.errors import CheckpointError

INDEX = "model.safetensors.index.json"
BYTES = 64  # of new_tensors()


@pytest.fixture(params=[single, sharded])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with one weights file, and one with three."""
    return request.param(tmp_path / "src")


def convert(source: Path, destination: Path, **options: bool) -> Conversion:
    return write_converted(read_folder(source), new_tensors(), destination, **options)


def revert(source: Path, destination: Path, **options: bool) -> Conversion:
    new = new_tensors()
    return write_reverted(read_folder(source), new.tensors, new.config, destination, **options)


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


def refused(action: Callable[[], object], parent: Path, *words: str) -> None:
    before = snapshot(parent)
    with pytest.raises(CheckpointError) as caught:
        action()
    assert str(caught.value).isprintable()
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert snapshot(parent) == before


def test_converting_shards_adds_one(tmp_path: Path) -> None:
    source = sharded(tmp_path / "src")
    before = snapshot(source)
    convert(source, tmp_path / "dst")
    after = snapshot(tmp_path / "dst")
    assert after.keys() - before.keys() == {ADDED}
    assert {name for name in before if after[name] != before[name]} == {"config.json", INDEX}
    assert snapshot(source) == before
    assert names_in(tmp_path) == ["dst", "src"]


def test_converting_one_file_renames_it(tmp_path: Path) -> None:
    source = single(tmp_path / "src")
    done = convert(source, tmp_path / "dst")
    before, after = snapshot(source), snapshot(tmp_path / "dst")
    assert after.keys() - before.keys() == {ADDED, ONLY_SHARD, INDEX}
    assert before.keys() - after.keys() == {"model.safetensors"}
    assert after[ONLY_SHARD] == before["model.safetensors"]
    assert list(index_of(tmp_path / "dst")["weight_map"].values()) == [ONLY_SHARD] * 4 + [ADDED] * 4
    assert index_of(tmp_path / "dst")["metadata"] == {"total_size": 4 * 64 + BYTES}
    assert done.notes == (f"model.safetensors is now called {ONLY_SHARD}, as it has an index",)


def test_the_index_keeps_what_it_had_and_grows(tmp_path: Path) -> None:
    source = sharded(tmp_path / "src")
    index = index_of(source)
    index = {
        "format": "x",
        "metadata": {"mine": 1, **index["metadata"]},
        "weight_map": dict(reversed(index["weight_map"].items())),
    }
    write_json(source / INDEX, index)
    convert(source, tmp_path / "dst")
    converted = index_of(tmp_path / "dst")
    assert list(converted) == ["format", "metadata", "weight_map"]
    assert converted["metadata"] == {"mine": 1, "total_parameters": 192 + 32, "total_size": 384 + BYTES}
    assert list(converted["weight_map"]) == [*index["weight_map"], *new_tensors().tensors]
    assert [converted["weight_map"][name] for name in new_tensors().tensors] == [ADDED] * 4


def test_the_new_shard_holds_the_new_tensors(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "dst")
    found = load_file(tmp_path / "dst" / ADDED)
    assert found.keys() == new_tensors().tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in new_tensors().tensors.items())
    assert read_shard(tmp_path / "dst" / ADDED).metadata == {"format": "pt"}


def test_config_is_kept_in_order_and_as_transformers_writes_it(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "dst")
    text = (tmp_path / "dst" / "config.json").read_text()
    assert text == json.dumps({**CONFIG, **new_tensors().config}, indent=2) + "\n"


def test_infinity_in_a_config_stays(tmp_path: Path) -> None:
    source = single(tmp_path / "src")
    write_json(source / "config.json", {"time_step_limit": [0.0, float("inf")], "name": "\ud800 é"})
    convert(source, tmp_path / "dst")
    assert read_folder(tmp_path / "dst").config["time_step_limit"] == [0.0, float("inf")]
    assert read_folder(tmp_path / "dst").config["name"] == "\ud800 é"


def test_converting_and_back_gives_the_same_directory(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "dst")
    done = revert(tmp_path / "dst", tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(source)
    assert (done.action, done.tensors, done.nbytes) == ("removed", 4, BYTES)


def test_any_number_of_shards_comes_back(tmp_path: Path) -> None:
    for count in (1, 2, 31):
        source = sharded(tmp_path / f"src{count}", shards=count)
        convert(source, tmp_path / f"dst{count}")
        revert(tmp_path / f"dst{count}", tmp_path / f"back{count}")
        before, after = snapshot(source), snapshot(tmp_path / f"back{count}")
        if count == 1:  # one shard needs no index
            before["model.safetensors"] = before.pop(ONLY_SHARD)
            del before[INDEX]
        assert after == before


def test_the_report_counts_files(source: Path, tmp_path: Path) -> None:
    (source / "pytorch_model.bin").write_text("x")
    shards = len(read_folder(source).shards)
    done = convert(source, tmp_path / "dst", link=True)
    facts = json.loads(json.dumps(done.to_dict()))
    assert (facts["source"], facts["destination"]) == (str(source), str(tmp_path / "dst"))
    assert (facts["action"], facts["tensors"], facts["nbytes"], facts["dry_run"]) == ("added", 4, BYTES, False)
    assert len(facts["linked"]) == shards
    assert facts["copied"] == ["code/modeling.py", "tokenizer.json"]
    assert facts["written"] == ["config.json", INDEX, ADDED]
    assert facts["left_out"] == ["pytorch_model.bin"]
    assert f"4 tensors (64 bytes) added\nfiles: {shards} linked, 2 copied, 3 written, 1 left out\n" in str(done)
    assert "left out: pytorch_model.bin" in str(done)
    assert not (tmp_path / "dst" / "pytorch_model.bin").exists()


def test_a_dry_run_reports_the_same_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    planned = convert(source, tmp_path / "dst", dry_run=True)
    assert names_in(tmp_path) == ["src"]
    assert "would be added" in str(planned)
    done = convert(source, tmp_path / "dst")
    assert {**planned.to_dict(), "dry_run": False} == done.to_dict()
    planned = revert(tmp_path / "dst", tmp_path / "back", dry_run=True)
    assert "would be removed" in str(planned)
    refused(lambda: convert(source, tmp_path / "dst", dry_run=True), tmp_path, "exists already")


def test_links_share_weights_and_large_files_and_copy_small_ones(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "large.json").write_bytes(bytes(5000))
    monkeypatch.setattr(folders, "LINKED_FROM", 5000)
    done = convert(source, tmp_path / "dst", link=True)
    shared = {name for name in snapshot(tmp_path / "dst") if (tmp_path / "dst" / name).stat().st_nlink == 2}
    assert shared == set(done.linked) | {"code"}  # every directory has two names
    assert "large.json" in done.linked
    originals = {path.stat().st_ino for path in source.iterdir()}
    assert all((tmp_path / "dst" / name).stat().st_ino in originals for name in done.linked)
    revert(tmp_path / "dst", tmp_path / "back", link=True)
    assert snapshot(tmp_path / "back") == snapshot(source)
    assert (tmp_path / "back" / "large.json").samefile(source / "large.json")


def test_a_directory_of_links_becomes_one_of_files(tmp_path: Path) -> None:
    """As in a Hugging Face cache."""
    repository = tmp_path / "models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "blobs").mkdir()
    plain = sharded(tmp_path / "plain")
    source = Path(shutil.copytree(plain, repository / "snapshots" / "0123abc"))
    for i, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        path.rename(repository / "blobs" / str(i))
        path.symlink_to(os.path.relpath(repository / "blobs" / str(i), path.parent))
    convert(plain, tmp_path / "expected")
    for link in (False, True):
        convert(source, tmp_path / f"dst{link}", link=link)
        assert snapshot(tmp_path / f"dst{link}") == snapshot(tmp_path / "expected")


def test_linking_that_is_impossible_says_so_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    refused(lambda: convert(source, tmp_path / "dst", link=True), tmp_path, "Invalid cross-device link", "leave --link out")


# A shard that holds new tensors beside others, as save_pretrained writes it


@pytest.mark.parametrize("how", ["one file", "shards"])
def test_tensors_are_taken_out_of_a_shard_that_holds_others(how: str, tmp_path: Path) -> None:
    mixed = (single if how == "one file" else sharded)(tmp_path / "mixed")
    name = "model.safetensors" if how == "one file" else "model-00002-of-00003.safetensors"
    odd = {"odd": torch.arange(3, dtype=torch.uint8), "wide": torch.arange(5, dtype=torch.float64), "none": torch.zeros(0, 3)}
    kept = {**load_file(mixed / name), **odd}
    save_file({**kept, **new_tensors().tensors}, mixed / name, metadata={"format": "pt", "é": "\n"})
    write_json(mixed / "config.json", {**CONFIG, **new_tensors().config})
    if how == "shards":
        index = index_of(mixed)
        index["weight_map"] |= dict.fromkeys([*odd, *new_tensors().tensors], name)
        index["metadata"]["total_size"] += 43 + BYTES
        write_json(mixed / INDEX, index)
    done = revert(mixed, tmp_path / "dst", link=True)
    save_file(kept, tmp_path / "expected", metadata={"format": "pt", "é": "\n"})
    shard, expected = read_shard(tmp_path / "dst" / name), read_shard(tmp_path / "expected")
    places = [{name: info.start for name, info in each.tensors.items() if info.nbytes} for each in (shard, expected)]
    assert places[0] == places[1]
    assert shard.metadata == {"format": "pt", "é": "\n"}
    found = load_file(tmp_path / "dst" / name)
    assert all(torch.equal(found[key], tensor) for key, tensor in kept.items())
    assert name in done.written
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == CONFIG
    if how == "shards":
        assert index_of(tmp_path / "dst")["metadata"]["total_size"] == 384 + 43
        assert index_of(tmp_path / "dst")["metadata"]["total_parameters"] == 192 - 32
        assert index_of(tmp_path / "dst")["weight_map"].keys() == {*tensors(0, 6), *odd}


def test_tensors_are_added_to_a_file_and_taken_out_of_it_in_one_go(tmp_path: Path) -> None:
    old = {**tensors(0, 3), "odd": torch.arange(3, dtype=torch.uint8), "wide": torch.arange(5, dtype=torch.float64)}
    save_file(old, tmp_path / "old", metadata={"format": "pt"})
    kept = {name: tensor for name, tensor in old.items() if name != "model.layers.1.weight"}
    added = {"x": torch.arange(4, dtype=torch.float32), "odd": torch.ones(2), "y": torch.zeros(2, 3, dtype=torch.bfloat16)}
    removed = {"model.layers.1.weight", "odd"}
    write_shard(tmp_path / "new", read_shard(tmp_path / "old"), removed, added, {"a": "b"})
    found, expected = load_file(tmp_path / "new"), {**kept, **added}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    shard = read_shard(tmp_path / "new")
    assert shard.metadata == {"a": "b"}
    assert all((shard.header + info.start) % info.width == 0 for info in shard.tensors.values())


def test_what_is_left_is_aligned_even_in_files_sorted_by_name(tmp_path: Path) -> None:
    source = single(tmp_path / "src")
    entries = {"a": ("U8", [2], 0, 2), "b": ("U8", [2], 2, 4), "c": ("F32", [1], 4, 8), "d": ("I64", [1], 8, 16)}
    header = {name: {"dtype": d, "shape": s, "data_offsets": [i, j]} for name, (d, s, i, j) in entries.items()}
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(16)))
    write_reverted(read_folder(source), {"a"}, (), tmp_path / "dst")
    shard = read_shard(tmp_path / "dst" / "model.safetensors")
    assert {name: info.start for name, info in shard.tensors.items()} == {"d": 0, "c": 8, "b": 12}
    assert shard.header % 8 == 0
    data = (tmp_path / "dst" / "model.safetensors").read_bytes()[shard.header :]
    assert data == bytes([*range(8, 16), *range(4, 8), *range(2, 4)])


def test_a_large_shard_is_rewritten_in_little_memory(tmp_path: Path) -> None:
    source = single(tmp_path / "src")
    size = 2**31
    entries = {"attnres": ("U8", [8], 0, 8), "w": ("U8", [size], 8, 8 + size)}
    header = {name: {"dtype": d, "shape": s, "data_offsets": [i, j]} for name, (d, s, i, j) in entries.items()}
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(source / "model.safetensors", 16 + len(text) + size)
    with open(source / "model.safetensors", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"end")
    if (source / "model.safetensors").stat().st_blocks * 512 > 2**24:
        pytest.skip("the file system has no sparse files")
    script = """if True:
        import resource, sys
        from pathlib import Path
        from attnres_compile.checkpoint.folders import write_reverted
        from attnres_compile.checkpoint.shards import read_folder
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_reverted(read_folder(Path(sys.argv[1])), {"attnres"}, (), Path(sys.argv[2]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    output = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "dst"], capture_output=True, text=True, check=True
    ).stdout
    assert int(output) * (1 if sys.platform == "darwin" else 1024) < 2**26
    shard = read_shard(tmp_path / "dst" / "model.safetensors")
    assert (shard.nbytes, list(shard.tensors)) == (size, ["w"])
    with open(tmp_path / "dst" / "model.safetensors", "rb") as file:
        file.seek(-5, os.SEEK_END)
        assert file.read() == b"end\0\0"
    assert (tmp_path / "dst" / "model.safetensors").stat().st_blocks * 512 < 2**24  # holes stay holes


# Refusals


def test_what_was_converted_is_not_converted_again(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "once")
    refused(lambda: convert(tmp_path / "once", tmp_path / "dst"), tmp_path, "'attnres_config' already", "convert --reverse")
    other = NewTensors({"other": torch.zeros(1)}, {"other": 1})
    refused(lambda: write_converted(read_folder(tmp_path / "once"), other, tmp_path / "dst"), tmp_path, ADDED)
    same = NewTensors({"model.layers.0.weight": torch.zeros(1)}, {})
    refused(lambda: write_converted(read_folder(source), same, tmp_path / "dst"), tmp_path, "'model.layers.0.weight'")


def test_a_config_that_names_its_weights_is_refused(source: Path, tmp_path: Path) -> None:
    write_json(source / "config.json", {"transformers_weights": "model.safetensors"})
    refused(lambda: convert(source, tmp_path / "dst"), tmp_path, "transformers_weights", "remove that entry")


def test_deep_nesting_is_written_as_it_was_or_refused(tmp_path: Path) -> None:
    source, outcomes = single(tmp_path / "src"), set()
    for depth in (10, *range(sys.getrecursionlimit() - 200, sys.getrecursionlimit() + 20, 5), 10**5):
        text = '{"a": ' * depth + "1" + "}" * depth
        (source / "config.json").write_text(text)
        try:
            write_converted(read_folder(source), NewTensors({}, {}), tmp_path / "dst", overwrite=True)
            assert "".join((tmp_path / "dst" / "config.json").read_text().split()) == text.replace(" ", "")
            outcomes.add("written")
        except CheckpointError as error:
            assert "nested too deeply" in str(error)
            outcomes.add("refused")
    assert outcomes == {"written", "refused"}


def test_taking_out_what_is_not_there_or_all(source: Path, tmp_path: Path) -> None:
    folder = read_folder(source)
    refused(lambda: write_reverted(folder, {"x"}, (), tmp_path / "dst"), tmp_path, "no tensor 'x'")
    refused(lambda: write_reverted(folder, folder.tensors, (), tmp_path / "dst"), tmp_path, "nothing would be left")


def test_source_and_destination_must_be_apart(source: Path, tmp_path: Path) -> None:
    (tmp_path / "by name").symlink_to("src")
    write_json(tmp_path / "config.json", {})  # so that tmp_path itself looks like a model directory
    for options in ({}, {"overwrite": True}, {"overwrite": True, "dry_run": True}, {"overwrite": True, "link": True}):
        for place in (source, source / "code", source / "dst", tmp_path, tmp_path / "by name", tmp_path / "by name" / "dst"):
            refused(lambda place=place, options=options: convert(source, place, **options), tmp_path, str(place))
    refused(lambda: convert(source, source / "dst"), tmp_path, "lies in the source")
    refused(lambda: convert(source, source, overwrite=True), tmp_path, "is the source itself")
    refused(lambda: convert(source, tmp_path, overwrite=True), tmp_path, "contains the source")


def test_a_destination_is_replaced_only_when_asked(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "dst")
    refused(lambda: convert(source, tmp_path / "dst"), tmp_path, "exists already", "--overwrite")
    (tmp_path / "dst" / "stale.txt").write_text("x")
    convert(source, tmp_path / "dst", overwrite=True)
    assert "stale.txt" not in snapshot(tmp_path / "dst")
    assert names_in(tmp_path) == ["dst", "src"]


def test_a_source_that_vanishes(source: Path, tmp_path: Path) -> None:
    folder = read_folder(source)
    folder.shards[0].path.unlink()
    for options in ({}, {"link": True}):
        refused(
            lambda options=options: write_converted(folder, new_tensors(), tmp_path / "dst", **options), tmp_path, "No such file"
        )


def test_a_source_that_changes_its_size(source: Path, tmp_path: Path) -> None:
    folder = read_folder(source)
    os.truncate(folder.shards[0].path, 100)
    names = set(list(folder.shards[0].tensors)[:1])
    refused(lambda: write_reverted(folder, names, (), tmp_path / "dst"), tmp_path, folder.shards[0].path.name)


@pytest.mark.parametrize("kind", ["nothing", "file", "pipe"])
def test_a_tokenizer_that_is_something_else_by_now(kind: str, tmp_path: Path) -> None:
    source = single(tmp_path / "src")
    folder = read_folder(source)
    (source / "tokenizer.json").unlink()
    if kind == "pipe":
        os.mkfifo(source / "tokenizer.json")
    if kind == "file":
        (source / "tokenizer.json").write_text("x")
        write_converted(folder, new_tensors(), tmp_path / "dst")
        assert (tmp_path / "dst" / "tokenizer.json").read_text() == "x"
    else:
        refused(lambda: write_converted(folder, new_tensors(), tmp_path / "dst"), tmp_path, "tokenizer.json")


# What Transformers makes of it


def test_transformers_loads_what_was_converted_and_what_was_taken_back(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(12).reshape(2, 6)
    expected = model(ids).logits
    for size in ("1GB", "10KB"):
        source = tmp_path / size
        model.save_pretrained(source, max_shard_size=size)
        assert (source / INDEX).exists() == (size == "10KB")
        convert(source, tmp_path / f"{size} dst")
        revert(tmp_path / f"{size} dst", tmp_path / f"{size} back")
        assert snapshot(tmp_path / f"{size} back") == snapshot(source)
        for folder in (tmp_path / f"{size} dst", tmp_path / f"{size} back"):
            loaded, facts = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert torch.equal(loaded.eval()(ids).logits, expected)
            assert not facts["missing_keys"]
            assert set(facts["unexpected_keys"]) == (set(new_tensors().tensors) if folder.name.endswith("dst") else set())


# What is shown meanwhile

SLOW = """if True:
    import sys, time
    from pathlib import Path
    from attnres_compile.checkpoint import folders, progress
    from attnres_compile.checkpoint.shards import read_folder
    progress.SHOWN_AFTER = float(sys.argv[3])
    place = folders.place
    folders.place = lambda *arguments: (time.sleep(0.1), place(*arguments))
    folder = read_folder(Path(sys.argv[1]))
    folders.write_reverted(folder, ["model.layers.0.weight"], [], Path(sys.argv[2]))
"""


def shown(source: Path, destination: Path, after: float) -> tuple[str, str]:
    """What a conversion that takes half a second writes to stdout and to a terminal on stderr."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    command = [sys.executable, "-c", SLOW, source, destination, str(after)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, text=True, env=environment) as process:
        os.close(slave)
        written = b""
        while True:
            try:
                part = os.read(master, 1000)
            except OSError:  # how Linux says that the other side is closed
                part = b""
            if not part:
                break
            written += part
        assert process.stdout is not None
        output = process.stdout.read()
    os.close(master)
    assert process.returncode == 0
    return output, written.decode()


def test_a_bar_appears_on_a_terminal_when_it_takes_long(tmp_path: Path) -> None:
    source = sharded(tmp_path / "src", width=1000)
    output, terminal = shown(source, tmp_path / "slow", after=0.0)
    assert output == ""
    assert "slow" in terminal
    assert "kB" in terminal
    assert shown(source, tmp_path / "quick", after=1000.0) == ("", "")


def test_without_a_terminal_nothing_is_printed(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, source, tmp_path / "dst", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FORCE_COLOR": "1"}, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_plain_values_are_enough(tmp_path: Path) -> None:
    """A folder that was never read from disk is only named: what is written depends on nothing else."""
    source = single(tmp_path / "src")
    folder = read_folder(source)
    copy = ModelFolder(folder.path, {"b": 1, "a": 2}, folder.shards, None, (), ())
    shared = torch.zeros(8).expand(4, 8)  # of memory that tensors share
    write_converted(copy, NewTensors({"x": shared, "y": shared[0]}, {"c": 3}), tmp_path / "dst")
    assert names_in(tmp_path / "dst") == ["config.json", ONLY_SHARD, ADDED, INDEX]
    assert (tmp_path / "dst" / "config.json").read_text() == '{\n  "b": 1,\n  "a": 2,\n  "c": 3\n}\n'
    assert load_file(tmp_path / "dst" / ADDED)["x"].shape == (4, 8)
