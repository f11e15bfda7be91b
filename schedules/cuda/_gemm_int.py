"""What the integer GEMM kernels share: what they take, and one value per column in W.

W holds, each part 64-byte aligned: B in the order in which a kernel reads it, then one value per
column, of as many columns as the kernel's blocks cover, of: base s32 · scale f32 · bias f32 ·
b_zero s32 · b_sum s32 (all but base only where used).

    sum (a-az)(b-bz) = sum a*b - az*(sum b - K*bz) - bz * sum a

The second part is in `base`, together with an s32 bias, or is formed from b_sum and the tensor
a_zero. The third needs the sums of A's rows, which kernels make on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernel import Kernel
from ...workload import NUMPY, Gemm, GemmWeights
from ._epilogue import Epilogue
from ._ir import T, address, call, ceil_div, do, i32, local, tirx


@dataclass(frozen=True)
class Constants:
    """Byte offsets in W of the values per column."""

    columns: int
    base: int
    scale: int
    bias: int
    b_zero: int
    b_sum: int
    nbytes: int  # of all of W

    @classmethod
    def after(cls, start: int, columns: int, workload: Gemm) -> Constants:
        row = ceil_div(columns * 4, 64) * 64
        offsets = [ceil_div(start, 64) * 64]
        scaled, biased = workload.out != "s32", workload.bias == "f32"
        for used in (True, scaled, biased, workload.b_zero, workload.runtime):
            offsets.append(offsets[-1] + (row if used else 0))
        return cls(columns, *offsets)


class IntegerGemm(Kernel):
    """C = epilogue(A x B) for u8 or s8 A and s8 B."""

    def refuses(self, workload: Gemm) -> str | None:
        if workload.a not in ("u8", "s8") or workload.b != "s8":
            return f"operands are {workload.a} x {workload.b}, not u8 or s8 x s8"
        return None


def pack(workload: Gemm, weights: GemmWeights, tiles: np.ndarray, at: Constants) -> np.ndarray:
    """W: the bytes of B as ordered by the kernel, then the values per column."""
    n, k = workload.n, workload.k
    out = np.zeros(at.nbytes, np.uint8)
    out[: tiles.size] = tiles.reshape(-1).view(np.uint8)

    def put(offset: int, values: np.ndarray | None, dtype: str) -> None:
        assert values is not None
        raw = np.ascontiguousarray(values, dtype=dtype).view(np.uint8).reshape(-1)
        out[offset : offset + raw.size] = raw

    sums = weights.b.astype(np.int64).sum(axis=0)
    if workload.b_zero:
        assert weights.b_zero is not None
        sums = sums - k * weights.b_zero.astype(np.int64)
        put(at.b_zero, weights.b_zero, "int32")
    base = np.zeros(n, np.int64)
    if workload.bias == "s32":
        assert weights.bias is not None
        base += weights.bias
    if workload.runtime:
        put(at.b_sum, sums.astype(np.int32), "int32")
    else:
        base -= weights.a_zero * sums
    put(at.base, base.astype(np.int32), "int32")
    if workload.out != "s32":
        put(at.scale, weights.scale, "float32")
    if workload.bias == "f32":
        put(at.bias, weights.bias, "float32")
    return out


class Operands:
    """The parameters of a kernel's function, and what every thread reads of them.

    To be made first in the function. `small`: offsets into A and C fit 32 bits.
    """

    def __init__(self, workload: Gemm, at: Constants) -> None:
        self.workload, self.at = workload, at
        m = workload.m
        small = m is not None and m * max(workload.n, workload.k) * 4 < 2**31
        self.index = "int32" if small else "int64"
        self.m = tirx.Var("m", "int64") if m is None else self.const(m)
        n, k = self.const(workload.n), self.const(workload.k)
        self.a = T.arg("a", T.buffer((self.m, k), NUMPY[workload.a]))
        self.w = T.arg("w", T.buffer((at.nbytes,), "uint8"))
        if workload.runtime:
            self.a_zero = T.arg("a_zero", T.buffer((1,), NUMPY[workload.a]))
            if workload.out != "s32":
                self.a_scale = T.arg("a_scale", T.buffer((1,), "float32"))
        self.c = T.arg("c", T.buffer((self.m, n), NUMPY[workload.out]))
        self.epilogue = Epilogue(workload)

    def const(self, value: int) -> Any:
        return tirx.const(value, self.index)

    def cast(self, value: Any) -> Any:
        """As the type of offsets."""
        return tirx.Cast(self.index, value) if self.index != "int32" else value

    def in_w(self, panel: Any, count: int, number: Any) -> Any:
        """panel * count + number: which part of W, in a type that holds its byte too."""
        wide = "int64" if self.at.nbytes >= 2**31 else "int32"
        return tirx.Cast(wide, panel) * count + tirx.Cast(wide, number)

    # ---- values per column ----
    def words(self, offset: int, column: Any, count: int) -> list[Any]:
        """The 32-bit values of 1, 2 or 4 consecutive columns, the first a multiple of `count`."""
        where = address(self.w, self.in_w(column, 4, 0) + offset)
        if count == 1:
            return [T.Bind(call("uint32", "load4", where))]
        found = local(count, "uint32")
        do("load16" if count == 4 else "load8", address(found, 0), where)
        return [found[i] for i in range(count)]

    def starts(self, column: Any, count: int) -> list[Any]:
        """What the accumulators of some columns start with."""
        base = [tirx.Cast("int32", v) for v in self.words(self.at.base, column, count)]
        if not self.workload.runtime:
            return base
        zero = T.Bind(tirx.Cast("int32", self.a_zero[0]))
        sums = [tirx.Cast("int32", v) for v in self.words(self.at.b_sum, column, count)]
        return [b - zero * s for b, s in zip(base, sums, strict=True)]

    def zeros(self, column: Any, count: int) -> list[Any]:
        """The zero points of some columns of B."""
        return [tirx.Cast("int32", v) for v in self.words(self.at.b_zero, column, count)]

    def scales(self, column: Any, count: int) -> list[Any]:
        """The factors of the accumulators of some columns; None where there are none."""
        if self.workload.out == "s32":
            return [None] * count
        scale = [call("float32", "as_float", v) for v in self.words(self.at.scale, column, count)]
        if self.workload.runtime:
            scale = [self.a_scale[0] * s for s in scale]
        return [T.Bind(s) for s in scale]

    def biases(self, column: Any, count: int) -> list[Any]:
        """The f32 biases of some columns; None where there are none."""
        if self.workload.bias != "f32":
            return [None] * count
        found = self.words(self.at.bias, column, count)
        return [T.Bind(call("float32", "as_float", v)) for v in found]

    # ---- products ----
    def dot(self, a: Any, b: Any, acc: Any) -> Any:
        """acc + the products of 4 numbers of A and 4 of B, both uint32."""
        b = tirx.Cast("int32", b)
        if self.workload.a == "u8":
            return call("int32", "dp4a_us", a, b, acc)
        return call("int32", "dp4a_ss", tirx.Cast("int32", a), b, acc)

    def total(self, a: Any, acc: Any) -> Any:
        """acc + the sum of 4 numbers of A."""
        return self.dot(a, i32(0x01010101), acc)
