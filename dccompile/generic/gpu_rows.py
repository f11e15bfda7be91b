"""Chains such as softmax in one kernel: threads share a row, which stays in shared memory.

Every nest walks the same leading dimensions in step. A block computes one point of these, or a few
where rows are short; between nests there is a barrier.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .gpu_ir import THREADS, barrier, blocks_of, i64, launch, parts, product, shared, when
from .gpu_loops import Kernels, place
from .gpu_partial import Partial
from .gpu_values import Scalar
from .lanes import Memory, flat_index, static
from .loops import count
from .reductions import operands
from .stages import Iter, Nest

_SHARED = 32 << 10  # bytes that rows may take
_MOST = 1 << 16  # steps of a row, where there are too few rows for all multiprocessors


class Rows(Kernels):
    """Writes nests whose first `depth` dimensions are common."""

    def fits(self, nests: list[Nest], inner: dict[Any, Any], depth: int) -> int:
        """Rows for a block; 0 where the nests are better kernels of their own."""
        if not depth:
            return 0
        work = max(count([*n.space[depth:], *n.over]) for n in nests)
        rows = [it.size for it in nests[0].space[:depth]]
        few = None not in rows and count(nests[0].space[:depth]) < self.multiprocessors
        if few and work > _MOST:
            return 0
        nbytes = 0
        for buffer, shape in inner.items():
            size = static(product(shape[depth:]))
            if size is None:
                return 0
            nbytes += size * buffer.ty.dtype.dtype.itemsize
        group = 1
        while group < THREADS and group * 2 <= work:
            group *= 2
        most = THREADS // group
        while most and nbytes * most > _SHARED:
            most //= 2
        return most

    def rows(self, nests: list[Nest], inner: dict[Any, Any], depth: int, most: int) -> None:
        """One kernel of `most` rows a block."""
        common = nests[0].space[:depth]
        total = product(it.extent for it in common)
        group = THREADS // most
        with launch(blocks_of(total, most)) as (b, t):
            slot = T.Bind(tirx.Cast("int64", tirx.FloorDiv(t, group)))
            y = T.Bind(tirx.FloorMod(t, group))
            at = T.Bind(b * most + slot)
            active = T.Bind(at < total)
            env = place(common, at)
            memory = _Slots(self.memory, slot)
            self.memory = memory
            for buffer, shape in inner.items():
                size = static(product(shape[depth:]))
                assert size is not None
                flat = shared(max(1, size) * most, str(buffer.ty.dtype.dtype))
                memory.slots[buffer] = (flat, shape[depth:], size, depth)
            for i, nest in enumerate(nests):
                if i:
                    barrier()
                own = {it.var: env[c.var] for it, c in zip(nest.space, common, strict=False)}
                own = {v: self.as_type(v, e) for v, e in own.items()}
                self.row(nest, nest.space[depth:], own, (t, y, group, active))

    def row(
        self, nest: Nest, space: list[Iter], env: dict[Any, Any], thread: tuple[Any, Any, int, Any]
    ) -> None:
        nest, space = self.fused(nest, space)
        t, y, group, active = thread
        total = product(it.extent for it in space)
        if nest.over:
            nest, over = self.fused(nest, nest.over)
            nest = replace(nest, over=over)
            terms = operands(nest)
            if terms is not None and nest.over and count(space) < group and count(over) > 1:
                with T.serial(i64(0), total) as s:
                    point = {**env, **place(space, s)}
                    partial = Partial(self, nest, point, terms)
                    with when(active):
                        partial.run(y, group)
                    partial.join(t, y, group, THREADS, True)
                    with when(tirx.And(active, tirx.EQ(y, 0))):
                        self.single(nest, Scalar(self.memory, point, partial.hook()))
                return
        with when(active), T.serial(i64(0), parts(total, group)) as i:
            at = T.Bind(i * group + tirx.Cast("int64", y))
            with when(at < total):
                point = {**env, **place(space, at)}
                if nest.over:
                    partial = Partial(self, nest, point, None)
                    partial.run(y, 1)
                    self.single(nest, Scalar(self.memory, point, partial.hook()))
                else:
                    self.single(nest, Scalar(self.memory, point))


class _Slots(Memory):
    """Memory in which each of a block's rows has its own copy of the inner buffers."""

    def __init__(self, memory: Memory, slot: Any) -> None:
        super().__init__(memory.bits)
        self.views = memory.views
        self.slot = slot
        self.slots: dict[Any, tuple[Any, list[Any], int, int]] = {}

    def at(self, old: Any, indices: Any) -> tuple[Any, Any]:
        if old not in self.slots:
            return super().at(old, indices)
        flat, shape, size, dropped = self.slots[old]
        return flat, self.slot * size + flat_index(list(indices)[dropped:], shape)
