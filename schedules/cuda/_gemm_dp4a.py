"""The function of `gemm_u8s8s32_dp4a`: a warp's steps, the sums of its parts and of all warps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...workload import Gemm
from ._epilogue import narrow
from ._gemm_int import Operands
from ._ir import (
    T,
    address,
    barrier,
    call,
    ceil_div,
    do,
    i32,
    launch,
    local,
    prim_func,
    shared,
    tirx,
    when,
)

if TYPE_CHECKING:
    from .gemm_u8s8s32_dp4a import GemmDp4a, Params


class Builder:
    """One PrimFunc of `kernel` for a workload and parameters."""

    def __init__(self, kernel: GemmDp4a, workload: Gemm, params: Params) -> None:
        assert workload.m is not None
        self.name, self.work, self.p, self.m = kernel.name, workload, params, workload.m
        self.lay = kernel.layout(workload, params)

    def function(self) -> Any:
        p, work = self.p, self.work
        with prim_func(self.name) as builder:
            self.io = Operands(work, self.lay.at)
            with launch((self.lay.blocks,), (32 * p.warps,)) as (block, thread):
                self.block, self.thread = block, thread
                self.lane, self.warp = T.Bind(thread % 32), T.Bind(thread // 32)
                self.part = T.Bind(self.lane // p.columns)
                self.acc = local(self.m, "int32")
                self.sums = local(self.m, "int32")
                for row in range(self.m):
                    T.buffer_store(self.acc, i32(0), [row])
                    T.buffer_store(self.sums, i32(0), [row])
                self._constants()
                self._multiply()
                self._add_parts()
                self._finish()
        return builder.get().with_attr("dcc.kernel", self.name)

    def _constants(self) -> None:
        """The values of the column that a thread ends: read now, not when all else is done."""
        io = self.io
        self.column = T.Bind(self.block * self.p.columns + self.thread % self.p.columns)
        self.start = T.Bind(io.starts(self.column, 1)[0])
        self.scale, self.bias = io.scales(self.column, 1)[0], io.biases(self.column, 1)[0]
        if self.work.b_zero:
            self.zero = T.Bind(io.zeros(self.column, 1)[0])

    # ---- products ----
    def _multiply(self) -> None:
        p, steps = self.p, self.lay.steps
        turns = ceil_div(steps, p.warps * p.ahead)
        b = local(4 * p.ahead, "uint32")
        a = local(4 * self.m, "uint32")
        with T.serial(0, turns) as turn:
            first = T.Bind(turn * (p.warps * p.ahead) + self.warp)
            for i in range(p.ahead):
                self._load_b(first + i * p.warps, b, 4 * i)
            for i in range(p.ahead):
                step = T.Bind(first + i * p.warps)
                # beyond the last step b is not loaded, and a must not be
                with when(step < steps if steps % (p.warps * p.ahead) else None):
                    self._step(step, a, b, 4 * i)

    def _load_b(self, step: Any, b: Any, at: int) -> None:
        """The last step is read again by the warps that have none left."""
        steps = self.lay.steps
        step = T.Bind(tirx.min(step, steps - 1) if steps % (self.p.warps * self.p.ahead) else step)
        where = self.io.in_w(self.block, steps, step) * 512 + self.lane * 16
        do("load16_once", address(b, at), address(self.io.w, where))

    def _step(self, step: Any, a: Any, b: Any, at: int) -> None:
        k = self.work.k
        begin = T.Bind((step * (32 // self.p.columns) + self.part) * 16)
        # No byte after a row is read as a part of it: B is 0 there, and what a copy of earlier
        # bytes adds to the sum of a row is masked.
        source = T.Bind(tirx.min(begin, k - 16)) if k % 16 == 0 else begin
        for row in range(self.m):
            if k % 16 == 0:
                do("load16", address(a, 4 * row), address(self.io.a, row, source))
                continue
            if k % 4:
                place, end = address(self.io.a, row, begin), address(self.io.a, self.m, 0)
                do("load16_part", address(a, 4 * row), place, k - begin, end)
                continue
            for i in range(4):
                place = address(self.io.a, row, tirx.min(begin + 4 * i, k - 4))
                T.buffer_store(a, call("uint32", "load4", place), [4 * row + i])
        ones = [i32(0x01010101)] * 4
        whole = k % self.p.step == 0
        if self.work.b_zero and not whole:
            ones = [
                T.Bind(tirx.Select(begin + 4 * i < k, i32(0x01010101), i32(0))) for i in range(4)
            ]
        for row in range(self.m):
            for i in range(4):
                word = a[4 * row + i]
                T.buffer_store(self.acc, self.io.dot(word, b[at + i], self.acc[row]), [row])
                if self.work.b_zero:
                    T.buffer_store(self.sums, self.io.dot(word, ones[i], self.sums[row]), [row])

    # ---- end ----
    def _add_parts(self) -> None:
        """Afterwards every lane has the sums of its column over the warp's part of K."""
        if self.work.b_zero:
            for row in range(self.m):
                T.buffer_store(self.acc, self.acc[row] - self.sums[row] * self.zero, [row])
        mask = self.p.columns
        while mask < 32:
            for row in range(self.m):
                other = call("int32", "shuffle_xor", self.acc[row], i32(mask))
                T.buffer_store(self.acc, self.acc[row] + other, [row])
            mask *= 2

    def _finish(self) -> None:
        p, io, n = self.p, self.io, self.work.n
        size = self.m * p.columns
        smem = shared(p.warps * size, "int32")
        with T.If(self.lane < p.columns), T.Then():
            for row in range(self.m):
                where = self.warp * size + row * p.columns + self.lane
                T.buffer_store(smem, self.acc[row], [where])
        barrier()
        total = local(1, "int32")
        for first in range(0, size, 32 * p.warps):
            number = T.Bind(self.thread + first)
            inside = self.column < n if n % p.columns else None
            rest = number < size if first + 32 * p.warps > size else None
            with when(rest), when(inside):
                T.buffer_store(total, self.start, [0])
                for warp in range(p.warps):
                    T.buffer_store(total, total[0] + smem[warp * size + number], [0])
                value = io.epilogue.value(total[0], self.scale, self.bias)
                row = T.Bind(number // p.columns)
                T.buffer_store(io.c, narrow(value, self.work.out), [row, self.column])
