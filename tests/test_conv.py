"""Every convolution kernel of the list, exact against the reference, over classes of shapes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import tvm
from convolution import Case, activations, build, check, conv, residual
from kernels import TARGETS, listed, load, marked
from memory import aligned, before_a_hole

from dccompile import reference, registry
from dccompile.workload import NUMPY

NAMES = [n for n in listed("") if n.startswith(("conv_", "groupconv_", "depthwise_"))]
KERNELS = pytest.mark.parametrize("name", marked(NAMES))

# ---- classes of shapes, of every kind of convolution ----
DENSE = {
    "pointwise": conv((9, 7), 64, 64),
    "pointwise_tails": conv((5, 3), 37, 41),
    "pointwise_one_pixel": conv((1, 1), 130, 70),
    "pointwise_stride": conv((9, 8), 32, 48, stride=2, pad=0),
    "3x3": conv((9, 13), 32, 48, 3),
    "3x3_14": conv((14, 14), 64, 36, 3),
    "3x3_7": conv((7, 7), 32, 64, 3),
    "3x3_56": conv((6, 56), 16, 32, 3),
    "3x3_stride": conv((15, 16), 32, 20, 3, 2),
    "3x3_valid": conv((8, 9), 20, 16, 3, pad=0),
    "3x3_dilated": conv((11, 12), 16, 16, 3, dilation=2),
    "3x3_one_channel": conv((8, 8), 1, 8, 3),
    "3x3_narrow": conv((9, 2), 16, 16, 3),
    "3x3_one_pixel": conv((1, 1), 8, 24, 3),
    "5x5_wide_pad": conv((3, 4), 12, 16, 5, pad=4),
    "1x7": conv((6, 12), 16, 18, (1, 7)),
    "7x1_stride": conv((14, 6), 16, 16, (7, 1), (2, 1)),
    "first_layer": conv((30, 34), 3, 64, 7, 2),
    "first_layer_3x3": conv((17, 15), 3, 32, 3, 2),
    "one_dim": conv((25,), 24, 32, 5),
    "three_dims": conv((5, 6, 7), 16, 24, 3),
    "three_dims_1": conv((3, 4, 5), 24, 40),
    "3x5x5_stride": conv((4, 12, 12), 3, 16, (3, 5, 5), (1, 2, 2)),
    "3x7x7": conv((3, 14, 14), 3, 32, (3, 7, 7), (1, 2, 2)),
    "batch": conv((7, 9), 16, 32, 3, batch=3),
    "3x3_asymmetric": replace(conv((8, 9), 16, 24, 3), pads=((0, 0), (0, 2), (2, 1))),
    "3x3_beyond": conv((4, 5), 8, 20, 3, pad=4),
    "3x3_odd_channels": conv((5, 8), 18, 33, 3),
    "first_layer_asymmetric": replace(conv((9, 11), 3, 20, 3, 2), pads=((0, 0), (0, 1), (0, 1))),
    "first_layer_batch": conv((6, 7), 3, 16, 3, batch=2),
    "pointwise_batch": conv((3, 3), 40, 36, batch=5),
    "pointwise_few": conv((7, 5), 2, 24),
}
GROUPED = {
    "4_a_group": conv((9, 14), 64, 64, 3, groups=16),
    "4_a_group_odd": conv((6, 5), 12, 12, 3, groups=3),
    "4_a_group_stride": conv((12, 11), 128, 128, 3, 2, groups=32),
    "8_a_group": conv((8, 9), 128, 128, 3, groups=16),
    "8_a_group_stride": conv((9, 10), 64, 64, 3, 2, groups=8),
    "16_a_group": conv((8, 7), 64, 64, 3, groups=4),
    "16_a_group_stride": conv((14, 14), 48, 48, 3, 2, groups=3),
    "32_a_group": conv((7, 7), 96, 96, 3, groups=3),
    "32_a_group_stride": conv((8, 8), 64, 64, 3, 2, groups=2),
    "pointwise_groups": conv((5, 9), 272, 272, groups=4),
    "pointwise_groups_wide": conv((3, 5), 96, 544, groups=4),
    "rows_of_runs": conv((5, 3, 4), 68, 272, (1, 1, 4), groups=4, pad=0),
    "rows_of_runs_whole": conv((5, 7, 2), 32, 48, (1, 1, 2), groups=2, pad=0, batch=2),
    "rows_of_runs_dense": conv((5, 4), 24, 40, (1, 4), pad=0),
    "unequal_groups": conv((6, 6), 12, 20, 3, groups=4),
    "group_narrow": conv((5, 2), 32, 32, 3, groups=8),
    "group_one_pixel": conv((1, 1), 64, 64, 3, groups=16),
    "group_5x5": conv((9, 9), 32, 32, 5, groups=8),
    "group_dilated": conv((9, 8), 32, 32, 3, dilation=2, groups=8),
    "group_3d": conv((4, 5, 6), 32, 32, 3, groups=8),
    "group_batch": conv((6, 6), 64, 64, 3, groups=16, batch=2),
    "2_a_group": conv((5, 17), 52, 52, 3, groups=26),
    "4_a_group_overlap": conv((5, 18), 28, 28, 3, groups=7),
    "8_a_group_overlap": conv((4, 15), 24, 24, 3, groups=3),
    "16_to_32_a_group": conv((6, 5), 32, 64, 3, groups=2),
    "32_to_16_a_group": conv((5, 15), 64, 32, (1, 3), groups=2),
    "group_far_pad": conv((2, 3), 32, 32, 3, pad=4, groups=8),
    "group_3d_stride": conv((5, 6, 7), 32, 32, 3, 2, groups=4),
    "group_one_side": replace(
        conv((6, 7), 32, 32, (3, 2), groups=8), pads=((0, 0), (0, 2), (1, 0))
    ),
}
DEPTHWISE = {
    "dw": conv((9, 12), 64, 64, 3, groups=64),
    "dw_strips": conv((3, 200), 64, 64, 3, groups=64),
    "dw_tails": conv((8, 9), 144, 144, 3, groups=144),
    "dw_few": conv((8, 9), 5, 5, 3, groups=5),
    "dw_24": conv((6, 7), 24, 24, 3, groups=24),
    "dw_stride": conv((13, 14), 96, 96, 3, 2, groups=96),
    "dw_stride_odd": conv((10, 9), 33, 33, 3, 2, groups=33),
    "dw_5x5": conv((10, 11), 40, 40, 5, groups=40),
    "dw_5x5_stride": conv((14, 14), 72, 72, 5, 2, groups=72),
    "dw_7x7": conv((9, 9), 16, 16, 7, groups=16),
    "dw_valid": conv((8, 8), 32, 32, 3, pad=0, groups=32),
    "dw_dilated": conv((12, 11), 32, 32, 3, dilation=2, groups=32),
    "dw_narrow": conv((9, 3), 64, 64, 3, groups=64),
    "dw_one_column": conv((9, 1), 48, 48, 3, groups=48),
    "dw_one_pixel": conv((1, 1), 64, 64, 3, groups=64),
    "dw_one_dim": conv((19,), 32, 32, 3, groups=32),
    "dw_3d": conv((4, 7, 8), 64, 64, 3, groups=64),
    "dw_3d_stride": conv((6, 8, 9), 48, 48, 3, 2, groups=48),
    "dw_3x5x5": conv((4, 9, 9), 36, 36, (3, 5, 5), (1, 2, 2), groups=36),
    "dw_4x4": conv((9, 9), 16, 16, 4, groups=16, pad=1),
    "dw_batch": conv((6, 6), 32, 32, 3, groups=32, batch=3),
}
SHAPES = DENSE | GROUPED | DEPTHWISE
# ---- classes of what follows the sums ----
INTEGER = {
    "to_u8": {"shifted": True, "padded": True},
    "to_u8_relu": {"bias": "s32", "bounded": True},
    "to_u8_clamp": {"bias": "f32", "shifted": True, "clamped": True, "padded": True},
    "to_s8": {"out": "s8", "shifted": True, "bias": "s32"},
    "to_s32": {"out": "s32", "bias": "s32", "padded": True},
    "to_f32": {"out": "f32", "bias": "f32", "padded": True},
    "to_f32_relu": {"out": "f32", "activation": "relu"},
    "to_f32_clip": {"out": "f32", "activation": "clip", "clip": (-0.5, 6.0), "bias": "s32"},
    "to_f32_sigmoid": {"out": "f32", "activation": "sigmoid"},
}
FLOAT = {
    "plain": {},
    "bias": {"bias": "f32"},
    "relu": {"bias": "f32", "activation": "relu"},
    "clip": {"activation": "clip", "clip": (0.0, 6.0), "bias": "f32"},
    "tanh": {"activation": "tanh"},
    "sigmoid": {"activation": "sigmoid", "bias": "f32"},
}
RESIDUALS = {"u8_inner_u8": ("u8", "u8"), "u8_inner_s8": ("u8", "s8"), "s8": ("s8", "")}
MAIN = ("pointwise_tails", "3x3", "4_a_group", "16_a_group", "pointwise_groups", "dw_tails")


def typed(name, work, more):
    """The workload with the dtypes that the kernel is for."""
    kind = {"a": "f32", "b": "f32", "out": "f32"} if "_f32f32f32_" in name else {}
    bits = {"b_bits": 7} if "u8s7" in name else {}
    return replace(work, **kind, **bits, **more)


def cases(name, works):
    """Cases of the workloads that the kernel takes."""
    kernel, target = load(name)
    return [Case(kernel, target, work) for work in works if kernel.refuses(work) is None]


def epilogues(name):
    return FLOAT if "_f32f32f32_" in name else INTEGER


def run_all(found, *batches):
    library = compiled(found)
    for case in found:
        for batch in batches or (None,):
            case.run(library, batch)


def compiled(found):
    if not found:
        pytest.skip("the kernel takes none of these shapes")
    return build(found)


@cache
def every_shape(name):
    """Every class of shapes, each with another epilogue: cases and their library."""
    options = list(epilogues(name).values())
    works = [typed(name, w, options[i % len(options)]) for i, w in enumerate(SHAPES.values())]
    found = cases(name, works)
    return found, compiled(found)


@KERNELS
def test_shapes(name):
    found, library = every_shape(name)
    for case in found:
        case.run(library)


@KERNELS
def test_epilogues(name):
    works = [typed(name, SHAPES[s], more) for s in MAIN for more in epilogues(name).values()]
    run_all(cases(name, works))


@KERNELS
def test_residuals(name):
    if "_f32f32f32_" in name:
        added = [("f32", "", {}), ("f32", "", {"bias": "f32", "activation": "relu"})]
    else:
        plain = {"shifted": True, "padded": True, "bias": "s32"}
        added = [(kind, inner, plain) for kind, inner in RESIDUALS.values()]
        added += [("u8", "u8", {"bounded": True}), ("u8", "", {"out": "s8", "clamped": True})]
    works = [
        residual(typed(name, SHAPES[s], more), kind, inner)
        for s in MAIN
        for kind, inner, more in added
    ]
    run_all(cases(name, works))


@KERNELS
def test_open_batch(name):
    shapes = (*MAIN, "3x3_stride", "dw", "dw_strips")
    works = [typed(name, replace(SHAPES[s], batch=None), {}) for s in shapes]
    run_all(cases(name, works), 0, 1, 2, 5)


@KERNELS
def test_nothing_outside_is_read_or_written(name):
    found, library = every_shape(name)
    for case in found:
        work = case.work
        a, _ = activations(work, work.batch, case.seed)
        held, region = before_a_hole(a)
        shape = (work.batch, *work.outputs, work.filters)
        out, raw = aligned(shape, NUMPY[work.out], guard=64)
        library[case.symbol](held, case.packed, tvm.runtime.from_dlpack(out))
        check(work, out, reference.conv(work, case.weights, a), "at the end of memory")
        guards = np.concatenate([raw[: out.ctypes.data - raw.ctypes.data], raw[-1:]])
        assert (guards == 0x5A).all(), work.describe()
        del held, region


@pytest.mark.parametrize("name", marked(n for n in NAMES if "_f32f32f32_" in n))
def test_infinity_and_nan_stay_where_they_are(name):
    found = cases(name, [typed(name, SHAPES[s], {"activation": "relu"}) for s in MAIN])
    library = compiled(found)
    for case in found:
        work = case.work
        a, _ = activations(work, 1, case.seed)
        a[0, 0, 1, 1, 0], a[0, 0, -1, -1, -1] = np.inf, np.nan
        out, _ = aligned((1, *work.outputs, work.filters), "float32")
        library[case.symbol](tvm.runtime.tensor(a), case.packed, tvm.runtime.from_dlpack(out))
        with np.errstate(invalid="ignore"):
            expected = reference.conv(work, case.weights, a)
        assert (np.isfinite(out) == np.isfinite(expected)).all()


def test_every_convolution_has_a_kernel_on_every_target():
    for target in TARGETS.values():
        for work in SHAPES.values():
            assert registry.select(work, target).kernel.op == "conv"
            floats = typed("conv_f32f32f32_", work, {})
            assert registry.select(floats, target).kernel.op == "conv"
