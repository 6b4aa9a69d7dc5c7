"""Garbage for options of ``torch.compile`` and of AttnResConfig, and state dicts that lack parts of AttnRes or have more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_nets import BATCH, Net, assert_untouched, assert_whole, converted, eager, expected_of

import attnres_compile as ac

VALUES: list[Any] = [
    "", "x", "ü☃", b"block", -1, 0, 1.5, 2.0, float("nan"), float("inf"), -float("inf"), [], [1], {}, (), object(), Net,
    torch.ones(2), torch.ones(()), np.ones(2), np.float64(0.5), np.int64(2), True, 10**30, 1j, ...,
]  # fmt: skip
OPTIONS = ["variant", "num_blocks", "block_size", "scale", "key_norm", "eps"]


def is_right(option: str, value: Any) -> bool:
    """Whether a value is one that the option takes, or a number of numpy's that is as good."""
    if option == "eps":
        return type(value) in (int, float, np.float64) and 0 <= value < 1
    if option == "key_norm":
        return value is True
    return option in ("num_blocks", "block_size") and type(value) is int and value > 0


@pytest.mark.parametrize("option", OPTIONS)
def test_garbage_in_a_config_is_named(option: str) -> None:
    for value in VALUES:
        if is_right(option, value):
            ac.AttnResConfig(**{option: value})
            continue
        with pytest.raises(ac.ConfigError, match=option):
            ac.AttnResConfig(**{option: value})
        if type(value) in (str, int, float, bool, list, dict):
            with pytest.raises(ac.ConfigError, match=option):
                ac.AttnResConfig.from_dict({**ac.AttnResConfig().to_dict(), option: value})


@pytest.mark.parametrize("option", OPTIONS)
def test_garbage_in_the_options_of_torch_compile_is_named(option: str) -> None:
    for value in ("x", -1, float("nan"), [], torch.ones(2), 10**30):
        model = Net()
        with pytest.raises(ac.ConfigError, match=option):
            torch.compile(model, backend=eager, options={option: value})(BATCH)
        assert_untouched(model)
        torch.compiler.reset()


@pytest.mark.parametrize("name", ["", "Variant", "ü☃", "num_blocks ", "mode", "triton.cudagraphs"])
def test_unknown_options_of_torch_compile_are_named(name: str) -> None:
    model = Net()
    with pytest.raises(ac.ConfigError, match=r"unknown option.*the options are: variant"):
        torch.compile(model, backend="attnres", options={name: 1})(BATCH)
    assert_untouched(model)


def test_the_largest_number_of_blocks_is_compared_with_the_sublayers() -> None:
    for option in ("num_blocks", "block_size"):
        with pytest.raises(ac.ConfigError, match=rf"{option}=1{'0' * 30}"):
            ac.convert_(Net(), ac.AttnResConfig(**{option: 10**30}), (BATCH,))


def test_options_that_contradict_each_other_through_torch_compile() -> None:
    with pytest.raises(ac.ConfigError, match="exclude each other"):
        torch.compile(Net(), backend=eager, options={"num_blocks": 2, "block_size": 2})(BATCH)


# ----------------------------------------------------------------------------------------------------------- state dicts


def changed(change: str) -> dict[str, Any]:
    """The state dict of another conversion, with one entry missing, too many, misnamed or misshapen."""
    state = converted(7).state_dict()
    name = "attnres.sites.1.query"
    if change == "missing":
        del state[name]
    elif change == "no AttnRes":
        for key in [key for key in state if key.startswith("attnres.")]:
            del state[key]
    elif change == "unexpected":
        state["attnres.sites.4.query"] = state[name]
    elif change == "misnamed":
        state["attnres.sites.1.pseudo_query"] = state.pop(name)
    elif change == "misshapen":
        state[name] = torch.ones(9)
    return state


@pytest.mark.parametrize("is_compiled", [False, True], ids=["before compiling", "between calls"])
@pytest.mark.parametrize("change", ["missing", "no AttnRes", "unexpected", "misnamed", "misshapen"])
def test_state_dicts_that_do_not_fit(change: str, is_compiled: bool) -> None:
    """Strictly, torch's error names the entry. Not strictly, torch names it in its result, and the model still runs rewritten."""
    model = converted(3)
    compiled = torch.compile(model, backend=eager)
    if is_compiled:
        compiled(BATCH)
    with pytest.raises(RuntimeError, match=r"attnres\.sites\.\d\.(pseudo_)?query"):
        model.load_state_dict(changed(change))
    if change != "misshapen":
        found = model.load_state_dict(changed(change), strict=False)
        assert any("attnres.sites" in key for key in [*found.missing_keys, *found.unexpected_keys])
    torch.testing.assert_close(compiled(BATCH), expected_of(model))
    assert_whole(model)


def test_an_assigned_state_of_another_shape_is_refused_by_torch() -> None:
    model = converted(3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(changed("misshapen"), assign=True)
    torch.testing.assert_close(torch.compile(model, backend=eager)(BATCH), expected_of(model))


def test_a_plain_model_names_what_it_has_no_place_for() -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*attnres\.sites\.0\.query"):
        Net().load_state_dict(converted().state_dict())
