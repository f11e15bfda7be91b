"""The loops around the integer micro-kernels: row blocks x column panels, shared among threads.

    for unit = (chunk of row blocks, panel):      parallel, where there is work for it
        for block in chunk:  tile of up to mr rows x nr vectors, all of K at once

Rows: M known gives blocks of two sizes that differ by one (10 rows, mr 6: 5 + 5). M known at run
time gives blocks of mr rows and one tail of each size, or, in the branch for many rows, a last
block that overlaps the one before. Columns: panels of nr vectors and one of what remains, whose
last vector is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...machine import Machine
from ...workload import NUMPY, Gemm
from ._epilogue import Epilogue
from ._ir import T, bits, intrinsic, local, prim_func, ramp, splat, tirx

if TYPE_CHECKING:
    from ._gemm_int import IntegerGemm

_PARALLEL_US = 20.0  # less is not worth sharing: a launch costs 1 to 3 us, and tiles of its own
_UNITS = 32  # parallel units to aim at, so that a few threads get nearly equal shares
_CHUNK_BYTES = 256 << 10  # rows of A that stay in L2 while panel after panel passes
_WEIGHT_BYTES_PER_US = 80e3  # streaming W, where rows are few
_UNROLL = 128  # multiply-adds of a tile up to which its k-loop is unrolled

Emit = Callable[[Any, int], None]  # a tile at a row, of a number of rows


def ceil_div(a: Any, b: Any) -> Any:
    return (a + (b - 1)) // b


class Builder:
    """One PrimFunc of `kernel` for a workload and parameters."""

    def __init__(self, kernel: IntegerGemm, workload: Gemm, params: Any, machine: Machine) -> None:
        self.kernel, self.workload, self.params = kernel, workload, params
        self.lay = kernel.layout(workload, params)
        m = workload.m
        small = m is not None and m * max(workload.n, workload.k) < 2**31
        self.index = "int32" if small else "int64"
        self.threads_from = self._threads_from()

    def _us(self, m: int) -> float:
        work = self.workload
        return max(
            2 * m * work.n * work.k / (self.kernel.gops * 1e3),
            self.lay.nbytes / _WEIGHT_BYTES_PER_US,
        )

    def _threads_from(self) -> int | None:
        """Least M that is shared among threads; None: no M of this workload."""
        m = self.workload.m
        if m is not None:
            return m if self._us(m) >= _PARALLEL_US else None
        low, high = 1, 1 << 40
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._us(middle) >= _PARALLEL_US else (middle + 1, high)
        return low

    def const(self, value: int) -> Any:
        return tirx.const(value, self.index)

    # ---- function and loops ----
    def function(self) -> Any:
        work = self.workload
        with prim_func(self.kernel.name) as builder:
            m = tirx.Var("m", "int64") if work.m is None else self.const(work.m)
            n, k = self.const(work.n), self.const(work.k)
            self.a = T.arg("a", T.buffer((m, k), NUMPY[work.a]))
            self.w = T.arg("w", T.buffer((self.lay.nbytes,), "uint8"))
            if work.runtime:
                self.a_zero = T.arg("a_zero", T.buffer((1,), NUMPY[work.a]))
                if work.out != "s32":
                    self.a_scale = T.arg("a_scale", T.buffer((1,), "float32"))
            self.c = T.arg("c", T.buffer((m, n), NUMPY[work.out]))
            self.epilogue = Epilogue(work, self.lay.lanes, self.kernel.bits == 512, self.c)
            if self.kernel.staged:
                self._stage(m)
            if work.b_zero:
                self._sum_rows(m)
            if work.m is not None:
                self._static(work.m)
            else:
                self._dynamic(m)
        return builder.get()

    def _static(self, m: int) -> None:
        mr = self.params.mr
        blocks = -(-m // mr)
        low, high = m // blocks, -(-m // blocks)
        tall = m - low * blocks  # blocks of `high` rows

        def block(b: Any, emit: Emit) -> None:
            if low == high:
                emit(b * high, high)
                return
            with T.If(b < tall):
                with T.Then():
                    emit(b * high, high)
                with T.Else():
                    emit(b * low + tall, low)

        parallel = self.threads_from is not None
        chunk = max(1, _CHUNK_BYTES // (mr * self.workload.k))
        if parallel:
            chunk = min(chunk, ceil_div(blocks, ceil_div(_UNITS, self.lay.panels)))
        self._units(blocks, chunk, block, parallel)

    def _dynamic(self, m: Any) -> None:
        mr = self.params.mr
        blocks = ceil_div(m, self.const(mr))
        chunk = max(1, min(_CHUNK_BYTES // (mr * self.workload.k), 4))

        def with_tails(b: Any, emit: Emit) -> None:
            if mr == 1:
                emit(b, 1)
                return
            with T.If(b < m // mr):
                with T.Then():
                    emit(b * mr, mr)
                with T.Else():
                    for rest in range(1, mr):
                        with T.If(tirx.EQ(m % mr, self.const(rest))):
                            with T.Then():
                                emit(b * mr, rest)

        def overlapping(b: Any, emit: Emit) -> None:
            emit(tirx.min(b * mr, m - mr), mr)

        start = self.threads_from
        if start is None or start == 1:
            self._units(blocks, chunk, with_tails, start == 1)
            return
        with T.If(m < start):
            with T.Then():
                self._units(blocks, None, with_tails, False)
            with T.Else():
                self._units(blocks, chunk, overlapping if start >= 2 * mr else with_tails, True)

    def _units(self, blocks: Any, chunk: int | None, block: Any, parallel: bool) -> None:
        """All tiles; at most `chunk` row blocks to a unit, None: all. Units are made equal."""
        panels = self.lay.panels
        chunks = 1 if chunk is None else ceil_div(blocks, chunk)
        share = ceil_div(blocks, chunks)
        if not isinstance(share, int):
            share = T.Bind(share)

        def unit(first: Any, last: Any, panel: Any) -> None:
            def run(offset: Any, vector: Any, nr: int, valid: int) -> None:
                def emit(row: Any, rows: int) -> None:
                    self._tile(row, rows, offset, vector, nr, valid)

                if isinstance(blocks, int) and blocks == 1:
                    block(self.const(0), emit)
                else:
                    with T.serial(first, last) as b:
                        block(b, emit)

            self._panel(panel, run)

        loop = T.parallel if parallel else T.serial
        if isinstance(chunks, int) and chunks * panels == 1:
            unit(self.const(0), self.const(blocks) if isinstance(blocks, int) else blocks, 0)
            return
        with loop(self.const(0), chunks * self.const(panels)) as u:
            if isinstance(chunks, int) and chunks == 1:
                unit(self.const(0), blocks, u)
            else:
                first = T.Bind(tirx.min(u // panels * share, blocks))
                last = T.Bind(tirx.min(first + share, blocks))
                unit(first, last, u % panels)

    def _panel(self, panel: Any, run: Callable[[Any, Any, int, int], None]) -> None:
        """run(byte offset in W, first vector, vectors, columns) of panel number `panel`."""
        lay, n = self.lay, self.workload.n
        nr, stride = lay.nr, lay.steps * lay.step_bytes
        whole = n // lay.lanes // nr  # panels of whole vectors
        rest = (
            whole * nr * stride,
            whole * nr,
            lay.vectors - whole * nr,
            n - whole * nr * lay.lanes,
        )
        if whole == 0:
            run(*rest)
        elif whole == lay.panels:
            run(panel * (nr * stride), panel * nr, nr, nr * lay.lanes)
        else:
            with T.If(panel < whole):
                with T.Then():
                    run(panel * (nr * stride), panel * nr, nr, nr * lay.lanes)
                with T.Else():
                    run(*rest)

    # ---- one tile ----
    def _tile(self, row: Any, rows: int, offset: Any, vector: Any, nr: int, valid: int) -> None:
        kernel, work, lay = self.kernel, self.workload, self.lay
        lanes = lay.lanes
        acc = local(rows * nr * lanes, "int32")
        start = [T.Bind(self._start(vector + j)) for j in range(nr)]
        for i in range(rows):
            for j in range(nr):
                T.buffer_store(acc, start[j], [ramp((i * nr + j) * lanes, lanes)])

        def step(s: Any) -> None:
            at = offset + s * (nr * lay.step_bytes)
            b = [
                kernel.b_operands(self.w, at + j * lay.step_bytes, lanes, self.params)
                for j in range(nr)
            ]
            for i in range(rows):
                a = self._operands(row + i, s)
                for j in range(nr):
                    where = ramp((i * nr + j) * lanes, lanes)
                    T.buffer_store(acc, kernel.multiply_add(acc[where], a, b[j], lanes), [where])

        whole = work.k // 4
        looped = whole if whole * rows * nr > _UNROLL else 0
        if looped:
            with T.serial(0, looped) as s:
                step(s)
        for s in range(looped, lay.steps):
            step(s)

        if work.b_zero:
            for i in range(rows):
                for j in range(nr):
                    where = ramp((i * nr + j) * lanes, lanes)
                    zero = self._constants(lay.b_zero, "int32", vector + j)
                    value = acc[where] - T.broadcast(self.row_sums[row + i], lanes) * zero
                    T.buffer_store(acc, value, [where])
        scale = [T.Bind(self._scale(vector + j)) for j in range(nr)] if work.out != "s32" else []
        bias = [
            T.Bind(self._constants(lay.bias, "float32", vector + j))
            for j in range(nr if work.bias == "f32" else 0)
        ]
        registers = [
            [acc[ramp((i * nr + j) * lanes, lanes)] for j in range(nr)] for i in range(rows)
        ]
        self.epilogue.store(registers, scale, bias, (row, vector * lanes), valid)

    def _dword(self, row: Any, step: Any) -> Any:
        """4 bytes of a row of A as int32; those of the last step end with the row."""
        k = self.workload.k
        if isinstance(step, int) and step * 4 + 4 > k:
            if k < 4:
                value = tirx.const(0, "int32")
                for t in range(k):
                    byte = tirx.Cast("int32", bits("uint8", self.a[row, t]))
                    value = value | (byte << (8 * t))
                return value
            return bits("int32", self.a[row, ramp(k - 4, 4)])
        return bits("int32", self.a[row, ramp(step * 4, 4)])

    def _operands(self, row: Any, step: Any) -> list[Any]:
        """Multiplier inputs of a row's 4 bytes."""
        lanes = self.lay.lanes
        if self.kernel.staged:
            pairs = [bits("int32", self.staged[row, ramp(step * 4 + at, 2)]) for at in (0, 2)]
            return [T.Bind(bits(f"int16x{2 * lanes}", T.broadcast(p, lanes))) for p in pairs]
        dwords = T.broadcast(self._dword(row, step), lanes)
        if self.kernel.flips(self.workload):
            # A constant mask LLVM would apply before the broadcast, which then is a shuffle
            # instead of a part of the load: 13 % slower.
            dwords = dwords ^ bits(f"int32x{lanes}", self.w[ramp(self.lay.flip, 4 * lanes)])
        return self.kernel.a_operands(dwords, lanes)

    def _stage(self, m: Any) -> None:
        """All of A widened to 16 bits, in k-steps as the tiles read them.

        Once for all columns: a pair for the multiplier is then one broadcasting load. Widened in
        every tile, AVX2 is 10 % slower; in registers, AVX-512 is 7 % slower as well.
        """
        k, steps = self.workload.k, self.lay.steps
        a, dtype = self.a, NUMPY[self.workload.a]
        self.staged = T.alloc_buffer((m, self.const(steps * 4)), "int16", scope="global")

        def move(row: Any, at: Any, size: int) -> None:
            wide = tirx.Cast(f"int16x{size}", a[row, ramp(at, size)])
            T.buffer_store(self.staged, wide, [row, ramp(at, size)])

        with T.serial(self.const(0), m) as row:
            whole = k // 4 * 4
            size = next((s for s in (self.kernel.bits // 16, 16, 8, 4) if s <= whole), 0)
            if size:
                with T.serial(0, whole // size) as c:
                    move(row, c * size, size)
                if whole % size:  # overlaps the one before
                    move(row, whole - size, size)
            if k % 4:
                last = bits(f"{dtype}x4", self._dword(row, steps - 1))
                wide = tirx.Cast("int16x4", last)
                T.buffer_store(self.staged, wide, [row, ramp(steps * 4 - 4, 4)])

    def _sum_rows(self, m: Any) -> None:
        """Sums of the rows of A as the tiles read them, once for all columns.

        Summed in every tile, they cost one more multiplication per row: 25 % more time at nr 4.
        """
        lanes, k = self.lay.lanes, self.workload.k
        self.row_sums = T.alloc_buffer((m,), "int32", scope="global")
        flips = 128 * k if self.kernel.flips(self.workload) else 0
        with T.serial(self.const(0), m) as row:
            total = local(lanes, "int32")
            every = ramp(0, lanes)
            T.buffer_store(total, splat(0, "int32", lanes), [every])
            with T.serial(0, k // lanes) as c:
                part = tirx.Cast(f"int32x{lanes}", self.a[row, ramp(c * lanes, lanes)])
                T.buffer_store(total, total[every] + part, [every])
            start = intrinsic("int32", "llvm.vector.reduce.add", total[every]) + flips
            T.buffer_store(self.row_sums, start, [row])
            with T.serial(0, k % lanes) as t:
                value = tirx.Cast("int32", self.a[row, k // lanes * lanes + t])
                T.buffer_store(self.row_sums, self.row_sums[row] + value, [row])

    def _constants(self, offset: int, dtype: str, vector: Any) -> Any:
        lanes = self.lay.lanes
        return bits(f"{dtype}x{lanes}", self.w[ramp(offset + vector * (4 * lanes), 4 * lanes)])

    def _start(self, vector: Any) -> Any:
        base = self._constants(self.lay.base, "int32", vector)
        if not self.workload.runtime:
            return base
        zero = tirx.Cast("int32", self.a_zero[0])
        if self.kernel.flips(self.workload):
            zero = zero + 128
        sums = self._constants(self.lay.b_sum, "int32", vector)
        return base - T.broadcast(zero, self.lay.lanes) * sums

    def _scale(self, vector: Any) -> Any:
        scale = self._constants(self.lay.scale, "float32", vector)
        if not self.workload.runtime:
            return scale
        return T.broadcast(self.a_scale[0], self.lay.lanes) * scale
