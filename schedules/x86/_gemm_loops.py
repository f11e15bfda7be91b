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
from ._ir import T, bits, intrinsic, prim_func, ramp, splat, tirx

if TYPE_CHECKING:
    from ._gemm_int import IntegerGemm

_PARALLEL_US = 40.0  # work below this is not worth waking other threads, which takes about 5 us
_UNITS = 32  # parallel units to aim at, so that a few threads get nearly equal shares
_CHUNK_BYTES = 256 << 10  # rows of A that stay in L2 while panel after panel passes
_WEIGHT_BYTES_PER_US = 80e3  # streaming W, where rows are few
_STAGED_STEPS = 128  # k-steps widened at once: 1 KiB of stack per row
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
        chunk = max(1, min(_CHUNK_BYTES // (mr * self.workload.k), 16))

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
                self._units(blocks, chunk, overlapping if start >= 4 * mr else with_tails, True)

    def _units(self, blocks: Any, chunk: int | None, block: Any, parallel: bool) -> None:
        """All tiles; `chunk` row blocks to a unit, None: all."""
        panels = self.lay.panels
        chunks = 1 if chunk is None else ceil_div(blocks, chunk)

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
                first = T.Bind(u // panels * chunk)
                last = T.Bind(tirx.min(first + chunk, blocks))
                unit(first, last, u % panels)

    def _panel(self, panel: Any, run: Callable[[Any, Any, int, int], None]) -> None:
        """run(byte offset in W, first vector, vectors, columns) of panel number `panel`."""
        lay, n = self.lay, self.workload.n
        nr, stride = lay.nr, lay.steps * lay.step_bytes
        whole = n // lay.lanes // nr  # panels of whole vectors
        rest = (whole * nr * stride, whole * nr, lay.vectors - whole * nr, n - whole * nr * lay.lanes)
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
        i32 = f"int32x{lanes}"
        acc = T.alloc_buffer((rows * nr * lanes,), "int32", scope="local")
        start = [T.Bind(self._start(vector + j)) for j in range(nr)]
        for i in range(rows):
            for j in range(nr):
                T.buffer_store(acc, start[j], [ramp((i * nr + j) * lanes, lanes)])
        if work.b_zero:
            row_sums = T.alloc_buffer((rows * lanes,), "int32", scope="local")
            for i in range(rows):
                T.buffer_store(row_sums, splat(0, "int32", lanes), [ramp(i * lanes, lanes)])

        def step(s: Any, operands: Callable[[int], list[Any]], ones: tuple[int, ...]) -> None:
            at = offset + s * (nr * lay.step_bytes)
            b = [
                kernel.b_operands(self.w, at + j * lay.step_bytes, lanes, self.params)
                for j in range(nr)
            ]
            for i in range(rows):
                a = operands(i)
                for j in range(nr):
                    where = ramp((i * nr + j) * lanes, lanes)
                    T.buffer_store(acc, kernel.multiply_add(acc[where], a, b[j], lanes), [where])
                if work.b_zero:
                    where = ramp(i * lanes, lanes)
                    constant = kernel.constant(ones, lanes)
                    total = kernel.multiply_add(row_sums[where], a, constant, lanes)
                    T.buffer_store(row_sums, total, [where])

        whole, rest = divmod(work.k, 4)
        all_ones = (1, 1, 1, 1)
        if kernel.staged:
            self._staged_steps(row, rows, whole, lambda s, operands: step(s, operands, all_ones))
        elif whole * rows * nr <= _UNROLL:
            for s in range(whole):
                step(s, lambda i, s=s: self._operands(self._quad(row + i, s * 4)), all_ones)
        elif whole:
            with T.serial(0, whole) as s:
                step(s, lambda i: self._operands(self._quad(row + i, s * 4)), all_ones)
        if rest and whole:
            ones = tuple(int(t >= 4 - rest) for t in range(4))
            step(whole, lambda i: self._operands(self._quad(row + i, work.k - 4)), ones)
        elif rest:
            ones = tuple(int(t < rest) for t in range(4))
            step(0, lambda i: self._operands(self._short_row(row + i)), ones)

        if work.b_zero:
            for i in range(rows):
                for j in range(nr):
                    where = ramp((i * nr + j) * lanes, lanes)
                    zero = self._constants(lay.b_zero, "int32", vector + j)
                    value = acc[where] - row_sums[ramp(i * lanes, lanes)] * zero
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

    def _quad(self, row: Any, k: Any) -> Any:
        return bits("int32", self.a[row, ramp(k, 4)])

    def _short_row(self, row: Any) -> Any:
        """A row of less than 4 bytes as a dword."""
        value = tirx.const(0, "int32")
        for t in range(self.workload.k):
            byte = tirx.Cast("int32", bits("uint8", self.a[row, t]))
            value = value | (byte << (8 * t))
        return value

    def _operands(self, dword: Any) -> list[Any]:
        """Multiplier inputs of 4 bytes of A."""
        lanes, a = self.lay.lanes, self.workload.a
        if self.kernel.staged:
            words = T.Bind(bits("int32x2", tirx.Cast("int16x4", bits(f"{NUMPY[a]}x4", dword))))
            pairs = [T.broadcast(T.Shuffle([words], [half]), lanes) for half in range(2)]
            return [T.Bind(bits(f"int16x{2 * lanes}", pair)) for pair in pairs]
        dwords = T.broadcast(dword, lanes)
        if a == "s8":
            dwords = T.Bind(dwords) ^ splat(-0x7F7F7F80, "int32", lanes)
        return self.kernel.a_operands(dwords, lanes)

    def _staged_steps(self, row: Any, rows: int, steps: int, step: Any) -> None:
        """The k-loop in blocks of which A is first widened to 16 bits, on the stack.

        Widened ahead, a pair for the multiplier is one broadcasting load; widened in place, it
        is two more vector operations, of which there are only two per product and sum.
        """
        lanes = self.lay.lanes
        block = min(steps, _STAGED_STEPS)
        staged = T.alloc_buffer((rows * max(1, block) * 4,), "int16", scope="local")

        def run(first: Any, count: int) -> None:
            for i in range(rows):
                self._widen(staged, i * block * 4, row + i, first * 4, count * 4)
            with T.serial(0, count) as s:

                def operands(i: int) -> list[Any]:
                    at = i * (block * 4) + s * 4
                    pairs = [bits("int32", staged[ramp(at + 2 * half, 2)]) for half in range(2)]
                    wide = [bits(f"int16x{2 * lanes}", T.broadcast(p, lanes)) for p in pairs]
                    return [T.Bind(w) for w in wide]

                step(first + s, operands)

        if steps > block:
            with T.serial(0, steps // block) as b:
                run(b * block, block)
        elif steps:
            run(0, steps)
        if steps > block and steps % block:
            run(steps - steps % block, steps % block)

    def _widen(self, staged: Any, to: Any, row: Any, k: Any, count: int) -> None:
        """staged[to : to + count] = A[row, k : k + count]."""

        def move(at: Any, size: int) -> None:
            wide = tirx.Cast(f"int16x{size}", self.a[row, ramp(k + at, size)])
            T.buffer_store(staged, wide, [ramp(to + at, size)])

        size = next(s for s in (self.kernel.bits // 16, 16, 8, 4) if s <= count)
        with T.serial(0, count // size) as c:
            move(c * size, size)
        if count % size:  # overlaps the last whole one
            move(count - size, size)

    def _constants(self, offset: int, dtype: str, vector: Any) -> Any:
        lanes = self.lay.lanes
        return bits(f"{dtype}x{lanes}", self.w[ramp(offset + vector * (4 * lanes), 4 * lanes)])

    def _start(self, vector: Any) -> Any:
        base = self._constants(self.lay.base, "int32", vector)
        if not self.workload.runtime:
            return base
        zero = tirx.Cast("int32", self.a_zero[0])
        if self.workload.a == "s8" and not self.kernel.staged:
            zero = zero + 128
        sums = self._constants(self.lay.b_sum, "int32", vector)
        return base - T.broadcast(zero, self.lay.lanes) * sums

    def _scale(self, vector: Any) -> Any:
        scale = self._constants(self.lay.scale, "float32", vector)
        if not self.workload.runtime:
            return scale
        return T.broadcast(self.a_scale[0], self.lay.lanes) * scale
