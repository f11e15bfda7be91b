"""The loops of the embedding kernels: threads, bags, and the checks before a bag is gathered.

Every loop begins at 0: TVM 0.27's CanonicalizeLoop miscompiles a loop that begins at an expression
of the variable of a loop that begins elsewhere than 0.
"""

from __future__ import annotations

from typing import Any

from ._embedding import HEADER, NAME, layout
from ._embedding_gather import Ahead, Bag, Gather
from ._ir import T, bits, i64, intrinsic, local, prim_func, ramp, shared, splat, tirx
from ._raise import raise_error

_PARALLEL_US = 50.0  # work below this is not worth waking other threads, which takes about 5 us
_UNITS = 16  # parallel units to aim at, so that a few threads get nearly equal shares
_LINE_US = 0.004  # a random line of memory, prefetched


class Builder(Gather):
    """One PrimFunc of `kernel` for a workload and parameters."""

    # ---- function ----
    def function(self) -> Any:
        work = self.workload
        with prim_func(self.name) as builder:
            self.bags = tirx.Var("bags", "int64") if work.bags is None else i64(work.bags)
            shape: tuple[Any, ...]
            if work.layout == "fixed":
                shape = (self.bags, i64(work.tables), i64(work.pooling))
                self.terms = self.bags * (work.tables * work.pooling)
            else:
                self.terms = tirx.Var("terms", "int64")
                shape = (self.terms,)
            index = T.arg("index", T.buffer(shape, self.index_type))
            if work.layout != "fixed":
                # an expression of bags could not be matched before `out` gives bags a value
                more = int(work.layout == "offsets+1")
                count = tirx.Var("cuts", "int64") if work.bags is None else i64(work.bags + more)
                self.cuts = T.arg(work.layout[:7], T.buffer((count,), self.index_type))
            weight = T.arg("weight", T.buffer(shape, "float32")) if work.weighted else None
            self.w = T.arg("w", T.buffer((i64(layout(work)[1]),), "uint8"))
            out = T.arg("out", T.buffer((self.bags, i64(work.tables), i64(work.dim)), "float32"))
            self.index = self._flat(index, self.terms, self.index_type)
            self.out = self._flat(out, self.bags * (work.tables * work.dim), "float32")
            if weight is not None:
                self.weight = self._flat(weight, self.terms, "float32")
            if work.layout == "lengths":
                self._check_lengths()
            self._units()
        return builder.get()

    @staticmethod
    def _flat(buffer: Any, size: Any, dtype: str) -> Any:
        return T.decl_buffer((size,), dtype, data=tirx.buffer_data(buffer))

    # ---- threads ----
    def _units(self) -> None:
        """All bags of all tables, in one loop or shared among threads where that pays."""
        work = self.workload
        total = self.bags * work.tables
        row_us = _LINE_US * len(self.row_lines)
        least = round(_PARALLEL_US / row_us)  # terms
        if isinstance(self.terms, tirx.IntImm):
            self._share(total, int(self.terms) >= least)
            return
        with T.If(self.terms >= i64(least)):
            with T.Then():
                self._share(total, True)
            with T.Else():
                self._share(total, False)

    def _share(self, total: Any, parallel: bool) -> None:
        if not parallel:
            self._bags(i64(0), total)
            return
        shared(total, _UNITS, self._bags)

    def _bags(self, first: Any, last: Any) -> None:
        """Bags first..last-1, counted table by table."""
        work = self.workload
        if work.layout == "fixed":
            self._first_bags(first, last)
            with T.serial(i64(0), last - first) as number:
                self._bag(self._fixed(T.Bind(first + number)))
            return
        if work.layout == "lengths":
            begin = local(1, "int64")
            T.buffer_store(begin, i64(0), [0])
            with T.serial(i64(0), first) as bag:
                T.buffer_store(begin, begin[0] + self._cut(bag), [0])
            self._first_rows(begin[0])
        else:
            self._first_rows(tirx.max(self._cut(first), i64(0)))
        base, rows = self._table(i64(0))
        with T.serial(i64(0), last - first) as number:
            bag = T.Bind(first + number)
            if work.layout == "lengths":
                start = T.Bind(begin[0])
                end = T.Bind(start + self._cut(bag))
                T.buffer_store(begin, end, [0])
            else:
                start = T.Bind(self._cut(bag))
                end = self._end(bag)
                self._check_offsets(bag, start, end)
            ahead = self._flat_ahead(start, base)
            self._bag(Bag(i64(0), bag, start, T.Bind(end - start), base, rows, ahead))

    def _first_rows(self, term: Any) -> None:
        """Prefetches the rows from a term on that no row before prefetches; one table."""
        term = T.Bind(term)
        count = T.Bind(tirx.min(self.terms - term, i64(self.params.far)))
        base, _ = self._table(i64(0))
        with T.serial(i64(0), count) as i:
            self.touch(T.Bind(term + i), base, self.row_lines, 2)

    def _first_bags(self, first: Any, last: Any) -> None:
        """The same from a bag of layout 'fixed' on."""
        work = self.workload
        if work.tables == 1:
            self._first_rows(first * work.pooling)
            return
        assert work.pooling is not None
        bags = i64(-(-self.params.far // max(work.pooling, 1)))
        with T.serial(i64(0), T.Bind(tirx.min(last - first, bags))) as number:
            table, _, term = self._locate(T.Bind(first + number))
            base, _ = self._table(table)
            with T.serial(i64(0), i64(work.pooling)) as i:
                self.touch(T.Bind(term + i), base, self.row_lines, 2)

    def _locate(self, number: Any) -> tuple[Any, Any, Any]:
        """Table, bag and first term of bag `number` of layout 'fixed'."""
        work = self.workload
        table = T.Bind(tirx.floordiv(number, self.bags))
        bag = T.Bind(number - table * self.bags)
        return table, bag, T.Bind((bag * work.tables + table) * work.pooling)

    def _flat_ahead(self, first: Any, base: Any) -> Ahead:
        """`Bag.ahead` where the terms of the bags of a table follow each other."""
        later = {d: T.Bind(first + d) for d in self.distances}
        return lambda i, distance: (tirx.min(later[distance] + i, self.terms - 1), base)

    def _cut(self, bag: Any) -> Any:
        return tirx.Cast("int64", self.cuts[bag])

    def _end(self, bag: Any) -> Any:
        if self.workload.layout == "offsets+1":
            return T.Bind(self._cut(bag + 1))
        end = local(1, "int64")
        T.buffer_store(end, self.terms, [0])
        with T.If(bag + 1 < self.bags), T.Then():
            T.buffer_store(end, self._cut(bag + 1), [0])
        return T.Bind(end[0])

    def _fixed(self, number: Any) -> Bag:
        """Bag `number` of layout 'fixed'."""
        work = self.workload
        pooling = work.pooling
        assert pooling is not None
        if work.tables == 1:
            base, rows = self._table(i64(0))
            first = T.Bind(number * pooling)
            later = self._flat_ahead(first, base)
            return Bag(i64(0), number, first, i64(pooling), base, rows, later)

        table, bag, first = self._locate(number)
        base, rows = self._table(table)
        places = {}
        for distance in self.distances:
            # term i + distance is in the bag `whole` or `whole + 1` later
            whole, rest = divmod(distance, pooling) if pooling else (0, 0)
            both = []
            for skip, shift in ((whole, rest), (whole + 1, rest - pooling)):
                one = T.Bind(tirx.min(number + skip, self.bags * work.tables - 1))
                other, _, start = self._locate(one)
                both.append((T.Bind(start + shift), self._table(other)[0]))
            places[distance] = pooling - rest, both

        def ahead(i: Any, distance: int) -> tuple[Any, Any]:
            turn, both = places[distance]
            this = T.Bind(i < turn)
            start, table = (tirx.Select(this, a, b) for a, b in zip(*both, strict=True))
            return start + i, table

        return Bag(table, bag, first, i64(pooling), base, rows, ahead)

    def _table(self, table: Any) -> tuple[Any, Any]:
        """Byte offset of a table's first row, its number of rows."""
        starts, _ = layout(self.workload)
        if len(starts) == 1:
            return i64(starts[0]), i64(self.workload.rows[0])
        return T.Bind(self._header(table, 0)), T.Bind(self._header(table, 8))

    def _header(self, table: Any, offset: int) -> Any:
        return bits("int64", self.w[ramp(table * HEADER + offset, 8)])

    # ---- checks ----
    def _check_lengths(self) -> None:
        """None negative, and their sum the number of terms."""
        total = local(1, "int64")
        T.buffer_store(total, i64(0), [0])
        with T.serial(i64(0), self.bags) as bag:
            length = T.Bind(self._cut(bag))
            with T.If(length < 0), T.Then():
                raise_error("DC2113: lengths: % at [%] is below 0", length, bag)
            T.buffer_store(total, total[0] + length, [0])
        with T.If(tirx.NE(total[0], self.terms)), T.Then():
            text = "DC2113: lengths: their sum is %, the number of indices is %"
            raise_error(text, total[0], self.terms)

    def _check_offsets(self, bag: Any, start: Any, end: Any) -> None:
        fine = tirx.And(tirx.And(start >= 0, start <= end), end <= self.terms)
        with T.If(tirx.Not(fine)), T.Then():
            text = (
                "DC2112: offsets: bag % is from % to % of % indices; "
                "offsets must not fall, nor pass the end"
            )
            raise_error(text, bag, start, end, self.terms)

    def _unsigned(self, value: Any, rows: Any, lanes: int) -> Any:
        """An index as an unsigned number that is below `self._limit(rows)` if it is allowed."""
        kind = self.index_type + (f"x{lanes}" if lanes > 1 else "")

        def wide(x: Any) -> Any:
            x = tirx.Cast(self.index_type, x)
            return T.broadcast(x, lanes) if lanes > 1 else x

        if self.workload.negative:
            value = value + wide(rows)
        if self.workload.padding is not None:
            skipped = wide(i64(self.workload.padding))
            shift = rows if self.workload.negative else i64(0)
            value = tirx.Select(tirx.EQ(value, skipped + wide(shift)), wide(i64(0)), value)
        return tirx.reinterpret("u" + kind, value)

    def _limit(self, rows: Any) -> Any:
        return tirx.Cast("u" + self.index_type, rows * 2 if self.workload.negative else rows)

    def _check_indices(self, bag: Bag) -> None:
        """Compares the largest index, as unsigned number, with the limit."""
        lanes, unsigned = self.index_lanes, "u" + self.index_type
        top, most = local(lanes, unsigned), local(1, unsigned)
        every = ramp(0, lanes)
        T.buffer_store(top, splat(0, unsigned, lanes), [every])
        T.buffer_store(most, tirx.const(0, unsigned), [0])

        def compare(first: Any) -> None:
            value = self._unsigned(self.index[ramp(first, lanes)], bag.rows, lanes)
            T.buffer_store(top, tirx.max(top[every], value), [every])

        steps = T.Bind(tirx.floordiv(bag.count, i64(lanes)))
        with T.serial(i64(0), steps) as step:
            compare(bag.first + step * lanes)
        pooling = self.workload.pooling or 0
        if self.workload.layout == "fixed" and pooling >= lanes:
            if pooling % lanes:
                compare(bag.first + (pooling - lanes))
        else:
            rest = T.Bind(bag.first + steps * lanes)
            with T.serial(i64(0), T.Bind(tirx.floormod(bag.count, i64(lanes)))) as i:
                value = self._unsigned(self.index[rest + i], bag.rows, 1)
                T.buffer_store(most, tirx.max(most[0], value), [0])
        limit = T.Bind(self._limit(bag.rows))
        over = tirx.GE(top[every], T.broadcast(limit, lanes))
        wrong = intrinsic("bool", f"llvm.vector.reduce.or.v{lanes}i1", over)
        with T.If(tirx.Or(wrong, most[0] >= limit)), T.Then():
            self._bad_index(bag)

    def _bad_index(self, bag: Bag) -> None:
        """Searches a bag for the index that is out of range, and raises."""
        work = self.workload
        with T.serial(i64(0), bag.count) as i:
            term = T.Bind(bag.first + i)
            index = T.Bind(self.index[term])
            wrong = self._unsigned(index, bag.rows, 1) >= self._limit(bag.rows)
            with T.If(wrong), T.Then():
                name = T.address_of(self.w[bag.table * HEADER + NAME])
                text = name, T.Bind(self._header(bag.table, 16))
                value = tirx.Cast("int64", index)
                where, place = "%", [term]
                if work.layout == "fixed":
                    where, place = "%, %, %", [bag.bag, bag.table, i]
                template = (
                    f"DC2110: embedding table '$' of % rows: index % at [{where}] of bag %; "
                    "indices must be from % to %"
                )
                least = 0 - bag.rows if work.negative else i64(0)
                values = [bag.rows, value, *place, bag.bag, least, bag.rows - 1]
                raise_error(template, *values, text=text)

    def _bag(self, bag: Bag) -> None:
        self._check_indices(bag)
        self.gather_bag(bag)
