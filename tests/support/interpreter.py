"""Makes the interpreter of triton 3.6 and 3.7 (TRITON_INTERPRET=1) compute what a GPU computes, fast enough for tests.

The interpreter runs a kernel in numpy, one program after the other. numpy has no bfloat16, so it keeps the bits in
uint16, and that is where it goes wrong:

- A cast from float32 to bfloat16 cuts the lower 16 bits off, where a GPU rounds to the nearest and ties to even. Where a
  rounding mode is asked for, it rounds ties up and loses the carry into the exponent. One downcast then costs twice the
  error, in one direction. Casts go through torch instead.
- ``tl.dot`` multiplies the bits of bfloat16 operands as integers. Operands are widened to float32 instead, in which their
  products are exact.
- Arithmetic on bfloat16 adds and multiplies those bits as well. No kernel here computes in bfloat16, so it raises.

triton 3.6 also takes ``int()`` of arrays of one element, which numpy 2.4 refuses.

Two things are only slow:

- A reduction with a combine function of its own calls it once per element. Here it is called on halves of the array, which
  is also how a GPU associates.
- Every call of a jitted helper patches ``triton.language`` anew, though the launch already did.

What stays different from a GPU: ``tl.dot`` takes float32 operands as they are whatever ``input_precision`` says, sums run in
another order, and programs never race.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
Reduction = interpreter.ReduceOps


def make_faithful() -> None:
    """Corrects the interpreter of this process; calling it again changes nothing."""
    if Builder.cast_impl is _cast:
        return
    Builder.cast_impl = _cast
    Builder.create_fp_to_fp = _round
    Builder.create_dot = _dot
    Builder.binary_op = _binary
    Reduction.generic_reduce = _reduce
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.InterpretedFunction.__call__ = _call


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, fresh floating tensors hold NaN, so that what a kernel leaves unwritten shows."""
    with torch.device("cpu"):  # torch notes once which functions follow a default device: let it be the real ones
        torch.empty(0)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))


def _filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poison(*args: Any, **kwargs: Any) -> Tensor:
        fresh = allocate(*args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    return poison


_original_cast, _original_round, _original_binary = Builder.cast_impl, Builder.create_fp_to_fp, Builder.binary_op
_original_patch_tensor = interpreter._patch_lang_tensor


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrowed(values: np.ndarray) -> np.ndarray:
    contiguous = torch.from_numpy(np.ascontiguousarray(values))
    return contiguous.to(torch.bfloat16).view(torch.uint16).numpy().reshape(values.shape)


def _cast(self: Any, source: Any, target: Any) -> Any:
    pair = source.dtype.scalar, target.scalar
    if pair == (tl.bfloat16, tl.float32):
        return Handle(_widened(source.data), tl.float32)
    if pair == (tl.float32, tl.bfloat16):
        return Handle(_narrowed(source.data), tl.bfloat16)
    return _original_cast(self, source, target)


def _round(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
        assert rounding == interpreter._ir.ROUNDING_MODE.RTNE, "bfloat16 is rounded to the nearest"
        return _cast(self, source, target)
    return _original_round(self, source, target, rounding)


def _binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
    if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
        raise TypeError("the interpreter has no bfloat16 arithmetic: compute in float32")
    return _original_binary(self, left, right, operation)


def _dot(self: Any, left: Any, right: Any, total: Any, precision: Any, imprecise: Any) -> Any:
    a, b = (_widened(operand.data) if operand.dtype.scalar == tl.bfloat16 else operand.data for operand in (left, right))
    return Handle(np.matmul(a, b, dtype=total.data.dtype) + total.data, total.dtype.scalar)


def _reduce(self: Any, inputs: Any) -> list[Any]:
    dtypes = [tensor.dtype for tensor in inputs]
    arrays = [tensor.handle.data for tensor in inputs]
    values = [array.ravel() if self.axis is None else np.moveaxis(array, self.axis, 0) for array in arrays]
    while (length := len(values[0])) > 1:
        lower = [self.to_tensor(value[: length // 2], dtype) for value, dtype in zip(values, dtypes, strict=True)]
        upper = [self.to_tensor(value[length // 2 :], dtype) for value, dtype in zip(values, dtypes, strict=True)]
        combined = self.combine_fn.fn(*lower, *upper)
        values = [tensor.handle.data for tensor in (combined if isinstance(combined, tuple) else (combined,))]
    results = [value[0] for value in values]
    if self.keep_dims:
        axes = tuple(range(arrays[0].ndim)) if self.axis is None else self.axis
        results = [np.expand_dims(result, axes) for result in results]
    return [self.to_tensor(result, dtype) for result, dtype in zip(results, dtypes, strict=True)]


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _original_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    # A launch patches `tl`. Triton's own helpers know `tl.core`, which the first of them patches for good.
    if tl.core.is_builtin(tl.core.full):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)
