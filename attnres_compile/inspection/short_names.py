"""Short names for the sublayers and sites of a chain, such as "layer 3 MLP", from the qualified names of modules.

No rule knows the name of a model: words that stand for attention and MLPs in module names are all that is known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

OUTPUT = "output"
_ROLES = {
    "cross-attention": re.compile(r"cross_?(attn|att)|enc(oder)?_?(dec(oder)?_?)?(attn|att)", re.IGNORECASE),
    "attention": re.compile(r"attn|attention|\bmha\b", re.IGNORECASE),
    "MLP": re.compile(r"mlp|ffn?\b|feed_?forward|\bfc_?\d?\b|dense_?(relu|act|gated)|moe|expert", re.IGNORECASE),
}


def sublayer_names(modules: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """One name for every sublayer of a chain, all different.

    Args:
        modules: for every sublayer the qualified names of the modules that made its output; there may be none.
    """
    common = _common_prefix([name for names in modules for name in names])
    depth = _layer_level([names[0] for names in modules if names])
    named = [_name(names, depth, common, _role) for names in modules]
    owners: dict[str, set[tuple[str, ...]]] = {}
    for name, names in zip(named, modules, strict=True):
        owners.setdefault(name, set()).add(tuple(names))
    # Where a layer has two sublayers of one role, the modules' own names tell them apart.
    named = [
        _name(names, depth, common, ".".join) if len(owners[name]) > 1 else name
        for name, names in zip(named, modules, strict=True)
    ]
    return _numbered([name or f"sublayer {i}" for i, name in enumerate(named, start=1)])


def read_names(sublayers: Sequence[str], befores: Sequence[int]) -> tuple[str, ...]:
    """One name for every read of a chain, all different: that of the sublayer which it feeds, or "output" behind the last.

    Args:
        sublayers: see :func:`sublayer_names`.
        befores: the number of sublayers before each read.
    """
    return _numbered([OUTPUT if before == len(sublayers) else sublayers[before] for before in befores])


def chain_names(modules: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """One name for every chain of a model, all different, such as "encoder" and "decoder".

    Args:
        modules: for every chain the qualified names of its modules.
    """
    prefixes = [_common_prefix(names).split(".")[:-1] for names in modules]
    shared = _common_prefix([".".join([*prefix, ""]) for prefix in prefixes]).count(".")
    return _numbered([".".join(prefix[: shared + 1]) or f"chain {i}" for i, prefix in enumerate(prefixes)])


def _name(names: Sequence[str], depth: int, common: str, role_of: Callable[[Sequence[str]], str]) -> str:
    """ "layer 3 attention", "layer 3 mixer", or what a name does not share with all others.

    ``role_of`` speaks of what stands behind the number of the layer.
    """
    if not names:
        return ""
    parts = names[0].split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if len(numbers) <= depth:
        return names[0].removeprefix(common)
    place = numbers[depth]
    roles = {role_of(name.split(".")[place + 1 :]) for name in names} - {""}
    known = sorted((role for role in roles if role in _ROLES), key=str.lower)
    return f"layer {parts[place]} {' + '.join(known or sorted(roles))}".rstrip()


def _role(tail: Sequence[str]) -> str:
    for part in tail:
        for role, words in _ROLES.items():
            if words.search(part):
                return role
    return next((part for part in tail if not part.isdigit()), "")


def _layer_level(names: Sequence[str]) -> int:
    """Which of the numbers in a qualified name counts layers: the first that is not the same everywhere, else the last."""
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in names]
    for level, values in enumerate(zip(*numbers, strict=False)):
        if len(set(values)) > 1:
            return level
    return max(min(map(len, numbers), default=0) - 1, 0)


def _common_prefix(names: Sequence[str]) -> str:
    """The leading parts, with their dots, that all names share; never the whole of a name."""
    split = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def _numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Names that still occur twice, of modules that run twice, get a number."""
    counts, seen = Counter(names), Counter[str]()
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return tuple(result)
