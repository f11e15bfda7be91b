"""Every way a model file can be wrong ends in one clear error, quickly, and never in a crash."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import mlp, model, node, qdq, tensor, value

from dccompile.errors import Error, ModelError, UnsupportedError
from dccompile.frontend import sandbox
from dccompile.frontend.gate import read

X = value("x", ["N", 8])
IMAGE = value("x", [2, 8, 16, 16])
FILTERS = {"w": np.ones((4, 8, 3, 3), np.float32)}


def refused(source, code: str, *words: str, kind: type[ModelError | UnsupportedError] = ModelError):
    """`read` raises `kind` with a problem of this code that holds all words; returns the error."""
    start = time.perf_counter()
    with pytest.raises(kind) as caught:
        read(source)
    assert time.perf_counter() - start < 2
    problems = [p for p in caught.value.problems if p.code == code]
    assert problems, caught.value.lines()
    assert any(all(word in str(p) for word in words) for p in problems), caught.value.lines()
    for line in caught.value.lines():
        assert "Fix: " in line and "\n" not in line and len(line) < 2000
        assert line.startswith("error DC3")
    assert caught.value.exit_code == 3
    return caught.value


def one(op: str, inputs: str = "x", tensors=(), x=X, opset: int = 17, outputs="y", **attributes):
    """A model of one node named 'bad'."""
    nodes = [node(op, inputs, outputs, "bad", **attributes)]
    return model(nodes, [x], outputs.split(), tensors, opset=opset)


# -- the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_truncated_file(tmp_path, keep):
    data = mlp().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelError) as caught:
        read(path)
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"PK\x03\x04rest", "zip"),
        (b"\x1f\x8b\x08rest", "gzip"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b'{"graph": {"node": []}}', "text"),
        (b"\xff" * 100, "not a valid protobuf"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
    ],
)
def test_not_a_model_file(tmp_path, content, word):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    refused(path, "DC3002", "m.onnx", word)


def test_file_cannot_be_read(tmp_path):
    refused(tmp_path, "DC3001", "a folder")
    refused(tmp_path / "missing.onnx", "DC3001", "missing.onnx", "No such file")
    refused("nul\0.onnx", "DC3001", "null")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "DC3001", "pipe")
    refused(12, "DC3001", "int")


def test_text_that_is_not_utf8():
    data = mlp().SerializeToString().replace(b"MatMul", b"Mat\xff\xfel")
    refused(data, "DC3002", "UTF-8")


def test_file_beyond_the_protobuf_limit(tmp_path):
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    refused(path, "DC3001", "2147483648 bytes", "save_as_external_data")


# -- header --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, 999, -1])
def test_ir_version(version):
    m = mlp()
    m.ir_version = version
    refused(m, "DC3003", f"IR version {version}")


@pytest.mark.parametrize("opset", [1, 10, 26, 999, -5, 2**62])
def test_opset_version(opset):
    m = mlp()
    m.opset_import[0].version = opset
    refused(m, "DC3004", f"opset {opset}", "11 to 25", "version_converter")


def test_opset_missing_or_contradictory():
    m = mlp()
    del m.opset_import[:]
    refused(m, "DC3004", "ai.onnx")
    m = mlp()
    m.opset_import.add(domain="ai.onnx", version=18)
    refused(m, "DC3004", "17 and 18")
    refused(
        model([node("Gelu", "x", "y", "bad", domain="com.microsoft")], [X], ["y"]),
        "DC3004",
        "Gelu 'bad' (node 0)",
        "com.microsoft",
    )


def test_training_graphs():
    m = mlp()
    m.training_info.add()
    refused(m, "DC3104", "training", kind=UnsupportedError)
    nodes = [node("Adam", "x x x x", "y z", "bad", domain="ai.onnx.preview.training")]
    m = model(nodes, [X], ["y"], domains=["ai.onnx.preview.training"])
    refused(m, "DC3104", "'bad' (node 0)", kind=UnsupportedError)


def test_inputs_and_outputs_must_be_tensors():
    relu = [node("Relu", "x", "y")]
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    optional = onnx.ValueInfoProto(name="o", type=helper.make_optional_type_proto(X.type))
    keys = onnx.ValueInfoProto(name="m")
    keys.type.map_type.key_type = TensorProto.INT64
    keys.type.map_type.value_type.CopyFrom(X.type)
    strings = value("t", [1], TensorProto.STRING)
    m = model(relu, [X, sequence, optional, keys, strings], ["y"])
    error = refused(m, "DC3103", "input 's'", "sequence", kind=UnsupportedError)
    assert [p.where for p in error.problems] == ["input 's'", "input 'o'", "input 'm'", "input 't'"]
    refused(model(relu, [X, onnx.ValueInfoProto(name="u")], ["y"]), "DC3005", "input 'u'")
    refused(model(relu, [X, value("u", [1], 99)], ["y"]), "DC3005", "input 'u'", "99")


# -- structure -----------------------------------------------------------------------------------


def test_cycle_names_its_nodes():
    nodes = [
        node("Relu", "x", "a", "start"),
        node("Add", "a c", "b", "first"),
        node("Relu", "b", "c", "second"),
        node("Relu", "c", "y", "end"),
    ]
    error = refused(model(nodes, [X], ["y"]), "DC3008", "Add 'first' (node 1)", "'second' (node 2)")
    assert len(error.problems) == 1 and "start" not in str(error) and "end" not in str(error)


def test_self_cycle_and_two_cycles():
    nodes = [
        node("Relu", "a", "a", "own"),
        node("Relu", "c", "b", "p"),
        node("Relu", "b", "c", "q"),
    ]
    error = refused(model(nodes, [X], ["a", "b"]), "DC3008", "Relu 'own' (node 0)")
    assert len(error.problems) == 2


def test_every_missing_tensor_is_listed():
    nodes = [node("Add", "x w0", "a", "one"), node("Add", "a w1", "y", "")]
    error = refused(model(nodes, [X], ["y", "z"]), "DC3007", "Add 'one' (node 0)", "'w0'")
    assert [p.where for p in error.problems] == ["Add 'one' (node 0)", "Add '#1' (node 1)", "graph"]


def test_missing_tensor_in_a_subgraph():
    branch = helper.make_graph([node("Add", "x lost", "b", "inner")], "t", [], [value("b", None)])
    nodes = [node("If", "c", "y", "choose", then_branch=branch, else_branch=branch)]
    m = model(nodes, [X, value("c", [], TensorProto.BOOL)], ["y"])
    refused(m, "DC3007", "Add 'inner' (node 0 in then_branch of If 'choose' (node 0))", "'lost'")


def test_a_name_given_twice():
    nodes = [node("Relu", "x", "y", "one"), node("Neg", "x", "y", "two")]
    refused(model(nodes, [X], ["y"]), "DC3006", "Neg 'two' (node 1)", "Relu 'one' (node 0)")
    refused(one("Relu", outputs="x"), "DC3006", "'x'")
    refused(model([node("Relu", "x", "y")], [X, X], ["y"]), "DC3006", "input 'x'")
    twice = [tensor("w", np.ones(8, np.float32))] * 2
    refused(one("Add", "x w", twice), "DC3006", "initializer 'w'")


def test_unknown_domains_and_operators_are_all_listed():
    nodes = [
        node("Add", "x x", "a", "evil", domain="com.evil"),
        node("Nonsense", "a", "b", ""),
        node("Gelu", "b", "c", "early"),
        node("Upsample", "c c", "y", "gone"),
    ]
    m = model(nodes, [X], ["y"], domains=["com.evil"])
    error = refused(m, "DC3101", "com.evil::Add 'evil' (node 0)", kind=UnsupportedError)
    where = [(p.code, p.where) for p in error.problems]
    assert where == [
        ("DC3101", "com.evil::Add 'evil' (node 0)"),
        ("DC3102", "Nonsense '#1' (node 1)"),
        ("DC3102", "Gelu 'early' (node 2)"),
        ("DC3102", "Upsample 'gone' (node 3)"),
    ]
    assert "opset 17" in error.problems[2].found and "later" in error.problems[2].found


def function(name: str, body: list[onnx.NodeProto], domain: str = "my", opset: int = 17):
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("my", 1)]
    return helper.make_function(domain, name, ["a"], ["b"], body, imports)


def test_functions_that_never_end():
    f = function("F", [node("G", "a", "b", "call", domain="my")])
    g = function("G", [node("F", "a", "b", "call", domain="my")])
    m = model([node("F", "x", "y", domain="my")], [X], ["y"], functions=[f, g], domains=["my"])
    refused(m, "DC3009", "my::F", "calls itself")


def test_functions_that_expand_without_bound():
    functions = [function("F0", [node("Relu", "a", "b")])]
    for i in range(1, 40):
        call = f"F{i - 1}"
        body = [node(call, "a", "t", domain="my"), node(call, "t", "b", domain="my")]
        functions.append(function(f"F{i}", body))
    calls = [node("F39", "x", "y", domain="my")]
    refused(model(calls, [X], ["y"], functions=functions, domains=["my"]), "DC3009", "1000000")


def test_deep_nesting():
    m = onnx.ModelProto(ir_version=8)
    graph = m.graph
    for _ in range(20000):
        graph = graph.node.add(op_type="If").attribute.add(name="then_branch", type=5).g
    refused(m, "DC3009", "nested")


# -- tensors ------------------------------------------------------------------------------------


def raw(dims, size: int, dtype: int = TensorProto.FLOAT) -> TensorProto:
    return TensorProto(name="w", dims=dims, data_type=dtype, raw_data=bytes(size))


@pytest.mark.parametrize(
    ("weight", "code", "word"),
    [
        (raw([4, 8], 127), "DC3010", "127 bytes"),
        (raw([4, 8], 0), "DC3010", "float[4, 8] has 128"),
        (raw([3], 3, TensorProto.INT4), "DC3010", "has 2"),
        (raw([8], 32, 0), "DC3010", "element type 0"),
        (raw([8], 32, 99), "DC3010", "element type 99"),
        (TensorProto(name="w", dims=[2], data_type=1, float_data=[1.0]), "DC3010", "1 entries"),
        (TensorProto(name="w", dims=[1], data_type=1, int64_data=[1]), "DC3010", "float_data"),
        (raw([-4], 16), "DC3017", "[-4]"),
        (raw([2**40], 16), "DC3017", "[1099511627776]"),
        (raw([2**31 - 1] * 8, 16), "DC3017", "64 GiB"),
        (raw([1] * 100000, 4), "DC3017", "100000 dims"),
    ],
)
def test_damaged_initializers(weight, code, word):
    refused(one("Add", "x w", [weight]), code, "'w'", word)


def test_all_damaged_initializers_are_listed():
    tensors = [raw([8], 3), tensor("v", np.ones(8, np.float32)), raw([8], 5)]
    tensors[2].name = "u"
    nodes = [node("Sum", "x w v u", "y")]
    error = refused(model(nodes, [X], ["y"], tensors), "DC3010", "'w'")
    assert [p.where for p in error.problems] == ["initializer 'w'", "initializer 'u'"]


def external(location: str, **entries) -> onnx.ModelProto:
    """x[N, 8] + w[8], with w in an external file."""
    weight = TensorProto(name="w", dims=[8], data_type=1, data_location=TensorProto.EXTERNAL)
    for key, text in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=str(text))
    return one("Add", "x w", [weight])


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    data = np.arange(16, dtype=np.float32).tobytes()
    (tmp_path / "secret.bin").write_bytes(data)
    (inside / "w.bin").write_bytes(data)
    (inside / "sub" / "w.bin").write_bytes(data)
    (inside / "empty").mkdir()
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    (inside / "linked").symlink_to(tmp_path)
    os.link(tmp_path / "secret.bin", inside / "hard.bin")
    os.mkfifo(inside / "pipe")
    return inside


@pytest.mark.parametrize(
    ("location", "entries", "word"),
    [
        ("../secret.bin", {}, "inside the model's folder"),
        ("sub/../../secret.bin", {}, "inside the model's folder"),
        ("/etc/passwd", {}, "inside the model's folder"),
        ("", {}, "inside the model's folder"),
        ("w.bin\0x", {}, "inside the model's folder"),
        ("link.bin", {}, "cannot be opened"),
        ("linked/secret.bin", {}, "cannot be opened"),
        ("missing.bin", {}, "No such file"),
        ("hard.bin", {}, "one link"),
        ("pipe", {}, "not a regular file"),
        ("empty", {}, "not a regular file"),
        ("w.bin", {"offset": 40}, "past its end"),
        ("w.bin", {"offset": 2**62}, "past its end"),
        ("w.bin", {"offset": -4}, "offset -4"),
        ("w.bin", {"offset": "seven"}, "whole numbers"),
        ("w.bin", {"offset": 0, "length": 16}, "length 16"),
        ("w.bin", {"length": 2**62}, "length"),
        ("w.bin", {"length": -1}, "length -1"),
    ],
)
def test_external_data_attacks(folder, location, entries, word):
    path = folder / "m.onnx"
    path.write_bytes(external(location, **entries).SerializeToString())
    refused(path, "DC3011", "initializer 'w'", word)


def test_external_data_without_a_folder(folder):
    m = external("w.bin")
    refused(m, "DC3011", "'w.bin'", "pass the path")
    refused(m.SerializeToString(), "DC3011", "'w.bin'", "pass the path")


@pytest.mark.parametrize(("location", "offset"), [("w.bin", 0), ("w.bin", 32), ("sub/w.bin", 4)])
def test_external_data_inside_the_folder(folder, location, offset):
    path = folder / "m.onnx"
    path.write_bytes(external(location, offset=offset, checksum="ignored").SerializeToString())
    graph = read(path)
    want = np.arange(16, dtype=np.float32)[offset // 4 : offset // 4 + 8]
    np.testing.assert_array_equal(graph.constants["w"], want)


def test_large_external_data_are_mapped(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 1 << 16), np.float32)
    path = tmp_path / "m.onnx"
    m = one("MatMul", "x w", {"w": weight})
    onnx.save(m, path, save_as_external_data=True, location="m.data", size_threshold=0)
    graph = read(path)
    held = graph.constants["w"]
    assert isinstance(held.base, np.memmap) and not held.flags.writeable
    np.testing.assert_array_equal(held, weight)
    assert graph.model.ByteSize() < 4096
    (embedded,) = graph.embedded().graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(embedded), weight)


# -- dims, types, shapes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "code"), [(-4, "DC3005"), (0, "DC3005"), (2**31, "DC3017"), (2**40, "DC3017")]
)
def test_input_dims(dim, code):
    refused(one("Relu", x=value("x", [4, dim])), code, "input 'x'", f"dim 1 is {dim}")


@pytest.mark.parametrize(
    ("op", "operand"),
    [
        ("Expand", [2**40, 4, 8]),
        ("Tile", [2**40, 1]),
        ("Pad", [0, 2**40, 0, 0]),
        ("Tile", [2**28, 2**28]),
    ],
)
def test_operators_that_make_huge_tensors(op, operand):
    m = one(op, "x k", {"k": np.array(operand, np.int64)}, x=value("x", [4, 8]))
    refused(m, "DC3017", f"{op} 'bad' (node 0)")


def test_huge_constants_are_never_built():
    k = np.array([2**20, 2**20], np.int64)
    m = model([node("ConstantOfShape", "k", "y", "bad")], [], ["y"], {"k": k})
    refused(m, "DC3017", "ConstantOfShape 'bad' (node 0)", "64 GiB")
    ends = {"a": np.int64(0), "b": np.int64(2**62), "d": np.int64(1)}
    m = model([node("Range", "a b d", "y", "bad")], [], ["y"], ends)
    refused(m, "DC3017", "Range 'bad' (node 0)")


def test_shape_inference_does_not_explode():
    nodes = [node("Shape", "x", "s0", "s")]
    nodes += [node("Concat", f"s{i} s{i}", f"s{i + 1}", f"c{i}", axis=0) for i in range(40)]
    refused(model(nodes, [X], ["s40"]), "DC3017", "Concat 'c29' (node 30)")
    nodes = [node("Gather", f"t{i} t{i}", f"t{i + 1}", f"g{i}") for i in range(40)]
    m = model(nodes, [value("t0", [2, 2], TensorProto.INT64)], ["t40"])
    refused(m, "DC3017", "Gather 'g9'", "1025 dims")


def test_declared_types_that_contradict_the_graph():
    relu = [node("Relu", "x", "y", "act")]
    lie = value("y", ["N", 8], TensorProto.INT64)
    refused(model(relu, [X], [lie]), "DC3013", "Relu 'act' (node 0)", "int64", "float")
    refused(model(relu, [X], [value("y", ["N", 9])]), "DC3013", "[N, 9]", "[N, 8]")
    refused(model(relu, [X], [value("y", [8])]), "DC3013", "'act'")
    m = model([*relu, node("Neg", "y", "z")], [X], ["z"])
    m.graph.value_info.append(value("y", ["N", 7]))
    refused(m, "DC3013", "tensor 'y'", "[N, 7]")
    m = one("Add", "x w", {"w": np.ones(8, np.float32)})
    m.graph.input.append(value("w", [9]))
    refused(m, "DC3013", "input 'w'")


def test_operand_types():
    m = one("Add", "x w", {"w": np.ones(8, np.int64)})
    refused(m, "DC3013", "Add 'bad' (node 0)", "tensor(float) and tensor(int64)", "Cast")
    refused(one("Cast", to=128), "DC3014", "Cast 'bad' (node 0)", "valid type")
    w = {"w": np.ones(8, np.float32)}
    m = one("LayerNormalization", "x w", w, outputs="y mean", stash_type=128)
    refused(m, "DC3013", "LayerNormalization 'bad' (node 0)", "'mean' has element type 128")
    m = one("MatMulInteger", "x w", {"w": np.ones((8, 4), np.int8)})
    refused(m, "DC3013", "MatMulInteger 'bad' (node 0)", "tensor(float)")


def test_every_shape_error_is_listed():
    nodes = [
        node("MatMul", "x w", "a", "left"),
        node("Relu", "x", "b", "fine"),
        node("MatMul", "b w", "c", "right"),
    ]
    m = model(nodes, [X], ["a", "c"], {"w": np.ones((7, 4), np.float32)})
    error = refused(m, "DC3014", "MatMul 'left' (node 0)", "Incompatible dimensions")
    assert [p.where for p in error.problems] == [
        "MatMul 'left' (node 0)",
        "MatMul 'right' (node 2)",
    ]


# -- attributes and constant operands ---------------------------------------------------------

INT = np.int64
INVALID: dict[str, tuple[Callable[[], onnx.ModelProto], str, str]] = {
    "unknown attribute": (lambda: one("Relu", colour=3), "DC3012", "colour"),
    "attribute of a wrong type": (lambda: one("Softmax", axis=0.5), "DC3012", "axis"),
    "missing attribute": (lambda: one("Concat", "x x"), "DC3012", "axis"),
    "too many inputs": (lambda: one("Relu", "x x"), "DC3012", "input size 2"),
    "too few inputs": (lambda: one("Add", "x"), "DC3012", "input size 1"),
    "dilation 0": (lambda: one("Conv", "x w", FILTERS, IMAGE, dilations=[0, 0]), "DC3016", "dil"),
    "stride 0": (lambda: one("Conv", "x w", FILTERS, IMAGE, strides=[0, 0]), "DC3016", "strides"),
    "group 0": (lambda: one("Conv", "x w", FILTERS, IMAGE, group=0), "DC3016", "group 0"),
    "wrong group": (lambda: one("Conv", "x w", FILTERS, IMAGE, group=3), "DC3016", "8 input"),
    "wrong kernel shape": (
        lambda: one("Conv", "x w", FILTERS, IMAGE, kernel_shape=[5, 5]),
        "DC3016",
        "kernel_shape [5, 5]",
    ),
    "negative pad": (
        lambda: one("Conv", "x w", FILTERS, IMAGE, pads=[-1, 0, 0, 0]),
        "DC3016",
        "pads",
    ),
    "kernel 0": (lambda: one("MaxPool", x=IMAGE, kernel_shape=[0, 0]), "DC3016", "kernel_shape"),
    "average kernel 0": (lambda: one("AveragePool", x=IMAGE, kernel_shape=[0, 2]), "DC3016", "ker"),
    "pool larger than the image": (
        lambda: one("MaxPool", x=IMAGE, kernel_shape=[99, 99]),
        "DC3016",
        "window of 99",
    ),
    "k beyond the dim": (
        lambda: one("TopK", "x k", {"k": np.array([99], INT)}, outputs="y z"),
        "DC3016",
        "k",
    ),
    "negative k": (
        lambda: one("TopK", "x k", {"k": np.array([-1], INT)}, outputs="y z"),
        "DC3016",
        "k -1",
    ),
    "split sizes": (
        lambda: one("Split", "x k", {"k": np.array([3, 3], INT)}, outputs="y z", axis=1),
        "DC3016",
        "split",
    ),
    "negative split sizes": (
        lambda: one("Split", "x k", {"k": np.array([-3, 11], INT)}, outputs="y z", axis=1),
        "DC3016",
        "split sizes",
    ),
    "more outputs than num_outputs": (  # onnx's shape inference aborts the process on this
        lambda: one("Split", outputs="y z w", opset=18, num_outputs=2, axis=1),
        "DC3016",
        "num_outputs 2; 3 is allowed",
    ),
    "no split outputs": (
        lambda: one("Split", outputs="y z", opset=18, num_outputs=0, axis=1),
        "DC3016",
        "num_outputs 0",
    ),
    "gemm inner dims": (
        lambda: one("Gemm", "x w", {"w": np.ones((7, 4), np.float32)}),
        "DC3016",
        "8 and 7",
    ),
    "gemm bias": (
        lambda: one(
            "Gemm", "x w b", {"w": np.ones((8, 4), np.float32), "b": np.ones(5, np.float32)}
        ),
        "DC3016",
        "bias",
    ),
    "reshape": (
        lambda: one("Reshape", "x k", {"k": np.array([5, 7], INT)}, x=value("x", [4, 8])),
        "DC3016",
        "32 elements",
    ),
    "two open dims": (
        lambda: one("Reshape", "x k", {"k": np.array([-1, -1], INT)}),
        "DC3016",
        "at most one -1",
    ),
    "transpose": (lambda: one("Transpose", perm=[0, 0]), "DC3016", "perm"),
    "gather index": (
        lambda: one("Gather", "x k", {"k": np.array([0, 8], INT)}, axis=1),
        "DC3016",
        "index 8; -8 to 7",
    ),
    "far gather index": (
        lambda: one("Gather", "x k", {"k": np.array([2**40], INT)}, axis=1),
        "DC3016",
        "index 1099511627776",
    ),
    "division by zero": (
        lambda: one(
            "Div", "x k", {"k": np.array([1, 0], np.int32)}, x=value("x", [2], TensorProto.INT32)
        ),
        "DC3016",
        "'k', which holds 0",
    ),
    "slice step 0": (
        lambda: one(
            "Slice",
            "x a b c s",
            {n: np.array([i], INT) for n, i in zip("abcs", (0, 4, 1, 0), strict=True)},
        ),
        "DC3016",
        "step",
    ),
    "axis beyond every rank": (  # onnx's shape inference is a segmentation fault on this
        lambda: one("LayerNormalization", "x w", {"w": np.ones(8, np.float32)}, axis=2**31),
        "DC3016",
        "axis [2147483648]",
    ),
    "range delta 0": (
        lambda: model(
            [node("Range", "a b d", "y", "bad")],
            [],
            ["y"],
            {"a": np.int64(0), "b": np.int64(9), "d": np.int64(0)},
        ),
        "DC3016",
        "delta 0",
    ),
    "range to infinity": (
        lambda: model(
            [node("Range", "a b d", "y", "bad")],
            [],
            ["y"],
            {"a": np.float32(0), "b": np.float32(np.inf), "d": np.float32(1)},
        ),
        "DC3016",
        "finite",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_operators(case):
    make, code, word = INVALID[case]
    refused(make(), code, "'bad' (node 0)", word)


# -- quantization parameters --------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, -0.1, np.nan, np.inf, -np.inf, -0.0])
def test_scales(scale):
    scale = np.float32(scale)
    m = qdq(s=scale)
    error = refused(m, "DC3015", "QuantizeLinear 'quantize' (node 0)", "'s'", str(scale))
    assert [p.where for p in error.problems] == [
        "QuantizeLinear 'quantize' (node 0)",
        "DequantizeLinear 'dequantize' (node 1)",
    ]
    scales = np.full(5, 0.02, np.float32)
    scales[3] = scale
    refused(qdq(ws=scales), "DC3015", "DequantizeLinear 'weight' (node 2)", "index 3")


def test_scale_from_a_constant_node():
    m = qdq()
    kept = [t for t in m.graph.initializer if t.name != "s"]
    del m.graph.initializer[:]
    m.graph.initializer.extend(kept)
    m.graph.node.insert(0, helper.make_node("Constant", [], ["s"], value_float=0.0))
    refused(m, "DC3015", "QuantizeLinear 'quantize' (node 1)", "scale 's' is 0.0")


def test_a_denormal_scale_is_allowed():
    read(qdq(s=np.float32(1e-40)))


def test_zero_points():
    refused(qdq(wz=np.zeros(5, np.uint8)), "DC3015", "'weight' (node 2)", "uint8; int8")
    refused(qdq(wz=np.zeros(4, np.int8)), "DC3015", "'weight' (node 2)", "[4]", "[5]")
    scales = {"ws": np.ones(4, np.float32), "wz": np.zeros(4, np.int8)}
    refused(qdq(**scales), "DC3015", "'weight' (node 2)", "4 scales", "5 entries")


def test_quantization_axis():
    m = qdq()
    m.graph.node[2].attribute[0].i = 2
    refused(m, "DC3015", "DequantizeLinear 'weight' (node 2)", "axis 2", "-2 to 1")


def test_scales_of_contrib_operators():
    tensors = {
        "xq": np.ones((2, 8), np.uint8),
        "s": np.float32(0.1),
        "z": np.uint8(0),
        "wq": np.ones((8, 4), np.int8),
        "ws": np.float32(np.nan),
        "wz": np.int8(0),
    }
    nodes = [node("QGemm", "xq s z wq ws wz", "y", "bad", domain="com.microsoft")]
    m = model(nodes, [X], ["y"], tensors, domains=["com.microsoft"])
    refused(m, "DC3015", "com.microsoft::QGemm 'bad' (node 0)", "'ws' is nan")


# -- onnx's own code crashes, hangs or takes all memory ------------------------------------------


def test_a_crash_of_onnx_is_an_error():
    crash = one("Split", outputs="y z w", opset=18, num_outputs=2, axis=1)
    for _ in range(2):
        with pytest.raises(ModelError, match="crashes, or needs more than") as caught:
            sandbox.call("infer", crash)
        assert caught.value.code == "DC3018"
    read(mlp())


def test_a_hang_of_onnx_is_an_error(monkeypatch):
    nodes = [node("Gather", f"t{i} t{i}", f"t{i + 1}", f"g{i}") for i in range(40)]
    endless = model(nodes, [value("t0", [2, 2], TensorProto.INT64)], ["t40"])
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    start = time.perf_counter()
    with pytest.raises(ModelError, match="does not end within 1 s"):
        sandbox.call("infer", endless)
    assert time.perf_counter() - start < 2
    monkeypatch.undo()
    read(mlp())


def test_the_helper_may_die_or_be_forked_between_calls():
    read(mlp())
    assert sandbox._helper is not None
    sandbox._helper.process.kill()
    sandbox._helper.process.wait()
    read(mlp())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            read(qdq())
            code = 0
        finally:
            sandbox._stop()
            os._exit(code)
    read(mlp())
    assert os.waitpid(child, 0)[1] == 0


def test_reading_from_several_threads():
    def work(index):
        return read((mlp, qdq)[index % 2]()).outputs[0].shape

    with ThreadPoolExecutor(4) as pool:
        shapes = list(pool.map(work, range(24)))
    assert shapes == [("N", 4), ("N", 5)] * 12


def test_vectors_too_long_to_propagate():
    m = one("Add", "x x", x=value("x", [2**31 - 1]))
    assert read(m).outputs[0].shape == (2**31 - 1,)


# -- what must not be refused -------------------------------------------------------------------


def test_good_models_pass():
    for m in (mlp(), qdq()):
        graph = read(m)
        assert graph.symbols == {"N": (1, None)}
        assert graph.inputs[0].shape == ("N", 8)


def test_the_callers_model_is_not_changed():
    m = mlp()
    before = m.SerializeToString()
    read(m, {"x": (4, 8)})
    assert m.SerializeToString() == before


def test_an_unsorted_graph_is_sorted():
    m = mlp()
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in m.graph.node][::-1]
    del m.graph.node[:]
    m.graph.node.extend(nodes)
    assert [n.name for n in read(m).model.graph.node] == ["fc0", "act", "fc1", "bias"]


def test_a_function_hides_the_operator_of_its_name():
    f = function("Relu", [node("Neg", "a", "b", "body")], domain="")
    graph = read(model([node("Relu", "x", "y", "call")], [X], ["y"], functions=[f]))
    assert [n.op_type for n in graph.model.graph.node] == ["Neg"]
    assert not graph.model.functions


def test_a_function_of_another_opset():
    f = function("F", [node("Relu", "a", "b", "body")], opset=18)
    calls = [node("F", "x", "y", "call", domain="my")]
    graph = read(model(calls, [X], ["y"], functions=[f], domains=["my"]))
    assert [n.op_type for n in graph.model.graph.node] == ["Relu"]


def test_contrib_operators_have_types():
    tensors = {"s": np.float32(0.1), "z": np.uint8(3), "wq": np.ones((8, 5), np.int8)}
    tensors["wz"] = np.int8(0)
    nodes = [
        node("QuantizeLinear", "x s z", "xq"),
        node("QGemm", "xq s z wq s wz _ s z", "yq", domain="com.microsoft"),
        node("DequantizeLinear", "yq s z", "y"),
        node("DynamicQuantizeMatMul", "x wq s wz", "d", domain="com.microsoft"),
    ]
    for opset in (11, 17, 25):
        m = model(nodes, [X], ["y", "d"], tensors, domains=["com.microsoft"], opset=opset)
        graph = read(m)
        assert [v.shape for v in graph.outputs] == [("N", 5), ("N", 5)]
        types = {v.name: v.type.tensor_type.elem_type for v in graph.model.graph.value_info}
        assert types["yq"] == TensorProto.UINT8


def test_old_style_default_inputs_are_constants():
    m = mlp()
    m.ir_version = 3
    for t in m.graph.initializer:
        m.graph.input.append(value(t.name, list(t.dims)))
    assert [v.name for v in read(m).inputs] == ["x"]


def test_odd_names_and_sizes():
    names = ["a\0b", "../../etc/passwd", "n" * (1 << 20), "\n\x1b[31m"]
    nodes = [node("Relu", "x", "y")]
    for i, name in enumerate(names):
        nodes.append(helper.make_node("Relu", ["x" if not i else names[i - 1]], [name], name=name))
    assert len(read(model(nodes, [X], ["y"])).model.graph.node) == 5


def test_a_long_chain():
    nodes = [node("Relu", f"t{i}", f"t{i + 1}", "") for i in range(2000)]
    assert len(read(model(nodes, [value("t0", ["N", 8])], ["t2000"])).model.graph.node) == 2000


def test_nested_branches():
    graph = helper.make_graph([node("Relu", "x", "y18")], "g", [], [value("y18", None)])
    for i in range(17, -1, -1):
        branch = node("If", "c", f"y{i}", then_branch=graph, else_branch=graph if i > 15 else LEAF)
        graph = helper.make_graph([branch], "g", [], [value(f"y{i}", None)])
    m = model(graph.node, [X, value("c", [], TensorProto.BOOL)], ["y0"])
    assert read(m).outputs[0].shape == ("N", 8)


LEAF = helper.make_graph([node("Relu", "x", "leaf")], "g", [], [value("leaf", None)])


# -- fuzz ----------------------------------------------------------------------------------------

FUZZ = """
import random, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
sys.path.insert(0, {root!r})
from dccompile.errors import Error
from dccompile.frontend.gate import read
from onnx_models import mlp, qdq

random.seed(1)
bases = [mlp().SerializeToString(), qdq().SerializeToString()]
good = bad = 0
for i in range(300):
    data = bytearray(bases[i % 2])
    kind = i // 2 % 3
    if kind == 0:
        data = data[: random.randrange(len(data))]
    for _ in range(kind * random.choice((1, 1, 2, 4))):
        at = random.randrange(len(data))
        data[at] = data[at] ^ (1 << random.randrange(8)) if kind == 1 else random.randrange(256)
    print(i, flush=True)
    try:
        read(bytes(data))
        good += 1
    except Error as error:
        bad += 1
        assert error.exit_code == 3 and all("Fix: " in line for line in error.lines())
print("done", good, bad)
"""


def test_damaged_files_never_crash():
    root = os.path.dirname(os.path.abspath(__file__))
    code = textwrap.dedent(FUZZ).format(root=root)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    good, bad = map(int, done.stdout.split()[-2:])
    assert good + bad == 300 and bad > 150


def test_error_lines_are_those_of_the_contract():
    error = refused(one("Relu", colour=3), "DC3012", "colour")
    assert isinstance(error, Error)
    assert error.lines()[0].startswith("error DC3012: Relu 'bad' (node 0): ")
