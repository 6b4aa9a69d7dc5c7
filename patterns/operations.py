"""One name for every spelling of an operation, and the facts of a node that all patterns ask for."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch.fx import Node

# Spellings that differ from the canonical name; everything else keeps its own name.
_ALIASES = {
    "iadd": "add_", "imul": "mul_", "isub": "sub_", "itruediv": "div_", "truediv": "div", "true_divide": "div",
    "divide": "div", "divide_": "div_", "multiply": "mul", "multiply_": "mul_", "subtract": "sub", "subtract_": "sub_",
    "__add__": "add", "__radd__": "add", "__iadd__": "add_", "__mul__": "mul", "__rmul__": "mul", "__sub__": "sub",
    "__truediv__": "div", "__getitem__": "getitem", "__pow__": "pow", "negative": "neg", "clip": "clamp", "absolute": "abs",
    "_to_copy": "to", "_unsafe_view": "view", "native_dropout": "dropout", "lift_fresh_copy": "clone",
    "linalg_vector_norm": "vector_norm", "linalg_norm": "vector_norm", "norm": "vector_norm",
    "slice": "getitem", "sym_size": "size", "_softmax": "softmax", "_safe_softmax": "softmax",
    "prim_from_local": "from_local", "prim_to_local": "to_local", "prim_redistribute": "redistribute",
    "prim_full_tensor": "full_tensor", "prim from_local": "from_local",  # the last: before torch 2.13
}  # fmt: skip

IN_PLACE = {
    "add_": torch.add, "mul_": torch.mul, "sub_": torch.sub, "div_": torch.div, "pow_": torch.pow, "square_": torch.square,
    "sqrt_": torch.sqrt, "rsqrt_": torch.rsqrt, "reciprocal_": torch.reciprocal,
    "clamp_min_": torch.clamp_min, "neg_": torch.neg, "abs_": torch.abs,
}  # fmt: skip

CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "alias", "cuda", "cpu"})
RESHAPES = frozenset({"view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as", "ravel"})
PERMUTES = frozenset({"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t"})
SLICES = frozenset({"getitem", "select", "narrow"})
MOVES = frozenset({"from_local", "to_local", "redistribute", "full_tensor"})
"""What only changes which rank holds which part of a value."""
DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"})
METADATA_READS = frozenset({
    "size", "dim", "numel", "stride", "getattr", "ndimension", "nelement", "get_device", "is_contiguous",
    "is_floating_point", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros",
    "new_ones", "new_empty", "new_full", "new_tensor", "_assert_async", "_check", "_assert_tensor_metadata",
})  # fmt: skip
_SHAPE_OF_SECOND = frozenset({"type_as", "view_as", "expand_as", "reshape_as", "to"})


def name_of(node: Node) -> str:
    """The canonical name of the operation, or the node's kind ("placeholder", "output", ...) where it is none."""
    if node.op == "call_method":
        return _ALIASES.get(str(node.target), str(node.target))
    if node.op != "call_function":
        return node.op
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
    elif isinstance(target, torch._ops.OpOverloadPacket):
        name = target.__name__
    else:
        name = getattr(target, "__name__", str(target))
    return _ALIASES.get(name, name)


def value_of(argument: Any) -> Any:
    """The example value of a node (a fake tensor, a symbol, ...), or the argument itself."""
    if isinstance(argument, Node):
        return argument.meta.get("example_value", argument.meta.get("val"))
    return argument


def shape_of(node: Node) -> tuple[Any, ...] | None:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def dtype_of(node: Node) -> torch.dtype | None:
    value = value_of(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def width_of(node: Node) -> str:
    """The size of the last dimension as text: comparing symbols would add a guard."""
    shape = shape_of(node)
    return str(shape[-1]) if shape else ""


def same_shape(a: Node, b: Node) -> bool:
    """Whether the shapes agree, without asking a symbolic shape a question that would add a guard."""
    left, right = shape_of(a), shape_of(b)
    if left is None or right is None or len(left) != len(right):
        return False
    return all(str(x) == str(y) for x, y in zip(left, right, strict=True))


def is_float_tensor(node: Any) -> TypeGuard[Node]:
    if not isinstance(node, Node):
        return False
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_call(node: Node) -> bool:
    return node.op in ("call_function", "call_method")


def argument(node: Node, position: int, keyword: str, default: Any = None) -> Any:
    """The argument at ``position`` or named ``keyword``."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(keyword, default)


def constant(value: Any) -> float | None:
    """The Python number behind a literal or behind a symbolic scalar (dynamic shapes lift module floats to inputs)."""
    if isinstance(value, Node):
        value = value_of(value)
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        hint = getattr(value.node, "hint", None)
        return float(hint) if hint is not None else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and type(value) is torch.Tensor:
        number = float(value)
        return number if math.isfinite(number) else None
    return None


def reads_only_metadata(node: Node, source: Node) -> bool:
    """Whether ``node`` asks ``source`` for its shape, dtype or device alone."""
    name = name_of(node)
    if name in METADATA_READS:
        return True
    second = argument(node, 1, "other")
    return name in _SHAPE_OF_SECOND and second is source and node.args[0] is not source


def is_idle_dropout(node: Node) -> bool:
    """Dropout that passes its input through: zero probability, or not training."""
    if name_of(node) not in DROPOUTS:
        return False
    return argument(node, 1, "p", 0.5) == 0.0 or argument(node, 2, "training", True) is False


def module_of(node: Node) -> str:
    """Qualified name of the module that made ``node``, relative to the captured model; "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return clean_path(path)


def clean_path(path: str) -> str:
    """``L['self'].model.layers.0`` and ``L['self']._modules['model']`` as a qualified name without the root.

    A module whose ``forward`` was replaced by a method of it, as accelerate does, is reached through that method.
    """
    if not path.startswith(("L[", "G[")):
        return path  # torch.export names modules as the model does
    path = path.replace(".forward.__self__", "")
    for noise in ("._modules['", "['", "']", "_modules."):
        path = path.replace(noise, "." if noise in ("._modules['", "['") else "")
    parts = [part for part in path.replace("[", ".").replace("]", "").split(".") if part]
    return ".".join(part for part in parts[2:] if part != "__dict__")


def source_line_of(node: Node) -> str:
    """``file:line: code`` of the innermost frame of the model's own source that made ``node``."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines()]
    for i in range(len(lines) - 1, -1, -1):
        if lines[i].startswith("File "):
            if "/torch/nn/" in lines[i] and any(line.startswith("File ") and "/torch/" not in line for line in lines[:i]):
                continue
            path, _, rest = lines[i].removeprefix('File "').partition('", line ')
            number = rest.split(",")[0]
            code = lines[i + 1] if i + 1 < len(lines) else ""
            return f"{path}:{number}: {code}".rstrip(": ")
    return ""
