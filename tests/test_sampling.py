"""RoiAlign and Resize: maps that are sampled, against ONNX Runtime."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from whole import Graph, Whole, ints

F = np.float32
RNG = np.random.default_rng(12)


def normal(*shape):
    return RNG.standard_normal(shape).astype(F)


_ALIGNS = [
    (16, {}),
    (16, {"coordinate_transformation_mode": "output_half_pixel"}),
    (11, {}),
    (16, {"mode": "max"}),
]


@pytest.mark.parametrize("opset, attributes", _ALIGNS)
def test_roi_align(opset, attributes):
    g = Graph(opset, x=("float32", [2, 70, "H", 13]), r=("float32", ["R", 4]), b=("int64", ["R"]))
    for ratio, scale in ((0, 0.25), (2, 1.0), (0, 1.0)):
        more = {"sampling_ratio": ratio, "spatial_scale": scale, **attributes}
        g.out(g("RoiAlign", "x", "r", "b", output_height=3, output_width=2, **more))
    whole = Whole(g.model())
    for number, (count, height) in enumerate([(1, 9), (5, 4), (8, 1), (7, 20)]):
        x = normal(2, 70, height, 13)
        x[0, 3, 0, 0] = np.nan if number == 1 else 1
        first = RNG.random((count, 2)) * 14 - 2
        last = first + RNG.random((count, 2)) * 14 + 0.01
        boxes = np.concatenate([first, last], 1) * (1 + 3 * (number % 2))
        boxes = np.round(boxes) if number == 3 else boxes
        whole.agrees(x=x, r=boxes.astype(F), b=RNG.integers(0, 2, count))
    bad = {"x": normal(2, 70, 4, 13), "r": normal(1, 4)}
    for batch in (-1, 2):
        with pytest.raises(ValueError, match=r"DC2110: RoiAlign"):
            whole(**bad, b=ints(batch))
    huge = F([[0, 0, 1e9, 1]])
    with pytest.raises(ValueError, match=r"DC2114: RoiAlign .* samples along a bin"):
        whole(x=bad["x"], r=huge, b=ints(0))
    # ONNX Runtime reads outside the map, or dies, on the boxes of the last test
    odd = F([[np.nan, 0, 3, np.nan], [-np.inf, np.nan, np.nan, 2], [5, 5, 2, 1]])
    for value in whole(x=bad["x"], r=odd, b=ints(0, 1, 0)):
        assert np.isfinite(value).all()


_NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
_MODES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
_TARGETS = [("scale", 2, 2), ("scale", 0.6, 0.7), ("size", 5, 20), ("size", 1, 1), ("scale", 3, 1)]


def resized(kind, shape, targets, modes=_MODES, **attributes):
    """Every mode of coordinates with every target, the roundings of mode nearest in turn."""
    g = Graph(19, x=(kind, shape))
    for number, (coordinates, (how, *sides)) in enumerate(itertools.product(modes, targets)):
        target = [F([1, 1, *sides])] if how == "scale" else [None, ints(1, 2, *sides)]
        more = {"coordinate_transformation_mode": coordinates, **attributes}
        if attributes["mode"] == "nearest":
            more["nearest_mode"] = _NEAREST[number % 4]
        g.out(g("Resize", "x", None, *target, **more))
    return Whole(g.model())


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize(mode):
    modes = (*_MODES, "half_pixel_symmetric")
    whole = resized("float32", [1, 2, 7, 9], _TARGETS, modes, mode=mode)
    whole.agrees(x=normal(1, 2, 7, 9))


def test_resize_of_integers():
    for kind in ("uint8", "int8"):
        whole = resized(kind, [1, 2, 7, 9], _TARGETS[1:4], _MODES[:3], mode="linear")
        whole.agrees(x=RNG.integers(0, 255, (1, 2, 7, 9)).astype(kind))


def test_resize_cubic():
    g = Graph(19, x=("float32", [1, 2, 5, 6]))
    for more in ({}, {"exclude_outside": 1}, {"cubic_coeff_a": -0.5}):
        for scales in ([1, 1, 1.7, 0.6], [1, 1, 1, 2]):
            g.out(g("Resize", "x", None, F(scales), mode="cubic", **more))
    Whole(g.model()).agrees(x=normal(1, 2, 5, 6))


def test_resize_of_open_sizes():
    for mode in ("nearest", "linear"):
        targets = [("scale", 0.5, 1.5), ("size", 5, 20)]
        modes = _MODES if mode == "nearest" else _MODES[:3]
        whole = resized("float32", ["N", 2, "H", "W"], targets, modes, mode=mode)
        for height, width in ((7, 9), (2, 2), (12, 1)):
            if height > 1 or mode == "nearest":
                whole.agrees(x=normal(1, 2, height, width))


def test_resize_of_some_axes():
    g = Graph(19, x=("float32", [1, 2, 7, 9]), line=("float32", [4, 6]))
    crop, part = (
        F([0, 0, 0.2, 0.1, 1, 1, 0.7, 1.3]),
        {"coordinate_transformation_mode": "tf_crop_and_resize"},
    )
    for mode in ("nearest", "linear", "cubic"):
        g.out(
            g(
                "Resize",
                "x",
                crop,
                None,
                ints(1, 2, 6, 5),
                mode=mode,
                extrapolation_value=7.0,
                **part,
            )
        )
    for policy in ("not_larger", "not_smaller"):
        more = {"axes": [2, 3], "keep_aspect_ratio_policy": policy}
        g.out(g("Resize", "x", None, None, ints(10, 7), mode="linear", **more))
    g.out(g("Resize", "x", None, F([2, 0.5]), mode="linear", axes=[3, 2]))
    g.out(g("Resize", "line", None, F([1.5, 2]), mode="linear"))
    Whole(g.model()).agrees(x=normal(1, 2, 7, 9), line=normal(4, 6))
