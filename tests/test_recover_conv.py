"""Recovery of convolutions: what is found, and that it computes what ONNX Runtime computes."""

from __future__ import annotations

import numpy as np
import pytest
from recovery import F32, S8, U8, Maker, agree, integers, ops


def weights(make, filters, channels, *window, dtype=np.int8, zero=0, per=True, axis=0):
    """DequantizeLinear of constant weights; their scales."""
    info = np.iinfo(dtype)
    value = make.rng.integers(info.min, info.max + 1, (filters, channels, *window))
    count = value.shape[axis] if per else ()
    scale = make.rng.uniform(0.5, 1.5, count) * 0.01
    name = make.const(value, dtype)
    more = {"axis": axis} if per else {}
    return make.dequant(name, scale, np.full(np.shape(scale), zero), dtype, **more), scale


def bias(make, filters, scale):
    value = make.rng.integers(-4000, 4000, filters)
    scale = np.broadcast_to(scale, (filters,)).astype(np.float32)
    return make.dequant(make.const(value, np.int32), scale, np.zeros(filters), np.int32, axis=0)


def quantized(
    make, x, filters, channels, *window, zero=110, kind=U8, relu=False, out=(0.4, 120, U8), **more
):
    """DequantizeLinear - Conv [- Relu] - QuantizeLinear of integers `x`."""
    w, scale = weights(make, filters, channels, *window)
    x = make.dequant(x, 0.05, zero, np.uint8 if kind == U8 else np.int8)
    scale = np.float32(0.05) * scale.astype(np.float32)
    value = make.op("Conv", x, w, bias(make, filters, scale), **more)
    value = make.op("Relu", value) if relu else value
    return make.quant(value, *out)


def only(recovered):
    (site,) = recovered.convs.values()
    return site


SHAPES = {
    "2d": ((2, 6, 9, 8), (8, 6, 3, 3), {"pads": [1, 1, 1, 1]}),
    "stride": ((1, 6, 9, 8), (8, 6, 3, 3), {"strides": [2, 2], "pads": [0, 1, 1, 0]}),
    "dilated": ((1, 4, 9, 9), (8, 4, 3, 3), {"dilations": [2, 2]}),
    "same_upper": ((1, 4, 9, 8), (8, 4, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same_lower": ((1, 4, 9, 8), (8, 4, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "valid": ((1, 4, 9, 8), (8, 4, 4, 3), {"auto_pad": "VALID"}),
    "groups": ((1, 12, 5, 5), (8, 3, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    "depthwise": ((1, 12, 5, 5), (12, 1, 3, 3), {"group": 12, "pads": [1, 1, 1, 1]}),
    "1d": ((2, 6, 19), (8, 6, 5), {"pads": [2, 2]}),
    "3d": ((1, 3, 4, 6, 7), (8, 3, 3, 3, 3), {"pads": [1] * 6, "strides": [1, 2, 2]}),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("zero", [0, 110])
def test_quantized_convolution(name, zero):
    shape, window, more = SHAPES[name]
    make = Maker()
    x = make.input(*shape, dtype=U8)
    y = quantized(make, x, *window, zero=zero, **more)
    found = agree(make.model(y), {"x": integers(make.rng, shape, U8)})
    work = only(found).workload
    assert (work.a, work.out, work.bias, work.bounded) == ("u8", "u8", "s32", True)
    assert work.padded == (zero != 0 and any(p for pair in work.pads for p in pair))
    assert set(ops(found)) <= {"Transpose", "DccConv", "Reshape"}


@pytest.mark.parametrize("name", SHAPES)
def test_float_convolution(name):
    shape, window, more = SHAPES[name]
    make = Maker()
    x = make.input(*shape)
    w = make.const(make.rng.standard_normal(window), np.float32)
    b = make.const(make.rng.standard_normal(window[0]), np.float32)
    y = make.op("Relu", make.op("Conv", x, w, b, **more))
    feeds = {"x": make.rng.standard_normal(shape).astype(np.float32)}
    work = only(agree(make.model(y), feeds)).workload
    assert (work.a, work.bias, work.activation) == ("f32", "f32", "relu")


def test_signed_activations_become_unsigned():
    make = Maker()
    x = make.input(1, 6, 8, 8)
    x = make.quant(x, 0.05, -3, S8)
    a = quantized(make, x, 8, 6, 3, 3, zero=-3, kind=S8, out=(0.1, 5, S8), pads=[1] * 4)
    y = make.dequant(a, 0.1, 5, np.int8)
    w, _ = weights(make, 4, 8, 1, 1)
    y = make.quant(make.op("Conv", y, w), 0.9, 7, S8)
    feeds = {"x": make.rng.standard_normal((1, 6, 8, 8)).astype(np.float32)}
    found = agree(make.model(y), feeds)
    first, second = (site.workload for site in found.convs.values())
    assert (first.out, second.a, second.out) == ("u8", "u8", "s8")
    assert "Cast" not in ops(found)


def test_signed_inputs_are_moved():
    make = Maker()
    x = make.input(1, 6, 8, 8, dtype=S8)
    y = quantized(make, x, 8, 6, 3, 3, zero=-3, kind=S8, pads=[1] * 4)
    found = agree(make.model(y), {"x": integers(make.rng, (1, 6, 8, 8), S8)})
    assert only(found).workload.a == "u8"


@pytest.mark.parametrize("first", [True, False], ids=["conv + x", "x + conv"])
@pytest.mark.parametrize("relu", [True, False])
def test_residual_between_quantizations(first, relu):
    make = Maker()
    x = make.input(1, 8, 7, 7, dtype=U8)
    c = quantized(make, x, 8, 8, 3, 3, pads=[1] * 4)
    parts = [make.dequant(c, 0.4, 120, np.uint8), make.dequant(x, 0.05, 110, np.uint8)]
    y = make.op("Add", *(parts if first else parts[::-1]))
    y = make.quant(make.op("Relu", y) if relu else y, 0.3137, 0 if relu else 99, U8)
    found = agree(make.model(y), {"x": integers(make.rng, (1, 8, 7, 7), U8)})
    work = only(found).workload
    assert work.residual is not None and work.residual.inner == "u8"
    assert not work.shifted and work.residual.first != first
    assert "Add" not in ops(found)


def test_residual_without_inner_quantization():
    make = Maker()
    x = make.input(1, 8, 7, 7, dtype=U8)
    w, scale = weights(make, 8, 8, 3, 3)
    a = make.dequant(x, 0.05, 0, np.uint8)
    c = make.op("Conv", a, w, bias(make, 8, np.float32(0.05) * scale), pads=[1] * 4)
    y = make.quant(make.op("Relu", make.op("Add", c, a)), 0.3137, 0, U8)
    found = agree(make.model(y), {"x": integers(make.rng, (1, 8, 7, 7), U8)})
    work = only(found).workload
    assert work.residual is not None and work.residual.inner == ""


def test_two_convolutions_into_one_sum():
    make = Maker()
    x = make.input(1, 8, 7, 7, dtype=U8)
    parts = [
        make.dequant(quantized(make, x, 8, 8, 3, 3, pads=[1] * 4), 0.4, 120, np.uint8),
        make.dequant(quantized(make, x, 8, 8, 1, 1), 0.4, 120, np.uint8),
    ]
    y = make.quant(make.op("Relu", make.op("Add", *parts)), 0.5137, 0, U8)
    found = agree(make.model(y), {"x": integers(make.rng, (1, 8, 7, 7), U8)})
    assert sorted(s.workload.residual is None for s in found.convs.values()) == [False, True]


def test_float_residual_and_batch_norm():
    make = Maker()
    x = make.input("N", 8, 7, 7)
    w = make.const(make.rng.standard_normal((8, 8, 3, 3)) / 8, np.float32)
    numbers = [make.const(make.rng.uniform(0.5, 1.5, 8), np.float32) for _ in range(4)]
    c = make.op("BatchNormalization", make.op("Conv", x, w, pads=[1] * 4), *numbers)
    y = make.op("Relu", make.op("Add", x, c))
    feeds = {"x": make.rng.standard_normal((2, 8, 7, 7)).astype(np.float32)}
    found = agree(make.model(y), feeds)
    work = only(found).workload
    assert work.residual is not None and work.bias == "f32" and work.batch is None
    assert "BatchNormalization" not in ops(found)


TRANSPOSED = {
    "2x2": ((1, 6, 4, 5), (6, 5, 2, 2), {"strides": [2, 2]}),
    "3x3": ((2, 6, 4, 5), (6, 5, 3, 3), {"strides": [2, 2], "pads": [1] * 4}),
    "3x3_padding": (
        (1, 6, 4, 5),
        (6, 5, 3, 3),
        {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]},
    ),
    "4x4": ((1, 6, 4, 5), (6, 5, 4, 4), {"strides": [2, 2], "pads": [1] * 4}),
    "stride_1": ((1, 6, 4, 5), (6, 5, 3, 3), {}),
    "dilated": ((1, 6, 4, 5), (6, 5, 3, 2), {"strides": [3, 2], "dilations": [2, 1]}),
    "groups": ((1, 6, 4, 5), (6, 2, 3, 3), {"strides": [2, 2], "group": 3}),
    "shape": ((1, 6, 4, 5), (6, 2, 3, 3), {"strides": [2, 2], "output_shape": [8, 10]}),
    "same": ((1, 6, 4, 5), (6, 2, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "1d": ((1, 6, 9), (6, 5, 4), {"strides": [2], "pads": [1, 1]}),
    "3d": ((1, 4, 3, 4, 2), (4, 5, 2, 2, 2), {"strides": [2, 2, 2]}),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolution(name):
    shape, window, more = TRANSPOSED[name]
    make = Maker()
    x = make.input(*shape)
    w = make.const(make.rng.standard_normal(window), np.float32)
    b = make.const(make.rng.standard_normal(window[1] * more.get("group", 1)), np.float32)
    y = make.op("Relu", make.op("ConvTranspose", x, w, b, **more))
    feeds = {"x": make.rng.standard_normal(shape).astype(np.float32)}
    found = agree(make.model(y), feeds)
    assert only(found).interleave is not None and set(ops(found)) == {"Transpose", "DccConv"}


def test_quantized_transposed_convolution():
    make = Maker()
    x = make.input(1, 6, 5, 5, dtype=U8)
    w, scale = weights(make, 6, 4, 3, 3, axis=1)
    a = make.dequant(x, 0.05, 90, np.uint8)
    b = bias(make, 4, np.float32(0.05) * scale.astype(np.float32))
    y = make.op("ConvTranspose", a, w, b, strides=[2, 2], pads=[1] * 4)
    found = agree(
        make.model(make.quant(y, 0.3, 100, U8)), {"x": integers(make.rng, (1, 6, 5, 5), U8)}
    )
    assert only(found).workload.out == "u8"


REFUSED = {
    "asymmetric weights": {"dtype": np.uint8, "zero": 30},
    "per input channel": {"axis": 1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_weights_are_multiplied_as_floats(name):
    make = Maker()
    x = make.input(1, 6, 8, 8, dtype=U8)
    w, _ = weights(make, 8, 6, 3, 3, **REFUSED[name])
    y = make.op("Conv", make.dequant(x, 0.05, 110, np.uint8), w)
    feeds = {"x": integers(make.rng, (1, 6, 8, 8), U8)}
    found = agree(make.model(make.quant(y, 0.4137, 120, U8)), feeds, optimize=False)
    assert only(found).workload.a == "f32"
    assert any("weights" in node["reason"] for node in found.nodes)


def test_unsigned_weights_in_the_middle_are_signed():
    make = Maker()
    x = make.input(1, 6, 8, 8, dtype=U8)
    w, _ = weights(make, 8, 6, 3, 3, dtype=np.uint8, zero=128, per=False)
    y = make.op("Conv", make.dequant(x, 0.05, 110, np.uint8), w)
    found = agree(
        make.model(make.quant(y, 0.9, 120, U8)), {"x": integers(make.rng, (1, 6, 8, 8), U8)}
    )
    assert only(found).workload.a == "u8"


def test_open_spatial_dims_are_left():
    make = Maker()
    x = make.input(1, 6, "H", 8)
    w = make.const(make.rng.standard_normal((4, 6, 3, 3)), np.float32)
    feeds = {"x": make.rng.standard_normal((1, 6, 9, 8)).astype(np.float32)}
    found = agree(make.model(make.op("Conv", x, w)), feeds)
    assert not found.convs and "spatial dims are open" in found.nodes[0]["reason"]


# ---- layout ----
def chain(make, x, channels, filters):
    w = make.const(make.rng.standard_normal((filters, channels, 3, 3)) / 8, np.float32)
    return make.op("Conv", x, w, pads=[1] * 4)


def layout(make, y, shape):
    feeds = {"x": make.rng.standard_normal(shape).astype(np.float32)}
    return ops(agree(make.model(y), feeds))


def test_one_transpose_at_each_end():
    make = Maker()
    x = make.input(1, 3, 12, 10)
    a = make.op("HardSwish", chain(make, x, 3, 8))
    b = make.op("MaxPool", a, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    c = make.op("AveragePool", a, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0])
    c = make.op("Mul", c, make.const(make.rng.standard_normal((8, 1, 1)), np.float32))
    d = make.op("Concat", make.op("Add", b, c), c, axis=1)
    first, second = make.op("Split", d, axis=1, num_outputs=2, outputs=2)
    y = make.op("Sub", first, make.op("Sigmoid", second))
    y = make.op("Pad", y, make.const([0, 0, 1, 2, 0, 0, 0, 1], np.int64))
    y = make.op("Slice", y, *(make.const([v], np.int64) for v in (1, 7, 2)))
    found = layout(make, chain(make, y, 8, 4), (1, 3, 12, 10))
    assert found.count("Transpose") == 2


def test_squeeze_and_excitation_without_transposes():
    make = Maker()
    x = make.input(2, 3, 8, 8)
    a = chain(make, x, 3, 16)
    s = make.op("GlobalAveragePool", a)
    w = make.const(make.rng.standard_normal((16, 16, 1, 1)), np.float32)
    a = make.op("Mul", a, make.op("Sigmoid", make.op("Conv", s, w)))
    y = make.op("Flatten", make.op("ReduceMean", chain(make, a, 16, 5), axes=[2, 3], keepdims=1))
    make.opset = 17
    assert layout(make, y, (2, 3, 8, 8)).count("Transpose") == 1


def shuffle(make, x, groups, channels, height, width):
    dims = [-1, groups, channels // groups, height, width]
    a = make.op("Reshape", x, make.const(dims, np.int64))
    a = make.op("Transpose", a, perm=[0, 2, 1, 3, 4])
    return make.op("Reshape", a, make.const([-1, channels, height, width], np.int64))


def test_channel_shuffle_stays_channels_last():
    make = Maker()
    x = make.input("N", 3, 6, 6)
    a = shuffle(make, make.op("Relu", make.op("Sigmoid", chain(make, x, 3, 12))), 3, 12, 6, 6)
    y = make.op("Flatten", make.op("GlobalAveragePool", chain(make, a, 12, 4)))
    assert layout(make, y, (1, 3, 6, 6)).count("Transpose") == 2  # of the images, and the shuffle


def test_shuffle_behind_a_convolution_orders_its_filters():
    make = Maker()
    x = make.input("N", 3, 6, 6)
    y = chain(make, shuffle(make, chain(make, x, 3, 12), 3, 12, 6, 6), 12, 4)
    assert layout(make, y, (1, 3, 6, 6)) == ["Transpose", "DccConv", "DccConv", "Transpose"]


def test_shuffle_between_convolutions_in_groups_is_absorbed():
    make = Maker()
    x = make.input("N", 3, 6, 5)
    w = make.const(make.rng.standard_normal((24, 1, 1, 1)), np.float32)
    a = make.op("Conv", chain(make, x, 3, 24), w, group=24)
    a = shuffle(make, a, 2, 24, 6, 5)
    w = make.const(make.rng.standard_normal((24, 1, 3, 3)), np.float32)
    b = make.const(make.rng.standard_normal(24), np.float32)
    a = make.op("Relu", make.op("Conv", a, w, b, group=24, pads=[1] * 4))
    w = make.const(make.rng.standard_normal((16, 6, 1, 1)), np.float32)
    y = make.op("Conv", a, w, group=4)
    feeds = {"x": make.rng.standard_normal((2, 3, 6, 5)).astype(np.float32)}
    found = agree(make.model(y), feeds)
    assert ops(found) == ["Transpose", *["DccConv"] * 4, "Transpose"]


def test_channels_last_models_have_no_transpose():
    make = Maker()
    x = make.op("Transpose", make.input(1, 6, 6, 3), perm=[0, 3, 1, 2])
    y = make.op("Transpose", chain(make, x, 3, 4), perm=[0, 2, 3, 1])
    assert "Transpose" not in layout(make, y, (1, 6, 6, 3))


def test_values_are_shared_between_both_layouts():
    make = Maker()
    x = make.input(1, 3, 6, 6)
    a = chain(make, x, 3, 4)
    b = make.op("Softmax", a, axis=1)
    y = make.op("Reshape", make.op("Add", a, b), make.const([4, 36], np.int64))
    layout(make, y, (1, 3, 6, 6))


def test_only_float_models_without_convolutions_are_left_alone():
    make = Maker()
    x = make.input(1, 3, 6, 6, dtype=F32)
    y = make.op("MaxPool", make.op("Relu", x), kernel_shape=[2, 2])
    assert layout(make, y, (1, 3, 6, 6)) == ["Relu", "MaxPool"]


# ---- integers between convolutions ----
def test_concat_and_pools_stay_in_integers():
    make = Maker()
    x = make.input(1, 6, 8, 8, dtype=U8)
    a = make.dequant(quantized(make, x, 8, 6, 3, 3, pads=[1] * 4), 0.4, 120, np.uint8)
    b = make.op("AveragePool", a, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
    b = make.dequant(make.quant(b, 0.3137, 100, U8), 0.3137, 100, np.uint8)
    y = make.quant(make.op("Concat", a, b, axis=1), 0.4213, 99, U8)
    y = make.dequant(y, 0.4213, 99, np.uint8)
    y = make.quant(make.op("GlobalAveragePool", y), 0.1717, 130, U8)
    found = agree(make.model(y), {"x": integers(make.rng, (1, 6, 8, 8), U8)})
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(found))
    assert ops(found).count("DccRequantize") == ops(found).count("DccTable") == 2
