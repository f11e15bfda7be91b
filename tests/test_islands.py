"""Counting of float islands, on a block with squeeze-excite and hard-swish, all of it quantized."""

from __future__ import annotations

import json

import numpy as np
import pytest
from recovery import F32, S8, U8, Maker, integers, ops, session

import dccompile
from dccompile.cli.islands import island_line
from dccompile.cli.main import main
from dccompile.frontend.islands import Islands, islands
from dccompile.frontend.recover import recover


def hard_swish(make, x):
    """As exporters write it before opset 14."""
    low, high, three = (make.const(value, np.float32) for value in (0, 6, 3))
    six = make.op("Clip", make.op("Add", x, three), low, high)
    return make.op("Mul", x, make.op("Div", six, high))


def squeeze_excite(make, x, scale, zero, hidden=8, channels=24):
    """x * hard-sigmoid(conv(relu(conv(mean of x)))), every tensor quantized."""

    def quantized(value, scale, zero):
        return make.dequant(make.quant(value, scale, zero, U8), scale, zero, np.uint8)

    def conv(value, filters, reads):
        w = make.const(integers(make.rng, (filters, reads, 1, 1), S8))
        return make.op("Conv", value, make.dequant(w, 0.008, 0, np.int8))

    gate = quantized(make.op("GlobalAveragePool", x), scale, zero)
    gate = quantized(make.op("Relu", conv(gate, hidden, channels)), 0.02, 0)
    gate = quantized(make.op("HardSigmoid", quantized(conv(gate, channels, hidden), 0.02, 128)),
                     1 / 255, 0)  # fmt: skip
    return quantized(make.op("Mul", x, gate), scale, zero)


def mobile(batch, quantized_mean):
    """A block as of MobileNet v3, from float images to float classes."""
    make = Maker(opset=18)

    def quantized(value, scale, zero):
        return make.dequant(make.quant(value, scale, zero, U8), scale, zero, np.uint8)

    def conv(value, filters, reads, size=1, **more):
        w = make.const(integers(make.rng, (filters, reads, size, size), S8))
        return make.op("Conv", value, make.dequant(w, 0.004, 0, np.int8), **more)

    x = quantized(make.input(batch, 3, 16, 16), 0.02, 128)
    y = quantized(conv(x, 24, 3, 3, pads=[1] * 4, strides=[2, 2]), 0.03, 128)
    first = quantized(make.op("HardSwish", y), 0.02, 18)
    y = quantized(conv(first, 24, 1, 3, pads=[1] * 4, group=24), 0.03, 120)
    y = quantized(hard_swish(make, y), 0.02, 18)
    y = squeeze_excite(make, y, 0.02, 18)
    y = quantized(make.op("Add", conv(y, 24, 24), first), 0.05, 100)
    y = make.op("HardSwish", y)
    if quantized_mean:
        axes = make.const([-1, 2], np.int64)
        y = make.op("ReduceMean", quantized(y, 0.03, 18), axes, keepdims=0)
        y = quantized(y, 0.02, 18)
    else:
        y = make.op("Flatten", quantized(make.op("GlobalAveragePool", y), 0.02, 18))
    w = make.const(integers(make.rng, (24, 10), S8))
    y = make.op("MatMul", y, make.dequant(w, 0.01, 0, np.int8))
    return make.model(y)


@pytest.mark.parametrize(("batch", "quantized_mean"), [(1, True), ("N", True), ("N", False)])
def test_a_mobilenet_block_has_one_island(batch, quantized_mean):
    model = mobile(batch, quantized_mean)
    recovered = recover(model)
    found = islands(recovered)
    head = model.graph.node[-1].name
    if quantized_mean:
        assert found == Islands(1, 2, [[head]])
        others = {"Transpose", "QuantizeLinear", "DequantizeLinear", "Mul", "Reshape", "Flatten"}
        assert {op for op in ops(recovered) if not op.startswith("Dcc")} <= others
    else:  # the last hard-swish has no quantization before the mean: another island
        swish = [n.name for n in model.graph.node if n.op_type == "HardSwish"][-1]
        assert (found.count, found.switches) == (2, 4)
        assert (found.nodes[0][0], found.nodes[1]) == (swish, [head])
    x = np.random.default_rng(1).standard_normal((3, 3, 16, 16)).astype(np.float32)
    feeds = {"x": x if batch == "N" else x[:1]}
    (want,) = session(model, optimize=False).run(None, feeds)
    (got,) = dccompile.compile(model, targets="x86-64-v3").load(threads=1).run(None, feeds)
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())


def test_models_without_8_bits_have_no_islands():
    make = Maker()
    assert islands(recover(make.model(make.op("Relu", make.input(2, 3))))).to_json() == {
        "count": 0, "switches": 0, "nodes": [],
    }  # fmt: skip


def test_a_float_operator_between_is_an_island():
    make = Maker()
    x = make.dequant(make.input(2, 3, dtype=U8), 0.05, 100, np.uint8)
    y = make.op("Softmax", x)
    total = make.op("Add", y, make.dequant(make.input(2, 3, dtype=U8, name="z"), 0.1, 0, np.uint8))
    model = make.model(make.quant(total, 0.04, 3, U8), make.input(4, dtype=F32, name="f"))
    found = islands(recover(model))
    assert (found.count, found.switches) == (1, 3)
    assert [name.rstrip("0123456789") for name in found.nodes[0]] == ["Softmax", "Add"]


def test_sums_of_8_bit_tensors_are_no_island():
    make = Maker()
    a = make.dequant(make.input(2, 3, dtype=U8), 0.05, 100, np.uint8)
    b = make.dequant(make.input(2, 3, dtype=U8, name="z"), 0.1, 0, np.uint8)
    c = make.op("Mul", a, make.op("Relu", make.op("Add", a, b)))
    model = make.model(make.quant(c, 0.04, 3, U8), make.quant(make.op("Sub", b, a), 0.04, 3, U8))
    assert islands(recover(model)).to_json() == {"count": 0, "switches": 0, "nodes": []}


def test_the_line_of_a_summary():
    many = [["a", "b", "c"], ["d"], ["e"], ["f"], ["g"], ["h"]]
    assert island_line(6, 1, many) == (
        "6 float islands, 1 precision switch: 'a' and 2 more, 'd', 'e', 'f', 2 more islands"
    )
    assert island_line(1, 2, [["y"]]) == "1 float island, 2 precision switches: 'y'"
    assert island_line(0, 1, []) == "0 float islands, 1 precision switch"


def test_check_and_compile_count_islands(capsys, tmp_path):
    path = tmp_path / "block.onnx"
    path.write_bytes(mobile(1, True).SerializeToString())
    assert main(["check", str(path)]) == 0
    assert "\n1 float island, 2 precision switches: 'MatMul" in capsys.readouterr().out
    assert main(["check", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["islands"]
    made = dccompile.compile(path, targets="x86-64-v3").manifest["islands"]
    assert found == made and found["count"] == 1 and found["switches"] == 2
