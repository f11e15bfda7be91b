"""Shapes that the graph itself computes, with symbolic dims: every consumer against ONNX Runtime.

The files torch_exports/dynamic_NAME_OPSET.onnx were exported by torch 2 (dynamo=False, names
shortened) from the models that the tests describe, N, T, H and W dynamic.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper
from whole import Graph, Whole, ints

from dccompile.errors import ModelError, UnsupportedError

EXPORTS = Path(__file__).with_name("torch_exports")
NT = [(1, 3), (2, 4), (3, 7), (2, 9), (5, 20), (1, 25), (4, 2)]
X = ("float32", ["N", "T", 8])


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def check(g, shapes=NT):
    """All outputs at all shapes, compiled once."""
    whole = Whole(g.model())
    for n, t in shapes:
        whole.agrees(x=normal(n, t, 8))
    return whole


def fill(value, kind):
    return numpy_helper.from_array(np.array([value], kind))


def test_reshape():
    g = Graph(x=X)
    n, t = g.dim("x", 0), g.dim("x", 1)
    g.out(g("Reshape", "x", g.vector(n, -1)))
    g.out(g("Reshape", "x", g.vector(g("Mul", n, t), 8)))
    split = g("Reshape", "x", g.vector(0, 0, 2, -1))
    moved = g("Transpose", split, perm=[0, 2, 1, 3])
    g.out(g("Reshape", moved, g.vector(g("Mul", n, np.array(2)), t, 4)))
    half = g("Div", g("Mul", t, np.array(8)), np.array(4))
    g.out(g("Reshape", "x", g.vector(-1, half)))
    head = g("Slice", g("Shape", "x"), ints(0), ints(2))
    g.out(g("Reshape", "x", g("Concat", head, ints(2, 4), axis=0)))
    cast = g("Cast", g("Cast", g("Shape", "x", start=1), to=6), to=7)
    first = g("Squeeze", g("Slice", cast, ints(0), ints(1)), ints(0))
    g.out(g("Reshape", "x", g.vector(first, -1, 4)), g("Flatten", "x", axis=2))
    whole = check(g)
    shapes = [str(o.shape).replace("T_1", "T") for o in whole.lowered.program.outputs]
    assert all("//" not in s for s in shapes), "N*T*8//8 is N*T"
    steps = [s.name.partition("_")[0] for s in whole.lowered.program.steps]
    assert steps == ["transpose"], "a reshape is a name"


def test_sizes_of_new_tensors():
    g = Graph(x=X)
    n, t = g.dim("x", 0), g.dim("x", 1)
    wanted = g.vector(n, t, 8)
    minus = g("ConstantOfShape", g("Shape", wanted), value=fill(-1, np.int64))
    one = g("ConstantOfShape", g("Shape", wanted), value=fill(1, np.int64))
    open_ = g("Where", g("Equal", wanted, minus), one, wanted)  # torch's expand(-1, ...)
    g.out(g("Expand", np.arange(8, dtype=np.float32).reshape(1, 8), open_))
    g.out(g("ConstantOfShape", g.vector(t, n), value=fill(2.5, np.float32)))
    g.out(g("Tile", "x", g.vector(1, 2, 1)), g("Tile", "x", g.vector(1, n, 1)))
    g.out(g("Range", np.array(0), t, np.array(1)))
    g.out(g("Range", np.array(3), g("Add", t, n), np.array(2)), g("Range", t, n, np.array(-1)))
    g.out(g("Pad", "x", g.vector(0, t, 0, 0, 1, 0)), g("Pad", "x", g.vector(0, 1, 0, 0, n, 0)))
    scale = g("Cast", g("Slice", g("Shape", "x"), ints(1), ints(2)), to=1)
    twice = g("Cast", g("Floor", g("Mul", scale, np.float32([2]))), to=7)
    batch = g("Slice", g("Shape", "x"), ints(0), ints(1))
    sizes = g("Concat", ints(1), batch, twice, ints(8), axis=0)
    resized = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    g.out(g("Resize", g("Unsqueeze", "x", ints(0)), None, None, sizes, mode="nearest", **resized))
    check(g)


def test_slices():
    g = Graph(x=X)
    t = g.dim("x", 1)
    less = g("Unsqueeze", g("Sub", t, np.array(1)), ints(0))
    half = g("Unsqueeze", g("Div", t, np.array(2)), ints(0))
    g.out(g("Slice", "x", ints(1), less, ints(1)), g("Slice", "x", half, ints(2**63 - 1), ints(1)))
    g.out(g("Slice", "x", ints(-1), ints(-(2**62)), ints(1), ints(-2)))
    g.out(g("Slice", "x", ints(-3), ints(-1), ints(1)))
    g.out(g("Slice", "x", ints(-1), ints(2), ints(1), ints(-3)))
    table = normal(20, 2)
    g.out(g("Slice", table, ints(0), g("Unsqueeze", t, ints(0)), ints(0)))
    g.out(g("Slice", table, g("Neg", half), ints(1000), ints(0)))
    either = g("Unsqueeze", g("Sub", t, g.dim("x", 0)), ints(0))  # of unknown sign
    g.out(g("Slice", "x", either, ints(9), ints(1)), g("Slice", "x", ints(0), either, ints(1)))
    parts = g("Concat", ints(1), less, axis=0)
    g.out(*g("Split", "x", parts, axis=1, parts=2))
    whole = check(g)
    assert whole.plan({"x": normal(1, 30, 8)})[16:18] == [20, 2], "a slice ends with its data"


def test_even_split():
    g = Graph(x=X)
    g.out(*g("Split", "x", axis=1, num_outputs=3, parts=3))
    whole = check(g, [(1, 3), (2, 5), (2, 6), (3, 2)])
    with pytest.raises(ValueError, match=r"DC2112: Split 'Split_0': a part: .* >= 0 is required"):
        whole(x=normal(1, 1, 8))


def test_rare_sizes():
    g = Graph(x=X)
    t = g.dim("x", 1)
    g.out(g("Pad", "x", g.vector(0, 0, 0, 0, g("Sub", np.array(22), t), 0)))  # pads or crops
    g.out(
        *g("TopK", "x", g.vector(g("Add", g("Div", t, np.array(2)), np.array(1))), axis=1, parts=2)
    )
    g.out(g("Range", np.float32(1), g("Cast", t, to=1), np.float32(2)))
    back = g("Div", g("Neg", t), np.array(2))
    g.out(g("Slice", "x", g("Unsqueeze", back, ints(0)), ints(2**62), ints(1)))
    check(g)


def test_topk_of_too_few():
    g = Graph(x=X)
    g.out(*g("TopK", "x", ints(4), axis=1, parts=2))
    whole = check(g, [(2, 4), (1, 6)])
    with pytest.raises(ValueError, match=r"DC2112: TopK .*: T-4 >= 0 is required"):
        whole(x=normal(2, 3, 8))


def squeeze(g, data):
    """torch's squeeze(1) of a dim that the exporter does not know."""
    one = g("Equal", g("Gather", g("Shape", data), ints(1), axis=0), ints(1))
    branches = []
    for op, args in (("Squeeze", [data, "axes"]), ("Identity", [data])):
        node = helper.make_node(op, args, [f"{op}_{data}"], name=op)
        axes = [numpy_helper.from_array(ints(1), "axes")] if op == "Squeeze" else []
        out = [helper.make_tensor_value_info(f"{op}_{data}", 1, None)]
        branches.append(helper.make_graph([node], op, [], out, axes))
    return g("If", one, then_branch=branches[0], else_branch=branches[1])


def test_if_that_shapes_decide():
    g = Graph(x=X)
    g.out(squeeze(g, g("Slice", "x", ints(0), ints(1), ints(1))))
    check(g)
    g = Graph(x=X)
    g.out(squeeze(g, "x"))
    refused(g, UnsupportedError, "If 'If_3': its condition differs between calls")


def test_sizes_as_data():
    g = Graph(x=X)
    n, t = g.dim("x", 0), g.dim("x", 1)
    g.out(t, g("Cast", t, to=1), g("Shape", "x"), g("Size", "x"))
    g.out(g("Div", "x", g("Sqrt", g("Cast", n, to=1))))
    g.out(g("ReduceProd", g("Shape", "x"), keepdims=0), g("ReduceMax", g("Shape", "x")))
    g.out(g("Cast", g("Floor", g("Mul", g("Cast", t, to=1), np.float32(0.5))), to=7))
    g.out(g("Cast", g("Ceil", g("Div", g("Cast", t, to=1), np.float32(3))), to=7))
    g.out(g("Mul", g("Cast", t, to=1), np.float32(0.25)))
    g.out(g("Min", t, n), g("Max", t, n, np.array(7)), g("Mod", t, np.array(3)), g("Neg", t))
    g.out(g("Div", g("Sub", n, t), np.array(2)))  # of unknown sign: towards zero
    g.out(g("Less", n, t), g("Less", n, np.array(1)), g("Where", g("Less", n, t), n, t))
    g.out(g("Gather", "x", g("Sub", t, np.array(1)), axis=1))
    check(g)


def test_causal_mask():
    g = Graph(x=X)
    t = g.dim("x", 1)
    places = g("Range", np.array(0), t, np.array(1))
    seen = g("LessOrEqual", g("Unsqueeze", places, ints(0)), g("Unsqueeze", places, ints(1)))
    mask = g("Where", seen, np.float32(0), np.float32(-1e9))
    scores = g("MatMul", "x", g("Transpose", "x", perm=[0, 2, 1]))
    g.out(g("Softmax", g("Add", scores, mask), axis=-1))
    g.out(g("Trilu", g("Expand", np.float32([[1]]), g.vector(t, t)), upper=0))
    g.out(g("Gather", normal(64, 3), places))
    check(g)


def test_dims_that_must_be_equal_are_checked_when_called():
    g = Graph(x=X)
    half = g("Unsqueeze", g("Div", g.dim("x", 0), np.array(2)), ints(0))
    even = g("Concat", g("Mul", half, ints(2)), ints(-1), axis=0)
    table = g("Slice", normal(20, 8), ints(0), g("Unsqueeze", g.dim("x", 1), ints(0)), ints(0))
    g.out(g("Add", "x", table), g("Reshape", "x", even))
    whole = check(g, [(2, 3), (4, 20)])
    with pytest.raises(ValueError, match=r"^DC2112: Add .*: T <= 20 is required"):
        whole(x=normal(2, 21, 8))
    with pytest.raises(ValueError, match=r"^DC2112: Reshape .*does not fill.*is required"):
        whole(x=normal(7, 1, 8))


def test_ranges_remove_checks():
    g = Graph(x=X)
    end = g("Unsqueeze", g.dim("x", 1), ints(0))
    g.out(g("Add", "x", g("Slice", normal(20, 8), ints(0), end, ints(0))))
    assert not Whole(g.model(), {"x": ["N", "1..20", 8]}).lowered.program.requirements


def test_workspace_covers_every_size():
    """T - N rows are most where N is least: bounds come from intervals, not from the ends."""
    g = Graph(x=("float32", ["T", 8]), y=("float32", ["N", 8]))
    rest = g("Slice", "x", g("Shape", "y", end=1), ints(2**63 - 1), ints(0))
    g.out(g("Softmax", g("MatMul", g("Exp", rest), normal(8, 8))))
    whole = Whole(g.model(), {"x": ["1..64", 8], "y": ["1..64", 8]})
    assert isinstance(whole.lowered.program.workspace, int)
    for t, n in ((64, 1), (64, 64), (3, 2)):
        if t > n:
            whole.agrees(x=normal(t, 8), y=normal(n, 8))
        assert whole.plan({"x": normal(t, 8), "y": normal(n, 8)})[0] >= 64 * 8 * 4 - 256


def refused(g, error, text):
    with pytest.raises(error) as caught:
        Whole(g.model())
    lines = caught.value.lines()
    assert any(text in line for line in lines), lines


def test_refusals():
    g = Graph(x=X)
    n, t = g.dim("x", 0), g.dim("x", 1)
    g.out(g("Reshape", "x", g.vector(g("Where", g("Less", n, t), n, t), -1)))
    refused(g, UnsupportedError, "Reshape 'Reshape_8': its input 1 is computed from data")
    g = Graph(x=X)
    g.out(g("Add", "x", g("Pad", "x", ints(0, 1, 0, 0, 0, 0))))
    refused(g, ModelError, "must be equal")


# -- exported by torch ---------------------------------------------------------------------------


def exported(name):
    return Whole((EXPORTS / f"dynamic_{name}.onnx").read_bytes())


def test_attention():
    """qkv Linear, split, view(b, t, h, c // h), softmax, view(b, t, c), LayerNorm, GELU."""
    whole = exported("attention_14")
    for n, t in NT:
        whole.agrees(x=normal(n, t, 8))


def test_transformer_encoder_layer():
    whole = exported("encoder_18")
    for n in (1, 2, 7):
        whole.agrees(x=normal(n, 9, 8))


def test_dim_that_torch_traced_as_a_constant():
    """TransformerEncoderLayer with N and T dynamic: torch writes the traced T, 9, into the graph.

    ONNX Runtime fails at other T inside the model; here the call says so.
    """
    whole = exported("encoder_nt_17")
    whole.agrees(x=normal(3, 9, 8))
    with pytest.raises(ValueError, match=r"DC2112: Reshape .*: T = 9 is required"):
        whole(x=normal(3, 13, 8))


def test_scaled_dot_product_attention():
    """scaled_dot_product_attention(is_causal=True), flatten(2)."""
    whole = exported("sdpa_17")
    for n, t in NT:
        whole.agrees(x=normal(n, t, 8))


def test_positions_and_causal_mask():
    """Embeddings of ids and arange(t); bias[:, :, :t, :t] of a buffer, masked_fill, tril(ones)."""
    whole = exported("gpt_14")
    for n, t in NT:
        whole.agrees(ids=np.random.default_rng(t).integers(0, 50, (n, t)))
    with pytest.raises(ValueError, match=r"DC2112: .*T <= 32 is required"):
        whole(ids=np.zeros((1, 33), np.int64))


def test_view_of_a_batch():
    """Conv, ReLU, MaxPool, x.view(x.size(0), -1), Linear."""
    whole = exported("cnn_17")
    for n in (1, 2, 5):
        whole.agrees(x=normal(n, 3, 16, 16))


def test_movements():
    """reshape(n // 2, -1, c), expand, repeat, cat, flip, chunk, split, stack, pad, arange."""
    whole = exported("misc_18")
    for n, t in [(2, 3), (4, 6), (3, 5), (6, 1)]:
        whole.agrees(x=normal(n, t, 8))
    with pytest.raises(ValueError, match=r"DC2112: Reshape .*: N//2 >= 1 is required"):
        whole(x=normal(1, 2, 8))


def test_interpolate():
    """interpolate by a factor and to x.shape[2:], adaptive pooling, strided slices."""
    whole = exported("upsample_18")
    for shape in ((1, 3, 8, 6), (2, 3, 4, 4), (3, 3, 10, 2)):
        whole.agrees(x=normal(*shape))


def test_windows():
    """view(b, h // 2, 2, w // 2, 2, c), permute and back; roll."""
    whole = exported("windows_17")
    for shape in ((1, 4, 6, 4), (2, 2, 2, 4), (3, 8, 4, 4)):
        whole.agrees(x=normal(*shape))
    with pytest.raises(ValueError, match=r"DC2112: Reshape .*is required"):
        whole(x=normal(1, 3, 4, 4))


def test_lengths():
    """arange(t) < lens[:, None], sum / clamp(min=1), triu(1) mask, x[arange(n), lens - 1]."""
    whole = exported("mask_17")
    for n, t in NT:
        lens = np.random.default_rng(n).integers(1, t + 1, n)
        whole.agrees(x=normal(n, t, 4), lens=lens)
