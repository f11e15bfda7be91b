"""Converters of ONNX operators: values at NaN, infinity and zero, errors, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_cases import Case, compare, compiled, special

from dccompile.errors import Error
from dccompile.frontend import operators as ops

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 3])
def test_pointwise(rows: int) -> None:
    case = Case(x=special(RNG, rows, 7))
    plain = """Relu IsNaN Sigmoid Tanh Erf Exp Log HardSwish HardSigmoid LeakyRelu Elu Selu
        ThresholdedRelu Softplus Softsign Mish Abs Neg Floor Ceil Round Sqrt Reciprocal Sign"""
    for op in plain.split():
        case.add(op, "x")
    f = np.float32
    case.add("Celu", "x", alpha=1.5).add("Clip", "x", f(-1), f(2)).add("Clip", "x", f(np.nan))
    case.add("IsInf", "x").add("IsInf", "x", detect_positive=0)
    case.add("IsInf", "x", detect_negative=0)
    for exponent in (f(2), f(0.5), f(-1.5), np.int64(3)):
        case.add("Pow", "x", exponent)
    case.add("PRelu", "x", normal(7)).add("Max", "x", normal(7)).add("Min", "x", normal(7))
    case.add("Softmax", "x", axis=-1).add("LogSoftmax", "x", axis=1)
    case.add("LpNormalization", "x", axis=1).add("LpNormalization", "x", axis=1, p=1)
    case.add("Where", "y1_0", np.float32(0), "x").add("Expand", "x", [2, 1, 1])
    compare(case, rtol=2e-6)


def test_new_activations() -> None:
    case = Case(20, x=special(RNG, 3, 33))
    compare(case.add("Gelu", "x").add("Gelu", "x", approximate="tanh"), rtol=2e-6)


def test_old_opsets() -> None:
    case = Case(11, x=normal(3, 4, 5))
    case.add("Softmax", "x", axis=1).add("Softmax", "x", axis=2).add("LogSoftmax", "x")
    case.add("Clip", "x", np.float32(0)).add("Flatten", "x").add("TopK", "x", [2], outputs=2)
    compare(case)


@pytest.mark.parametrize("axes", [[1], [-1], [0], [0, 2], [2, 3]])
def test_reductions(axes: list[int]) -> None:
    case = Case(x=np.abs(normal(2, 3, 8, 9)) + 0.1)
    kinds = "Max Min Sum Mean Prod L1 L2 SumSquare LogSumExp LogSum"
    for kind in kinds.split():
        case.add(f"Reduce{kind}", "x", axes, keepdims=0).add(f"Reduce{kind}", "x", axes)
    compare(case, rtol=1e-5, atol=1e-5)


def test_reductions_of_nan_and_of_nothing() -> None:
    case = Case(x=special(RNG, 2, 3, 4))
    for kind in ("Max", "Min", "Sum"):
        case.add(f"Reduce{kind}", "x", [1])
    compare(case, others=[{"x": np.full((2, 3, 4), np.nan, np.float32)}])
    empty = Case(x=np.zeros((2, 0, 4), np.float32))
    for kind in ("Max", "Min", "Sum", "Prod", "L2"):
        empty.add(f"Reduce{kind}", "x", [1])
    compare(empty)


def test_selection() -> None:
    case = Case(x=np.round(normal(2, 3, 8, 9) * 4))
    for axis in (1, 2, 3):
        case.add("ArgMax", "x", axis=axis).add("ArgMin", "x", axis=axis, keepdims=0)
        case.add("TopK", "x", [3], outputs=2, axis=axis)
        case.add("TopK", "x", [2], outputs=2, axis=axis, largest=0)
        case.add("CumSum", "x", np.int64(axis))
        case.add("CumSum", "x", np.int64(axis), reverse=1, exclusive=1)
    compare(case)


def test_normalizations() -> None:
    x = normal(3, 4, 8, 9)
    case = Case(x=x)
    c, v = normal(4), np.abs(normal(4)) + 0.1
    case.add("LayerNormalization", "x", normal(9), normal(9))
    case.add("LayerNormalization", "x", normal(4, 8, 9), outputs=3, axis=1)
    case.add("BatchNormalization", "x", c, c, c, v).add("InstanceNormalization", "x", c, c)
    compare(case, rtol=1e-4, atol=1e-5, others=[{"x": x[:1]}])


def test_quantization() -> None:
    x = np.concatenate([normal(2, 3, 8, 9) * 100, special(RNG, 1, 3, 8, 9)])
    scales, f = np.abs(normal(3)) + 0.1, np.float32(0.7)
    case = Case(x=x)
    case.add("QuantizeLinear", "x", f, np.uint8(9)).add("QuantizeLinear", "x", f)
    case.add("QuantizeLinear", "x", f, np.int8(-3))
    case.add("QuantizeLinear", "x", scales, np.array([1, -2, 3], np.int8), axis=1)
    case.add("QuantizeLinear", "x", scales, np.array([1, -2, 3], np.int8), axis=-3)
    case.add("DequantizeLinear", "y0_0", f, np.uint8(9))
    case.add("DequantizeLinear", "y3_0", scales, np.array([1, -2, 3], np.int8), axis=1)
    compare(case)
    for value in (normal(3, 7), np.zeros((3, 7), np.float32)):
        compare(Case(x=value).add("DynamicQuantizeLinear", "x", outputs=3))
    wide = Case(21, x=RNG.integers(0, 65535, (3, 5)).astype(np.uint16))
    compare(wide.add("DequantizeLinear", "x", f, np.uint16(7)))


def test_integer_products() -> None:
    a = RNG.integers(0, 255, (5, 17, 31)).astype(np.uint8)
    b = RNG.integers(-128, 127, (31, 33)).astype(np.int8)
    f, columns = np.float32, np.abs(normal(33)) + 0.01
    case = Case(a=a).add("MatMulInteger", "a", b)
    case.add("MatMulInteger", "a", b, np.uint8(7), np.int8(-3))
    out = (f(13.3), np.uint8(100))
    case.add("QLinearMatMul", "a", f(0.1), np.uint8(7), b, f(0.2), np.int8(-3), *out)
    zeros = np.zeros(33, np.int8)
    case.add("QLinearMatMul", "a", f(0.1), np.uint8(7), b, columns, zeros, *out)
    compare(case)


def test_integer_convolutions() -> None:
    x = RNG.integers(0, 255, (2, 6, 13, 15)).astype(np.uint8)
    w = RNG.integers(-128, 127, (9, 6, 3, 3)).astype(np.int8)
    f, zero, y = np.float32, np.uint8(7), (np.float32(30), np.uint8(100))
    case = Case(x=x).add("ConvInteger", "x", w.view(np.uint8), zero, pads=[1, 1, 1, 1])
    case.add("QLinearConv", "x", f(0.1), zero, w, f(0.2), np.int8(0), *y, strides=[2, 2])
    scales, bias = np.abs(normal(9)) + 0.01, RNG.integers(-999, 999, 9).astype(np.int32)
    zeros = np.zeros(9, np.int8)
    case.add("QLinearConv", "x", f(0.1), zero, w, scales, zeros, *y, bias, auto_pad="SAME_UPPER")
    compare(case)


def test_integers() -> None:
    case = Case(
        a=RNG.integers(-99, 99, (3, 7)).astype(np.int32),
        b=np.array([[3], [-7], [-1]], np.int32),
        f=normal(3, 7),
        u=RNG.integers(0, 255, (3, 9)).astype(np.uint8),
        s=RNG.integers(0, 7, (3, 9)).astype(np.uint8),
    )
    known = np.array([3, -7, -1, 5, 5, 6, 7], np.int32)
    case.add("Div", "a", "b").add("Mod", "a", "b").add("Mod", "a", "b", fmod=1)
    case.add("Div", "a", known).add("Mod", "a", known).add("Mod", "f", normal(7), fmod=1)
    case.add("BitShift", "u", "s", direction="LEFT").add("BitShift", "u", "s", direction="RIGHT")
    case.add("Max", "a", "b").add("Relu", "a").add("Clip", "a", np.int32(-5), np.int32(9))
    compare(case)


def test_shift_by_the_width_is_zero() -> None:
    u, s = np.full((1, 4), 255, np.uint8), np.array([[0, 7, 8, 200]], np.uint8)
    for direction, want in (("LEFT", [255, 128, 0, 0]), ("RIGHT", [255, 1, 0, 0])):
        case = Case(u=u, s=s).add("BitShift", "u", "s", direction=direction)
        np.testing.assert_array_equal(compiled(case.model())(u, s)[0], [want])


def test_gathers() -> None:
    case = Case(
        t=normal(3, 4, 5),
        i=np.array([0, -1, 2]),
        j=np.array([[0, 1], [-5, 2], [4, -1]], np.int32),
        e=RNG.integers(-4, 4, (3, 2, 5)),
        p=np.array([[0, 1], [-1, -4], [2, 3]]),
        q=np.array([[0], [-1], [2]]),
    )
    case.add("Gather", "t", "i").add("Gather", "t", "i", axis=1).add("Gather", "t", "j", axis=-1)
    case.add("Gather", "t", np.int64(-1), axis=1).add("Gather", "t", np.array([[0, 2], [-1, 1]]))
    case.add("GatherElements", "t", "e", axis=1).add("GatherND", "t", "p")
    case.add("GatherND", "t", "q").add("GatherND", "t", "q", batch_dims=1)
    case.add("ScatterElements", "t", "e", normal(3, 2, 5), axis=1)
    case.add("ScatterND", "t", "p", normal(3, 5))
    case.add("OneHot", "i", [4], np.array([0.5, 2], np.float32))
    compare(case, symbolic=False)


@pytest.mark.parametrize("bad", [10, -11, 100_000, 2**40, -(2**63)])
def test_index_out_of_range(bad: int) -> None:
    t, i = normal(10, 4), np.array([0, bad])
    for symbolic in (False, True):
        case = Case(t=t).add("Gather", "t", "i")
        case.feeds["i"] = i
        model = case.model(False)
        if symbolic:
            model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rows"
        with pytest.raises(ValueError, match=r"DC2110: Gather 'Gather_0'"):
            compiled(model)(t, i)


def test_other_bad_indices() -> None:
    t = normal(10, 4)
    for op, i, extra in (
        ("GatherElements", np.array([[0, 1, 2, 10]]), ()),
        ("GatherND", np.array([[9, 4]]), ()),
        ("ScatterND", np.array([[10]]), (normal(1, 4),)),
        ("ScatterElements", np.array([[0, 0, 0, -11]]), (normal(1, 4),)),
    ):
        case = Case(t=t, i=i).add(op, "t", "i", *extra)
        with pytest.raises(ValueError, match="DC2110"):
            compiled(case.model(False))(t, i)
    with pytest.raises(Error, match="index 10 at"):
        compiled(Case(t=t).add("Gather", "t", np.array([3, 10])).model(False))


def test_division_that_would_trap() -> None:
    a = np.array([[7, -(2**31)]], np.int32)
    for op in ("Div", "Mod"):
        case = Case(a=a, b=a).add(op, "a", "b")
        run = compiled(case.model())
        with pytest.raises(ValueError, match="DC2111"):
            run(a, np.array([[1, 0]], np.int32))
        if op == "Div":
            with pytest.raises(ValueError, match="DC2111"):
                run(a, np.array([[1, -1]], np.int32))
        else:
            assert run(a, np.array([[4, -1]], np.int32))[0].tolist() == [[3, 0]]
    with pytest.raises(Error, match="contains 0"):
        compiled(Case(a=a).add("Div", "a", np.array([1, 0], np.int32)).model())


def test_hazards_name_every_node() -> None:
    case = Case(x=normal(1, 2, 4, 4), k=np.array([2]))
    case.add("Unique", "x").add("TopK", "x", "k", outputs=2).add("Reshape", "x", "k")
    half = np.array([1, 1, 0.5, 0.5], np.float32)
    case.add("Resize", "x", "", half, mode="linear", antialias=1)
    case.add("Resize", "x", "", np.array([1, 1, 2, 2], np.float32), mode="nearest")
    case.add("Shape", "x").add("Reshape", "x", "y5_0").add("Relu", "x")
    found = {(p.where, p.code) for p in ops.hazards(case.model(False))}
    assert found == {
        ("Unique 'Unique_0'", "DC3111"),
        ("TopK 'TopK_1'", "DC3112"),
        ("Reshape 'Reshape_2'", "DC3112"),
        ("Resize 'Resize_3'", "DC3113"),
    }


def test_table() -> None:
    assert {"Relu", "QLinearConv", "Celu", "TopK", "Conv"} <= ops.supported()
    assert set(ops.table()) == ops.supported()
