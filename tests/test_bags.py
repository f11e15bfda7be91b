"""Embedding bags in all the forms that models write them in, against ONNX Runtime."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from embedding import agree, kinds, only_bag, recover_model
from onnx import TensorProto, helper, numpy_helper
from recovery import F32, Maker

import dccompile as dc
from dccompile import sls
from dccompile.errors import UsageError
from dccompile.frontend.gate import read
from dccompile.streams import Stream

I32, I64 = TensorProto.INT32, TensorProto.INT64
ROWS, DIM = 50, 8
EXPORTS = Path(__file__).with_name("torch_exports")


class Graph(Maker):
    """`Maker` with tables and unchecked models."""

    def table(self, rows=ROWS, dim=DIM, dtype=np.float32):
        return self.const(self.rng.standard_normal((rows, dim)), dtype)

    def indices(self, *shape, dtype=np.int64, low=0):
        return self.rng.integers(low, ROWS, shape).astype(dtype)

    def model(self, *outputs):
        values = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "test", self.inputs, values, self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


# -- Gather and a reduction ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean"])
@pytest.mark.parametrize("keep", [0, 1])
def test_gather_and_reduction(op, keep, dtype):
    make = Graph(opset=18)
    index = make.input("N", 5, dtype=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), name="i")
    rows = make.op("Gather", make.table(), index)
    model = make.model(make.op(op, rows, make.const([1], np.int64), keepdims=keep))
    found = agree(model, {"i": make.indices(4, 5, dtype=dtype, low=-ROWS)})
    work = only_bag(found)
    assert (work.mode, work.pooling, work.bags) == (op[6:].lower(), 5, None)
    assert work.negative, "negative indices of a Gather count from the end"
    assert kinds(found) == ["DccEmbeddingBag", "Unsqueeze"][: 1 + keep]


@pytest.mark.parametrize("axes", [[-2], [2], [1, 2], [0, 1, 2]])
def test_indices_of_any_rank(axes):
    make = Graph()
    rows = make.op("Gather", make.table(), make.input(2, 3, 4, dtype=I64, name="i"))
    model = make.model(make.op("ReduceSum", rows, make.const(axes, np.int64), keepdims=0))
    work = only_bag(agree(model, {"i": make.indices(2, 3, 4)}))
    assert work.pooling == {1: 4, 2: 12, 3: 24}[len(axes)]
    assert work.bags * work.pooling == 24


@pytest.mark.parametrize("opset", [11, 13])
def test_axes_as_attribute(opset):
    make = Graph(opset)
    rows = make.op("Gather", make.table(), make.input("N", 3, dtype=I64, name="i"))
    model = make.model(make.op("ReduceMean", rows, axes=[1], keepdims=0))
    assert only_bag(agree(model, {"i": make.indices(2, 3)})).mode == "mean"


@pytest.mark.parametrize("unsqueezed", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_weighted_rows(unsqueezed, first):
    make = Graph()
    rows = make.op("Gather", make.table(), make.input("N", 4, dtype=I64, name="i"))
    shape = ("N", 4) if unsqueezed else ("N", 4, 1)
    weights = make.input(*shape, dtype=F32, name="w")
    if unsqueezed:
        weights = make.op("Unsqueeze", weights, make.const([2], np.int64))
    factors = (weights, rows) if first else (rows, weights)
    y = make.op("ReduceSum", make.op("Mul", *factors), make.const([1], np.int64), keepdims=0)
    w = make.rng.standard_normal([3 if d == "N" else d for d in shape]).astype(np.float32)
    found = agree(make.model(y), {"i": make.indices(3, 4), "w": w})
    assert only_bag(found).weighted


@pytest.mark.parametrize("place", ["table", "rows"])
def test_float16_table(place):
    make = Graph()
    table = make.table(dtype=np.float16)
    index = make.input("N", 3, dtype=I64, name="i")
    if place == "table":
        rows = make.op("Gather", make.op("Cast", table, to=F32), index)
    else:
        rows = make.op("Cast", make.op("Gather", table, index), to=F32)
    model = make.model(make.op("ReduceSum", rows, make.const([1], np.int64), keepdims=0))
    assert only_bag(agree(model, {"i": make.indices(2, 3)})).storage == "f16"


def test_lookups_of_large_tables_alone():
    for rows, recovered in ((50, False), (40_000, True)):
        make = Graph()
        index = make.input("N", 2, dtype=I64, name="i")
        model = make.model(make.op("Gather", make.table(rows), index))
        found = agree(model, {"i": make.indices(3, 2)})
        assert bool(found.bags) is recovered
    assert only_bag(found).pooling == 1


@pytest.mark.parametrize(
    "what", ["dynamic", "other axis", "used twice", "channel weights", "not constant", "double"]
)
def test_what_is_left_alone(what):
    make = Graph()
    pooling = "L" if what == "dynamic" else 3
    index = make.input("N", pooling, dtype=I64, name="i")
    table = make.table(dtype=np.float64 if what == "double" else np.float32)
    feeds = {"i": make.indices(2, 3)}
    if what == "not constant":
        table = make.input(ROWS, DIM, name="t")
        feeds["t"] = make.rng.standard_normal((ROWS, DIM)).astype(np.float32)
    rows = make.op("Gather", table, index)
    factor = make.const(np.arange(DIM), np.float32)
    scaled = make.op("Mul", rows, factor) if what == "channel weights" else rows
    axis = make.const([0 if what == "other axis" else 1], np.int64)
    y = [make.op("ReduceSum", scaled, axis, keepdims=0)]
    y += [rows] if what == "used twice" else []
    found = agree(make.model(*y), feeds)
    assert not found.bags and "Gather" in kinds(found)
    if what in ("dynamic", "other axis", "used twice"):
        assert any(n["reason"] for n in found.nodes if n["op"] == "ReduceSum")


# -- several tables ------------------------------------------------------------------------------


def tables(make, picks, consumer, weighted=False, slicing="gather"):
    """Bags over slices `picks` of one index tensor (N, 4, 3), then what reads them."""
    sparse = make.input("N", 4, 3, dtype=I64, name="i")
    weights = make.input("N", 4, 3, name="w") if weighted else None

    def piece(source, t):
        if slicing == "gather":
            return make.op("Gather", source, make.const(t, np.int64), axis=1)
        bounds = [make.const([v], np.int64) for v in (t, t + 1, 1)]
        return make.op("Squeeze", make.op("Slice", source, *bounds), bounds[2])

    pooled = []
    for number, t in enumerate(picks):
        rows = make.op("Gather", make.table(ROWS + number), piece(sparse, t))
        if weights:
            column = make.op("Unsqueeze", piece(weights, t), make.const([2], np.int64))
            rows = make.op("Mul", rows, column)
        pooled.append(make.op("ReduceSum", rows, make.const([1], np.int64), keepdims=0))
    if consumer == "stack":
        axis = make.const([1], np.int64)
        pooled = [make.op("Unsqueeze", value, axis) for value in pooled]
    if consumer == "each":
        return make.model(*pooled)
    front = make.input("N", *([1] if consumer == "stack" else []), DIM, name="z")
    return make.model(make.op("Concat", front, *pooled, axis=1))


def feeds(make, consumer, weighted=False):
    given = {"i": make.indices(5, 4, 3)}
    if weighted:
        given["w"] = make.rng.standard_normal((5, 4, 3)).astype(np.float32)
    if consumer != "each":
        shape = (5, 1, DIM) if consumer == "stack" else (5, DIM)
        given["z"] = make.rng.standard_normal(shape).astype(np.float32)
    return given


@pytest.mark.parametrize("consumer", ["stack", "concat", "each"])
@pytest.mark.parametrize("weighted", [False, True])
def test_tables_of_one_index_tensor_become_one(consumer, weighted):
    make = Graph()
    model = tables(make, range(4), consumer, weighted)
    found = agree(model, feeds(make, consumer, weighted))
    work = only_bag(found)
    assert work.rows == (50, 51, 52, 53) and work.weighted is weighted
    left = {"stack": ["Concat"], "concat": ["Reshape", "Concat"], "each": ["Gather"] * 4}
    assert kinds(found) == ["DccEmbeddingBag", *left[consumer]]


def test_tables_in_an_order_of_their_own():
    make = Graph()
    found = agree(tables(make, [2, 0, 2], "stack"), feeds(make, "stack"))
    assert only_bag(found).rows == (51, 50, 52), "sorted by the position of their indices"


def test_slices_are_seen():
    make = Graph()
    found = agree(tables(make, range(4), "concat", slicing="slice"), feeds(make, "concat"))
    assert only_bag(found).tables == 4


@pytest.mark.parametrize("consumer", ["stack", "concat"])
@pytest.mark.parametrize("pooled", [True, False])
def test_tables_with_indices_of_their_own(consumer, pooled):
    """Put together where their results are; what is between them stays where it is."""
    make = Graph()
    axis = make.const([1], np.int64)
    parts, given = [], {}
    for t in range(5):
        shape = (3,) if pooled else ()
        index = make.input("N", *shape, dtype=I64, name=f"i{t}")
        given[f"i{t}"] = make.indices(4, *shape)
        value = make.op("Gather", make.table(40_000 + t), index)
        if pooled:
            value = make.op("ReduceSum", value, axis, keepdims=0)
        if t == 1:
            value = make.op("Neg", value)
        parts.append(make.op("Unsqueeze", value, axis) if consumer == "stack" else value)
    found = agree(make.model(make.op("Concat", *parts, axis=1)), given)
    assert sorted(site.workload.rows for site in found.bags.values()) == [
        (40_000,), (40_001,), (40_002, 40_003, 40_004),
    ]  # fmt: skip


def test_tables_of_other_widths_stay_apart():
    make = Graph()
    sparse = make.input("N", 2, dtype=I64, name="i")
    outputs = []
    for t, dim in enumerate((8, 16)):
        at = make.op("Gather", sparse, make.const(t, np.int64), axis=1)
        outputs.append(make.op("Gather", make.table(40_000, dim), at))
    found = agree(make.model(*outputs), {"i": make.indices(3, 2)})
    assert [site.workload.dim for site in found.bags.values()] == [8, 16]


# -- loops ---------------------------------------------------------------------------------------


def torch_feeds(name):
    """Inputs for the exports, whose tables are 50 x 8."""
    rng = np.random.default_rng(1)
    index, offsets = rng.integers(0, ROWS, 9), np.array([0, 4, 4])
    if "fixed" in name:
        given = {"indices": rng.integers(0, ROWS, (4, 5))}
    else:
        # In ONNX Runtime the mean of an empty bag of TorchScript's is NaN.
        given = {"indices": index, "offsets": np.array([0, 4, 5]) if "mean" in name else offsets}
    if "last" in name:
        given["offsets"] = np.array([0, 4, 4, 9])
    if "padding" in name:
        index[[0, 4, 5, 6, 7, 8]] = 3
    if "weighted" in name:
        given["weights"] = rng.random(given["indices"].shape, np.float32)
    return given


EXPECTED = {
    "fixed_sum": dict(layout="fixed", pooling=5),
    "fixed_mean": dict(layout="fixed", pooling=5, mode="mean"),
    "fixed_weighted": dict(layout="fixed", pooling=5, weighted=True),
    "offsets_sum": dict(layout="offsets"),
    "offsets_mean": dict(layout="offsets", mode="mean"),
    "offsets_weighted": dict(layout="offsets", weighted=True),
    "last_offset": dict(layout="offsets+1"),
    "padding": dict(layout="offsets", padding=3),
    "static": dict(layout="offsets", bags=3),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_new_exporter_of_torch(name):
    """Made by PyTorch 2.13 with dynamo=True, which needs packages that the tests do not."""
    model = onnx.load(EXPORTS / f"bag_{name}.onnx")
    found = agree(model, torch_feeds(name))
    work = only_bag(found)
    assert {key: getattr(work, key) for key in EXPECTED[name]} == EXPECTED[name]
    assert not {"Loop", "ConcatFromSequence"} & {*kinds(found)}
    named = {n["op"]: n["precision"] for n in found.nodes}
    assert named["Loop"] == "float32"


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "padding"])
def test_old_exporter_of_torch(name):
    torch = pytest.importorskip("torch")
    options = {"mode": "mean" if "mean" in name else "sum"}
    bag = torch.nn.EmbeddingBag(ROWS, DIM, include_last_offset="last" in name, **options)
    given = {k: torch.from_numpy(v) for k, v in torch_feeds(name).items()}
    args = [given.get(k) for k in ("indices", "offsets", "weights")]
    file = io.BytesIO()
    axes = {} if name == "static" else {k: {0: f"n_{k}"} for k in given}
    if "fixed" in name:
        axes = {k: {0: "N"} for k in given}
    if name == "offsets_weighted":
        axes["weights"] = axes["indices"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            bag, tuple(args), file, dynamo=False, opset_version=17, input_names=[*given],
            dynamic_axes=axes,
        )  # fmt: skip
    found = agree(onnx.load_from_string(file.getvalue()), torch_feeds(name))
    work = only_bag(found)
    assert {key: getattr(work, key) for key in EXPECTED[name]} == EXPECTED[name]
    assert "Loop" not in kinds(found)


def loop_of(model):
    return next(node for node in model.graph.node if node.op_type == "Loop")


@pytest.mark.parametrize("change", ["step", "start", "rows", "axis", "result"])
def test_other_loops_are_left_alone(change):
    """A bag's loop with one part changed is a loop that says something else."""
    model = onnx.load(EXPORTS / "bag_offsets_sum.onnx")
    loop = loop_of(model)
    graph = loop.attribute[0].g
    constants = {t.name: t for t in model.graph.initializer}

    def other(name, value):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    if change == "step":  # bags 0, 2, 4, ..
        add = next(n for n in graph.node if n.output[0] == graph.output[1].name)
        add.input[1] = other("two", np.int64(2))
    elif change == "start":
        loop.input[2] = other("one", np.int64(1))
    elif change == "rows":
        branch = next(n for n in graph.node if n.op_type == "If").attribute
        inner = next(a.g for a in branch if a.name == "else_branch")
        inner.node[0].input[1] = other("zero", np.array([0]))
    elif change == "axis":
        constants["int64_0_1d"].CopyFrom(numpy_helper.from_array(np.array([1]), "int64_0_1d"))
    else:
        branch = next(n for n in graph.node if n.op_type == "If").attribute
        inner = next(a.g for a in branch if a.name == "else_branch")
        inner.node[1].op_type = "ReduceMax"
    assert not recover_model(model).bags


# -- the operators of domain dccompile -----------------------------------------------------------


def sls_model(name, kind):
    ins = ["table", *(["w"] if "Weighted" in name else []), "i", "l"]
    inputs = [helper.make_tensor_value_info("w", F32, ["T"])] if "w" in ins else []
    inputs += [helper.make_tensor_value_info(n, kind, [d]) for n, d in (("i", "T"), ("l", "N"))]
    table = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    node = helper.make_node(name, ins, ["y"], domain=sls.DOMAIN, name="bag")
    output = helper.make_tensor_value_info("y", F32, ["N", DIM])
    table = numpy_helper.from_array(table, "table")
    graph = helper.make_graph([node], "sls", inputs, [output], [table])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(sls.DOMAIN, 1)]
    model = helper.make_model(graph, functions=sls.functions(name), opset_imports=opsets)
    model.ir_version = 9
    return model


@pytest.mark.parametrize("kind", [I32, I64])
@pytest.mark.parametrize("name", sls.OPERATORS)
def test_functions(name, kind):
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    model = sls_model(name, kind)
    onnx.checker.check_model(model, full_check=True)
    given = {"i": np.array([1, 2, 3, 4, 5, 49, 0], dtype), "l": np.array([3, 0, 4], dtype)}
    if "Weighted" in name:
        given["w"] = np.random.default_rng(0).random(7, np.float32)
    work = only_bag(agree(model, given))
    assert (work.layout, work.negative) == ("lengths", False)
    assert work.mode == ("mean" if "Mean" in name else "sum")


# -- compiled ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    model = sls_model("SparseLengthsWeightedSum", I32)
    return {name: dc.compile(model, targets="host", embedding=name) for name in ("keep", "int8")}


def test_compiled_bags(compiled):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 6, 40).astype(np.int32)
    terms = int(lengths.sum())
    given = {
        "i": rng.integers(0, ROWS, terms).astype(np.int32),
        "l": lengths,
        "w": rng.random(terms, np.float32),
    }
    want = recovery_session().run(None, given)[0]
    for name, tolerance in (("keep", 1e-5), ("int8", 0.15)):
        module = compiled[name].load(threads=2)
        np.testing.assert_allclose(module(given)[0], want, rtol=1e-5, atol=tolerance)
        precisions = {n["precision"] for n in compiled[name].manifest["nodes"]}
        assert {"keep": "float32", "int8": "int8-rows"}[name] in precisions


def recovery_session():
    from recovery import session

    return session(sls_model("SparseLengthsWeightedSum", I32))


def test_bad_input_is_named(compiled):
    module = compiled["keep"].load(threads=1)
    ones = np.ones(4, np.float32)
    index, lengths = np.array([1, 2, 3, 4], np.int32), np.array([1, 3], np.int32)
    for wrong in (ROWS, -1):
        with pytest.raises(dc.InputError, match=f"'table' of 50 rows: index {wrong} at"):
            module({"i": np.array([1, 2, wrong, 4], np.int32), "l": lengths, "w": ones})
    with pytest.raises(dc.InputError, match="sum is 3, the number of indices is 4"):
        module({"i": index, "l": np.array([1, 2], np.int32), "w": ones})
    with pytest.raises(dc.InputError, match=r"lengths: -1 at \[1\]"):
        module({"i": index, "l": np.array([5, -1], np.int32), "w": ones})


def test_tables_are_stored_as_the_kernel_packs_them(compiled, tmp_path):
    from dccompile import registry
    from dccompile.machine import resolve
    from dccompile.runtime import artifact
    from dccompile.tables import quantize_rows
    from dccompile.workload import EmbeddingBag, EmbeddingTables

    path = compiled["int8"].save(tmp_path / "m.dcm")
    with artifact.read(path) as file:
        (variant,) = file.manifest["variants"]
        params = file.params(variant["params"]).copy()
        (stored,) = file.tensors(variant["params"]).values()
        (table,) = file.manifest["tables"]
    work = variant["kernels"][0]["workload"]
    work = EmbeddingBag(**{k: v for k, v in work.items() if k != "op"} | {"rows": (ROWS,)})
    kernel = registry.select(work, resolve("host")).kernel
    values = numpy_helper.to_array(sls_model("SparseLengthsSum", I32).graph.initializer[0])
    rows, error = quantize_rows(values, 8)
    packed = kernel.pack(work, EmbeddingTables([rows], ("table",)), kernel.Params())
    np.testing.assert_array_equal(params[stored.offset :][: stored.nbytes], packed)
    assert table["relative_error"] == pytest.approx(error.relative) and 0 < error.relative < 0.01


def test_a_stream_keeps_its_promise():
    pieces = [np.ones((2, 3), np.float32), np.zeros(8, np.uint8)]
    assert b"".join(Stream(32, b"", lambda: iter(pieces)).chunks())[24:] == bytes(8)
    with pytest.raises(ValueError, match="40 bytes gave 32"):
        list(Stream(40, b"", lambda: iter(pieces)).chunks())


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_rows_that_cannot_be_stored(value):
    model = sls_model("SparseLengthsSum", I64)
    table = numpy_helper.to_array(model.graph.initializer[0]).copy()
    table[33, 5] = value
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "table"))
    with pytest.raises(dc.ModelError, match="table 'table', row 33"):
        dc.compile(model, targets="host", embedding="fp16")


def test_embedding_has_four_forms():
    with pytest.raises(UsageError, match="keep, fp16, int8, int4"):
        dc.compile(sls_model("SparseLengthsSum", I64), embedding="int2")


def test_gate_takes_the_functions():
    assert not read(sls_model("SparseLengthsSum", I64)).model.functions


@pytest.mark.parametrize("change", ["axis", "count", "begins"])
def test_other_functions_are_left_alone(change):
    """SparseLengthsSum with one part changed is another function."""
    model = sls_model("SparseLengthsSum", I64)
    function = model.functions[0]
    (loop,) = (node for node in function.node if node.op_type == "Loop")
    graph = loop.attribute[0].g
    if change == "axis":  # columns instead of rows
        gather = next(n for n in graph.node if n.input[0] == "data")
        gather.attribute.append(helper.make_attribute("axis", 1))
    elif change == "count":  # as many bags as terms
        next(n for n in function.node if n.op_type == "Size").input[0] = "indices"
    else:
        next(n for n in function.node if n.op_type == "CumSum").attribute.append(
            helper.make_attribute("exclusive", 1)
        )
    assert not recover_model(model).bags
