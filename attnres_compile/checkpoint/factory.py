"""Models outside Transformers: a function of the user's builds them, and says or lets guess how they are called."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnres_compile.checkpoint.files import in_one_line
from attnres_compile.dummies import dummy_inputs
from attnres_compile.errors import ConfigError

Factory = Callable[[], Any]
_INPUT = re.compile(r"^(?P<dtype>[a-z]+[0-9]*)\[(?P<shape>[0-9, ]*)\]$")
_TOKENS = 8


def import_factory(name: str | None) -> Factory:
    """The callable that ``package.module:function`` names; modules are found in the working directory, too.

    Raises:
        ConfigError: if there is none.
    """
    if name is None:
        raise ConfigError("a state dict alone does not tell its model: give --model package.module:function, which builds it.")
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{name!r} names no factory; write it as package.module:function.")
    sys.path.append(os.getcwd())  # at the end: nothing there may hide an installed package
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(f"the factory {name!r} can't be imported: {in_one_line(error)}") from error
    finally:
        sys.path.pop()
    if not callable(found):
        raise ConfigError(f"{name!r} is no function but {type(found).__name__}.")
    factory: Callable[[], Any] = found
    return factory


def parse_input(text: str) -> Tensor:
    """An example argument from its dtype and shape, such as ``int64[1,16]``: zeros.

    Raises:
        ConfigError: for anything else.
    """
    match = _INPUT.match(text)
    dtype = getattr(torch, match["dtype"], None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{text!r} is no input; write its dtype and shape, such as int64[1,16] or float32[1,3,32,32].")
    return torch.zeros([int(size) for size in match["shape"].split(",") if size.strip()], dtype=dtype, device="meta")


def build(factory: Factory, device: torch.device | str | None = None) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Call ``factory``, which returns a module, or ``(module, args)``, or ``(module, args, kwargs)`` with example arguments.

    Args:
        device: where the module is built, in evaluation mode; by default where the factory builds it.

    Raises:
        ConfigError: if the factory fails or returns something else.
    """
    try:
        with torch.device(device) if device is not None else contextlib.nullcontext():
            made = factory()
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"the model's factory failed: {in_one_line(error)}") from error
    model, *call = made if isinstance(made, tuple) and made else (made,)
    args = call[0] if call else ()
    kwargs = call[1] if len(call) > 1 else {}
    if not isinstance(model, nn.Module) or not isinstance(kwargs, dict) or len(call) > 2:
        raise ConfigError(
            f"the model's factory must return a torch.nn.Module, or (module, args) or (module, args, kwargs), not "
            f"{type(made).__name__}."
        )
    if device is not None:
        model = model.to(device)  # some parameters are made by constructors that ignore the device
    return model.eval(), tuple(args) if isinstance(args, (tuple, list)) else (args,), kwargs


def guess_inputs(model: nn.Module) -> tuple[Tensor, ...]:
    """Ids ``[1, 8]`` for a model that takes one argument and embeds ids; none for Transformers models, which have their own.

    Raises:
        ConfigError: if nothing can be guessed.
    """
    if dummy_inputs(model):
        return ()
    parameters = inspect.signature(model.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(required) == 1 and any(isinstance(module, nn.Embedding) for module in model.modules()):
        return (torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta"),)
    raise ConfigError(
        f"how {type(model).__name__} is called is not known: give --input for each positional argument, such as "
        "--input float32[1,3,32,32], or let the factory return (module, args)."
    )
