"""Models outside Transformers: state dicts in files and in directories of torch.distributed.checkpoint."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import attnres_compile as ac
from attnres_compile.checkpoint.factory import build, guess_inputs, import_factory, parse_input
from attnres_compile.checkpoint.offline_states import convert_state, revert_state
from attnres_compile.cli import app

FORMATS = ["state.pt", "checkpoint.pt", "state.safetensors", "distributed"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Network(nn.Module):
    """``[B, 4]`` to ``[B, 3]``: six sublayers of width 16."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.inwards = nn.Linear(4, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(layers))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inwards(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(4))
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def with_inputs() -> tuple[nn.Module, tuple[Tensor]]:
    return Network(), (torch.zeros(2, 4),)


INPUTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}


def saved(model: nn.Module, path: Path) -> Path:
    """``model`` in the format that the name of ``path`` stands for."""
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path, {"format": "pt", "author": "somebody"})
    elif path.name == "distributed":
        dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=path, no_dist=True)
    else:
        whole = {"model": model.state_dict(), "optimizer": OPTIMIZER, "step": 3}
        torch.save(model.state_dict() if path.name == "state.pt" else whole, path)
    return path


def state_in(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The state dict as a user would load it, without us."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.is_dir():
        state = {"model": model.state_dict(), "step": 0}
        dcp.load(state, checkpoint_id=path, no_dist=True)
        assert state["step"] == 3
        return state["model"]
    content = torch.load(path, weights_only=True)
    return content.get("model", content)


@pytest.mark.parametrize("name", FORMATS)
def test_convert_load_and_revert(name: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "back").mkdir()
    model = Network()
    source, converted, back = saved(model, tmp_path / "source" / name), tmp_path / name, tmp_path / "back" / name
    report, done = convert_state(source, converted, ac.AttnResConfig(num_blocks=3), model=with_inputs)
    assert (report.num_sites, done.tensors, done.nbytes) == (6, 12, 12 * 16 * 4)

    loaded = ac.from_pretrained(converted, model=Network)
    assert loaded.attnres.config == ac.AttnResConfig(num_blocks=3)
    torch.testing.assert_close(ac.rewrite(loaded, args=(INPUTS,))(INPUTS), model(INPUTS), rtol=1e-5, atol=1e-6)
    # Without from_pretrained, as people load state dicts.
    other = Network()
    ac.convert_(other, ac.AttnResConfig(num_blocks=3), (INPUTS,))
    other.load_state_dict(state_in(converted, other))
    assert torch.equal(ac.rewrite(other, args=(INPUTS,))(INPUTS), ac.rewrite(loaded, args=(INPUTS,))(INPUTS))

    lost, done = revert_state(converted, back)
    assert lost == "all queries are zero: the model computes the same without AttnRes"
    assert done.tensors == 12
    plain = Network()
    plain.load_state_dict(state_in(back, plain))
    assert torch.equal(plain(INPUTS), model(INPUTS))


@pytest.mark.parametrize("name", ["state.pt", "checkpoint.pt"])
def test_a_state_dict_of_other_blocks_is_refused_by_load_state_dict(name: str, tmp_path: Path) -> None:
    saved(Network(), tmp_path / name)
    convert_state(tmp_path / name, tmp_path / "converted.pt", ac.AttnResConfig(num_blocks=3), model=with_inputs)
    other = Network()
    ac.convert_(other, ac.AttnResConfig(num_blocks=2), (INPUTS,))
    with pytest.raises(ac.ParameterMismatchError, match="first that differs is site 2"):
        other.load_state_dict(state_in(tmp_path / "converted.pt", other))


def test_everything_else_in_a_file_stays(tmp_path: Path) -> None:
    saved(Network(), tmp_path / "checkpoint.pt")
    convert_state(tmp_path / "checkpoint.pt", tmp_path / "converted.pt", model=with_inputs)
    content = torch.load(tmp_path / "converted.pt", weights_only=True)
    assert list(content) == ["model", "optimizer", "step"]
    assert (content["optimizer"], content["step"]) == (OPTIMIZER, 3)
    saved(Network(), tmp_path / "state.safetensors")
    convert_state(tmp_path / "state.safetensors", tmp_path / "converted.safetensors", model=with_inputs)
    revert_state(tmp_path / "converted.safetensors", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "state.safetensors").read_bytes()


def test_names_behind_a_wrapper_s_prefix(tmp_path: Path) -> None:
    torch.save({f"module.{name}": value for name, value in Network().state_dict().items()}, tmp_path / "ddp.pt")
    convert_state(tmp_path / "ddp.pt", tmp_path / "converted.pt", model=with_inputs)
    state = torch.load(tmp_path / "converted.pt", weights_only=True)
    assert "module.attnres.sites.5.key_norm" in state
    assert len(ac.from_pretrained(tmp_path / "converted.pt", model=Network).attnres.sites) == 6


def test_trained_queries_are_said_to_be_lost(tmp_path: Path) -> None:
    model = Network()
    ac.convert_(model, args=(INPUTS,))
    with torch.no_grad():
        model.attnres.sites[2].query[3] = -0.25
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    lost, _ = revert_state(tmp_path / "trained.pt", tmp_path / "back.pt", dry_run=True)
    assert lost.startswith("1 of 6 sites have queries that are not zero (the largest entry is 0.25)")
    assert not (tmp_path / "back.pt").exists()


class TestFactories:
    def test_found_by_name_in_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "models_of_mine.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(2, 2)\n")
        monkeypatch.chdir(tmp_path)
        model, args, kwargs = build(import_factory("models_of_mine:make"), "meta")
        assert (model.weight.device.type, model.training, args, kwargs) == ("meta", False, (), {})

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            pytest.param(None, "give --model", id="none"),
            pytest.param("models", "package.module:function", id="no function"),
            pytest.param("no_such_module:make", "ModuleNotFoundError", id="no module"),
            pytest.param("json:no_such_function", "AttributeError", id="no such function"),
            pytest.param("json:__name__", "is no function but str", id="no function at all"),
        ],
    )
    def test_names_of_nothing(self, name: str | None, message: str) -> None:
        with pytest.raises(ac.ConfigError, match=message):
            import_factory(name)

    @pytest.mark.parametrize("made", [None, (Network(), (), {}, 1), (1, 2), (Network(), (), 3)], ids=str)
    def test_what_is_no_model(self, made: Any) -> None:
        with pytest.raises(ac.ConfigError, match=r"must return a torch\.nn\.Module"):
            build(lambda: made)

    def test_one_that_fails(self) -> None:
        with pytest.raises(ac.ConfigError, match="ZeroDivisionError"):
            build(lambda: 1 / 0)

    def test_inputs_are_given_as_dtype_and_shape(self) -> None:
        value = parse_input("bfloat16[2, 4]")
        assert (value.dtype, tuple(value.shape), value.device.type) == (torch.bfloat16, (2, 4), "meta")
        assert tuple(parse_input("int64[]").shape) == ()
        for text in ("int64", "int65[1]", "int64[-1]", "tensor[1]", "[1]"):
            with pytest.raises(ac.ConfigError, match="is no input"):
                parse_input(text)

    def test_ids_are_guessed_for_what_embeds_them_and_nothing_else(self) -> None:
        (ids,) = guess_inputs(LanguageModel())
        assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (1, 8))
        with pytest.raises(ac.ConfigError, match="--input"):
            guess_inputs(Network())


class Attack:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


class TestRefused:
    @pytest.mark.parametrize("name", ["state.pt", "distributed"])
    def test_no_pickle_runs_code(self, name: str, tmp_path: Path) -> None:
        path = saved(Network(), tmp_path / name)
        victim = tmp_path / "written"
        (path / ".metadata" if path.is_dir() else path).write_bytes(pickle.dumps(Attack(victim)))
        with pytest.raises(ac.CheckpointError):
            convert_state(path, tmp_path / "converted", model=with_inputs)
        assert not victim.exists()
        assert not (tmp_path / "converted").exists()

    def test_data_files_outside_the_directory(self, tmp_path: Path) -> None:
        path = saved(Network(), tmp_path / "distributed")
        (path / "__0_0.distcp").rename(tmp_path / "__0_0.distcp")
        metadata = (path / ".metadata").read_bytes()
        # One more byte in a string of a pickle's protocol 4, whose length stands before it.
        (path / ".metadata").write_bytes(metadata.replace(b"\x0c__0_0.distcp", b"\x0f../__0_0.distcp"))
        with pytest.raises(ac.CheckpointError, match="lies outside the directory"):
            convert_state(path, tmp_path / "converted", model=with_inputs)
        assert not (tmp_path / "converted").exists()

    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("damage", ["empty", "half", "garbage"])
    def test_damaged_files(self, name: str, damage: str, tmp_path: Path) -> None:
        path = saved(Network(), tmp_path / name)
        file = path / ".metadata" if path.is_dir() else path
        content = file.read_bytes()
        damaged = {"empty": b"", "half": content[: len(content) // 2], "garbage": bytes(range(256)) * 9}
        file.write_bytes(damaged[damage])
        with pytest.raises(ac.CheckpointError) as caught:
            convert_state(path, tmp_path / "converted", model=with_inputs)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "converted").exists()

    @pytest.mark.parametrize("name", FORMATS)
    def test_another_model(self, name: str, tmp_path: Path) -> None:
        path = saved(Network(layers=5), tmp_path / name)
        with pytest.raises(ac.CheckpointError, match=r"lacks 6 of the 42 tensors of Network.*blocks\.5\.norm\.weight"):
            convert_state(path, tmp_path / "converted", model=with_inputs)

    @pytest.mark.parametrize("name", FORMATS)
    def test_converting_twice_and_reverting_nothing(self, name: str, tmp_path: Path) -> None:
        path = saved(Network(), tmp_path / name)
        with pytest.raises(ac.CheckpointError, match="was not converted"):
            revert_state(path, tmp_path / "back")
        with pytest.raises(ac.CheckpointError, match="was not converted"):
            ac.from_pretrained(path, model=Network)
        converted = tmp_path / f"converted-{name}"
        convert_state(path, converted, model=with_inputs)
        with pytest.raises(ac.CheckpointError, match="converted before"):
            convert_state(converted, tmp_path / "twice", model=with_inputs)

    def test_a_file_without_tensors(self, tmp_path: Path) -> None:
        torch.save({"step": 3}, tmp_path / "empty.pt")
        with pytest.raises(ac.CheckpointError, match="holds no state dict"):
            convert_state(tmp_path / "empty.pt", tmp_path / "converted.pt", model=with_inputs)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class TestCommand:
    @pytest.fixture(autouse=True)
    def models(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "of_tests.py").write_text(
            "import torch\n"
            "class Block(torch.nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.norm, self.out = torch.nn.RMSNorm(8), torch.nn.Linear(8, 8)\n"
            "    def forward(self, x):\n"
            "        return x + self.out(self.norm(x))\n"
            "def make():\n"
            "    return torch.nn.Sequential(*(Block() for _ in range(4)), torch.nn.RMSNorm(8))\n"
        )
        torch.manual_seed(0)
        torch.save(import_factory("of_tests:make")().state_dict(), "state.pt")

    def test_inputs_on_the_command_line(self) -> None:
        done = run("convert", "state.pt", "out.pt", "--model", "of_tests:make", "--input", "float32[2,8]", "--block-size", "2")
        assert done.exit_code == 0, done.stderr
        assert "4 sublayers of width 8 in blocks 2 x 2, 4 sites from 1.norm to 4" in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            pytest.param(("--model", "of_tests:make"), ["--input"], id="no inputs"),
            pytest.param((), ["--model"], id="no model"),
            pytest.param(("--model", "of_tests:make", "--link"), ["--link", "Transformers"], id="link"),
            pytest.param(("--model", "of_tests:make", "--naming", "fla"), ["--naming"], id="naming"),
            pytest.param(("--model", "of_tests:make", "--input", "float32"), ["float32[1,3,32,32]"], id="no shape"),
            pytest.param(("--model", "of_tests:make", "--dtype", "int8"), ["float32, bfloat16, float16"], id="dtype"),
        ],
    )
    def test_bad_options_are_one_line(self, arguments: tuple[str, ...], words: list[str]) -> None:
        done = run("convert", "state.pt", "out.pt", *arguments)
        assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.output
        assert [word for word in words if word not in done.stderr] == []
        assert not Path("out.pt").exists()

    def test_a_state_dict_of_ids_needs_no_inputs(self, tmp_path: Path) -> None:
        (tmp_path / "words.py").write_text(
            "from torch import nn\nfrom of_tests import Block\n"
            "def make():\n    return nn.Sequential(nn.Embedding(5, 8), *(Block() for _ in range(4)), nn.RMSNorm(8))\n"
        )
        torch.save(import_factory("words:make")().state_dict(), "words.pt")
        done = run("convert", "words.pt", "out.pt", "--model", "words:make", "--num-blocks", "2", "--json")
        assert done.exit_code == 0, done.stderr
        facts = json.loads(done.stdout)
        assert (facts["action"], facts["tensors"], facts["report"]["num_sites"]) == ("added", 8, 4)
        back = run("convert", "--reverse", "out.pt", "back.pt")
        assert "all queries are zero" in back.stdout
        before, after = torch.load("words.pt", weights_only=True), torch.load("back.pt", weights_only=True)
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
