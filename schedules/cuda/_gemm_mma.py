"""The function of `gemm_u8s8s32_mma`: copies to shared memory and products; the rest is `Tile`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...workload import Gemm
from ._gemm_int import Operands
from ._gemm_tile import Tile
from ._ir import T, address, barrier, ceil_div, do, i32, launch, local, prim_func, tirx, when

if TYPE_CHECKING:
    from .gemm_u8s8s32_mma import GemmMma, Params

_STATIC = 48 << 10  # bytes of shared memory that need no consent of the driver
_LARGE = 8 << 20  # bytes of B that are much of a second-level cache
_GROUP = 8  # rows of blocks


class Builder(Tile):
    """One PrimFunc of `kernel` for a workload and parameters."""

    def __init__(self, kernel: GemmMma, workload: Gemm, params: Params, run: int) -> None:
        super().__init__(workload, params, run)
        self.name, self.lay = kernel.name, kernel.layout(workload, params)
        # words of shared memory: A's part of a stage, all of it
        self.a_words = params.split * params.bm * 16
        self.stage_words = self.a_words + params.split * params.bn * 16

    def function(self) -> Any:
        p, panels = self.p, self.lay.blocks
        with prim_func(self.name) as builder:
            io = Operands(self.work, self.lay.at)
            blocks = tirx.floordiv(io.m + (p.bm - 1), io.const(p.bm))
            with launch((blocks * panels,), (p.threads,)) as (block, thread):
                scope = "shared" if p.shared <= _STATIC else "shared.dyn"
                smem = T.alloc_buffer((p.shared // 4,), "uint32", scope=scope)
                self.place(io, smem, thread)
                self._choose(block, blocks, panels)
                self._multiply()
                if self.work.b_zero:
                    self.correct()
                if p.split > 1:
                    self.add_up()
                with when(tirx.EQ(self.part, 0) if p.split > 1 else None):
                    self.finish()
        return builder.get().with_attr("dcc.kernel", self.name)

    def _choose(self, block: Any, blocks: Any, panels: int) -> None:
        """Which rows and columns are a block's: side by side, so that they share rows of A.

        Where B does not stay in L2 below one row of blocks, `_GROUP` rows of them go together.
        """
        if self.work.n * self.work.k < _LARGE:
            row, panel = tirx.floordiv(block, panels), tirx.floormod(block, panels)
        else:
            first = T.Bind(tirx.floordiv(block, _GROUP * panels) * _GROUP)
            rows = T.Bind(tirx.min(blocks - first, _GROUP))
            within = T.Bind(tirx.floormod(block, _GROUP * panels))
            row, panel = first + tirx.floormod(within, rows), tirx.floordiv(within, rows)
        self.first_row = T.Bind(row * self.p.bm)
        self.panel = T.Bind(tirx.Cast("int32", panel))

    # ---- copies ----
    def _copies(self, bytes_of: int) -> list[tuple[Any, Any]]:
        """(number, condition) of the 16-byte chunks that a thread copies of so many bytes."""
        chunks, threads = bytes_of // 16, self.p.threads
        found = []
        for i in range(ceil_div(chunks, threads)):
            rest = chunks - i * threads
            found.append(
                (self.thread + i * threads, self.thread < rest if rest < threads else None)
            )
        return found

    def _rows(self) -> None:
        """What every chunk of A that a thread copies keeps: row, byte of it, place, validity."""
        p, io = self.p, self.io
        self.chunks = []
        for number, condition in self._copies(p.split * p.bm * 64):
            slice_, row, c = number // (4 * p.bm), number // 4 % p.bm, number % 4
            at = T.Bind(self.first_row + io.cast(row))
            inside = T.Bind(at < io.m)
            from_k = T.Bind(slice_ * 64 + c * 16)
            row_of_a = T.Bind(tirx.min(at, io.m - 1))
            place = T.Bind((slice_ * p.bm + row) * 16 + (c ^ (row // 2 % 4)) * 4)
            self.chunks.append((row_of_a, from_k, place, inside, condition))

    def _fetch(self, tile: Any, slot: Any) -> None:
        """Starts the copies of a tile of A and B to a stage."""
        p, k = self.p, self.work.k
        stage = T.Bind(slot * self.stage_words)
        for row, from_k, place, inside, condition in self.chunks:
            with when(condition):
                at = T.Bind(tile * (64 * p.split) + from_k)
                rest = T.Bind(tirx.Select(inside, k - at, 0))
                self._copy(row, at, stage + place, rest)
        bytes_of = p.split * p.bn * 64
        per_panel = self.lay.steps // p.split  # tiles
        first = T.Bind(self.io.in_w(self.panel, per_panel, tile) * bytes_of)
        for number, condition in self._copies(bytes_of):
            with when(condition):
                where = address(self.smem, stage + self.a_words + number * 4)
                do("copy16", where, address(self.io.w, first + number * 16), i32(16))

    def _copy(self, row: Any, at: Any, place: Any, rest: Any) -> None:
        """16 bytes of a row of A to a word of shared memory, zeros from byte `rest` on."""
        k, io = self.work.k, self.io

        def within(size: int, begin: int) -> Any:
            return tirx.max(tirx.min(rest - begin, i32(size)), i32(0))

        if k % 16 == 0:
            do("copy16", address(self.smem, place), address(io.a, row, io.cast(at)), within(16, 0))
            return
        if k % 4 == 0:
            for i in range(4):
                source = address(io.a, row, io.cast(at) + 4 * i)
                do("copy4", address(self.smem, place + i), source, within(4, 4 * i))
            return
        # rows begin at any byte: no asynchronous copy can do that
        words = local(4, "uint32")
        source, end = address(io.a, row, io.cast(at)), address(io.a, io.m, 0)
        do("load16_part", address(words, 0), source, rest, end)
        every = T.ramp(0, 1, 4)
        T.buffer_store(self.smem, words[every], [T.ramp(place, 1, 4)])

    # ---- products ----
    def _multiply(self) -> None:
        p = self.p
        tiles = self.lay.steps // p.split
        self._rows()
        for s in range(p.stages - 1):
            if s < tiles:
                self._fetch(i32(s), i32(s))
            do("commit")
        self.start()
        if p.split > 1:  # few rows: blocks have nobody to wait with, registers are left
            self.early = [self.factors(group) for group in range(self.groups)]
        # unrolled 16 times, as ptxas likes to do, the loop takes twice the registers
        with T.serial(0, tiles, annotations={"disable_unroll": True}) as tile:
            do(f"wait{p.stages - 2}")
            barrier()
            stage = T.Bind(tile % p.stages * self.stage_words)
            a = local(2 * 4 * self.tiles, "uint32")
            b = local(4 * self.fragments, "uint32")
            self._load_b(stage, b)
            self._load_a(stage, a, 0)
            if tiles > p.stages - 1:  # after the loads, whose latency it hides
                ahead = T.Bind(tile + (p.stages - 1))
                with T.If(ahead < tiles), T.Then():
                    self._fetch(ahead, ahead % p.stages)
            do("commit")
            self._load_a(stage, a, 1)
            for step in range(2):
                self._step(a, b, step)

    def _load_b(self, stage: Any, b: Any) -> None:
        """A lane's words of both k-steps."""
        part = self.part * (self.p.bn // 8) + self.column * self.fragments
        first = T.Bind(stage + self.a_words + part * 128 + self.lane * 4)
        for j in range(self.fragments):
            value = self.smem[T.ramp(first + j * 128, 1, 4)]
            T.buffer_store(b, value, [T.ramp(j * 4, 1, 4)])

    def _load_a(self, stage: Any, a: Any, step: int) -> None:
        """A lane's words of one k-step: 4 matrices of 8 rows x 16 bytes for every 16 rows."""
        p, lane = self.p, self.lane
        row = self.part * p.bm + self.row * p.wm + lane % 16
        chunk = (step * 2 + lane // 16) ^ (lane // 2 % 4)
        first = T.Bind(stage + row * 16 + chunk * 4)
        for tile in range(self.tiles):
            to = address(a, (step * self.tiles + tile) * 4)
            do("ldmatrix4", to, address(self.smem, first + tile * 256))

    def _step(self, a: Any, b: Any, step: int) -> None:
        """Products of 32 of K."""
        multiply = f"mma_{self.work.a}s8"
        for tile in range(self.tiles):
            words = (step * self.tiles + tile) * 4
            for j in range(self.fragments):
                where = address(self.acc, (tile * self.fragments + j) * 4)
                do(multiply, where, address(a, words), address(b, j * 4 + step * 2))
            if self.work.b_zero:
                for half in range(2):
                    total = self.sums[2 * tile + half]
                    for i in (half, half + 2):
                        total = self.io.total(a[words + i], total)
                    T.buffer_store(self.sums, total, [2 * tile + half])
