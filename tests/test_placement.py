"""Where Quantize/DequantizeLinear pairs go, and which tensors share a range."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from whole import Graph, ints

from dccompile.quantization.placement import Plan, layers, place
from dccompile.quantization.prepare import float_model

IMAGE: tuple[str, list[int | str]] = ("float32", [1, 8, 6, 6])
ROWS: tuple[str, list[int | str]] = ("float32", ["N", 8])
RNG = np.random.default_rng(0)


def filters(o: int = 8, c: int = 8, k: int = 1) -> np.ndarray:
    return RNG.standard_normal((o, c, k, k)).astype(np.float32)


def conv(g: Graph, x: str, **attributes: object) -> str:
    return str(g("Conv", x, filters(), **attributes))


def plan(g: Graph, **options: object) -> Plan:
    return place(prepared(g), **options)  # type: ignore[arg-type]


def prepared(g: Graph) -> onnx.ModelProto:
    return float_model(g.model()).model


def pairs(p: Plan) -> list[str]:
    return [name for group in p.groups for name in group.tensors]


def test_layers_read_codes_and_the_end_stays_float() -> None:
    g = Graph(x=IMAGE)
    a = conv(g, "x")
    g.out(g("Softmax", conv(g, a), axis=1))
    assert pairs(plan(g)) == ["x", a]


@pytest.mark.parametrize("op", ["Relu", "Clip"])
def test_no_pair_between_a_layer_and_its_clamp(op: str) -> None:
    g = Graph(x=IMAGE)
    bounds = (np.float32(0), np.float32(6)) if op == "Clip" else ()
    a = conv(g, "x")
    b = g(op, a, *bounds)
    g.out(conv(g, b))
    found = plan(g)
    assert pairs(found) == ["x", b] and found.through == (a,)
    assert pairs(plan(g, net_aware=False)) == ["x", a, b]


def test_a_tensor_with_another_reader_has_a_pair() -> None:
    g = Graph(x=IMAGE)
    a = conv(g, "x")
    b = g("Relu", a)
    g.out(g("Add", conv(g, b), conv(g, a)))
    assert pairs(plan(g)) == ["x", a, b]


def test_both_operands_of_a_residual_sum_unless_it_is_fused() -> None:
    g = Graph(x=IMAGE)
    a = g("Relu", conv(g, "x"))
    b = conv(g, a)
    c = g("Relu", g("Add", b, a))
    g.out(conv(g, c))
    assert pairs(plan(g)) == ["x", a, b, c]
    fused = plan(g, fuse_sums=True)
    assert pairs(fused) == ["x", a, c] and b in fused.through


def test_fused_sums_of_two_layers_keep_one_pair() -> None:
    g = Graph(x=IMAGE)
    a, b = conv(g, "x"), conv(g, "x")
    c = g("Add", a, b)
    g.out(conv(g, c))
    assert pairs(plan(g, fuse_sums=True)) == ["x", a, c]


def test_max_pool_shares_the_range_behind_it() -> None:
    g = Graph(x=IMAGE)
    a = g("Relu", conv(g, "x"))
    b = g("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])
    g.out(conv(g, b))
    group = plan(g).group_of()[a]
    assert group.tensors == (a, b) and group.observed == (b,)
    wide = plan(g, net_aware=False).group_of()[a]
    assert wide.observed == wide.tensors == (a, b)


def test_max_pool_of_a_tensor_that_others_read_does_not_narrow_it() -> None:
    g = Graph(x=IMAGE)
    a = g("Relu", conv(g, "x"))
    b = g("MaxPool", a, kernel_shape=[1, 1])
    g.out(g("Add", conv(g, b), conv(g, a)))
    assert a in plan(g).group_of()[a].observed


def test_concat_has_one_scale_with_what_only_it_reads() -> None:
    g = Graph(x=IMAGE)
    a, b, c = (g("Relu", conv(g, "x")) for _ in range(3))
    joined = g("Concat", a, b, c, axis=1)
    g.out(g("Conv", joined, filters(8, 24)), conv(g, c))
    found = plan(g).group_of()
    assert found[joined].tensors == (a, b, joined) and found[joined].observed == (joined,)
    assert found[c].tensors == (c,)
    assert plan(g, net_aware=False).group_of()[joined].tensors == (joined,)


def test_functions_of_one_tensor_have_no_pairs_inside() -> None:
    g = Graph(x=IMAGE)
    a = conv(g, "x")
    b = g("Mul", a, g("Sigmoid", a))
    g.out(conv(g, b))
    assert pairs(plan(g)) == ["x", a, b]


@pytest.mark.parametrize(
    ("op", "attributes", "bounds"),
    [
        ("HardSwish", {}, (-3, np.inf)),
        ("HardSigmoid", {"alpha": 0.25, "beta": 0.5}, (-2, 2)),
        ("Sigmoid", {}, (-np.inf, np.inf)),
    ],
)
def test_ranges_end_where_the_reader_is_flat(
    op: str, attributes: dict[str, float], bounds: tuple[float, float]
) -> None:
    g = Graph(x=IMAGE)
    a = conv(g, "x")
    b = g(op, a, **attributes)
    g.out(conv(g, b))
    assert plan(g).group_of()[a].bounds == bounds
    assert plan(g, net_aware=False).group_of()[a].bounds == (-np.inf, np.inf)


def test_squeeze_and_excite_stays_in_integers() -> None:
    g = Graph(x=IMAGE)
    a = g("Relu", conv(g, "x"))
    mean = g("GlobalAveragePool", a)
    gate = g("HardSigmoid", conv(g, g("Relu", conv(g, mean))))
    scaled = g("Mul", a, gate)
    g.out(conv(g, scaled))
    found = pairs(plan(g))
    assert {a, mean, gate, scaled} <= {*found}


def test_what_is_computed_of_the_input_in_float_is_not_quantized_twice() -> None:
    g = Graph(x=IMAGE)
    a = g("Div", g("Sub", "x", np.float32(0.5)), np.float32(0.2))
    g.out(conv(g, a))
    assert pairs(plan(g)) == [a]


def test_moves_of_the_input_hand_codes_on() -> None:
    g = Graph(x=("float32", [1, 6, 6, 8]))
    a = g("Transpose", "x", perm=[0, 3, 1, 2])
    g.out(conv(g, a))
    assert plan(g).group_of()["x"].tensors == ("x", a)


def test_float_operators_end_the_integers() -> None:
    g = Graph(x=ROWS)
    w = RNG.standard_normal((8, 8)).astype(np.float32)
    a = g("MatMul", "x", w)
    n = g("LayerNormalization", a, np.ones(8, np.float32), axis=-1)
    r = g("Relu", n)
    g.out(g("MatMul", r, w))
    assert pairs(plan(g)) == ["x", r]


def test_the_bias_behind_a_matmul_needs_no_pair() -> None:
    g = Graph(x=ROWS)
    w, b = RNG.standard_normal((8, 8)).astype(np.float32), np.ones(8, np.float32)
    a = g("MatMul", "x", w)
    r = g("Relu", g("Add", a, b))
    g.out(g("MatMul", r, w))
    assert pairs(plan(g)) == ["x", r]


def test_an_excluded_layer_takes_no_neighbour_with_it() -> None:
    g = Graph(x=IMAGE)
    a = g("Relu", conv(g, "x"))
    b = g("Relu", conv(g, a))
    g.out(conv(g, b))
    model = prepared(g)
    names = layers(model)
    assert len(names) == 3
    found = place(model, [names[1]])
    assert found.layers == (names[0], names[2]) and pairs(found) == ["x", b]
    assert place(model, ["Conv_*"]).layers == ()


@pytest.mark.parametrize(
    "move",
    [
        lambda g, x: g("Reshape", x, ints(1, 8, 4, 9)),
        lambda g, x: g("Pad", x, ints(0, 0, 1, 1, 0, 0, 1, 1)),
        lambda g, x: g("Slice", x, ints(0), ints(4), ints(2)),
        lambda g, x: g("Split", x, ints(3, 3), parts=2, axis=3)[0],
    ],
)
def test_moves_share_the_range(move: Callable[[Graph, str], str]) -> None:
    g = Graph(x=IMAGE)
    a = g("Relu", conv(g, "x"))
    b = move(g, a)
    g.out(conv(g, b))
    assert plan(g).group_of()[a].tensors == (a, b)


def test_a_pad_with_another_number_is_float() -> None:
    g = Graph(x=IMAGE)
    a = conv(g, "x")
    b = g("Pad", a, ints(0, 0, 1, 1, 0, 0, 1, 1), np.float32(1))
    g.out(conv(g, b))
    assert pairs(plan(g)) == ["x", b]
