"""From the s32 accumulators of a convolution to C: as in `_epilogue`, with a residual sum.

Zero points, limits and factors of the residual come from W, where equal layers may differ.

Four vectors make one 64-byte store of codes. Where a tile has fewer vectors of filters, those of
neighbouring pixels are packed together and their halves or quarters stored one by one.

Instructions per vector, residual with inner quantization: vcvtdq2ps, vmulps, vrndscaleps, vmaxps,
vminps, vpmovzxbd, vcvtdq2ps, 2 vfmadd, vcvtps2dq, and 1 for the packs: 11. On Zen 4 only vmulps and
vfmadd compete with vpdpbusd for its pipes (measured: a pair takes 2 cycles, with most others
1.25), so that most of it is free if it runs among the multiplications of another tile. The
scheduler looks about 64 instructions ahead: `emit` therefore yields after every instruction, for
the caller to put its own between them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

from ...workload import INT8_LIMITS, Conv
from ._epilogue import _PACKS, Epilogue
from ._ir import T, bits, intrinsic, masked_load, masked_store, ramp, tirx

Constant = Callable[[str, str], Any]  # by name and dtype: a vector, all lanes alike
Steps = Generator[None, None, Any]  # one instruction a step, its value at the end
Place = tuple[int, int, int, int]  # of codes in a pack: first code, codes, pixel, vector


class ConvEpilogue(Epilogue):
    """The end of a tile of neighbouring pixels x vectors of filters.

    `c`, and `residual` if there is one, are (pixels, filters).
    """

    def __init__(
        self,
        workload: Conv,
        lanes: int,
        byte_masks: bool,
        c: Any,
        residual: Any,
        constant: Constant,
    ) -> None:
        super().__init__(workload, lanes, byte_masks, c)
        self.conv, self.residual, self.constant = workload, residual, constant

    def emit(
        self, registers: list[list[Any]], scale: list[Any], bias: list[Any], at: Any, valid: int
    ) -> Iterator[None]:
        """As `store`, in steps of about one instruction."""
        if self.conv.out not in INT8_LIMITS:
            super().store(registers, scale, bias, at, valid)
            return
        row, column = at
        lanes = self.lanes
        for cells, places in self._packs(len(registers), valid):
            codes = yield from _each(
                [
                    self._code(
                        self._scaled(registers[i][j], j, scale, bias),
                        row + i,
                        column + j * lanes,
                        valid - j * lanes,
                    )
                    for i, j in cells
                ]
            )
            words = yield from self._words(codes)
            for first, count, i, j in places:
                self._put(words, first, count, row + i, column + j * lanes)
                yield

    def store(
        self, registers: list[list[Any]], scale: list[Any], bias: list[Any], at: Any, valid: int
    ) -> None:
        for _ in self.emit(registers, scale, bias, at, valid):
            pass

    def instructions(self, pixels: int, vectors: int) -> int:
        """About as many steps as `emit` has."""
        residual = self.conv.residual
        each = 4 + (0 if residual is None else 8 if residual.inner else 3)
        return pixels * vectors * each + -(-pixels * vectors // 4) * 4

    def _packs(
        self, pixels: int, valid: int
    ) -> Iterator[tuple[list[tuple[int, int]], list[Place]]]:
        """Which (pixel, vector) are packed together, and where their codes go."""
        lanes = self.lanes
        width = -(-valid // lanes)
        if self.conv.groups == 1 and width * lanes == self.conv.filters:  # C is contiguous
            cells = [(i, j) for i in range(pixels) for j in range(width)]
            for k in range(0, len(cells), 4):
                pack = cells[k : k + 4]
                yield pack, [(0, len(pack) * lanes, *pack[0])]
            return
        rest = width % 4
        for i in range(pixels):
            for j in range(0, width - rest, 4):
                places = [(0, min(4 * lanes, valid - j * lanes), i, j)]
                yield [(i, j + d) for d in range(4)], places
        if not rest:
            return
        together, j = 4 // rest, width - rest
        for top in range(0, pixels, together):
            members = range(top, min(top + together, pixels))
            places = [(s * rest * lanes, valid - j * lanes, i, j) for s, i in enumerate(members)]
            yield [(i, j + d) for i in members for d in range(rest)], places

    def _code(self, y: Any, pixel: Any, column: Any, valid: int) -> Steps:
        """From y as f32 to its s32 code, without the zero point."""
        lanes, dtype, residual = self.lanes, f"float32x{self.lanes}", self.conv.residual
        y = T.Bind(y)
        yield
        if residual is not None:
            other = T.Bind(self._residual(pixel, column, valid))
            yield
            b, c = self.constant("b", dtype), self.constant("c", dtype)
            if not residual.inner:  # LLVM would make the product in y and this sum one fma
                other = T.Bind(intrinsic(dtype, "llvm.fma", other, b, c))
                yield
                y = T.Bind(intrinsic(dtype, "llvm.arithmetic.fence", y) + other)
                yield
            else:
                low, high = self.constant("low", dtype), self.constant("high", dtype)
                q = T.Bind(intrinsic(dtype, "llvm.rint", y))
                yield
                q = T.Bind(q + self.constant("shift", dtype))
                yield
                q = T.Bind(tirx.Select(tirx.LT(q, low), low, q))
                yield
                q = T.Bind(tirx.Select(tirx.GT(q, high), high, q))
                yield
                terms = [(q, self.constant("a", dtype)), (other, b)]
                if residual.first:
                    terms.reverse()
                inner = T.Bind(intrinsic(dtype, "llvm.fma", *terms[1], c))
                yield
                y = T.Bind(intrinsic(dtype, "llvm.fma", *terms[0], inner))
                yield
        if not self.conv.bounded:  # vcvtps2dq gives INT_MIN beyond 2**31; keeps a NaN
            y = T.Bind(tirx.Select(tirx.GT(y, self._f32(65535.0)), self._f32(65535.0), y))
            yield
        return T.Bind(intrinsic(f"int32x{lanes}", "llvm.lrint", y))

    def _residual(self, pixel: Any, column: Any, valid: int) -> Any:
        """float32xL of R; filters past the last are not read."""
        lanes = self.lanes
        if valid >= lanes:
            codes = self.residual[pixel, ramp(column, lanes)]
        elif self.byte_masks:
            codes = masked_load(self.residual, [pixel, column], lanes, valid)
        else:
            parts = [self.residual[pixel, column + min(i, valid - 1)] for i in range(lanes)]
            codes = T.Shuffle(parts, list(range(lanes)))
        return tirx.Cast(f"float32x{lanes}", tirx.Cast(f"int32x{lanes}", codes))

    def _words(self, s32: list[Any]) -> Steps:
        """Up to 4 registers of s32 as codes in order, int32xL; with fewer the rest is copies."""
        lanes, work = self.lanes, self.conv
        to16, to_u8, to_s8 = _PACKS[lanes]
        s32 = [s32[d % len(s32)] for d in range(4)]
        halves = []
        for a, b in ((s32[0], s32[1]), (s32[2], s32[3])):
            half = intrinsic(f"int16x{2 * lanes}", to16, a, b)
            if work.shifted:
                zero = self.constant("zero", f"int16x{2 * lanes}")
                half = intrinsic(f"int16x{2 * lanes}", "llvm.sadd.sat", half, zero)
            halves.append(T.Bind(half))
            yield
        unsigned = work.out == "u8"
        dtype = f"int8x{4 * lanes}"
        codes = intrinsic(dtype, to_u8 if unsigned else to_s8, *halves)
        if work.clamped:
            name = "llvm.u" if unsigned else "llvm.s"
            codes = intrinsic(dtype, name + "max", codes, self.constant("least", dtype))
            codes = intrinsic(dtype, name + "min", codes, self.constant("greatest", dtype))
        codes = T.Bind(codes)
        yield
        quarter = lanes // 4  # the packs interleave dwords by 128-bit lanes
        order = [d % quarter * 4 + d // quarter for d in range(lanes)]
        return T.Bind(T.Shuffle([bits(f"int32x{lanes}", codes)], order))

    def _put(self, words: Any, first: int, count: int, row: Any, column: Any) -> None:
        """Stores codes first .. first + count - 1 at C[row, column]."""
        lanes = self.lanes
        dtype = "uint8" if self.conv.out == "u8" else "int8"

        def part(begin: int, size: int) -> Any:
            dwords = list(range((first + begin) // 4, (first + begin + size) // 4))
            piece = words if size == 4 * lanes else T.Shuffle([words], dwords)
            return bits(f"{dtype}x{size}", piece)

        def put(begin: int, size: int) -> None:
            T.buffer_store(self.c, part(begin, size), [row, ramp(column + begin, size)])

        done = 0
        while done < count:
            left = count - done
            whole = [s for s in (4 * lanes, 2 * lanes, lanes) if s <= left]
            if whole:
                put(done, whole[0])
                done += whole[0]
            elif left % 4 == 0:
                size = 1 << (left.bit_length() - 1)
                put(done, size)
                done += size
            elif self.byte_masks:
                masked_store(self.c, [row, column + done], part(done, lanes), lanes, left)
                done = count
            elif left >= 4:
                put(done, 4)
                done += 4
            else:  # 1 to 3 bytes, from one dword
                word = T.Bind(T.Shuffle([words], [(first + done) // 4]))
                for byte in range(left):
                    value = tirx.Cast(dtype, word >> (8 * byte))
                    T.buffer_store(self.c, value, [row, column + done + byte])
                done = count


def _each(parts: list[Steps]) -> Steps:
    """One after the other of `parts`; their values."""
    values = []
    for steps in parts:
        values.append((yield from steps))
        yield
    return values


__all__ = ["ConvEpilogue"]
