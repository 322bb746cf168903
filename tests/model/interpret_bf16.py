"""Triton's interpreter with the arithmetic of bf16.

The interpreter keeps bf16 as 16-bit integers and adds and multiplies these. Here operands of bf16 are widened to fp32,
which is exact, and results are rounded to the nearest bf16, ties to even, as GPUs do. Products of matrices stay fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle


def widened(bits: Any) -> Any:
    """fp32 of the bits of bf16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: Any) -> Any:
    """The bits of the nearest bf16; of a number that is none, one that is none."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def right_bf16() -> None:
    """Mend the interpreter of this process."""
    dot, cast, fp_to_fp = Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp
    elementwise = {
        "create_fmul": np.multiply,
        "create_fadd": np.add,
        "create_fsub": np.subtract,
        "create_fdiv": np.divide,
    }

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if not _is_bf16(a):
            return dot(self, a, b, d, *options)
        return TensorHandle(widened(a.data) @ widened(b.data) + d.data, d.dtype.scalar)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(source.data), tl.float32)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if {source.dtype.scalar, target.scalar} == {tl.float32, tl.bfloat16}:
            return cast_impl(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def by(operation: Callable[[Any, Any], Any], usual: Any) -> Any:
        def run(self: Any, left: Any, right: Any) -> Any:
            if not _is_bf16(left):
                return usual(self, left, right)
            return TensorHandle(rounded(operation(widened(left.data), widened(right.data))), tl.bfloat16)

        return run

    for name, operation in elementwise.items():
        setattr(Builder, name, by(operation, getattr(Builder, name)))
    Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    Builder.create_fp_ext = Builder.create_fp_trunc = cast_impl
