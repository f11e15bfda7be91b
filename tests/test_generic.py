"""The generic schedule: odd sizes, tails, symbolic batches, all targets, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_cases import Case, compare, imported
from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from dccompile import machine
from dccompile.generic import legalize, stack
from dccompile.generic import schedule as generic

TARGETS = [t for t in machine.TARGETS.values() if not machine.missing_features(t.features)]
SIZES = [1, 3, 7, 17, 31, 33, 100]


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_tails(target: machine.Machine) -> None:
    """Every size in the vector dimension and beside it, broadcasts, reductions both ways."""
    case = Case(**{f"x{n}": normal(n, 3, n) for n in SIZES})
    for n in SIZES:
        case.add("Mul", f"x{n}", normal(1, n)).add("Sub", f"x{n}", normal(2, 3, 1))
        case.add("ReduceSum", f"x{n}", [1], keepdims=0).add("ReduceMax", f"x{n}", [0])
        case.add("Softmax", f"x{n}", axis=-1).add("Transpose", f"x{n}", perm=[1, 0])
    compare(case, symbolic=False, target=target)


def test_symbolic_batch() -> None:
    case = Case(x=normal(0, 5, 7, 33))
    for op in ("Relu", "Sigmoid"):
        case.add(op, "x")
    case.add("ReduceMean", "x", [2]).add("ReduceMax", "x", [0]).add("Softmax", "x", axis=1)
    case.add("Transpose", "x", perm=[2, 0, 1]).add("Concat", "x", "x", axis=2)
    case.add("MatMul", "x", normal(1, 33, 17)).add("LayerNormalization", "x", normal(2, 33))
    others = [{"x": normal(n, n, 7, 33)} for n in SIZES]
    compare(case, others=others, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_transpositions(dtype: str) -> None:
    x = (normal(0, 3, 19, 17, 35) * 50).astype(np.int64).astype(dtype)
    case = Case(x=x)
    for perm in (
        [0, 2, 3, 1],
        [0, 3, 1, 2],
        [1, 0, 2, 3],
        [3, 2, 1, 0],
        [0, 1, 3, 2],
        [2, 3, 0, 1],
    ):
        case.add("Transpose", "x", perm=perm)
    compare(case, others=[{"x": x[:1]}])


def test_products() -> None:
    case = Case(a=normal(0, 5, 17, 31), b=normal(1, 5, 31, 33), v=normal(2, 5, 1))
    case.add("MatMul", "a", "b").add("MatMul", "a", normal(3, 31, 7)).add("MatMul", "a", "vec")
    case.constants["vec"] = normal(4, 31)
    case.add("Gemm", normal(5, 7, 31), normal(6, 100, 31), transB=1, alpha=0.5)
    compare(case, rtol=1e-4, atol=1e-4, symbolic=False)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_convolutions_and_pools(target: machine.Machine) -> None:
    x = normal(0, 2, 6, 17, 19)
    case = Case(x=x)
    case.add("Conv", "x", normal(1, 33, 6, 3, 3), pads=[1, 1, 1, 1])
    case.add("Conv", "x", normal(2, 9, 6, 3, 2), strides=[2, 2])
    case.add("Conv", "x", normal(3, 10, 3, 3, 3), normal(4, 10), group=2)
    case.add("Conv", "x", normal(5, 6, 1, 3, 3), group=6, pads=[2] * 4, dilations=[2, 2])
    case.add("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    case.add("MaxPool", "x", kernel_shape=[3, 2], strides=[3, 1], ceil_mode=1)
    case.add("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")
    case.add("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    case.add("AveragePool", "x", kernel_shape=[3, 2], auto_pad="SAME_LOWER")
    case.add("GlobalAveragePool", "x").add("GlobalMaxPool", "x")
    compare(case, rtol=1e-4, atol=1e-4, others=[{"x": x[:1]}], target=target)


def test_layout() -> None:
    x = normal(0, 2, 8, 6, 9)
    case = Case(x=x, z=normal(1, 2, 5, 6, 9))
    case.add("Concat", "x", "z", "x", axis=1).add("Concat", "x", "x", axis=3)
    case.add("Slice", "x", [1, 2], [5, -1], [2, 3])
    case.add("Slice", "x", [5, 8], [0, 1], [2, 3], [-2, -3])
    for mode in ("constant", "reflect", "edge"):
        case.add("Pad", "x", [0, 0, 1, 2, 0, 0, 3, 1], mode=mode)
    case.add("Split", "x", [4, 5], outputs=2, axis=3).add("Reshape", "x", [0, -1, 4])
    case.add("Tile", "x", [1, 2, 1, 3]).add("DepthToSpace", "x", blocksize=2, mode="CRD")
    compare(case)


def test_chain_in_one_function() -> None:
    """Elementwise neighbours of a product run in its loop nest, with quantization between."""
    case = Case(x=normal(0, 3, 33)).add("MatMul", "x", normal(1, 33, 17))
    case.add("Add", "y0_0", normal(2, 17)).add("Relu", "y1_0").add("Mul", "y2_0", "y1_0")
    case.add("QuantizeLinear", "y3_0", np.float32(0.1), np.uint8(3))
    case.add("DequantizeLinear", "y4_0", np.float32(0.1), np.uint8(3)).add("Sigmoid", "y5_0")
    case.outputs = ["y6_0"]
    compare(case)
    mod, left = legalize.fuse(imported(case.model()), machine.host())
    assert len([f for f in mod.functions.values() if isinstance(f, tirx.PrimFunc)]) == 1
    assert not left


def test_report_names_what_is_left() -> None:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("odd")
        x = T.arg("x", T.buffer((4,), "float32"))
        with T.serial(0, 4) as i:
            T.buffer_store(x, x[i] + tirx.const(1, "float32"), [i])
    func = builder.get()
    mod = ir.IRModule({"odd": func, "mine": func.with_attr("dcc.kernel", "mine")})
    result, report = generic.schedule_generic(mod, machine.host())
    assert list(report.left) == ["odd"] and report.left["odd"]
    assert result["mine"].same_as(mod["mine"])


def test_local_buffers_live_on_the_stack() -> None:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("f")
        x = T.arg("x", T.buffer((64,), "float32"))
        with T.parallel(0, 64) as i:
            own = T.alloc_buffer((1,), "float32", scope="local")
            T.buffer_store(own, x[i], [0])
            T.buffer_store(x, own[0] * own[0], [i])
    mod, target = ir.IRModule({"f": builder.get()}), legalize.target_of(machine.host())
    for build, calls in ((tirx.build, True), (stack.build, False)):
        built = build(mod, target)
        text = getattr(built, "mod", built).inspect_source("ll")
        assert ("TVMBackendAllocWorkspace" in text) == calls
