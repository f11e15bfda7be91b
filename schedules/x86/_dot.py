"""How 4 bytes of A meet 4 bytes of B: the multiply instructions of the integer kernels.

Every k-step adds to each s32 lane the sum of 4 products u8 x s8, exactly. GEMM and convolution
kernels inherit one of these vocabularies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from ._ir import T, bits, intrinsic, ramp, splat, tirx

_MADDUBS = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw"}
_MADD = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd"}


class Dot(ABC):
    """The vocabulary of a micro-kernel with s32 accumulators."""

    gops: ClassVar[float]  # about the speed of one thread, for the choice to use more
    seven_bits: ClassVar[bool] = False  # only for |b| <= 64
    staged: ClassVar[bool] = False  # A is widened to 16 bits before it is multiplied
    bits: ClassVar[int]  # widest vector

    def step_cycles(self, mr: float, nr: float, lanes: int, params: Any) -> float:
        """Estimated cycles of a k-step of a tile of mr rows and nr vectors."""
        wide = lanes / 8  # 512 bits are two halves, of which two of a kind start in a cycle
        loads = (nr * wide * self._loads(params) + mr * (2 if self.staged else 1)) / 2
        return max(mr * nr * wide / 2 * self._operations, loads, 4.0)

    _operations: ClassVar[int] = 1  # on the ports of multiplications, for a vector and k-step

    def _loads(self, params: Any) -> float:
        """Loads of a vector and k-step."""
        return 1.0

    @abstractmethod
    def encode(self, quads: np.ndarray, params: Any) -> np.ndarray:
        """s8 (..., lanes, 4) weights of k-steps as uint8 (..., bytes)."""

    def a_operands(self, dwords: Any, lanes: int) -> list[Any]:
        """The multiplier inputs made of int32xL, 4 u8 of one row in every lane.

        Not asked of kernels that are `staged`: theirs are int16x(2L), k pairs (0, 1) and (2, 3).
        """
        return [T.Bind(bits(f"int8x{4 * lanes}", dwords))]

    @abstractmethod
    def b_operands(self, w: Any, offset: Any, lanes: int, params: Any) -> list[Any]:
        """The multiplier inputs of one vector and k-step, at a byte offset of W."""

    @abstractmethod
    def multiply_add(self, acc: Any, a: list[Any], b: list[Any], lanes: int) -> Any:
        """acc int32xL plus the sums of 4 products."""


class DotVnni(Dot):
    """vpdpbusd: the sum of 4 products in one instruction."""

    bits = 512

    def encode(self, quads: np.ndarray, params: Any) -> np.ndarray:
        return quads.view(np.uint8).reshape(*quads.shape[:-2], -1)

    def b_operands(self, w: Any, offset: Any, lanes: int, params: Any) -> list[Any]:
        return [T.Bind(bits(f"int8x{4 * lanes}", w[ramp(offset, 4 * lanes)]))]

    def multiply_add(self, acc: Any, a: list[Any], b: list[Any], lanes: int) -> Any:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return intrinsic(f"int32x{lanes}", name, acc, a[0], b[0])


class Dot16(Dot):
    """vpmaddwd on operands widened to 16 bits, for both vector widths.

    Parameters say with `wide` whether B is stored as s16.
    """

    staged = True
    _operations = 2

    def _loads(self, params: Any) -> float:
        return 2.0 if params.wide else 1.0

    def encode(self, quads: np.ndarray, params: Any) -> np.ndarray:
        pairs = quads.reshape(*quads.shape[:-1], 2, 2)  # of k: (0, 1), (2, 3)
        parts = np.moveaxis(pairs, -2, -3)  # first pairs of all lanes, then second pairs
        if params.wide:
            parts = parts.astype(np.int16)
        return np.ascontiguousarray(parts).view(np.uint8).reshape(*quads.shape[:-2], -1)

    def b_operands(self, w: Any, offset: Any, lanes: int, params: Any) -> list[Any]:
        size = (4 if params.wide else 2) * lanes
        wide = f"int16x{2 * lanes}"
        parts = [w[ramp(offset + part * size, size)] for part in range(2)]
        if params.wide:
            return [T.Bind(bits(wide, part)) for part in parts]
        return [T.Bind(tirx.Cast(wide, bits(f"int8x{size}", part))) for part in parts]

    def multiply_add(self, acc: Any, a: list[Any], b: list[Any], lanes: int) -> Any:
        for pairs_a, pairs_b in zip(a, b, strict=True):
            acc = acc + intrinsic(f"int32x{lanes}", _MADD[lanes], pairs_a, pairs_b)
        return acc


class Dot7(Dot):
    """vpmaddubsw, for both vector widths: its sums of pairs fit 16 bits where |b| <= 64."""

    seven_bits = True
    _operations = 2

    def encode(self, quads: np.ndarray, params: Any) -> np.ndarray:
        return quads.view(np.uint8).reshape(*quads.shape[:-2], -1)

    def b_operands(self, w: Any, offset: Any, lanes: int, params: Any) -> list[Any]:
        return [T.Bind(bits(f"int8x{4 * lanes}", w[ramp(offset, 4 * lanes)]))]

    def multiply_add(self, acc: Any, a: list[Any], b: list[Any], lanes: int) -> Any:
        pairs = intrinsic(f"int16x{2 * lanes}", _MADDUBS[lanes], a[0], b[0])
        ones = splat(1, "int16", 2 * lanes)
        return acc + intrinsic(f"int32x{lanes}", _MADD[lanes], pairs, ones)
