"""The gather of a bag: its rows added up in registers, later rows prefetched, the sums stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...workload import NUMPY, EmbeddingBag
from ._embedding import EmbeddingKernel, Params, columns, lines
from ._ir import T, bits, i64, intrinsic, local, masked_store, ramp, splat, tirx

SIZES = {"f32": 4, "f16": 2, "u8": 1, "u4": 1}  # bytes of a column, or of two
Ahead = Callable[[Any, int], tuple[Any, Any]]


@dataclass(frozen=True)
class Bag:
    """A bag: `count` terms from `first` of the flat index, rows of a table from byte `base`.

    `ahead` gives, for i and a distance, the term of the flat index that comes so many after term i
    of the bag, and the base of its table; `distance` is one of the parameters.
    """

    table: Any
    bag: Any
    first: Any
    count: Any
    base: Any
    rows: Any
    ahead: Ahead


class Gather:
    """Emits gathers from W; `index`, `weight` and `out` are flat views of the tensors."""

    index: Any
    weight: Any
    w: Any
    out: Any

    def __init__(self, kernel: EmbeddingKernel, workload: EmbeddingBag, params: Params) -> None:
        self.workload, self.params, self.name = workload, params, kernel.name
        self.columns = columns(workload, kernel.bits // 32, kernel.accumulators)
        self.lanes = self.columns.lanes
        self.vector = f"float32x{self.lanes}"
        self.coded = workload.storage in ("u8", "u4")
        self.index_type = NUMPY[workload.index]
        self.row_lines = lines(0, workload.row_bytes, workload.row_bytes)
        self.distances = [d for d in (params.far, params.near) if d]
        self.index_lanes = kernel.bits // (64 if workload.index == "s64" else 32)

    def gather_bag(self, bag: Bag) -> None:
        """Computes and stores a bag whose indices are allowed."""
        for number, block in enumerate(self.columns.blocks):
            self._gather(bag, [self.columns.starts[i] for i in block], number == 0)

    def _gather(self, bag: Bag, starts: list[int], first: bool) -> None:
        """Sums the rows of a bag over the columns of some vectors, and stores them."""
        work, lanes = self.workload, self.lanes
        vectors = len(starts) * (2 if work.storage == "u4" else 1)
        acc = local(vectors * lanes, "float32")
        at = [ramp(v * lanes, lanes) for v in range(vectors)]
        bias = local(1, "float32") if self.coded else None
        counted = work.mode == "mean" and work.padding is not None
        count = local(1, "int64") if counted else None
        for where in at:
            T.buffer_store(acc, splat(0.0, "float32", lanes), [where])
        if bias is not None:
            T.buffer_store(bias, tirx.const(0.0, "float32"), [0])
        if count is not None:
            T.buffer_store(count, i64(0), [0])

        def row(term: Any, index: Any) -> None:
            if work.negative:
                index = T.Bind(index + tirx.Select(index < 0, bag.rows, i64(0)))
            offset = T.Bind(bag.base + index * work.row_bytes)
            weight = T.Bind(self.weight[term]) if work.weighted else None
            self._add(offset, weight, starts, acc, at, bias)
            if count is not None:
                T.buffer_store(count, count[0] + 1, [0])

        with T.serial(i64(0), bag.count) as i:
            term = T.Bind(bag.first + i)
            index = T.Bind(tirx.Cast("int64", self.index[term]))
            self._prefetch(bag, i, starts, first)
            if work.padding is None:
                row(term, index)
            else:
                with T.If(tirx.NE(index, i64(work.padding))), T.Then():
                    row(term, index)

        values = [acc[where] for where in at]
        if work.storage == "u4":
            values = [
                half for v in range(0, vectors, 2) for half in self._interleave(*values[v : v + 2])
            ]
        if bias is not None:
            total = T.Bind(T.broadcast(bias[0], lanes))
            values = [v + total for v in values]
        if work.mode == "mean":
            terms = count[0] if count is not None else bag.count
            divisor = T.Bind(tirx.Cast("float32", tirx.max(terms, i64(1))))
            values = [v / T.broadcast(divisor, lanes) for v in values]
        self._store(bag, starts, values)

    def _prefetch(self, bag: Bag, i: Any, starts: list[int], first: bool) -> None:
        """The lines of a later row that this pass reads; scale and bias come with the first."""
        work = self.workload
        size, codes = SIZES[work.storage], self._codes()
        spans = [(starts[0] * size, min((starts[-1] + self.lanes) * size, codes))]
        if self.coded and first:
            if len(self.columns.blocks) == 1:
                spans = [(0, work.row_bytes)]
            else:
                spans.append((codes, work.row_bytes))
        touched = [o for span in spans for o in lines(*span, work.row_bytes)]
        for distance, level in ((self.params.far, 2), (self.params.near, 1)):
            if distance:
                self.touch(*bag.ahead(i, distance), touched, level)

    def touch(self, term: Any, base: Any, offsets: list[int], level: int) -> None:
        """Prefetches bytes of a term's row into the cache of a level."""
        row = T.Bind(base + tirx.Cast("int64", self.index[term]) * self.workload.row_bytes)
        # read; 3 is the first-level cache, 2 the second; data, not code
        hint = [tirx.const(v, "int32") for v in (0, 4 - level, 1)]
        for offset in offsets:
            line = T.address_of(self.w[row + offset])
            T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", line, *hint))

    def _add(
        self, offset: Any, weight: Any, starts: list[int], acc: Any, at: list[Any], bias: Any
    ) -> None:
        """acc += weight * the row at byte `offset`."""
        work, lanes = self.workload, self.lanes
        size = SIZES[work.storage]
        factor = weight
        if self.coded:
            parts = offset + self._codes()
            factor, add = (T.Bind(self._scalar(parts, part)) for part in (0, 1))
            if weight is not None:
                factor = factor * weight
                total = intrinsic("float32", "llvm.fma", add, weight, bias[0])
            else:
                total = bias[0] + add
            T.buffer_store(bias, total, [0])
        if factor is not None:
            factor = T.Bind(T.broadcast(factor, lanes))
        vectors: list[Any] = []
        for start in starts:
            raw = self.w[ramp(offset + start * size, lanes * size)]
            vectors += self._widen(raw)
        for where, value in zip(at, vectors, strict=True):
            if factor is None:
                total = acc[where] + value
            else:
                total = intrinsic(self.vector, "llvm.fma", value, factor, acc[where])
            T.buffer_store(acc, total, [where])

    def _codes(self) -> int:
        """Bytes of a row before its scale."""
        work = self.workload
        return (work.dim + 1) // 2 if work.storage == "u4" else work.dim * SIZES[work.storage]

    def _scalar(self, offset: Any, part: int) -> Any:
        """The scale (0) or bias (1) behind the codes of a row."""
        if self.workload.scale == "f32":
            return bits("float32", self.w[ramp(offset + 4 * part, 4)])
        return tirx.Cast("float32", bits("float16", self.w[ramp(offset + 2 * part, 2)]))

    def _widen(self, raw: Any) -> list[Any]:
        """Bytes of a row as vectors of f32: the codes, not yet scaled."""
        lanes, ints = self.lanes, f"int32x{self.lanes}"
        storage = self.workload.storage
        if storage == "f32":
            return [bits(self.vector, raw)]
        if storage == "f16":
            return [tirx.Cast(self.vector, bits(f"float16x{lanes}", raw))]
        if storage == "u8":
            return [tirx.Cast(self.vector, tirx.Cast(ints, raw))]
        both = T.Bind(tirx.Cast(ints, raw))
        low, high = both & splat(15, "int32", lanes), both >> splat(4, "int32", lanes)
        return [tirx.Cast(self.vector, low), tirx.Cast(self.vector, high)]

    def _interleave(self, even: Any, odd: Any) -> list[Any]:
        """Columns 0, 2, 4, .. and 1, 3, 5, .. as two vectors in order."""
        lanes = self.lanes
        even, odd = T.Bind(even), T.Bind(odd)
        order = [[h + i // 2 + lanes * (i % 2) for i in range(lanes)] for h in (0, lanes // 2)]
        return [T.Shuffle([even, odd], half) for half in order]

    def _store(self, bag: Bag, starts: list[int], values: list[Any]) -> None:
        work, lanes = self.workload, self.lanes
        begins = starts
        if work.storage == "u4":
            begins = [2 * start + half for start in starts for half in (0, lanes)]
        out = T.Bind((bag.bag * work.tables + bag.table) * work.dim)
        for begin, value in zip(begins, values, strict=True):
            valid = work.dim - begin
            if valid >= lanes:
                T.buffer_store(self.out, value, [ramp(out + begin, lanes)])
            elif valid > 0:
                masked_store(self.out, out + begin, value, lanes, valid)
