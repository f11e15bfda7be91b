"""A group of lanes gathers a bag: indices checked, rows loaded and added up, sums stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...workload import NUMPY, EmbeddingBag
from ._embedding import Params, codes, plan
from ._ir import T, address, call, do, i32, i64, local, tirx

NONE = 2**63 - 1  # no term of a bag
_ONE = 0x4B000000  # 2**23 as f32: its low bits count ones
_MINUS_0 = {"f32": 0x80000000, "f16": 0x80008000, "u8": 0, "u4": 0}


@dataclass(frozen=True)
class Bag:
    """A bag: `count` terms, rows of a table from byte `base`.

    Unless the layout is 'fixed', `first` is the place of its first term in the index. `stored` says
    whether it is one at all; `steps` is how often its warp has to go round.
    """

    table: Any
    bag: Any
    first: Any
    count: Any
    stored: Any
    steps: Any
    base: Any
    rows: Any


class Rows:
    """Emits gathers from W."""

    index: Any
    weight: Any
    w: Any
    out: Any
    lane: Any  # of the bag, int32
    part: Any  # of the columns: number of the pass
    raw: Any  # rows under way
    parts: Any  # their scales and biases
    indices: Any  # fetched for the step after
    weights: Any

    def __init__(self, workload: EmbeddingBag, params: Params) -> None:
        self.workload, self.plan = workload, plan(workload, params)
        self.coded = workload.storage in ("u8", "u4")
        self.index_type = NUMPY[workload.index]
        self.slots = -(-self.plan.rows // self.plan.lanes)  # terms of a step that a lane checks

    def gather(self, bag: Bag) -> Any:
        """Computes and stores a bag; gives the number of its first wrong term, or `NONE`."""
        work, plan = self.workload, self.plan
        sums = local(plan.each * plan.columns, "float32")
        bias = local(1, "float32")
        counted, wrong = local(1, "int64"), local(1, "int64")
        for i in range(plan.each * plan.columns):
            T.buffer_store(sums, tirx.const(0.0, "float32"), [i])
        T.buffer_store(bias, tirx.const(0.0, "float32"), [0])
        T.buffer_store(counted, i64(0), [0])
        T.buffer_store(wrong, i64(NONE), [0])
        units = [self._unit(j) for j in range(plan.each)]
        words = plan.each * plan.words
        self.raw = local(plan.rows * words, "uint32")
        self.parts = local(max(1, plan.rows * plan.pieces * max(1, plan.piece // 4)), "uint32")
        held = local(self.slots, "float32")
        self.indices = local(self.slots, self.index_type)
        self.weights = local(self.slots, "float32")
        offsets = self._offsets(bag, units)

        def check(start: Any) -> tuple[list[Any], list[Any]]:
            found = self._check(bag, start, counted, wrong)
            self._fetch(bag, start + plan.rows)
            return found

        def hold(factors: list[Any]) -> None:
            for slot, factor in enumerate(factors):
                T.buffer_store(held, factor, [slot])

        self._fetch(bag, i64(0))
        rows, factors = check(i64(0))
        for r in range(plan.rows):
            self._load_row(offsets, rows, r)
        hold(factors)
        with T.serial(i64(0), T.Bind(tirx.max(bag.steps - 1, i64(0)))) as step:
            rows, factors = check(T.Bind((step + 1) * plan.rows))
            for r in range(plan.rows):
                self._add_row(held, r, sums, bias)
                self._load_row(offsets, rows, r)
            hold(factors)
        for r in range(plan.rows):
            self._add_row(held, r, sums, bias)

        values = [sums[i] for i in range(plan.each * plan.columns)]
        if self.coded:
            values = [call("float32", "add", v, bias[0]) for v in values]
        if work.mode == "mean":
            terms = bag.count
            if work.padding is not None:
                terms = call("int64", "lanes_sum", counted[0], plan.lanes)
            divisor = T.Bind(tirx.Cast("float32", tirx.max(terms, i64(1))))
            values = [v / divisor for v in values]
        self._store(bag, units, values)
        return T.Bind(call("int64", "lanes_min", wrong[0], plan.lanes))

    def place(self, bag: Bag, term: Any) -> list[Any]:
        """Where a term of a bag is in the index."""
        if self.workload.layout == "fixed":
            return [bag.bag, bag.table, term]
        return [bag.first + term]

    def at(self, tensor: Any, bag: Bag, term: Any) -> Any:
        """A term's element of the index or the weights."""
        return tensor[tuple(self.place(bag, term))]

    def _unit(self, j: int) -> Any:
        """The number of a lane's unit in the row; the last one again where there is no more."""
        plan = self.plan
        number = self.part * (plan.lanes * plan.each) + (self.lane + j * plan.lanes)
        return T.Bind(number)

    # ---- indices ----
    def _place(self, start: Any, slot: int) -> tuple[Any, Any]:
        """The term in the bag that a lane checks in a step, and whether the step has it."""
        at = self.lane + slot * self.plan.lanes
        whole = (slot + 1) * self.plan.lanes <= self.plan.rows
        return T.Bind(start + at), tirx.const(True, "bool") if whole else at < self.plan.rows

    def _fetch(self, bag: Bag, start: Any) -> None:
        """Starts to load the indices and weights of a step."""
        for slot in range(self.slots):
            place, own = self._place(start, slot)
            there = T.Bind(tirx.And(own, place < bag.count))
            none = tirx.const(0, self.index_type)
            index = tirx.if_then_else(there, self.at(self.index, bag, place), none)
            T.buffer_store(self.indices, index, [slot])
            if self.workload.weighted:
                weight = self.at(self.weight, bag, place)
                one = tirx.const(1.0, "float32")
                T.buffer_store(self.weights, tirx.if_then_else(there, weight, one), [slot])

    def _check(self, bag: Bag, start: Any, counted: Any, wrong: Any) -> tuple[list[Any], list[Any]]:
        """Rows of a step, int32 and -1 where there is none, and weights, of a lane's own terms."""
        work, rows, factors = self.workload, [], []
        for slot in range(self.slots):
            place, own = self._place(start, slot)
            index = T.Bind(tirx.Cast("int64", self.indices[slot]))
            wanted = tirx.And(own, place < bag.count)
            if work.padding is not None:
                wanted = tirx.And(wanted, tirx.NE(index, i64(work.padding)))
            wanted = T.Bind(wanted)
            row = index
            if work.negative:
                row = T.Bind(index + tirx.Select(index < 0, bag.rows, i64(0)))
            fine = T.Bind(tirx.And(row >= 0, row < bag.rows))
            first = tirx.min(wrong[0], place)
            bad = tirx.And(wanted, tirx.Not(fine))
            T.buffer_store(wrong, tirx.Select(bad, first, wrong[0]), [0])
            T.buffer_store(counted, counted[0] + tirx.Cast("int64", wanted), [0])
            there = T.Bind(tirx.And(wanted, fine))
            rows.append(T.Bind(tirx.Select(there, tirx.Cast("int32", row), i32(-1))))
            if work.weighted:
                one = tirx.const(1.0, "float32")
                factors.append(T.Bind(tirx.Select(there, self.weights[slot], one)))
        return rows, factors

    # ---- rows ----
    def _offsets(self, bag: Bag, units: list[Any]) -> list[Any]:
        """Where a lane's units, and the scale, are in row 0 of the bag's table."""
        plan, last = self.plan, i64(self.plan.units - 1)
        begins = [tirx.min(tirx.Cast("int64", u), last) * plan.unit for u in units]
        return [T.Bind(bag.base + begin) for begin in (*begins, i64(codes(self.workload)))]

    def _load_row(self, offsets: list[Any], rows: list[Any], r: int) -> None:
        """Starts to load row r of a step."""
        plan = self.plan
        row = self._of_lane(rows, r, "int32")
        there = T.Bind(tirx.Cast("int32", row >= 0))
        offset = T.Bind(tirx.Cast("int64", row) * self.workload.row_bytes)
        for j, begin in enumerate(offsets[:-1]):
            at = address(self.raw, (r * plan.each + j) * plan.words)
            self._load(plan.unit, at, begin + offset, there, _MINUS_0[self.workload.storage])
        self._load_parts(r, offsets[-1] + offset, there)

    def _add_row(self, weights: Any, r: int, sums: Any, bias: Any) -> None:
        """sums += row r of a step."""
        plan, factor = self.plan, None
        if self.workload.weighted:
            factor = self._of_lane([weights[slot] for slot in range(self.slots)], r, "float32")
        if self.coded:
            factor = self._scale(r, factor, bias)
        first = r * plan.each * plan.words
        for j in range(plan.each):
            words = [self.raw[first + j * plan.words + i] for i in range(plan.words)]
            for i, value in enumerate(self._values(words)):
                at = j * plan.columns + i
                if factor is None:
                    total = call("float32", "add", sums[at], value)
                else:
                    total = call("float32", "fma", value, factor, sums[at])
                T.buffer_store(sums, total, [at])

    def _of_lane(self, values: list[Any], r: int, dtype: str) -> Any:
        """Row or weight r of a step, from the lane that has it."""
        value, lane = values[r // self.plan.lanes], i32(r % self.plan.lanes)
        width = i32(self.plan.lanes)
        if dtype == "int32":
            return T.Bind(call("int32", "shuffle", value, lane, width))
        word = call("uint32", "as_uint", value)
        return T.Bind(_float(call("uint32", "shuffle", word, lane, width)))

    def _load(self, size: int, at: Any, offset: Any, there: Any, other: int) -> None:
        once = "_once" if size == 16 else ""
        word = tirx.const(other, "uint32")
        do(f"load{size}{once}_if", at, address(self.w, offset), there, word)

    def _load_parts(self, r: int, tail: Any, there: Any) -> None:
        """Scale and bias of row r, in pieces that are aligned."""
        plan = self.plan
        zero = 0x80008000 if self.workload.scale == "f16" else 0x80000000
        step = max(1, plan.piece // 4)
        for p in range(plan.pieces):
            other = zero
            if plan.piece < 4:
                other = zero >> 8 * (p * plan.piece % 4) & (1 << 8 * plan.piece) - 1
            at = address(self.parts, (r * plan.pieces + p) * step)
            self._load(plan.piece, at, tail + p * plan.piece, there, other)

    def _scale(self, r: int, weight: Any, bias: Any) -> Any:
        """What codes of row r are multiplied with; its bias is added up."""
        words = self._words(r)
        if self.workload.scale == "f32":
            scale, add = (_float(w) for w in words)
        else:
            scale, add = _halves(words[0])
        if weight is None:
            T.buffer_store(bias, call("float32", "add", bias[0], add), [0])
            return T.Bind(scale)
        T.buffer_store(bias, call("float32", "fma", add, weight, bias[0]), [0])
        return T.Bind(call("float32", "mul", scale, weight))

    def _words(self, r: int) -> list[Any]:
        """The pieces of row r put together."""
        plan = self.plan
        if plan.piece >= 4:
            count = plan.pieces * plan.piece // 4
            return [self.parts[r * count + i] for i in range(count)]
        each = 4 // plan.piece
        words = []
        for first in range(0, plan.pieces, each):
            word: Any = tirx.const(0, "uint32")
            for i in range(each):
                shift = tirx.const(8 * plan.piece * i, "uint32")
                word = word | (self.parts[r * plan.pieces + first + i] << shift)
            words.append(T.Bind(word))
        return words

    def _values(self, words: list[Any]) -> list[Any]:
        """A unit as columns of f32: the codes, not yet scaled."""
        storage, size = self.workload.storage, min(4, self.plan.unit)
        if storage == "f32":
            return [_float(w) for w in words]
        if storage == "f16":
            return [v for w in words for v in _halves(w)[: size // 2]]
        decode: Callable[[Any, int], Any] = _byte if storage == "u8" else _nibble
        return [decode(w, i) for w in words for i in range(size if storage == "u8" else 2 * size)]

    # ---- sums ----
    def _store(self, bag: Bag, units: list[Any], values: list[Any]) -> None:
        """Stores as many columns at a time as every row of the output is aligned for."""
        work, plan = self.workload, self.plan
        size = next(s for s in (4, 2, 1) if work.dim % s == 0 and plan.columns % s == 0)
        words = local(len(values), "uint32")
        for i, value in enumerate(values):
            T.buffer_store(words, call("uint32", "as_uint", value), [i])
        for j, unit in enumerate(units):
            for i in range(0, plan.columns, size):
                column = T.Bind(tirx.Cast("int64", unit * plan.columns + i))
                with T.If(tirx.And(bag.stored, column < work.dim)), T.Then():
                    at = j * plan.columns + i
                    source = words[at] if size == 1 else address(words, at)
                    do(f"store{4 * size}", address(self.out, bag.bag, bag.table, column), source)


def _float(word: Any) -> Any:
    """The number in 32 bits."""
    return call("float32", "as_float", word)


def _halves(word: Any) -> tuple[Any, Any]:
    """The two halves of a word as f32."""
    upper = word >> tirx.const(16, "uint32")
    return call("float32", "half_to_float", word), call("float32", "half_to_float", upper)


def _byte(word: Any, i: int) -> Any:
    """Byte i of a word as f32: full speed, as conversions are not."""
    bits = call("uint32", "permute", word, tirx.const(_ONE, "uint32"), tirx.const(0x7650 + i))
    return call("float32", "add", _float(bits), tirx.const(-(2.0**23)))


def _nibble(word: Any, i: int) -> Any:
    """Four bits of a word as f32: of 2**23 + n * 2**p without shifting by p."""
    if i > 4:  # above the significand
        word, i = word >> tirx.const(16, "uint32"), i - 4
    place = tirx.const(15 << 4 * i, "uint32")
    bits = (word & place) | tirx.const(_ONE, "uint32")
    unit, ones = 2.0 ** (-4 * i), -(2.0 ** (23 - 4 * i))
    number = _float(bits)
    return call("float32", "fma", number, tirx.const(unit), tirx.const(ones))
