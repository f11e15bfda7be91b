"""Input shapes: their spelling, what they bind, and what contradicts the model."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto
from onnx_models import mlp, model, node, value

from dccompile.errors import ModelError, UsageError
from dccompile.frontend.gate import parse_shape, read


def pair(left=("N", 8), right=("N", 8)):
    """Two inputs, joined along the last axis, so that only their batches meet."""
    inputs = [value("a", left), value("b", right)]
    return model([node("Concat", "a b", "y", "join", axis=1)], inputs, ["y"])


def shapes_of(graph):
    return {v.name: v.shape for v in (*graph.inputs, *graph.outputs)}


WRONG = "x x: :1x2 x:1x x:x x:1xx2 x:1,2 x:0 x:-2 x:1.5 x:1.. x:..4 x:4..1 x:0..4 x:1..2..3 x:1e3"
WRONG += " x:2147483648 x:1..2147483648 x:99999999999999999999 x:N-1 x:１ x:Ñ"

# -- the spelling ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("x:1x3x224x224", ("x", (1, 3, 224, 224))),
        ("x:1..64x13", ("x", ("1..64", 13))),
        ("x:Nx3", ("x", ("N", 3))),
        ("x:?x3", ("x", ("?", 3))),
        ("x:-1x3", ("x", (-1, 3))),
        ("x:7", ("x", (7,))),
        ("input:0:2x3", ("input:0", (2, 3))),
        ("a/b.c:2", ("a/b.c", (2,))),
        ("x:64..64", ("x", ("64..64",))),
    ],
)
def test_spelling(text, want):
    assert parse_shape(text) == want


@pytest.mark.parametrize("text", ["", "x:\n", *WRONG.split()])
def test_wrong_spelling(text):
    with pytest.raises(UsageError) as caught:
        parse_shape(text)
    assert caught.value.code == "DC2010" and caught.value.exit_code == 2
    assert "\n" not in caught.value.lines()[0]


# -- binding --------------------------------------------------------------------------------


def test_open_dims_keep_their_names():
    graph = read(mlp())
    assert shapes_of(graph) == {"x": ("N", 8), "y": ("N", 4)}
    assert graph.symbols == {"N": (1, None)}


def test_a_number_fixes_a_dim():
    graph = read(mlp(), {"x": (64, 8)})
    assert shapes_of(graph) == {"x": (64, 8), "y": (64, 4)}
    assert graph.symbols == {}


def test_a_range_bounds_a_symbol():
    graph = read(mlp(), {"x": ("1..64", 8)})
    assert shapes_of(graph) == {"x": ("N", 8), "y": ("N", 4)}
    assert graph.symbols == {"N": (1, 64)}


def test_a_range_of_one_value_is_a_number():
    assert shapes_of(read(mlp(), {"x": ("64..64", 8)}))["x"] == (64, 8)


def test_a_name_renames_a_symbol():
    graph = read(mlp(), {"x": ("batch", 8)})
    assert shapes_of(graph) == {"x": ("batch", 8), "y": ("batch", 4)}


@pytest.mark.parametrize("dim", ["?", -1, None])
def test_leave_a_dim_as_the_model_has_it(dim):
    assert shapes_of(read(mlp(), {"x": (dim, dim)}))["x"] == ("N", 8)


def test_numpy_integers_are_numbers():
    assert shapes_of(read(mlp(), {"x": (np.int64(3), 8)}))["x"] == (3, 8)


def test_a_symbol_is_bound_wherever_it_stands():
    graph = read(pair(), {"b": (5, 8)})
    assert shapes_of(graph) == {"a": (5, 8), "b": (5, 8), "y": (5, 16)}
    graph = read(pair(("N", "N"), (3, 8)), {"a": (3, "?")})
    assert shapes_of(graph)["a"] == (3, 3)


def test_unnamed_dims_get_names():
    relu = [node("Relu", "x", "y")]
    for dim in (None, "?", ""):
        graph = read(model(relu, [value("x", [dim, 8])], ["y"]))
        assert shapes_of(graph) == {"x": ("x_0", 8), "y": ("x_0", 8)}
    graph = read(model(relu, [value("x", [-1, "x_0"])], ["y"]))
    assert shapes_of(graph)["x"] == ("x_0_2", "x_0")


def test_names_that_are_not_identifiers():
    m = pair(("past + 1", 8), ("past + 1", 8))
    graph = read(m, {"a": ("1..9", 8)})
    assert graph.symbols == {"past_1": (1, 9)}
    assert shapes_of(graph)["b"] == ("past_1", 8)


def test_an_input_without_a_rank():
    m = model([node("Relu", "x", "y")], [value("x", None)], ["y"])
    with pytest.raises(ModelError) as caught:
        read(m)
    assert caught.value.code == "DC3005" and "--shape x:" in str(caught.value)
    graph = read(m, {"x": ("1..4", 8)})
    assert shapes_of(graph)["x"] == ("x_0", 8) and graph.symbols == {"x_0": (1, 4)}


def test_a_scalar_input():
    assert shapes_of(read(model([node("Relu", "x", "y")], [value("x", [])], ["y"])))["y"] == ()


# -- contradictions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "code", "words"),
    [
        ({"z": (1,)}, "DC2011", ["'z'", "'x'"]),
        ({"x": (1, 8, 1)}, "DC2012", ["'x'", "3 dims", "2 (N, 8)"]),
        ({"x": ()}, "DC2012", ["0 dims"]),
        ({"x": "1x8"}, "DC2012", ["'x'"]),
        ({"x": (4, 9)}, "DC2012", ["dim 1 of 'x'", "8", "9"]),
        ({"x": (4, "1..9")}, "DC2012", ["dim 1 of 'x'", "8", "1..9"]),
        ({"x": (4, "K")}, "DC2012", ["dim 1 of 'x'", "'K'"]),
        ({"x": (0, 8)}, "DC2010", ["dim 0", "1..2147483647"]),
        ({"x": (-3, 8)}, "DC2010", ["-3"]),
        ({"x": (2**31, 8)}, "DC2010", ["2147483648"]),
        ({"x": (2**64, 8)}, "DC2010", ["18446744073709551616"]),
        ({"x": (1.5, 8)}, "DC2010", ["1.5"]),
        ({"x": (True, 8)}, "DC2010", ["True"]),
        ({"x": ("9..3", 8)}, "DC2010", ["9..3", "min <= max"]),
    ],
)
def test_wrong_requests(shapes, code, words):
    with pytest.raises(UsageError) as caught:
        read(mlp(), shapes)
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_one_symbol_with_two_values():
    for left, right in (((4, 8), (5, 8)), (("1..4", 8), (5, 8)), (("B", 8), ("C", 8))):
        with pytest.raises(UsageError) as caught:
            read(pair(), {"a": left, "b": right})
        assert caught.value.code == "DC2012" and "'N'" in str(caught.value)


def test_a_shape_that_the_operators_refuse():
    m = model(
        [node("Reshape", "x k", "y", "flat")],
        [value("x", ["N", 3])],
        ["y"],
        {"k": np.array([2, 6], np.int64)},
    )
    assert shapes_of(read(m)) == {"x": (4, 3), "y": (2, 6)}
    with pytest.raises(ModelError) as caught:
        read(m, {"x": (5, 3)})
    assert "Reshape 'flat' (node 0)" in str(caught.value)


def test_sizes_count_at_the_end_of_the_range():
    m = model([node("Relu", "x", "y")], [value("x", ["N", 2**20])], ["y"])
    read(m, {"x": ("1..64", 2**20)})
    with pytest.raises(ModelError) as caught:
        read(m, {"x": (f"1..{2**20}", 2**20)})
    assert caught.value.code == "DC3017" and "input 'x'" in str(caught.value)


# -- dims that must be equal -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "inputs", "tensors", "want"),
    [
        ([node("Add", "a b", "y")], {"a": ["M", 8], "b": ["N", 8]}, {}, {"b": ("M", 8)}),
        ([node("Add", "a b", "y")], {"a": ["M", 8], "b": [1, "K"]}, {}, {"b": (1, 8)}),
        ([node("MatMul", "a w", "y")], {"a": ["M", "K"]}, {"w": (8, 3)}, {"a": ("M", 8)}),
        ([node("MatMul", "a w", "y")], {"a": ["K"]}, {"w": (8, 3)}, {"a": (8,)}),
        (
            [node("MatMul", "a b", "y")],
            {"a": ["B", "M", "K"], "b": ["C", "L", 5]},
            {},
            {"b": ("B", "K", 5)},
        ),
        (
            [node("Gemm", "a w", "y", transA=1, transB=1)],
            {"a": ["K", "M"]},
            {"w": (3, 8)},
            {"a": (8, "M")},
        ),
        (
            [node("Concat", "a b", "y", axis=-1)],
            {"a": ["M", "P"], "b": ["N", "Q"]},
            {},
            {"b": ("M", "Q")},
        ),
        (
            [node("Conv", "a w", "y", group=2)],
            {"a": ["N", "C", 9, 9]},
            {"w": (4, 3, 3, 3)},
            {"a": ("N", 6, 9, 9)},
        ),
        (
            [node("Relu", "a", "r"), node("Add", "r b", "s"), node("MatMul", "s w", "y")],
            {"a": ["M", "P"], "b": ["N", "Q"]},
            {"w": (8, 3)},
            {"a": ("M", 8), "b": ("M", 8)},
        ),
    ],
)
def test_operators_bind_dims(nodes, inputs, tensors, want):
    weights = {name: np.ones(dims, np.float32) for name, dims in tensors.items()}
    m = model(nodes, [value(name, dims) for name, dims in inputs.items()], ["y"], weights)
    graph = read(m)
    shapes = shapes_of(graph)
    assert {name: shapes[name] for name in want} == want
    used = {d for v in graph.inputs for d in v.shape or () if isinstance(d, str)}
    assert set(graph.symbols) == used


def test_merged_symbols_keep_the_common_range():
    m = model([node("Add", "a b", "y", "sum")], [value("a", ["M", 8]), value("b", ["N", 8])], ["y"])
    assert read(m, {"a": ("2..64", 8), "b": ("1..32", 8)}).symbols == {"M": (2, 32)}
    assert read(m, {"a": ("2..64", 8)}).symbols == {"M": (2, 64)}
    assert shapes_of(read(m, {"b": (4, 8)}))["a"] == (4, 8)
    with pytest.raises(ModelError) as caught:
        read(m, {"a": ("33..64", 8), "b": ("1..32", 8)})
    assert "Add 'sum' (node 0)" in str(caught.value) and "equal" in str(caught.value)


def test_declared_output_names_are_kept():
    nodes = [node("NonZero", "x", "y")]
    m = model(nodes, [value("x", ["N"])], [value("y", [1, "found"], TensorProto.INT64)])
    assert shapes_of(read(m))["y"] == (1, "found")
