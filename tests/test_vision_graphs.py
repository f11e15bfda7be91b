"""Vision graphs of every kind through `compile` and `load`, against ONNX Runtime.

Many one-layer graphs share a model, so that one compilation serves them all.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from recovery import MS, S8, U8, Maker, compare, evaluate, session

import dccompile
from dccompile.errors import ModelError
from dccompile.frontend.gate import read
from dccompile.frontend.recover import recover

TARGETS = ("x86-64-v4-vnni", "x86-64-v4", "x86-64-v3")


def pick(rng, *values):
    return values[int(rng.integers(len(values)))]


def window(rng, rank):
    """Sizes, kernel, strides, dilations and pads of a window that fits."""
    size = [int(rng.integers(1, (24, 9, 5)[rank - 1])) for _ in range(rank)]
    kernel = [pick(rng, 1, 2, 3, 3) for _ in range(rank)]
    strides = [pick(rng, 1, 1, 2, 3) for _ in range(rank)]
    dilations = [pick(rng, 1, 1, 2) for _ in range(rank)]
    pads = [int(rng.integers(0, k + 1)) for k in kernel * 2]
    for i in range(rank):
        missing = (kernel[i] - 1) * dilations[i] + 1 - size[i] - pads[i] - pads[rank + i]
        pads[rank + i] += max(0, missing)
    return size, kernel, {"strides": strides, "dilations": dilations, "pads": pads}


def quantized_layer(make, rng, name, feeds):
    """DequantizeLinear - Conv [- activation] - QuantizeLinear, or QLinearConv."""
    size, kernel, more = window(rng, pick(rng, 1, 2, 2, 3))
    channels = pick(rng, 1, 3, 8, 12, 16, 24, 34)
    groups = pick(rng, 1, 1, channels, *(g for g in (2, 3, 4, 8) if channels % g == 0))
    filters = groups * pick(rng, 1, 2, 4) if groups > 1 else pick(rng, 1, 7, 16, 33)
    signed = rng.random() < 0.25
    kind, dtype = (S8, np.int8) if signed else (U8, np.uint8)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    zero = pick(rng, low, high, int(rng.integers(low, high + 1)))
    x = make.input(pick(rng, 1, 2), channels, *size, dtype=kind, name=name)
    values = rng.integers(low, high + 1, [d.dim_value for d in _dims(make.inputs[-1])])
    ends = rng.random(values.shape) < 0.3
    feeds[name] = np.where(ends, rng.choice([low, high], values.shape), values).astype(dtype)
    offset = 0 if signed or rng.random() < 0.7 else pick(rng, 0, 120, 128)
    stored = np.uint8 if offset else np.int8
    info = np.iinfo(stored)
    codes = rng.integers(info.min, info.max + 1, (filters, channels // groups, *kernel))
    scale = rng.uniform(0.3, 1.5, filters if rng.random() < 0.6 else ()) * 0.01
    y_scale = 0.05 * scale.mean() * 74 * 2 * np.sqrt(codes[0].size)
    y_zero = pick(rng, low, high, int(rng.integers(low, high + 1)))
    bias = rng.integers(-8000, 8000, filters)
    w, zeros = make.const(codes, stored), np.full(np.shape(scale), offset)
    more["group"] = groups
    if rng.random() < 0.25:
        parts = [(0.05, np.float32), (zero, dtype), None, (scale, np.float32), (zeros, stored)]
        parts += [(y_scale, np.float32), (y_zero, dtype), (bias, np.int32)]
        names = [w if part is None else make.const(*part) for part in parts]
        return make.op("QLinearConv", x, *names, **more)
    w = make.dequant(w, scale, zeros, stored, **({"axis": 0} if np.ndim(scale) else {}))
    sums = np.broadcast_to(np.float32(0.05) * scale.astype(np.float32), (filters,))
    c = make.dequant(make.const(bias, np.int32), sums, np.zeros(filters), np.int32, axis=0)
    y = make.op("Conv", make.dequant(x, 0.05, zero, dtype), w, c, **more)
    if rng.random() < 0.4:
        y = make.op("Relu", y)
        y_zero = low
    return make.quant(y, y_scale, y_zero, kind)


def float_layer(make, rng, name, feeds):
    """Conv or ConvTranspose, a normalization, an activation, a pool, a residual sum."""
    rank = pick(rng, 1, 2, 2, 3)
    size, kernel, more = window(rng, rank)
    channels = pick(rng, 1, 3, 8, 12, 34)
    groups = pick(rng, 1, channels)
    x = make.input(2, channels, *size, name=name)
    feeds[name] = rng.standard_normal((2, channels, *size)).astype(np.float32)

    def normal(*shape):
        return make.const(rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])), np.float32)

    if rng.random() < 0.3:
        del more["pads"]
        y = make.op("ConvTranspose", x, normal(channels, 5, *kernel), normal(5), **more)
        filters = 5
    else:
        filters = groups * pick(rng, 1, 2, 3)
        y = make.op("Conv", x, normal(filters, channels // groups, *kernel), group=groups, **more)
    if rng.random() < 0.5:
        numbers = [make.const(rng.uniform(0.5, 1.5, filters), np.float32) for _ in range(4)]
        y = make.op("BatchNormalization", y, *numbers)
    y = make.op(pick(rng, "Relu", "Sigmoid", "HardSwish", "Elu", "Softplus"), y)
    gate = make.op("Sigmoid", make.op("GlobalAveragePool", y))
    y = make.op("Mul", *((y, gate) if rng.random() < 0.5 else (gate, y)))
    if rng.random() < 0.5:
        scale = pick(rng, (1, filters, *[1] * rank), (filters, *[1] * rank), ())
        y = make.op("PRelu", y, normal(*scale)) if scale else make.op("Add", y, y)
    return y


def _dims(value):
    return value.type.tensor_type.shape.dim


def run(model, target, feeds):
    loaded = dccompile.compile(model, targets=target).load(threads=1)
    got = loaded(**feeds)
    return list(got.values()) if isinstance(got, dict) else list(got)


@pytest.mark.parametrize("seed, target", list(enumerate(TARGETS)), ids=TARGETS)
def test_layers(seed, target):
    rng, make, feeds = np.random.default_rng(seed), Maker(seed=seed), {}
    outputs = [quantized_layer(make, rng, f"q{i}", feeds) for i in range(10)]
    outputs += [float_layer(make, rng, f"f{i}", feeds) for i in range(4)]
    model = make.model(*outputs)
    expected = session(model).run(None, feeds)
    for got, want in zip(run(model, target, feeds), expected, strict=True):
        if want.dtype.itemsize == 1:
            apart = np.abs(got.astype(int) - want.astype(int))
            assert got.shape == want.shape and apart.max() <= 1
            assert (apart > 0).sum() <= max(1, 2e-3 * want.size)
        else:
            compare(got, want)


def pooled(opset, kind, size, **attributes):
    make = Maker(opset)
    x = make.input(1, 4, *size)
    w = make.const(make.rng.standard_normal((4, 4, *[1] * len(size))), np.float32)
    return make, make.op(kind, make.op("Conv", x, w), **attributes)


@pytest.mark.parametrize(
    "kind, size, attributes",
    [
        ("MaxPool", (3, 12), {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 0, 1]}),
        ("AveragePool", (8,), {"kernel_shape": [1], "strides": [3]}),
        ("AveragePool", (12,), {"kernel_shape": [2], "strides": [2], "pads": [0, 1]}),
        ("MaxPool", (5, 7), {"kernel_shape": [2, 2], "strides": [3, 2], "pads": [1, 0, 1, 0]}),
        ("AveragePool", (11, 4), {"kernel_shape": [2, 1], "strides": [2, 2]}),
    ],
)
def test_windows_that_begin_behind_the_data_do_not_count(kind, size, attributes):
    make, y = pooled(19, kind, size, ceil_mode=1, **attributes)
    model = make.model(y)
    feeds = {"x": make.rng.standard_normal((1, 4, *size)).astype(np.float32)}
    compare(evaluate(recover(model), feeds)[0], session(model).run(None, feeds)[0])


def test_bundles_of_onnx_runtime():
    """FusedConv, pools and Softmax of 8-bit tensors, pools of channels-last ones."""
    make = Maker()
    x = make.input(1, 6, 7, 5)
    z = make.input(1, 8, 7, 5, name="z")
    w = make.const(make.rng.standard_normal((8, 6, 3, 3)) / 7, np.float32)
    b = make.const(make.rng.standard_normal(8), np.float32)
    more = {"domain": MS, "pads": [1] * 4}
    outputs = [
        make.op("FusedConv", x, w, b, z, activation="Relu", **more),
        make.op("FusedConv", x, w, activation="Clip", activation_params=[-0.5, 0.7], **more),
        make.op("FusedConv", x, w, b, activation="LeakyRelu", activation_params=[0.2], **more),
    ]
    q = make.quant(x, 0.03, 110, U8)
    ends = [make.const(v, t) for v, t in ((0.03, np.float32), (110, np.uint8))]
    parts = [*ends, make.const(0.02, np.float32), make.const(90, np.uint8)]
    outputs.append(make.op("QLinearGlobalAveragePool", q, *parts, domain=MS, channels_last=0))
    pool = {"domain": MS, "kernel_shape": [3, 2], "strides": [2, 1]}
    outputs.append(make.op("QLinearAveragePool", q, *parts, **pool))
    turned = make.op("Transpose", q, perm=[0, 2, 3, 1])
    outputs.append(make.op("QLinearAveragePool", turned, *parts, channels_last=1, **pool))
    model = make.model(*outputs)
    shapes = {"x": (1, 6, 7, 5), "z": (1, 8, 7, 5)}
    feeds = {n: make.rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    expected = session(model).run(None, feeds)
    for got, want in zip(run(model, "x86-64-v3", feeds), expected, strict=True):
        if want.dtype.kind == "f":
            compare(got, want)
        else:
            assert got.shape == want.shape and got.dtype == want.dtype
            assert np.abs(got.astype(int) - want.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "attributes, words",
    [
        ({"group": 3}, "6 are allowed"),
        ({"auto_pad": "SAME"}, "auto_pad 'SAME'"),
        ({"auto_pad": "SAME_UPPER", "pads": [1, 1, 1, 1]}, "one of them"),
        ({"strides": [0, 1]}, "strides 0"),
        ({"dilations": [3, 3]}, "a window of 7 elements over 6"),
        ({"pads": [-1, 0, 0, 0]}, "0 or more"),
    ],
)
def test_bad_convolutions(attributes, words):
    make = Maker()
    x = make.input(1, 8, 6, 6)
    w = make.const(np.ones((6, 2 if "group" in attributes else 8, 3, 3)), np.float32)
    node = onnx.helper.make_node("Conv", [x, w], ["y"], **attributes)
    y = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    y.type.tensor_type.ClearField("shape")
    graph = onnx.helper.make_graph([node], "g", make.inputs, [y], make.constants)
    opsets = [onnx.helper.make_opsetid("", 19)]
    with pytest.raises(ModelError, match=words):
        read(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9))
