"""AttnResConfig: defaults, every error and its message, and storage as versioned JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from attnres_compile import AttnResConfig, ConfigError
from attnres_compile.config import FORMAT_VERSION

OPTIONS = "variant, num_blocks, block_size, scale, key_norm, eps, weights, query, heads, normalize_keys"


def test_defaults() -> None:
    fields = dataclasses.asdict(AttnResConfig())
    assert fields == {
        "variant": "block", "num_blocks": 8, "block_size": None, "scale": "preserve", "key_norm": True, "eps": None,
        "weights": "softmax", "query": "learned", "heads": 1, "normalize_keys": True,
    }  # fmt: skip


def test_is_frozen_and_hashable() -> None:
    config = AttnResConfig(num_blocks=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_blocks = 2  # type: ignore[misc]
    assert len({config, AttnResConfig(num_blocks=4), AttnResConfig(num_blocks=2)}) == 2


def test_config_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="variant must be one of"):
        AttnResConfig(variant="dense")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"variant": "dense"}, "variant must be one of 'block', 'full', not 'dense'.", id="variant"),
        pytest.param({"variant": None}, "variant must be one of 'block', 'full', not None.", id="variant-none"),
        pytest.param({"scale": "mean"}, "scale must be one of 'preserve', 'paper', not 'mean'.", id="scale"),
        pytest.param({"scale": 1.0}, "scale must be one of 'preserve', 'paper', not 1.0.", id="scale-number"),
        pytest.param({"num_blocks": 0}, "num_blocks must be a positive integer or None, not 0.", id="no-blocks"),
        pytest.param({"num_blocks": -2}, "num_blocks must be a positive integer or None, not -2.", id="negative-blocks"),
        pytest.param({"num_blocks": 2.0}, "num_blocks must be a positive integer or None, not 2.0.", id="blocks-float"),
        pytest.param({"num_blocks": "8"}, "num_blocks must be a positive integer or None, not '8'.", id="blocks-text"),
        pytest.param({"num_blocks": True}, "num_blocks must be a positive integer or None, not True.", id="blocks-bool"),
        pytest.param({"block_size": 0}, "block_size must be a positive integer or None, not 0.", id="no-size"),
        pytest.param({"block_size": 1.5}, "block_size must be a positive integer or None, not 1.5.", id="size-float"),
        pytest.param({"block_size": True}, "block_size must be a positive integer or None, not True.", id="size-bool"),
        pytest.param({"key_norm": 1}, "key_norm must be True or False, not 1.", id="key-norm-number"),
        pytest.param({"key_norm": None}, "key_norm must be True or False, not None.", id="key-norm-none"),
        pytest.param({"eps": -1e-6}, "eps must be a number in [0, 1) or None, not -1e-06.", id="eps-negative"),
        pytest.param({"eps": 1.0}, "eps must be a number in [0, 1) or None, not 1.0.", id="eps-one"),
        pytest.param({"eps": float("nan")}, "eps must be a number in [0, 1) or None, not nan.", id="eps-nan"),
        pytest.param({"eps": "1e-6"}, "eps must be a number in [0, 1) or None, not '1e-6'.", id="eps-text"),
        pytest.param({"eps": True}, "eps must be a number in [0, 1) or None, not True.", id="eps-bool"),
        pytest.param(
            {"num_blocks": 4, "block_size": 4}, "num_blocks and block_size exclude each other; give one of them.", id="both",
        ),
        pytest.param(
            {"num_blocks": 8, "block_size": 4}, "num_blocks and block_size exclude each other; give one of them.",
            id="both-and-the-default-written-out",
        ),
        pytest.param({"num_blocks": None}, "variant='block' needs num_blocks or block_size.", id="neither"),
        pytest.param(
            {"variant": "full", "block_size": 2},
            "variant='full' has one sublayer per block, so block_size=2 contradicts it; use variant='block'.",
            id="full-with-a-size",
        ),
    ],
)  # fmt: skip
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AttnResConfig(**options)
    assert str(caught.value) == message


def test_unknown_options_list_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        AttnResConfig.from_options({"blocks": 4})
    assert str(caught.value) == f"unknown option 'blocks'; the options are: {OPTIONS}."


@pytest.mark.parametrize("options", [None, {}], ids=["none", "empty"])
def test_no_options_are_the_defaults(options: dict[str, Any] | None) -> None:
    assert AttnResConfig.from_options(options) == AttnResConfig()


def test_options_are_fields_and_stay_as_they_are() -> None:
    options = {"block_size": 3, "scale": "paper"}
    assert AttnResConfig.from_options(options) == AttnResConfig(block_size=3, scale="paper")
    assert options == {"block_size": 3, "scale": "paper"}


def test_a_block_size_replaces_the_default_number_of_blocks() -> None:
    config = AttnResConfig(block_size=3)
    assert (config.num_blocks, config.block_size) == (None, 3)


# ------------------------------------------------------------------------------------------------ sublayers per block


@pytest.mark.parametrize(
    ("config", "num_sublayers", "expected"),
    [
        pytest.param(AttnResConfig(), 64, 8, id="default"),
        pytest.param(AttnResConfig(), 8, 1, id="default-on-eight"),
        pytest.param(AttnResConfig(), 9, 2, id="default-rounds-up"),
        pytest.param(AttnResConfig(), 5, 1, id="default-bends-to-a-short-chain"),
        pytest.param(AttnResConfig(num_blocks=3), 7, 3, id="last-block-shorter"),
        pytest.param(AttnResConfig(num_blocks=1), 7, 7, id="one-block"),
        pytest.param(AttnResConfig(num_blocks=7), 7, 1, id="as-many-blocks-as-sublayers"),
        pytest.param(AttnResConfig(block_size=4), 7, 4, id="size"),
        pytest.param(AttnResConfig(block_size=7), 7, 7, id="size-of-the-chain"),
        pytest.param(AttnResConfig(variant="full"), 7, 1, id="full"),
        pytest.param(AttnResConfig(variant="full", num_blocks=99), 7, 1, id="full-ignores-the-number"),
        pytest.param(AttnResConfig(variant="full", num_blocks=None), 7, 1, id="full-without-a-number"),
        pytest.param(AttnResConfig(variant="full", block_size=1), 7, 1, id="full-with-size-one"),
    ],
)
def test_resolved_block_size(config: AttnResConfig, num_sublayers: int, expected: int) -> None:
    assert config.resolved_block_size(num_sublayers) == expected


@pytest.mark.parametrize("num_blocks", [6, 8, 100])
def test_more_blocks_than_sublayers(num_blocks: int) -> None:
    with pytest.raises(ConfigError) as caught:
        AttnResConfig(num_blocks=num_blocks).resolved_block_size(5)
    assert str(caught.value) == f"num_blocks={num_blocks} is more than the 5 sublayers of the chain; use at most 5."


def test_blocks_larger_than_the_chain() -> None:
    with pytest.raises(ConfigError) as caught:
        AttnResConfig(block_size=6).resolved_block_size(5)
    assert str(caught.value) == "block_size=6 exceeds the 5 sublayers of the chain."


# --------------------------------------------------------------------------------------------------------- storage

STORED = [
    pytest.param(AttnResConfig(), id="default"),
    pytest.param(AttnResConfig(num_blocks=4, scale="paper", key_norm=False, eps=1e-5), id="all-changed"),
    pytest.param(AttnResConfig(block_size=3), id="block-size"),
    pytest.param(AttnResConfig(variant="full"), id="full"),
    pytest.param(AttnResConfig(variant="full", num_blocks=None, eps=0), id="full-bare"),
]


@pytest.mark.parametrize("config", STORED)
def test_round_trip(config: AttnResConfig) -> None:
    assert AttnResConfig.from_dict(config.to_dict()) == config
    assert AttnResConfig.from_json(config.to_json()) == config


def test_stored_form() -> None:
    assert json.loads(AttnResConfig(num_blocks=4, eps=1e-5).to_json()) == {
        "format_version": 1, "variant": "block", "num_blocks": 4, "block_size": None, "scale": "preserve", "key_norm": True,
        "eps": 1e-5, "weights": "softmax", "query": "learned", "heads": 1, "normalize_keys": True,
    }  # fmt: skip
    assert type(AttnResConfig().to_dict()["num_blocks"]) is int


def test_the_default_still_bends_after_a_round_trip() -> None:
    assert AttnResConfig.from_json(AttnResConfig().to_json()).resolved_block_size(4) == 1


def test_replacing_another_field_keeps_what_was_written() -> None:
    assert dataclasses.replace(AttnResConfig(), scale="paper").resolved_block_size(4) == 1
    with pytest.raises(ConfigError, match="num_blocks=8 is more than the 4 sublayers"):
        dataclasses.replace(AttnResConfig(num_blocks=8), scale="paper").resolved_block_size(4)


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_other_format_versions(version: object) -> None:
    data = {**AttnResConfig().to_dict(), "format_version": version}
    with pytest.raises(ConfigError) as caught:
        AttnResConfig.from_dict(data)
    assert str(caught.value) == (
        f"this AttnRes config has format version {version!r}; this release reads version {FORMAT_VERSION}."
    )


def test_a_dict_without_a_version() -> None:
    with pytest.raises(ConfigError, match="has format version None; this release reads version 1"):
        AttnResConfig.from_dict({"variant": "full"})


def test_a_stored_unknown_field_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        AttnResConfig.from_dict({**AttnResConfig().to_dict(), "gate": True})
    assert str(caught.value) == f"unknown option 'gate'; the options are: {OPTIONS}."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", "this AttnRes config is not JSON: ", id="no-json"),
        pytest.param("", "this AttnRes config is not JSON: ", id="empty"),
        pytest.param("[1, 2]", "an AttnRes config is a JSON object, not list.", id="list"),
        pytest.param("null", "an AttnRes config is a JSON object, not NoneType.", id="null"),
    ],
)
def test_text_that_is_no_config(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AttnResConfig.from_json(text)
    assert str(caught.value).startswith(message)
