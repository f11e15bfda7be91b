"""Elementwise operators between 8-bit tensors become tables of 256 codes; what stays in integers.

Results are compared with ONNX Runtime code by code, not within one.
"""

from __future__ import annotations

import numpy as np
import pytest
from recovery import S8, U8, Maker, evaluate, integers, ops, session

import dccompile
from dccompile.frontend.islands import islands
from dccompile.frontend.recover import recover

CODES = np.arange(256, dtype=np.uint8)


def number(make, value):
    return make.const(value, np.float32)


def hard_swish(make, x):
    """As exporters write it before opset 14."""
    six = make.op("Clip", make.op("Add", x, number(make, 3)), number(make, 0), number(make, 6))
    return make.op("Mul", x, make.op("Div", six, number(make, 6)))


def gelu(make, x):
    y = make.op("Erf", make.op("Div", x, number(make, np.sqrt(2))))
    y = make.op("Mul", x, make.op("Add", y, number(make, 1)))
    return make.op("Mul", y, number(make, 0.5))


def single(kind, **attributes):
    return lambda make, x: make.op(kind, x, **attributes)


CHAINS = {
    **{kind: single(kind) for kind in ("Sigmoid", "Tanh", "HardSwish", "Erf", "Exp", "Sqrt",
                                       "Log", "Softplus", "Selu", "Relu", "Abs", "Reciprocal")},
    "HardSigmoid": single("HardSigmoid", alpha=1 / 6),
    "LeakyRelu": single("LeakyRelu", alpha=0.1),
    "Elu": single("Elu", alpha=0.7),
    "hard-swish": hard_swish,
    "gelu": gelu,
    "silu": lambda make, x: make.op("Mul", x, make.op("Sigmoid", x)),
    "mish": lambda make, x: make.op("Mul", make.op("Tanh", make.op("Softplus", x)), x),
    "1 - x": lambda make, x: make.op("Sub", number(make, [[1]]), x),
    "x ** 2": lambda make, x: make.op("Pow", x, number(make, 2)),
    "2 ** x": lambda make, x: make.op("Pow", number(make, [2]), x),
    "max(x, 0.3, -x)": lambda make, x: make.op("Max", x, number(make, 0.3), make.op("Neg", x)),
    "PRelu": lambda make, x: make.op("PRelu", x, number(make, 0.3)),
    "requantize": lambda make, x: x,
}  # fmt: skip


def chained(name, source, target, seed):
    """DequantizeLinear - the chain - QuantizeLinear over all codes, random scales."""
    make = Maker(seed=seed)
    rng = make.rng
    zeros = {U8: lambda: int(rng.integers(60, 180)), S8: lambda: int(rng.integers(-60, 60))}
    kind = np.uint8 if source == U8 else np.int8
    x = make.dequant(
        make.input(2, 128, dtype=source), rng.uniform(0.01, 0.1), zeros[source](), kind
    )
    y = CHAINS[name](make, x)
    model = make.model(make.quant(y, rng.uniform(0.003, 0.05), zeros[target](), target))
    return model, {"x": CODES.view(kind).reshape(2, 128)}


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("name", CHAINS)
def test_a_table_holds_what_onnx_runtime_computes(name, optimize):
    for seed, (source, target) in enumerate([(U8, U8), (U8, S8), (S8, U8), (S8, S8)]):
        model, feeds = chained(name, source, target, seed)
        recovered = recover(model)
        assert ops(recovered) == ["DccTable"]
        assert {n["precision"] for n in recovered.nodes} <= {"int8", "folded"}
        (got,), (want,) = evaluate(recovered, feeds), session(model, optimize).run(None, feeds)
        assert got.dtype == want.dtype and len(np.unique(want)) > 3
        np.testing.assert_array_equal(got, want)


def test_quantizations_within_are_part_of_the_table():
    make = Maker()
    x = make.dequant(make.input(1, 256, dtype=U8), 0.05, 120, np.uint8)
    gate = make.op("HardSigmoid", x, alpha=1 / 6)
    gate = make.dequant(make.quant(gate, 1 / 255, 0, U8), 1 / 255, 0, np.uint8)
    three = make.dequant(make.const(51, np.uint8), 1 / 51, 0, np.uint8)  # a constant in 8 bits
    y = make.op("Mul", make.op("Mul", x, gate), three)
    y = make.dequant(make.quant(y, 0.04, 30, U8), 0.04, 30, np.uint8)
    model = make.model(make.quant(make.op("LeakyRelu", y), 0.03, 20, U8))
    recovered = recover(model)
    assert ops(recovered) == ["DccTable"]
    feeds = {"x": CODES.reshape(1, 256)}
    # Between two roundings: without its optimizer, which computes x * gate in one step.
    want = session(model, optimize=False).run(None, feeds)
    np.testing.assert_array_equal(evaluate(recovered, feeds)[0], want[0])


@pytest.mark.parametrize("other", ["output", "reader", "second tensor", "row", "rank"])
def test_what_is_no_function_of_one_code_stays(other):
    make = Maker()
    x = make.dequant(make.input(2, 8, dtype=U8), 0.05, 120, np.uint8)
    inner = make.op("Sigmoid", x)
    y, outputs = make.op("Mul", x, inner), []
    if other == "output":
        outputs = [inner]
    elif other == "reader":
        outputs = [make.op("Softmax", inner)]
    elif other == "second tensor":
        y = make.op("Add", y, make.dequant(make.input(2, 8, dtype=U8, name="z"), 0.1, 9, np.uint8))
    elif other == "row":
        y = make.op("Add", y, make.const(np.arange(8) / 9, np.float32))
    else:
        y = make.op("Add", y, number(make, [[[0.5]]]))
    model = make.model(make.quant(y, 0.04, 30, U8), *outputs)
    recovered = recover(model)
    assert "DccTable" not in ops(recovered)
    feeds = {"x": integers(make.rng, (2, 8), U8), "z": integers(make.rng, (2, 8), U8)}
    feeds = {i.name: feeds[i.name] for i in model.graph.input}
    for got, want in zip(evaluate(recovered, feeds), session(model).run(None, feeds), strict=True):
        if want.dtype == np.uint8:
            np.testing.assert_array_equal(got, want)


def test_nan_gives_the_least_code():
    make = Maker()
    x = make.dequant(make.input(256, dtype=S8), 0.05, 0, np.int8)
    model = make.model(make.quant(make.op("Sqrt", x), 0.02, -7, S8))
    (table,) = (t for t in recover(model).model.graph.initializer if t.name.endswith("_table"))
    assert np.frombuffer(table.raw_data, np.int8)[128:].tolist() == [-128] * 128


# ---- compiled ----
def loaded(model, target, feeds):
    return dccompile.compile(model, targets=target).load(threads=1).run(None, feeds)


SIZES = (1, 2, 5, 16, 31, 33, 63, 64, 65, 100, 129, 1000)


@pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3"])
def test_look_ups_of_every_length(target):
    """Vectors, tails and single codes; s8 and u8 on both sides; open and empty dims."""
    make = Maker()
    outputs, feeds = [], {}
    for i, size in enumerate(SIZES):
        source, kind = ((U8, np.uint8), (S8, np.int8))[i % 2]
        out = (U8, S8)[i // 2 % 2]
        zero = 100 if source == U8 else -20
        x = make.input("N" if i % 3 == 0 else 2, size, dtype=source, name=f"x{i}")
        feeds[x] = integers(make.rng, (2, size), source)
        y = make.op("Tanh", make.dequant(x, 0.02, zero, kind))
        outputs.append(make.quant(y, 0.008, 7, out))
    none = make.op("Slice", "x3", *(make.const([n], np.int64) for n in (3, 3, 1)))
    none = make.op("Exp", make.dequant(none, 0.02, -20, np.int8))
    none = make.quant(none, 0.008, -7, S8)
    outputs.append(make.op("Concat", none, "x3", axis=1))
    model = make.model(*outputs)
    wanted = session(model).run(None, feeds)
    for got, want in zip(loaded(model, target, feeds), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3"])
def test_look_ups_fused_with_their_neighbours(target):
    """Behind a reduction, before a Transpose, a Pad, a Concat, a Mul of another shape."""
    make = Maker()
    x = make.input(2, 24, 9, 10, dtype=U8)
    a = make.dequant(x, 0.05, 120, np.uint8)
    y = make.dequant(make.quant(hard_swish(make, a), 0.03, 12, U8), 0.03, 12, np.uint8)
    turned = make.quant(make.op("Transpose", y, perm=[0, 2, 3, 1]), 0.03, 12, U8)
    pads = make.const([0, 0, 1, 2, 0, 0, 2, 1], np.int64)
    wide = make.quant(make.op("Pad", y, pads), 0.03, 12, U8)
    both = make.quant(make.op("Concat", y, make.op("Sigmoid", a), axis=1), 0.035, 9, U8)
    gate = make.op("GlobalAveragePool", a)
    gate = make.dequant(make.quant(gate, 0.0213, 128, U8), 0.0213, 128, np.uint8)
    gate = make.quant(make.op("HardSigmoid", gate), 1 / 255, 0, U8)
    gated = make.op("Mul", y, make.dequant(gate, 1 / 255, 0, np.uint8))
    model = make.model(turned, wide, both, make.quant(gated, 0.025, 14, U8))
    feeds = {"x": integers(make.rng, (2, 24, 9, 10), U8)}
    wanted = session(model, optimize=False).run(None, feeds)
    for got, want in zip(loaded(model, target, feeds), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


# ---- what moves bytes ----
def moved(make, kind, x):
    """An operator that moves or chooses the elements of (2, 8, 6, 6), by name."""
    ints = lambda *values: make.const(values, np.int64)  # noqa: E731
    if kind == "Split":
        a, b = make.op("Split", x, axis=1, outputs=2, **({"num_outputs": 2}))
        return make.op("Concat", b, a, axis=2)
    if kind == "Resize":
        scales = make.const([1, 1, 2, 2], np.float32)
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
        return make.op("Resize", x, "", scales, **how, nearest_mode="floor")
    return {
        "Pad": lambda: make.op("Pad", x, ints(0, 0, 1, 1, 0, 0, 1, 1)),
        "Expand": lambda: make.op("Expand", x, ints(3, 2, 8, 6, 6)),
        "Tile": lambda: make.op("Tile", x, ints(1, 2, 1, 1)),
        "DepthToSpace": lambda: make.op("DepthToSpace", x, blocksize=2),
        "SpaceToDepth": lambda: make.op("SpaceToDepth", x, blocksize=2),
        "GlobalMaxPool": lambda: make.op("GlobalMaxPool", x),
        "MaxPool": lambda: make.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4),
        "Gather": lambda: make.op("Gather", x, ints(3, 0, 5, 1), axis=1),
        "Slice": lambda: make.op("Slice", x, ints(1), ints(7), ints(1), ints(2)),
        "Transpose": lambda: make.op("Transpose", x, perm=[0, 2, 3, 1]),
    }[kind]()


MOVED = ("Split", "Resize", "Pad", "Expand", "Tile", "DepthToSpace", "SpaceToDepth",
         "GlobalMaxPool", "MaxPool", "Gather", "Slice", "Transpose")  # fmt: skip


@pytest.mark.parametrize("behind", ["a convolution, same scale", "the input, another scale"])
def test_operators_that_move_stay_in_bytes(behind):
    make = Maker(opset=18)
    x = make.input(2, 8, 6, 6, dtype=U8)
    value = make.dequant(x, 0.05, 7, np.uint8)
    w = make.dequant(make.const(integers(make.rng, (8, 8, 1, 1), S8)), 0.01, 0, np.int8)
    conv = make.quant(make.op("Conv", value, w), 0.05, 110, U8)
    same = behind.endswith("same scale")
    if same:
        value = make.dequant(conv, 0.05, 110, np.uint8)
    after = (0.05, 110, U8) if same else (0.0437, 9, U8)
    model = make.model(conv, *(make.quant(moved(make, kind, value), *after) for kind in MOVED))
    recovered = recover(model)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(recovered))
    assert ("DccTable" in ops(recovered)) == (not same)
    assert islands(recovered).switches == 0
    feeds = {"x": integers(make.rng, (2, 8, 6, 6), U8)}
    wanted = session(model, optimize=False).run(None, feeds)
    got = loaded(model, "x86-64-v3", feeds)
    for kind, mine, want in zip(("Conv", *MOVED), got, wanted, strict=True):
        apart = np.abs(mine.astype(int) - want.astype(int))
        # A tie in the rounding of the convolution may fall to either side.
        assert apart.max() <= same + (kind == "Conv") and (apart > 0).mean() < 0.01, kind


def test_quantization_moves_in_front_of_what_moves():
    """So that the convolutions write bytes, and only of what comes from 8 bits."""
    make = Maker()
    x = make.dequant(make.input(1, 4, 6, 6, dtype=U8), 0.05, 100, np.uint8)

    def conv(filters):
        w = make.const(integers(make.rng, (filters, 4, 1, 1), S8))
        return make.op("Conv", x, make.dequant(w, 0.01, 0, np.int8))

    pooled = make.op("MaxPool", make.op("Relu", conv(8)), kernel_shape=[2, 2], strides=[2, 2])
    smaller = make.op("MaxPool", conv(8), kernel_shape=[2, 2], strides=[2, 2])
    y = make.quant(make.op("Concat", pooled, smaller, axis=1), 0.1, 90, U8)
    z = make.quant(make.op("Transpose", make.input(2, 3, name="z"), perm=[1, 0]), 0.1, 90, U8)
    model = make.model(y, z)
    recovered = recover(model)
    assert {s.workload.out for s in recovered.convs.values()} == {"u8"}
    assert ops(recovered).index("Transpose") < ops(recovered).index("QuantizeLinear")
    feeds = {"x": integers(make.rng, (1, 4, 6, 6), U8)}
    feeds["z"] = make.rng.standard_normal((2, 3)).astype(np.float32)
    got, want = evaluate(recovered, feeds), session(model).run(None, feeds)
    assert np.abs(got[0].astype(int) - want[0]).max() <= 1
    np.testing.assert_array_equal(got[1], want[1])


def test_a_filter_whose_weights_vanished_does_not_leave_the_others_in_float():
    make = Maker()
    x = make.dequant(make.input(1, 4, 6, 6, dtype=U8), 0.02, 100, np.uint8)
    scale = np.array([0.01, 3e-38, 0.02, 1e-33], np.float32)  # the second times 0.02 is no normal
    codes = make.const(integers(make.rng, (4, 4, 3, 3), S8))
    w = make.dequant(codes, scale, np.zeros(4), np.int8, axis=0)
    sums = np.float32(0.02) * scale
    bias = make.const(make.rng.integers(-9000, 9000, 4), np.int32)
    bias = make.dequant(bias, sums, np.zeros(4), np.int32, axis=0)
    model = make.model(make.quant(make.op("Conv", x, w, bias), 0.9, 120, U8))
    recovered = recover(model)
    assert ops(recovered)[-1] in ("DccConv", "Transpose")
    (site,) = recovered.convs.values()
    assert (site.precision, site.workload.bias) == ("int8", "s32")
    feeds = {"x": integers(make.rng, (1, 4, 6, 6), U8)}
    (got,), (want,) = evaluate(recovered, feeds), session(model, optimize=False).run(None, feeds)
    assert (got[:, [1, 3]] == 120).all() and np.abs(got.astype(int) - want).max() <= 1
