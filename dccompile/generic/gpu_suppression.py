"""Non-maximum suppression on a GPU: the rows that `suppression` finds, in the same order.

For every batch and class, called a pair here, three kernels:
 1. a thread for every box counts the candidates before it: they are in order then. Scores that are
    NaN have no order; a pair with such candidates is sorted by one thread, with the heap that CPUs
    use, whose steps decide.
 2. a block takes the candidates in order. One that no earlier one dropped is kept, and all threads
    drop those behind it whose overlap with it is too large: as many steps as boxes are kept.
 3. the kept ones of all pairs are written one after the other.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .gpu_counted import running_sum
from .gpu_ir import (
    THREADS,
    attributes,
    barrier,
    blocks_of,
    flat,
    i32,
    i64,
    launch,
    parts,
    product,
    registers,
    report,
    slot,
    when,
)
from .gpu_topk import preceding
from .suppression import Heap
from .topk import Rank


def scratch(batches: Any, classes: Any, boxes: Any) -> list[tuple[list[Any], str]]:
    """Shapes and types: scores of a heap, order, dropped, kept, numbers of candidates and kept."""
    pairs = batches * classes
    whole = ["float32", "int32", "int32", "int32"]
    return [*(([pairs, boxes], kind) for kind in whole), ([pairs, 2], "int32")]


def suppression(
    batches: Any, classes: Any, boxes: Any, rows: Any, center: bool, most: bool, iou: bool,
    score: bool, where: str,
) -> Any:  # fmt: skip
    """PrimFunc with the parameters of `suppression.suppression`, but for the scratch."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("suppression")
        a = T.arg("boxes", T.buffer([batches, boxes, 4], "float32"))
        b = T.arg("scores", T.buffer([batches, classes, boxes], "float32"))
        limit = T.arg("most", T.buffer((1,), "int64")) if most else None
        overlap = T.arg("iou", T.buffer((1,), "float32")) if iou else None
        least = T.arg("score", T.buffer((1,), "float32")) if score else None
        picks = T.arg("picks", T.buffer([rows, 3], "int64"))
        shapes = scratch(batches, classes, boxes)
        own = [T.arg(f"s{i}", T.buffer(s, t)) for i, (s, t) in enumerate(shapes)]
        found = T.arg("found", T.buffer((1,), "int64"))
        sizes = [product([batches, boxes, 4]), product([batches, classes, boxes])]
        work = [flat(o, product(s)) for o, (s, _) in zip(own, shapes, strict=True)]
        out = flat(picks, product([rows, 3]))
        kit = _Kit(product([batches, classes]), product([classes]), product([boxes]), work)
        kit.boxes, kit.scores, kit.center = flat(a, sizes[0]), flat(b, sizes[1]), center
        kit.sort(least)
        kit.select(limit, overlap, least, f"DC2113: {where}: its IoU threshold must be from 0 to 1")
        kit.write(out, found)
    return builder.get()


class _Kit:
    boxes: Any
    scores: Any
    center: bool

    def __init__(self, pairs: Any, classes: Any, count: Any, work: list[Any]) -> None:
        self.pairs, self.classes, self.count = pairs, classes, count
        self.heap, self.order, self.dropped, self.kept, self.numbers = work

    def sort(self, least: Any) -> None:
        """The order of the candidates, where no score is NaN."""
        groups = parts(self.count, THREADS)
        with launch(blocks_of(self.pairs * groups, 1)) as (b, t):
            pair = T.Bind(tirx.FloorDiv(b, groups))
            at = T.Bind(tirx.FloorMod(b, groups) * THREADS + tirx.Cast("int64", t))
            inside = pair < self.pairs
            active = T.Bind(tirx.And(inside, at < self.count))
            base = T.Bind(pair * self.count)
            own = registers(1, "float32")
            T.buffer_store(own, tirx.const(0.0, "float32"), [0])
            with when(active):
                T.buffer_store(own, self.scores[base + at], [0])
                T.buffer_store(self.dropped, i32(0), [base + at])

            def counts(value: Any) -> Any:
                return tirx.const(True, "bool") if least is None else value > least[0]

            before = preceding(
                lambda i: self.scores[base + i], own[0], at, self.count, inside, t, "float32",
                Rank("float32", True), counts,
            )  # fmt: skip
            with when(active):
                with when(counts(own[0])):
                    T.buffer_store(self.order, tirx.Cast("int32", at), [base + before])

    def select(self, limit: Any, overlap: Any, least: Any, message: str) -> None:
        threshold: Any = tirx.const(0.0, "float32")
        with launch(blocks_of(self.pairs, 1)) as (pair, t):
            if overlap is not None:
                threshold = slot(overlap[0])
                fine = slot(tirx.And(threshold >= 0.0, threshold <= 1.0))
                with when(tirx.And(tirx.Not(fine), tirx.EQ(t, 0))):
                    report(message)
            base = T.Bind(pair * self.count)
            total = self.candidates(base, t, least)
            most = i64(0) if limit is None else slot(limit[0])
            kept, place = registers(1, "int32"), registers(1, "int32")
            T.buffer_store(kept, i32(0), [0])
            T.buffer_store(place, i32(0), [0])
            with T.While(tirx.And(place[0] < total, tirx.Cast("int64", kept[0]) < most)):
                with when(tirx.EQ(self.dropped[base + place[0]], i32(0))):
                    self.keep(base, place[0], kept[0], total, t, threshold)
                    T.buffer_store(kept, kept[0] + 1, [0])
                T.buffer_store(place, place[0] + 1, [0])
            with when(tirx.EQ(t, 0)):
                T.buffer_store(self.numbers, kept[0], [pair * 2 + 1])

    def candidates(self, base: Any, t: Any, least: Any) -> Any:
        """Their number, int32; sorts those that have no order."""
        mine, odd = registers(1, "int32"), registers(1, "int32")
        T.buffer_store(mine, i32(0), [0])
        T.buffer_store(odd, i32(0), [0])
        with T.serial(i64(0), parts(self.count, THREADS)) as i:
            at = T.Bind(i * THREADS + tirx.Cast("int64", t))
            with when(at < self.count):
                value = slot(self.scores[base + at])
                counts = tirx.const(True, "bool") if least is None else value > least[0]
                with when(counts):
                    T.buffer_store(mine, mine[0] + 1, [0])
                    with when(tirx.isnan(value)):
                        T.buffer_store(odd, odd[0] + 1, [0])
        _, total = running_sum(mine[0], t, THREADS, "int32")
        _, strange = running_sum(odd[0], t, THREADS, "int32")
        with when(tirx.And(strange > 0, tirx.EQ(t, 0))):
            self.by_heap(base, least)
        barrier()
        return total

    def by_heap(self, base: Any, least: Any) -> None:
        """Sorts as on a CPU: what leaves the heap goes behind the rest of it, then all turns."""
        heap = _Heap(self.heap, self.order, base)
        heap.fill(lambda i: self.scores[base + i], self.count, least)
        total = slot(heap.count[0])
        with T.While(heap.count[0] > 0):
            first = slot(heap.places[0])
            heap.pop()
            heap.put(heap.count[0], tirx.const(0.0, "float32"), first)
        with T.serial(i32(0), tirx.truncdiv(total, i32(2))) as i:
            a, b = slot(heap.places[i]), slot(heap.places[total - 1 - i])
            heap.put(i, tirx.const(0.0, "float32"), b)
            heap.put(total - 1 - i, tirx.const(0.0, "float32"), a)

    def keep(self, base: Any, place: Any, kept: Any, total: Any, t: Any, threshold: Any) -> None:
        box = slot(self.order[base + place])
        with when(tirx.EQ(t, 0)):
            T.buffer_store(self.kept, box, [base + kept])
        sides, area = self.sides(base, box)
        rest = T.Bind(tirx.truncdiv(total - place - 1 + (THREADS - 1), i32(THREADS)))
        with T.serial(i32(0), rest) as i:
            at = T.Bind(place + 1 + i * THREADS + t)
            with when(at < total), when(tirx.EQ(self.dropped[base + at], i32(0))):
                own, size = self.sides(base, slot(self.order[base + at]))
                left, right = _most(own[0], sides[0]), _least(own[1], sides[1])
                over, under = _most(own[2], sides[2]), _least(own[3], sides[3])
                with when(tirx.And(right > left, under > over)):
                    common = slot((right - left) * (under - over))
                    union = slot(size + area - common)
                    zero = tirx.const(0.0, "float32")
                    solid = tirx.all(common > zero, size > zero, area > zero, union > zero)
                    with when(tirx.And(solid, common / union > threshold)):
                        T.buffer_store(self.dropped, i32(1), [base + at])
        barrier()

    def sides(self, base: Any, box: Any) -> tuple[list[Any], Any]:
        """Left, right, top, bottom and area of a box."""
        batch = tirx.FloorDiv(tirx.FloorDiv(base, self.count), self.classes)
        first = T.Bind((batch * self.count + tirx.Cast("int64", box)) * 4)
        numbers = [slot(self.boxes[first + k]) for k in range(4)]
        sides = []
        for low, high in ((1, 3), (0, 2)):  # x, y
            if self.center:
                middle, half = numbers[1 - low], slot(numbers[5 - high] * 0.5)
                sides += [slot(middle - half), slot(middle + half)]
            else:
                u, v = numbers[low], numbers[high]
                sides += [slot(tirx.Select(u >= v, v, u)), slot(tirx.Select(u >= v, u, v))]
        return sides, slot((sides[1] - sides[0]) * (sides[3] - sides[2]))

    def write(self, out: Any, found: Any) -> None:
        with launch(blocks_of(self.pairs, 1)) as (pair, t):
            mine = registers(1, "int64")
            T.buffer_store(mine, i64(0), [0])
            with T.serial(i64(0), parts(pair, THREADS)) as i:
                at = T.Bind(i * THREADS + tirx.Cast("int64", t))
                with when(at < pair):
                    number = tirx.Cast("int64", self.numbers[at * 2 + 1])
                    T.buffer_store(mine, mine[0] + number, [0])
            _, first = running_sum(mine[0], t, THREADS, "int64")
            kept = slot(tirx.Cast("int64", self.numbers[pair * 2 + 1]))
            with when(tirx.And(tirx.EQ(pair, self.pairs - 1), tirx.EQ(t, 0))):
                T.buffer_store(found, first + kept, [0])
            with T.serial(i64(0), parts(kept, THREADS)) as i:
                at = T.Bind(i * THREADS + tirx.Cast("int64", t))
                with when(at < kept):
                    box = tirx.Cast("int64", self.kept[pair * self.count + at])
                    batch = tirx.FloorDiv(pair, self.classes)
                    values = (batch, tirx.FloorMod(pair, self.classes), box)
                    for k, value in enumerate(values):
                        T.buffer_store(out, value, [(first + at) * 3 + k])


class _Heap(Heap):
    """A heap that begins at an offset of its buffers."""

    def __init__(self, scores: Any, places: Any, base: Any) -> None:
        super().__init__(_Shifted(scores, base), _Shifted(places, base))
        self.base = base

    def put(self, at: Any, score: Any, place: Any) -> None:
        T.buffer_store(self.scores.buffer, score, [self.base + at])
        T.buffer_store(self.places.buffer, place, [self.base + at])


class _Shifted:
    """A buffer read from an offset on."""

    def __init__(self, buffer: Any, base: Any) -> None:
        self.buffer, self.base = buffer, base

    def __getitem__(self, at: Any) -> Any:
        return self.buffer[self.base + at]


def _most(a: Any, b: Any) -> Any:
    return slot(tirx.Select(a < b, b, a))


def _least(a: Any, b: Any) -> Any:
    return slot(tirx.Select(b < a, b, a))
