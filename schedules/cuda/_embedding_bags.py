"""The bags of the embedding kernels: which lanes gather which, and what is wrong with the input."""

from __future__ import annotations

from typing import Any

from tvm.ir import StringImm

from ...machine import Gpu, Machine
from ...workload import EmbeddingBag
from ..x86._embedding import HEADER, NAME, layout
from ._embedding import Params, WarpKernel
from ._embedding_rows import NONE, Bag, Rows
from ._ir import T, address, barrier, call, do, i32, i64, launch, local, prim_func, shared, tirx

_OCCUPANCY = 2  # blocks of a multiprocessor where lengths are added up


class Builder(Rows):
    """One PrimFunc of `kernel` for a workload and parameters."""

    def __init__(
        self, kernel: WarpKernel, workload: EmbeddingBag, params: Params, machine: Machine
    ) -> None:
        super().__init__(workload, params)
        self.name = kernel.name
        self.blocks = _OCCUPANCY * (machine.multiprocessors if isinstance(machine, Gpu) else 1)

    # ---- function ----
    def function(self) -> Any:
        work, plan = self.workload, self.plan
        with prim_func(self.name) as builder:
            self.bags = tirx.Var("bags", "int64") if work.bags is None else i64(work.bags)
            shape: tuple[Any, ...]
            if work.layout == "fixed":
                shape = (self.bags, i64(work.tables), i64(work.pooling))
            else:
                self.terms = tirx.Var("terms", "int64")
                shape = (self.terms,)
            self.index = T.arg("index", T.buffer(shape, self.index_type))
            if work.layout != "fixed":
                # an expression of bags could not be matched before `out` gives bags a value
                more = int(work.layout == "offsets+1")
                count = tirx.Var("cuts", "int64") if work.bags is None else i64(work.bags + more)
                self.cuts = T.arg(work.layout[:7], T.buffer((count,), self.index_type))
            if work.weighted:
                self.weight = T.arg("weight", T.buffer(shape, "float32"))
            self.w = T.arg("w", T.buffer((i64(layout(work)[1]),), "uint8"))
            shape = (self.bags, i64(work.tables), i64(work.dim))
            self.out = T.arg("out", T.buffer(shape, "float32"))
            # a launch of no blocks would be an error
            blocks = tirx.max(tirx.floordiv(self.bags + (plan.bags - 1), i64(plan.bags)), i64(1))
            if work.layout == "lengths":
                blocks = i64(self.blocks)
            grid = (blocks, i64(work.tables), i64(plan.passes))
            with launch(grid, (plan.warps * 32,)) as (block, table, part, thread):
                self.thread, self.part = thread, T.Bind(tirx.Cast("int32", part))
                self.lane = T.Bind(tirx.floormod(thread, plan.lanes))
                if work.layout == "lengths":
                    self._lengths(block)
                else:
                    group = tirx.Cast("int64", tirx.floordiv(thread, plan.lanes))
                    self._one(T.Bind(block * plan.bags + group), table)
        return builder.get()

    def _header(self, table: Any, offset: int) -> Any:
        """A number of a table's header."""
        words = local(2, "uint32")
        do("load8", address(words, 0), address(self.w, table * HEADER + offset))
        high = tirx.Cast("uint64", words[1]) << tirx.const(32, "uint64")
        return T.Bind(tirx.Cast("int64", high | tirx.Cast("uint64", words[0])))

    def _table(self, table: Any) -> tuple[Any, Any]:
        """Byte offset and rows of a table."""
        if self.workload.tables == 1:
            return i64(HEADER), i64(self.workload.rows[0])
        return self._header(table, 0), self._header(table, 8)

    # ---- bags ----
    def _one(self, bag: Any, table: Any) -> None:
        """The bag of a group of lanes where each has one."""
        work = self.workload
        stored = T.Bind(bag < self.bags)
        if work.layout == "fixed":
            pooling = work.pooling
            assert pooling is not None
            first = i64(0)
            count = T.Bind(tirx.Select(stored, i64(pooling), i64(0)))
            # by way of a shuffle, so that the compiler cannot know it: it would do without the
            # loop, and then load each row when it is needed, one at a time, to save registers
            most = call("uint32", "shuffle", tirx.Cast("uint32", count), i32(0), i32(32))
            most = tirx.Cast("int64", most) + (self.plan.rows - 1)
            steps = T.Bind(tirx.floordiv(most, i64(self.plan.rows)))
        else:
            first = T.Bind(self._cut(bag, stored))
            if work.layout == "offsets+1":
                end = T.Bind(self._cut(bag + 1, stored))
            else:
                later = bag + 1 < self.bags
                end = T.Bind(tirx.Select(later, self._cut(bag + 1, later), self.terms))
            count = self._check_offsets(bag, stored, first, end)
            steps = self._steps(count)
        base, rows = self._table(table)
        self._bag(Bag(table, bag, first, count, stored, steps, base, rows))

    def _cut(self, bag: Any, there: Any) -> Any:
        """An offset or length, 0 where it is not there."""
        value = tirx.if_then_else(there, self.cuts[bag], tirx.const(0, self.index_type))
        return tirx.Cast("int64", value)

    def _steps(self, count: Any) -> Any:
        """Steps that the longest bag of the warp takes: shuffles are for all lanes at once."""
        if self.plan.lanes < 32:
            count = call("int64", "lanes_max", count, i32(32))
        rows = self.plan.rows
        return T.Bind(tirx.floordiv(count + (rows - 1), i64(rows)))

    def _bag(self, bag: Bag) -> None:
        wrong = self.gather(bag)
        with T.If(tirx.And(tirx.EQ(self.lane, 0), wrong < i64(NONE))), T.Then():
            self._report_index(bag, wrong)

    # ---- lengths ----
    def _lengths(self, block: Any) -> None:
        """A range of bags to a block, of these one to a warp: what comes before is added up.

        A block reads all lengths before its own, 2 blocks a multiprocessor: of a million bags
        1 GB from the second-level cache, 0.2 ms, where their rows of 256 bytes, 20 a bag, take
        1.5. Expected, not measured on a GPU. The last block reads them all, and checks.
        """
        plan = self.plan
        share = _kept(tirx.floordiv(self.bags + (self.blocks - 1), i64(self.blocks)))
        first = _kept(tirx.min(block * share, self.bags))
        last = _kept(tirx.min(first + share, self.bags))
        checks = T.Bind(tirx.EQ(block, i64(self.blocks - 1)))
        before = self._before(first, checks)

        warp = tirx.Cast("int64", tirx.floordiv(self.thread, 32))
        own = T.Bind(tirx.floordiv(share + (plan.warps - 1), i64(plan.warps)))
        begin = _kept(tirx.min(first + warp * own, last))
        end = _kept(tirx.min(begin + own, last))
        lane = T.Bind(tirx.floormod(self.thread, 32))
        cursor = local(1, "int64")
        T.buffer_store(cursor, i64(0), [0])
        with T.serial(i64(0), tirx.floordiv(begin - first - lane + 31, i64(32))) as i:
            more = self._cut(first + lane + i * 32, tirx.const(True, "bool"))
            T.buffer_store(cursor, cursor[0] + more, [0])
        T.buffer_store(cursor, before + call("int64", "lanes_sum", cursor[0], i32(32)), [0])

        together = 32 // plan.lanes
        group = tirx.floordiv(lane, plan.lanes)
        base, rows = self._table(i64(0))
        length = local(1, "int64")
        T.buffer_store(length, self._cut(begin + group, begin + group < end), [0])
        rounds = T.Bind(tirx.floordiv(own + (together - 1), i64(together)))
        with T.serial(i64(0), rounds) as i:
            bag = T.Bind(begin + i * together + group)
            stored, count = T.Bind(bag < end), T.Bind(length[0])
            later = T.Bind(bag + together)
            T.buffer_store(length, self._cut(later, later < end), [0])
            mine = tirx.Select(tirx.EQ(self.lane, 0), count, i64(0))
            start = T.Bind(cursor[0] + call("int64", "lanes_scan", mine) - mine)
            start = self._of_first(start)
            total = call("int64", "lanes_sum", mine, i32(32))
            T.buffer_store(cursor, cursor[0] + total, [0])
            # they may be any where the lengths are wrong
            fine = tirx.And(tirx.And(start >= 0, count >= 0), count <= self.terms - start)
            count = T.Bind(tirx.Select(fine, count, i64(0)))
            self._bag(Bag(i64(0), bag, start, count, stored, self._steps(count), base, rows))

    def _of_first(self, value: Any) -> Any:
        """The value of the first lane of a bag."""
        if self.plan.lanes == 1:
            return value
        mine = tirx.Select(tirx.EQ(self.lane, 0), value, i64(0))
        return T.Bind(call("int64", "lanes_sum", mine, self.plan.lanes))

    def _before(self, first: Any, checks: Any) -> Any:
        """The sum of the lengths before bag `first`; one block checks them all."""
        threads, warps = self.plan.warps * 32, self.plan.warps
        before, total, wrong = (local(1, "int64") for _ in range(3))
        T.buffer_store(before, i64(0), [0])
        T.buffer_store(total, i64(0), [0])
        T.buffer_store(wrong, i64(NONE), [0])
        none = T.Bind(tirx.Select(first < self.bags, first, i64(0)))
        most = T.Bind(tirx.Select(checks, self.bags, none))
        rounds = T.Bind(tirx.floordiv(most - self.thread + (threads - 1), i64(threads)))
        with T.serial(i64(0), rounds) as i:
            bag = T.Bind(i * threads + self.thread)
            length = T.Bind(self._cut(bag, tirx.const(True, "bool")))
            T.buffer_store(total, total[0] + length, [0])
            T.buffer_store(before, before[0] + tirx.Select(bag < first, length, i64(0)), [0])
            place = tirx.Select(length < 0, bag, i64(NONE))
            T.buffer_store(wrong, tirx.min(wrong[0], place), [0])
        kinds = ((before, "sum"), (total, "sum"), (wrong, "min"))
        found = shared(len(kinds) * warps, "int64")
        for k, (value, how) in enumerate(kinds):
            of_warp = T.Bind(call("int64", f"lanes_{how}", value[0], i32(32)))
            with T.If(tirx.EQ(tirx.floormod(self.thread, 32), 0)), T.Then():
                T.buffer_store(found, of_warp, [k * warps + tirx.floordiv(self.thread, 32)])
        barrier()
        before, total, wrong = (
            T.Bind(_all([found[k * warps + w] for w in range(warps)], how))
            for k, (_, how) in enumerate(kinds)
        )
        with T.If(tirx.And(checks, tirx.EQ(self.thread, 0))), T.Then():
            with T.If(wrong < i64(NONE)):
                with T.Then():
                    text = "DC2113: lengths: % at [%] is below 0"
                    self._report(text, tirx.Cast("int64", self.cuts[wrong]), wrong)
                with T.Else():
                    with T.If(tirx.NE(total, self.terms)), T.Then():
                        text = "DC2113: lengths: their sum is %, the number of indices is %"
                        self._report(text, total, self.terms)
        return before

    # ---- errors ----
    def _check_offsets(self, bag: Any, stored: Any, start: Any, end: Any) -> Any:
        """The number of terms, 0 where an offset is wrong.

        Who begins outside of the terms says nothing, but for the first bag: the one before ends
        there, and of bags that are wrong together the first is the one to name.
        """
        inside = T.Bind(tirx.And(start >= 0, start <= self.terms))
        ends = T.Bind(tirx.And(start <= end, end <= self.terms))
        guilty = tirx.Or(tirx.EQ(bag, i64(0)), inside)
        wrong = tirx.And(tirx.Not(tirx.And(inside, ends)), guilty)
        with T.If(tirx.And(tirx.And(stored, tirx.EQ(self.lane, 0)), wrong)), T.Then():
            text = (
                "DC2112: offsets: bag % is from % to % of % indices; "
                "offsets must not fall, nor pass the end"
            )
            self._report(text, bag, start, end, self.terms)
        fine = tirx.And(stored, tirx.And(inside, ends))
        return T.Bind(tirx.Select(fine, end - start, i64(0)))

    def _report_index(self, bag: Bag, wrong: Any) -> None:
        work = self.workload
        where = "%, %, %" if work.layout == "fixed" else "%"
        text = (
            f"DC2110: embedding table '$' of % rows: index % at [{where}] of bag %; "
            "indices must be from % to %"
        )
        least = 0 - bag.rows if work.negative else i64(0)
        index = T.Bind(tirx.Cast("int64", self.at(self.index, bag, wrong)))
        values = [bag.rows, index, *self.place(bag, wrong), bag.bag, least, bag.rows - 1]
        values += [i64(0)] * (8 - len(values))
        name = address(self.w, bag.table * HEADER + NAME)
        length = T.Bind(tirx.Cast("int32", self._header(bag.table, 16)))
        do("report8", StringImm(text), *values, name, length)

    def _report(self, text: str, *values: Any) -> None:
        filled = [*values, *[i64(0)] * (4 - len(values))]
        do("report", StringImm(text), *filled, address(self.w, 0), i32(0))


def _kept(value: Any) -> Any:
    """The value, behind what TVM would put in the place of every use."""
    register = local(1, "int64")
    T.buffer_store(register, value, [0])
    return register[0]


def _all(values: list[Any], how: str) -> Any:
    """Sum or least of some values."""
    result = values[0]
    for value in values[1:]:
        result = result + value if how == "sum" else tirx.min(result, value)
    return result
