"""Operators of detection, whose rows the data decide, down to none, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from whole import Graph, Whole, ints

import dccompile as dc
from dccompile.errors import InputError, UnsupportedError

F = np.float32
RNG = np.random.default_rng(11)


def normal(*shape):
    return RNG.standard_normal(shape).astype(F)


def corners(batches, count, size=10.0):
    """Boxes of two corners in any order, half of them on a grid so that overlaps are equal."""
    first, extent = RNG.random((2, batches, count, 2)) * size
    boxes = np.concatenate([first, first + extent - 1], -1)
    boxes[:, ::2] = np.round(boxes[:, ::2])
    return boxes.astype(F)


# -- rows that the data decide -------------------------------------------------------------------


def test_nonzero():
    g = Graph(x=("float32", ["N", 4]), flags=("bool", ["N", 4]), codes=("uint8", ["N", 4]))
    g.out(g("NonZero", "x"), g("NonZero", "flags"), g("NonZero", "codes"))
    whole = Whole(g.model())
    for count in (1, 3, 50):
        x = normal(count, 4)
        x[RNG.random(x.shape) < 0.5] = 0
        x[0, :3] = np.nan, -0.0, 1e-45
        flags = RNG.random(x.shape) < 0.3
        whole.agrees(x=x, flags=flags, codes=flags.astype(np.uint8) * 200)
    nothing = np.zeros((5, 4))
    whole.agrees(x=nothing.astype(F), flags=nothing > 0, codes=nothing.astype(np.uint8))


def test_what_follows_from_computed_rows():
    """Every consumer at many rows, one and none: shapes, movement, arithmetic, reductions."""
    g = Graph(x=("float32", ["N", 6]))
    places = g("Transpose", g("NonZero", g("Greater", "x", F(0))), perm=[1, 0])
    value = g("GatherND", "x", places)
    row = g("Gather", g("Transpose", places, perm=[1, 0]), np.array(0))
    rows = g("Gather", "x", row)
    g.out(places, value, rows, g("Shape", value), g("Size", rows))
    g.out(g("Concat", rows, rows, axis=0), g("Concat", rows, g("Mul", rows, F(2)), axis=1))
    g.out(g("ConstantOfShape", g("Shape", rows)), g("Flatten", g("Unsqueeze", rows, ints(1))))
    g.out(g("ReduceSum", rows, ints(0), keepdims=0), g("ReduceMax", rows, ints(1), keepdims=0))
    g.out(g("Softmax", rows, axis=1), g("MatMul", rows, normal(6, 33)), g("Relu", value))
    g.out(g("Reshape", rows, g.vector(g.dim(rows, 0), 3, 2)), g("Cast", value, to=7))
    g.out(g("Where", g("Less", value, F(0.5)), value, F(9)), g("Slice", rows, ints(1), ints(4)))
    g.out(g("Range", np.array(0), g.dim(rows, 0), np.array(1)), g("Transpose", rows, perm=[1, 0]))
    g.out(g("Min", g.dim(rows, 0), np.array(3)), g("Expand", value, g.vector(2, g.dim(rows, 0))))
    g.out(*g("Split", rows, ints(2, 4), axis=1, parts=2), g("Tile", value, ints(2)))
    whole = Whole(g.model())
    for count in (1, 2, 17):
        whole.agrees(x=normal(count, 6))
    whole.agrees(x=-np.ones((4, 6), F))


def test_conditions_of_nan():
    """A condition and its opposite are both false for NaN; TVM alone turns one into the other."""
    g = Graph(x=("float32", ["N", 8]))
    for op in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"):
        opposite = g("Not", g(op, "x", F(1)))
        g.out(opposite, g("Where", opposite, "x", F(7)))
    g.out(g("NonZero", opposite), g("Not", g("Equal", "x", "x")), g("Cast", "x", to=9))
    odd = F([np.nan, 0, 1, -0.0, np.inf, -np.inf, 2, np.nan])
    Whole(g.model()).agrees(x=np.tile(odd, (5, 1)))


def test_top_of_ties_and_infinities():
    g = Graph(x=("float32", ["N", "M"]), y=("int64", ["N", 40]))
    for largest in (1, 0):
        for k in (1, 16, 17, 30):
            g.out(*g("TopK", "x", ints(k), parts=2, largest=largest))
        g.out(*g("TopK", "y", ints(40), parts=2, largest=largest))
    g.out(*g("TopK", "x", g("Unsqueeze", g.dim("x", 1), ints(0)), parts=2))
    whole = Whole(g.model())
    for count in (30, 31, 333):
        x = np.round(normal(3, count) * 3)
        x[0, :3] = np.inf, -np.inf, np.inf
        whole.agrees(x=x, y=RNG.integers(-3, 3, (3, 40)))


def test_numbers_of_bounded_rows():
    """TVM narrows loop variables of few values, also where they are stored as int64."""
    g = Graph(x=("float32", ["N", 3]))
    places = g("Transpose", g("NonZero", "x"), perm=[1, 0])
    for data in ("x", places):
        rows = g.dim(g("Slice", data, ints(0), ints(4), ints(0)), 0)
        numbers = g("Range", np.array(0), rows, np.array(1))
        column, shape = g("Unsqueeze", numbers, ints(1)), g.vector(rows, 5)
        index = g("Expand", column, shape)
        zeros = g("ConstantOfShape", shape)
        updates = g("Expand", np.arange(5, dtype=F), shape)
        g.out(numbers, index, g("ScatterElements", zeros, index, updates, axis=0))
    whole = Whole(g.model())
    for count in (1, 5, 9):
        whole.agrees(x=np.round(normal(count, 3)))
    whole.agrees(x=np.zeros((2, 3), F))


def test_two_counts_in_one_shape():
    g = Graph(x=("float32", ["N"]), y=("float32", ["M"]))
    found = [g("Squeeze", g("NonZero", name), ints(0)) for name in ("x", "y")]
    both = g("Concat", *found, axis=0)
    column, line = g("Unsqueeze", found[0], ints(1)), g("Unsqueeze", found[1], ints(0))
    g.out(both, g("Mul", column, line), g("NonZero", g("Mul", column, line)))
    whole = Whole(g.model(), {"x": ["1..40"], "y": ["1..30"]})
    program = whole.lowered.program
    assert isinstance(program.workspace, int) and len(program.computed) == 3
    for count, other in ((40, 30), (3, 1), (1, 4)):
        for keep in (1.0, 0.5, 0.0):
            x, y = ((RNG.random(n) < keep).astype(F) for n in (count, other))
            whole.agrees(x=x, y=y)


def test_counts_that_must_be_equal():
    g = Graph(x=("float32", ["N"]), y=("float32", ["N"]))
    g.out(g("Add", g("NonZero", "x"), g("NonZero", "y")))
    whole = Whole(g.model())
    whole.agrees(x=F([1, 0, 2]), y=F([0, 3, 4]))
    with pytest.raises(ValueError, match=r"DC2112: Add .* is required of the sizes that the data"):
        whole(x=F([1, 0, 0]), y=F([0, 3, 4]))


def test_compress():
    g = Graph(x=("float32", ["N", 5]), rows=("bool", ["N"]), columns=("bool", [4]))
    g.out(g("Compress", "x", "rows", axis=0), g("Compress", "x", "columns", axis=-1))
    g.out(g("Compress", "x", "columns"))
    whole = Whole(g.model())
    for keep in (0.0, 0.5, 1.0):
        rows, columns = RNG.random(7) < keep, RNG.random(4) < keep
        whole.agrees(x=normal(7, 5), rows=rows, columns=columns)


def suppressed(center, *limits):
    g = Graph(b=("float32", ["N", "S", 4]), s=("float32", ["N", 3, "S"]), **_LIMITS)
    names = [v if isinstance(v, str) else np.asarray(v) for v in limits]
    picks = g("NonMaxSuppression", "b", "s", *names, center_point_box=center)
    box = g("Squeeze", g("Slice", picks, ints(2), ints(3), ints(1)), ints(1))
    g.out(picks, g("Gather", g("Reshape", "b", ints(-1, 4)), box))
    g.out(g("Identity", "m"), g("Identity", "i"), g("Identity", "t"))
    return Whole(g.model())


_LIMITS = {"m": ("int64", [1]), "i": ("float32", [1]), "t": ("float32", [1])}


@pytest.mark.parametrize("center", [0, 1])
@pytest.mark.parametrize("limits", [(np.int64(4), F(0.5), F(0.3)), ("m", "i", "t"), ("m", "i")])
def test_suppression(center, limits):
    """Equal scores and overlaps, NaN and infinite scores and boxes, limits of 0 and below."""
    whole = suppressed(center, *limits)
    for number in range(24):
        count = int(RNG.integers(1, 40))
        boxes, scores = corners(2, count), RNG.random((2, 3, count)).astype(F)
        if number % 3 == 0:
            scores = np.round(scores * 4) / 4
        for kind, odd in ((1, np.nan), (3, np.inf)):
            if number % 4 == kind:
                scores[RNG.random(scores.shape) < 0.3] = odd
                boxes[RNG.random(boxes.shape) < 0.05] = odd
        most = np.array([RNG.choice([-1, 0, 2, 9, 100])])
        overlap = RNG.choice(F([0, 0.25, 1 / 3, 0.5, 1]), 1)
        least = RNG.choice(F([-1, 0.5, 2]), 1)
        whole.agrees(b=boxes, s=scores, m=most, i=overlap, t=least)


def test_suppression_at_the_threshold():
    """Two boxes whose overlap is the threshold itself both stay."""
    boxes = np.array([[[0, 0, 2, 1], [0, 0, 1, 1], [0, 0, 3, 1]]], F)
    scores = np.ones((1, 3, 3), F) * F([0.9, 0.8, 0.7])
    whole = suppressed(0, "m", "i")
    for overlap in (0.5, np.nextafter(F(0.5), F(0)), F(2) / F(3), F(1) / F(3)):
        feeds = {"m": ints(9), "i": F([overlap]), "t": F([0])}
        whole.agrees(b=boxes, s=scores, **feeds)
    with pytest.raises(ValueError, match=r"DC2113: NonMaxSuppression .* must be from 0 to 1"):
        whole(b=boxes, s=scores, m=ints(9), i=F([1.5]), t=F([0]))


def test_suppression_without_limits_keeps_nothing():
    g = Graph(b=("float32", [1, 3, 4]), s=("float32", [1, 1, 3]))
    g.out(g("NonMaxSuppression", "b", "s"), g("Relu", "s"))
    Whole(g.model()).agrees(b=corners(1, 3), s=normal(1, 1, 3))


# -- the module ----------------------------------------------------------------------------------


def detector():
    """Boxes above a score, the best 5 at most, and a head that runs on them."""
    g = Graph(b=("float32", [1, "S", 4]), s=("float32", [1, 2, "S"]))
    picks = g("NonMaxSuppression", "b", "s", ints(5), F([0.5]), F([0.2]))
    box = g("Squeeze", g("Slice", picks, ints(2), ints(3), ints(1)), ints(1))
    found = g("Gather", g("Reshape", "b", ints(-1, 4)), box)
    g.out(picks, found, g("MatMul", found, np.eye(4, 3, dtype=F)), g("Relu", "b"))
    return g.model()


def test_module_gives_the_rows_there_are(tmp_path):
    model = detector()
    reference = Whole(model).session
    dc.compile(model).save(tmp_path / "m.dcm")
    module = dc.load(tmp_path / "m.dcm")
    assert [str(d) for d in module.outputs[0].shape] == ["NonMaxSuppression_0_count", "3"]
    for count in (1, 20, 7):
        b, s = corners(1, count), RNG.random((1, 2, count)).astype(F)
        for scores in (s, s * 0):
            want = reference.run(None, {"b": b, "s": scores})
            for got in (module(b, scores), module(b=b, s=scores)):
                for value, right in zip(got, want, strict=True):
                    assert value.dtype == right.dtype
                    np.testing.assert_allclose(value, right, 1e-6)
    b, s = corners(1, 20), RNG.random((1, 2, 20)).astype(F)
    name = module.outputs[0].name
    buffer = np.zeros((10, 3), np.int64)
    rows = reference.run(None, {"b": b, "s": s})[0]
    got = module(b, s, out={name: buffer})[name]
    np.testing.assert_array_equal(got, rows)
    assert np.shares_memory(got, buffer)
    bound = module.bind({"b": b, "s": s}, {name: buffer})
    np.testing.assert_array_equal(bound()[name], rows)
    s[:] = 0
    assert bound()[name].shape == (0, 3) and bound.outputs[1].shape == (0, 4)
    with pytest.raises(InputError, match=r"this call makes int64\[10, 3\]"):
        module(b, s, out={name: buffer[:9]})


# -- whole stages --------------------------------------------------------------------------------


def test_roi_align_of_no_boxes():
    g = Graph(x=("float32", [1, 16, 8, 8]), s=("float32", [1, 1, "S"]), b=("float32", [1, "S", 4]))
    picks = g("NonMaxSuppression", "b", "s", ints(8), F([0.7]), F([0.5]))
    column = [
        g("Squeeze", g("Slice", picks, ints(k), ints(k + 1), ints(1)), ints(1)) for k in (0, 2)
    ]
    boxes = g("Gather", g("Squeeze", "b", ints(0)), column[1])
    maps = g("RoiAlign", "x", boxes, column[0], output_height=4, output_width=4, sampling_ratio=2)
    y = g("Relu", g("Conv", maps, normal(24, 16, 3, 3), pads=[1, 1, 1, 1]))
    y = g("Flatten", g("GlobalAveragePool", y))
    g.out(boxes, g("Softmax", g("Gemm", y, normal(24, 5), normal(5)), axis=1))
    whole = Whole(g.model())
    for count in (1, 9, 30):
        scores = RNG.random((1, 1, count)).astype(F)
        for level in (scores, scores * 0.4):
            whole.agrees(x=normal(1, 16, 8, 8), s=level, b=np.abs(corners(1, count)))


def column(g, data, k):
    return g("Squeeze", g("Slice", data, ints(k), ints(k + 1), ints(1)), ints(1))


def proposals(g, boxes, scores):
    """As torchvision does: boxes of some size, the best 6 of them, suppressed class by class."""
    sides = [g("Sub", column(g, boxes, k + 2), column(g, boxes, k)) for k in (0, 1)]
    fine = g("And", *(g("GreaterOrEqual", side, F(2)) for side in sides))
    keep = g("Squeeze", g("NonZero", fine), ints(0))
    boxes, scores = g("Gather", boxes, keep), g("Gather", scores, keep)
    count = g("Unsqueeze", g("Min", g.dim(scores, 0), np.array(6)), ints(0))
    best, which = g("TopK", scores, count, parts=2)
    boxes = g("Gather", boxes, which)
    group = g("Cast", g("Mod", which, np.array(2)), to=1)
    apart = g("Mul", group, g("Add", g("ReduceMax", boxes, keepdims=0), F(1)))
    moved = g("Add", boxes, g("Unsqueeze", apart, ints(1)))
    levels = g("Unsqueeze", g("Unsqueeze", best, ints(0)), ints(0))
    limits = np.array([100]), F([0.5]), F([0.05])
    picks = g("NonMaxSuppression", g("Unsqueeze", moved, ints(0)), levels, *limits)
    kept = g("Slice", column(g, picks, 2), ints(0), ints(4), ints(0))
    return g("Gather", boxes, kept), g("Gather", best, kept)


def pooled(g, maps, boxes, channels):
    """As torchvision does: every box from the map of its size, scattered into one tensor."""
    sides = [g("Sub", column(g, boxes, k + 2), column(g, boxes, k)) for k in (0, 1)]
    level = g("Cast", g("Greater", g("Sqrt", g("Mul", *sides)), F(20)), to=7)
    shape = g.vector(g.dim(boxes, 0), channels, 3, 3)
    result = g("ConstantOfShape", shape)
    for number, (name, scale) in enumerate(maps.items()):
        rows = g("Squeeze", g("NonZero", g("Equal", level, np.array(number))), ints(0))
        none = g("Cast", g("ConstantOfShape", g("Shape", rows)), to=7)
        more = {"output_height": 3, "output_width": 3, "sampling_ratio": 2}
        part = g("RoiAlign", name, g("Gather", boxes, rows), none, spatial_scale=scale, **more)
        result = g("ScatterND", result, g("Unsqueeze", rows, ints(1)), part)
    return result


def test_proposals_of_two_levels():
    g = Graph(
        16,
        p=("float32", [1, 8, 32, 32]),
        q=("float32", [1, 8, 16, 16]),
        b=("float32", ["N", 4]),
        s=("float32", ["N"]),
    )
    boxes, scores = proposals(g, "b", "s")
    found = pooled(g, {"p": 0.5, "q": 0.25}, boxes, 8)
    flat = g("Reshape", found, g.vector(g.dim(boxes, 0), 72))
    g.out(boxes, scores, found, g("Gemm", flat, normal(72, 5)))
    whole = Whole(g.model())
    for count in (1, 5, 40):
        for extent in (60, 30, 1.5):  # none of the last is large enough
            first = RNG.random((count, 2)) * 40
            rois = np.concatenate([first, first + RNG.random((count, 2)) * extent], 1)
            maps = {"p": normal(1, 8, 32, 32), "q": normal(1, 8, 16, 16)}
            whole.agrees(**maps, b=rois.astype(F), s=RNG.random(count).astype(F))


def test_refusals():
    g = Graph(19, x=("float32", [1, 2, 8, 8]))
    g.out(g("Resize", "x", None, F([1, 1, 0.5, 0.5]), mode="linear", antialias=1))
    g.out(g("Unique", "x"))
    with pytest.raises(UnsupportedError) as caught:
        Whole(g.model())
    assert {p.code for p in caught.value.problems} == {"DC3111", "DC3113"}
