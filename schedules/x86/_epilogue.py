"""From s32 accumulators in registers to C: scale, round, saturate, pack, store with tails masked.

Four vectors become one store of bytes. With 512-bit vectors: 4x (vcvtdq2ps, vmulps, vcvtps2dq)
2 vpackssdw, 2 vpaddsw of the zero point, vpackuswb, vpermd that undoes the packs' interleaving of
128-bit lanes, a 64-byte store.
"""

from __future__ import annotations

from typing import Any

from ...workload import Gemm
from . import _math
from ._ir import T, bits, intrinsic, local, masked_store, ramp, splat, tirx

_PACKS = {  # lanes: s32 -> s16, s16 -> u8, s16 -> s8, all saturating within 128-bit lanes
    16: (
        "llvm.x86.avx512.packssdw.512",
        "llvm.x86.avx512.packuswb.512",
        "llvm.x86.avx512.packsswb.512",
    ),
    8: ("llvm.x86.avx2.packssdw", "llvm.x86.avx2.packuswb", "llvm.x86.avx2.packsswb"),
}


class Epilogue:
    """The end of a tile of `rows` x `vectors` registers of `lanes` columns each.

    `byte_masks` tells whether stores of bytes can be masked (AVX-512) or must be split.
    """

    def __init__(self, workload: Gemm, lanes: int, byte_masks: bool, c: Any) -> None:
        self.workload, self.lanes, self.byte_masks, self.c = workload, lanes, byte_masks, c

    def store(
        self, registers: list[list[Any]], scale: list[Any], bias: list[Any], at: Any, valid: int
    ) -> None:
        """Stores registers[row][vector] of s32 at C[row0, column0] = `at`; `valid` columns."""
        out = self.workload.out
        if out == "s32":
            self._store_words(registers, at, valid)
            return
        rows = [
            [self._scaled(r, j, scale, bias) for j, r in enumerate(vectors)]
            for vectors in registers
        ]
        if out == "f32":
            self.store_floats(rows, at, valid)
        else:
            self._store_codes(rows, at, valid)

    def store_floats(self, rows: list[list[Any]], at: Any, valid: int) -> None:
        """Activates and stores registers of f32."""
        if self.workload.activation in ("sigmoid", "tanh"):
            self._store_activated(rows, at, valid)
        else:
            self._store_words([[self._simple(y) for y in ys] for ys in rows], at, valid)

    def _f32(self, value: float) -> Any:
        return splat(value, "float32", self.lanes)

    def _scaled(self, register: Any, j: int, scale: list[Any], bias: list[Any]) -> Any:
        dtype = f"float32x{self.lanes}"
        y = tirx.Cast(dtype, register)
        return intrinsic(dtype, "llvm.fma", y, scale[j], bias[j]) if bias else y * scale[j]

    # ---- f32 and s32 ----
    def _simple(self, y: Any) -> Any:
        """Activations of one or two instructions; a NaN stays one."""
        if self.workload.activation == "relu":
            y = T.Bind(y)
            return tirx.Select(tirx.LT(y, self._f32(0.0)), self._f32(0.0), y)
        if self.workload.activation == "clip":
            assert self.workload.clip is not None
            low, high = (self._f32(bound) for bound in self.workload.clip)
            y = T.Bind(y)
            y = T.Bind(tirx.Select(tirx.LT(y, low), low, y))
            return tirx.Select(tirx.GT(y, high), high, y)
        return y

    def _store_word(self, value: Any, row: Any, column: Any, valid: int) -> None:
        if valid >= self.lanes:
            T.buffer_store(self.c, value, [row, ramp(column, self.lanes)])
        else:
            masked_store(self.c, [row, column], value, self.lanes, valid)

    def _store_words(self, rows: list[list[Any]], at: Any, valid: int) -> None:
        row, column = at
        for i, vectors in enumerate(rows):
            for j, value in enumerate(vectors):
                first = j * self.lanes
                self._store_word(value, row + i, column + first, valid - first)

    def _store_activated(self, rows: list[list[Any]], at: Any, valid: int) -> None:
        """Sigmoid or tanh, one register at a time in a loop: unrolled, each takes 20 instructions.

        The detour over memory keeps the accumulators free of indices known only at run time,
        which would keep them out of registers.
        """
        row, column = at
        lanes, width = self.lanes, len(rows[0])
        activation = getattr(_math, self.workload.activation)
        scratch = local(len(rows) * width * lanes, "float32")
        for i, vectors in enumerate(rows):
            for j, value in enumerate(vectors):
                T.buffer_store(scratch, value, [ramp((i * width + j) * lanes, lanes)])
        with T.serial(0, len(rows) * width) as v:
            where = ramp(v * lanes, lanes)
            T.buffer_store(scratch, activation(scratch[where], lanes), [where])
        with T.serial(0, len(rows)) as i:
            for j in range(width):
                value = scratch[ramp((i * width + j) * lanes, lanes)]
                self._store_word(value, row + i, column + j * lanes, valid - j * lanes)

    # ---- u8 and s8 ----
    def _store_codes(self, rows: list[list[Any]], at: Any, valid: int) -> None:
        row, column = at
        lanes, width = self.lanes, len(rows[0])
        if width * lanes == self.workload.n:  # consecutive rows are contiguous in C
            rows = [[y for vectors in rows for y in vectors]]
            valid = len(rows[0]) * lanes
        for i, vectors in enumerate(rows):
            for first in range(0, len(vectors), 4):
                group = vectors[first : first + 4]
                count = min(valid - first * lanes, len(group) * lanes)
                if count > 0:
                    codes = T.Bind(self._codes(group))
                    self._store_bytes(codes, row + i, column + first * lanes, count)

    def _codes(self, group: list[Any]) -> Any:
        """Up to 4 registers of f32 as int8x(4 lanes), in order; with fewer the rest is copies."""
        lanes, work = self.lanes, self.workload
        to16, to_u8, to_s8 = _PACKS[lanes]
        s32 = []
        for y in group:
            if not work.bounded:  # vcvtps2dq gives INT_MIN beyond 2**31; keeps a NaN
                y = T.Bind(y)
                y = tirx.Select(tirx.GT(y, self._f32(65535.0)), self._f32(65535.0), y)
            s32.append(T.Bind(intrinsic(f"int32x{lanes}", "llvm.lrint", y)))
        s32 = [s32[d % len(s32)] for d in range(4)]
        halves = []
        for a, b in ((s32[0], s32[1]), (s32[2], s32[3])):
            half = intrinsic(f"int16x{2 * lanes}", to16, a, b)
            if work.zero_point:
                zero = splat(work.zero_point, "int16", 2 * lanes)
                half = intrinsic(f"int16x{2 * lanes}", "llvm.sadd.sat", half, zero)
            halves.append(T.Bind(half))
        unsigned = work.out == "u8"
        codes = intrinsic(f"int8x{4 * lanes}", to_u8 if unsigned else to_s8, *halves)
        if work.clamp is not None:
            name = "llvm.u" if unsigned else "llvm.s"
            for which, bound, idle in zip(
                ("max", "min"), work.clamp, (0, 255) if unsigned else (-128, 127), strict=True
            ):
                if bound != idle:
                    limit = splat(bound - 256 if bound > 127 else bound, "int8", 4 * lanes)
                    codes = intrinsic(f"int8x{4 * lanes}", name + which, codes, limit)
        return codes

    def _store_bytes(self, codes: Any, row: Any, column: Any, count: int) -> None:
        """The first `count` codes, whose dwords are interleaved by 128-bit lanes."""
        lanes = self.lanes
        order = [d % (lanes // 4) * 4 + d // (lanes // 4) for d in range(lanes)]
        dtype = "uint8" if self.workload.out == "u8" else "int8"
        words = bits(f"int32x{lanes}", codes)

        def part(first: int, size: int) -> Any:
            dwords = order[first // 4 : (first + size) // 4]
            return bits(f"{dtype}x{size}", T.Shuffle([words], dwords))

        def put(value: Any, first: int, size: int) -> None:
            T.buffer_store(self.c, value, [row, ramp(column + first, size)])

        size = next(s for s in (lanes, 2 * lanes, 4 * lanes) if s >= count)
        if size == count:
            put(part(0, size), 0, size)
        elif self.byte_masks:
            masked_store(self.c, [row, column], part(0, size), size, count)
        else:
            done = 0
            for piece in (16, 8, 4):
                if count - done >= piece:
                    put(part(done, piece), done, piece)
                    done += piece
            if done < count:  # 1 to 3 bytes, from one dword
                word = T.Bind(T.Shuffle([words], [order[done // 4]]))
                for byte in range(count - done):
                    value = tirx.Cast(dtype, word >> (8 * byte))
                    T.buffer_store(self.c, value, [row, column + done + byte])


__all__ = ["Epilogue"]
