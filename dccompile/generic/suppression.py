"""Non-maximum suppression as ONNX Runtime computes it, bit for bit.

Candidates come out of a binary heap, best score first and the earlier of equal ones. The heap's
steps are those of the C++ standard library: NaN scores have no order, so which of them comes first
depends on the steps. A candidate is dropped when its overlap with a box kept before it, the
intersection divided by the union, is above the threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import StringImm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .counted import attributes, i64, size
from .elementwise import rounded
from .lanes import local

_KEPT = 5  # of a kept box: left, right, top, bottom, area


def i32(value: int) -> Any:
    return tirx.const(value, "int32")


def suppression(
    batches: Any, classes: Any, boxes: Any, rows: Any, center: bool, most: bool, iou: bool,
    score: bool, where: str,
) -> Any:  # fmt: skip
    """PrimFunc(boxes f32 (batches, boxes, 4), scores f32 (batches, classes, boxes), ...).

    `most` int64 (1,), `iou` and `score` f32 (1,) follow where they are given; then the outputs:
    rows int64 (rows, 3) of batch, class and box, three tensors of scratch (see `scratch`), the
    number of rows. `center` tells that boxes are center and size instead of two corners.
    Raises DC2113 where iou is not from 0 to 1.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        attributes("suppression")
        a = T.arg("boxes", T.buffer([batches, boxes, 4], "float32"))
        b = T.arg("scores", T.buffer([batches, classes, boxes], "float32"))
        limit = T.arg("most", T.buffer((1,), "int64")) if most else None
        overlap = T.arg("iou", T.buffer((1,), "float32")) if iou else None
        least = T.arg("score", T.buffer((1,), "float32")) if score else None
        picks = T.arg("picks", T.buffer([rows, 3], "int64"))
        scratch_ = [T.arg(f"s{i}", T.buffer(s, t)) for i, (s, t) in enumerate(scratch(boxes))]
        found = T.arg("found", T.buffer((1,), "int64"))
        with T.sblock("root"):
            flat = T.decl_buffer((size([rows, 3]),), "int64", data=tirx.buffer_data(picks))
            total = local(1, "int64")
            T.buffer_store(total, i64(0), [0])
            threshold = tirx.const(0.0, "float32")
            if overlap is not None:
                threshold = T.Bind(overlap[0])
                fine = tirx.And(threshold >= 0.0, threshold <= 1.0)
                text = f"DC2113: {where}: its IoU threshold must be from 0 to 1"
                T.add_to_parent(tirx.AssertStmt(fine, StringImm("ValueError"), [StringImm(text)]))
            top = T.Bind(limit[0]) if limit is not None else i64(0)
            with T.serial(i64(0), _wide(batches)) as n, T.serial(i64(0), _wide(classes)) as c:
                heap = Heap(scratch_[0], scratch_[1])
                heap.fill(lambda i: b[n, c, i], _wide(boxes), least)

                def pick(place: Any, kept: Any) -> Any:
                    return _suppressed(lambda k: a[n, place, k], scratch_[2], kept, center,
                                       threshold)  # fmt: skip

                def store(place: Any) -> None:
                    at = T.Bind(total[0])
                    for k, value in enumerate((n, c, place)):
                        T.buffer_store(flat, value, [at * 3 + k])
                    T.buffer_store(total, at + 1, [0])

                _select(heap, top, pick, store)
            T.buffer_store(found, total[0], [0])
    return builder.get()


def scratch(boxes: Any) -> list[tuple[list[Any], str]]:
    """Shapes and types of the heap's scores and places, and of the kept boxes."""
    return [([boxes], "float32"), ([boxes], "int32"), ([boxes * _KEPT], "float32")]


def _wide(value: Any) -> Any:
    return i64(value) if isinstance(value, int) else value


class Heap:
    """A heap of (score, place) as std::priority_queue makes it of a filled vector."""

    def __init__(self, scores: Any, places: Any) -> None:
        self.scores, self.places = scores, places
        self.count = local(1, "int32")

    def fill(self, score: Callable[[Any], Any], boxes: Any, least: Any) -> None:
        """Takes every box whose score is above `least`, or every box."""
        count = self.count
        T.buffer_store(count, i32(0), [0])
        with T.serial(i64(0), boxes) as i:
            value = T.Bind(score(i))
            test = value > least[0] if least is not None else tirx.const(True, "bool")
            with T.If(test), T.Then():
                self.put(count[0], value, tirx.Cast("int32", i))
                T.buffer_store(count, count[0] + 1, [0])
        n = T.Bind(count[0])
        half = T.Bind(tirx.truncdiv(n, i32(2)))
        with T.serial(i32(0), half) as i:
            at = T.Bind(half - 1 - i)
            self.sink(at, n, T.Bind(self.scores[at]), T.Bind(self.places[at]))

    def put(self, at: Any, score: Any, place: Any) -> None:
        T.buffer_store(self.scores, score, [at])
        T.buffer_store(self.places, place, [at])

    def less(self, a: Any, b: Any) -> Any:
        """Whether pair a comes after pair b."""
        equal = tirx.And(tirx.EQ(a[0], b[0]), a[1] > b[1])
        return tirx.Or(a[0] < b[0], equal)

    def at(self, index: Any) -> tuple[Any, Any]:
        return self.scores[index], self.places[index]

    def sink(self, start: Any, n: Any, score: Any, place: Any) -> None:
        """Fills the hole at `start` of the first n with a pair: down to a leaf, then up again."""
        hole, child = local(1, "int32"), local(1, "int32")
        T.buffer_store(hole, start, [0])
        T.buffer_store(child, start, [0])
        with T.While(child[0] < tirx.truncdiv(n - 1, i32(2))):
            T.buffer_store(child, child[0] * 2 + 2, [0])
            with T.If(self.less(self.at(child[0]), self.at(child[0] - 1))), T.Then():
                T.buffer_store(child, child[0] - 1, [0])
            self.put(hole[0], *self.at(child[0]))
            T.buffer_store(hole, child[0], [0])
        even = tirx.EQ(tirx.truncmod(n, i32(2)), i32(0))
        with T.If(tirx.And(even, tirx.EQ(child[0] * 2 + 2, n))), T.Then():
            T.buffer_store(child, child[0] * 2 + 1, [0])
            self.put(hole[0], *self.at(child[0]))
            T.buffer_store(hole, child[0], [0])
        above = local(1, "bool")
        T.buffer_store(above, tirx.const(True, "bool"), [0])
        with T.While(tirx.And(hole[0] > start, above[0])):
            up = T.Bind(tirx.truncdiv(hole[0] - 1, i32(2)))
            T.buffer_store(above, self.less(self.at(up), (score, place)), [0])
            with T.If(above[0]), T.Then():
                self.put(hole[0], *self.at(up))
                T.buffer_store(hole, up, [0])
        self.put(hole[0], score, place)

    def pop(self) -> None:
        """Takes the best pair out."""
        n = T.Bind(self.count[0] - 1)
        with T.If(n > 0), T.Then():
            self.sink(i32(0), n, T.Bind(self.scores[n]), T.Bind(self.places[n]))
        T.buffer_store(self.count, n, [0])


def _select(
    heap: Heap, most: Any, pick: Callable[[Any, Any], Any], store: Callable[[Any], None]
) -> None:
    """Pops candidates until enough are kept; `pick` emits the test and keeps the box."""
    kept = local(1, "int32")
    T.buffer_store(kept, i32(0), [0])
    with T.While(tirx.And(heap.count[0] > 0, tirx.Cast("int64", kept[0]) < most)):
        place = T.Bind(tirx.Cast("int64", heap.places[0]))
        heap.pop()
        dropped = pick(place, T.Bind(kept[0]))
        with T.If(tirx.Not(dropped[0])), T.Then():
            store(place)
            T.buffer_store(kept, kept[0] + 1, [0])


def _suppressed(
    box: Callable[[int], Any], kept: Any, count: Any, center: bool, threshold: Any
) -> Any:
    """Compares a box with the kept ones and appends it to them; a flag: whether it is dropped."""
    sides = []
    for first, second in ((1, 3), (0, 2)):  # x, y
        if center:
            middle, half = T.Bind(box(1 - first)), T.Bind(box(5 - second) * 0.5)
            sides += [T.Bind(middle - half), T.Bind(middle + half)]
        else:
            u, v = T.Bind(box(first)), T.Bind(box(second))
            sides += [T.Bind(tirx.Select(u >= v, v, u)), T.Bind(tirx.Select(u >= v, u, v))]
    area = _product(sides[1] - sides[0], sides[3] - sides[2])
    at, hit = local(1, "int32"), local(1, "bool")
    T.buffer_store(at, i32(0), [0])
    T.buffer_store(hit, tirx.const(False, "bool"), [0])
    with T.While(tirx.And(at[0] < count, tirx.Not(hit[0]))):
        base = T.Bind(at[0] * _KEPT)
        left, right = _most(sides[0], kept[base]), _least(sides[1], kept[base + 1])
        with T.If(right > left), T.Then():
            over, under = _most(sides[2], kept[base + 2]), _least(sides[3], kept[base + 3])
            with T.If(under > over), T.Then():
                common = _product(right - left, under - over)
                other = T.Bind(kept[base + 4])
                union = T.Bind(area + other - common)
                zero = tirx.const(0.0, "float32")
                solid = tirx.all(common > zero, area > zero, other > zero, union > zero)
                T.buffer_store(hit, tirx.And(solid, common / union > threshold), [0])
        T.buffer_store(at, at[0] + 1, [0])
    with T.If(tirx.Not(hit[0])), T.Then():
        for k, value in enumerate([*sides, area]):
            T.buffer_store(kept, value, [count * _KEPT + k])
    return hit


def _product(a: Any, b: Any) -> Any:
    return T.Bind(rounded(a * b))


def _most(a: Any, b: Any) -> Any:
    return T.Bind(tirx.Select(a < b, b, a))


def _least(a: Any, b: Any) -> Any:
    return T.Bind(tirx.Select(b < a, b, a))
