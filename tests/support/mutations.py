"""JSON as a damaged or malicious file holds it: values of other kinds, moved and doubled entries, broken bytes, depth."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Iterator
from typing import Any

from attnres_compile.checkpoint.folders import ADDED

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"
ODD_NUMBERS = (-1, 0, 1, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, 10**5000, -(2**63), 0.5, 1e300, 1e999)
ODD_STRINGS = (
    "", ".", "..", "/", "\0", "\n", "\ud800", "x" * 300, "x" * 70_000, "é", "__metadata__", "weight_map", "F4", "BF16", "F31",
    "../outside.safetensors", "../../x", "/etc/passwd", "code/../../outside.safetensors", "code", "link.safetensors", "pipe",
    "config.json", INDEX, ADDED, SHARD, f"./{SHARD}", SHARD.upper(), "model.safetensors", "/dev/zero", "~/x", "file:///etc/passwd",
)  # fmt: skip
ODD_VALUES = (None, True, False, [], {}, [[]], {"a": {}}, float("nan"), float("inf"), [0, 2**63], [8, 0], [0, 0, 0], [-1, -1])
ODD_BYTES = (b"\0", b"\xff", b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"-", b"e", b"9", b"\\ud800", b"\xef\xbb\xbf", b" ")


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: a container and a key or position in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from nodes(value[key])


def odd_value(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(draw.choice((ODD_NUMBERS, ODD_STRINGS, ODD_VALUES))))


def as_text(value: Any) -> bytes:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)  # the reader's limit is what is tested
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(limit)


def mutated_value(value: Any, draw: random.Random) -> Any:
    """One to three changes of structure: values, keys, entries that are gone, moved or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(nodes(value))
        if not places:
            return odd_value(draw)
        container, key = draw.choice(places)
        what = draw.randrange(6)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[draw.choice(ODD_STRINGS)] = container.pop(key)
        elif what == 2:
            other, other_key = draw.choice(places)
            taken = (
                copy.deepcopy(other[other_key]) if other_key in (other if isinstance(other, dict) else range(len(other))) else 0
            )
            container[key] = taken
        elif what == 3 and isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
            container[key] += draw.choice((-8, -1, 1, 8, 2**32))
        else:
            container[key] = odd_value(draw)
    return value


def mutated_text(text: bytes, draw: random.Random) -> bytes:
    """Changes that no JSON library would write: bytes, truncations, repetitions, doubled keys, depth."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, until = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        what = draw.randrange(7)
        if what == 0:
            text = text[:at]
        elif what == 1:
            text = text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :]
        elif what == 2:
            text = text[:at] + draw.choice(ODD_BYTES) + text[at:]
        elif what == 3:
            text = text[:until] + text[at : min(until, at + 2000)] + text[until:]
        elif what == 4:
            text = text[:at] + text[until:]
        elif what == 5:
            depth = draw.choice((10, 200, 1100, 100_000))
            opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
            text = text.replace(b": ", b": " + opening * depth + b"1" + closing * depth + b', "b": ', 1)
        else:  # the first key once more, with a value of any kind
            key = text[text.find(b'"') : text.find(b":") + 1]
            text = text.replace(b"{", b"{" + key + as_text(odd_value(draw)) + b",", 1)
    return text
