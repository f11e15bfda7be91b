"""The dot interaction: recognised in every form that torch writes, and its kernels."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from embedding import agree, interact, kinds
from kernels import listed
from onnx import helper, numpy_helper

from dccompile import registry
from dccompile.generic import legalize
from dccompile.machine import TARGETS, missing_features
from dccompile.workload import Interaction

EXPORTS = Path(__file__).with_name("torch_exports")
EXPECTED = {
    "flat": Interaction(5, 8),
    "indices": Interaction(5, 8),
    "concat": Interaction(5, 8),
    "diagonal": Interaction(5, 8, diagonal=True),
    "upper": Interaction(5, 8, order="upper"),
}


def feeds(batch=3, seed=0):
    rng = np.random.default_rng(seed)
    x, e = (rng.standard_normal((batch, *d)).astype(np.float32) for d in ((8,), (4, 8)))
    return {"x": x, "e": e}


def recovered(model):
    found = agree(model, feeds())
    (site,) = found.interactions.values()
    assert kinds(found) == ["DccInteraction"]
    assert next(n for n in found.nodes if n["op"] == "MatMul")["site"] == site.name
    return site.workload


@pytest.mark.parametrize("name", EXPECTED)
def test_new_exporter_of_torch(name):
    assert recovered(onnx.load(EXPORTS / f"interaction_{name}.onnx")) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_old_exporter_of_torch(name):
    torch = pytest.importorskip("torch")
    work = EXPECTED[name]
    pairs = [(i, j) for i in range(5) for j in work.row(i)]
    i, j = (torch.tensor(side) for side in zip(*pairs, strict=True))

    class Model(torch.nn.Module):
        def forward(self, x, e):
            if name == "concat":
                vectors = torch.cat([x, *(e[:, t] for t in range(4))], 1).view(x.shape[0], -1, 8)
            else:
                vectors = torch.cat([x.unsqueeze(1), e], 1)
            products = torch.bmm(vectors, vectors.transpose(1, 2))
            if name == "flat":
                taken = products.flatten(1).index_select(1, i * 5 + j)
            else:
                taken = products[:, i, j]
            return torch.cat([x, taken], 1)

    file = io.BytesIO()
    args = tuple(torch.from_numpy(value) for value in feeds().values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Model(), args, file, dynamo=False, opset_version=17, input_names=["x", "e"],
            dynamic_axes={"x": {0: "N"}, "e": {0: "N"}},
        )  # fmt: skip
    assert recovered(onnx.load_from_string(file.getvalue())) == work


@pytest.mark.parametrize("change", ["order", "mixed", "front", "scaled"])
def test_other_products_are_left_alone(change):
    model = onnx.load(EXPORTS / "interaction_flat.onnx")
    graph = model.graph
    gather = next(n for n in graph.node if n.op_type == "GatherND")
    constants = {t.name: t for t in graph.initializer}
    at = numpy_helper.to_array(constants[gather.input[1]]).copy()
    if change == "order":  # the first pair twice
        at[1] = at[0]
    elif change == "mixed":  # one sample's products where another's belong
        transposes = [n for n in graph.node if n.op_type == "Transpose"]
        transposes[-1].op_type, last = "Reshape", transposes[-1]
        del last.attribute[:]
        shape = numpy_helper.from_array(np.array([-1, len(at)]), "mixing")
        graph.initializer.append(shape)
        last.input.append("mixing")
    elif change == "front":  # another dense vector than the first one
        graph.node[-1].input[0] = "negated"
        graph.node.insert(0, helper.make_node("Neg", ["x"], ["negated"]))
    else:
        matmul = next(n for n in graph.node if n.op_type == "MatMul")
        index = list(graph.node).index(matmul)
        product, matmul.output[0] = matmul.output[0], "unscaled"
        graph.node.insert(index + 1, helper.make_node("Neg", ["unscaled"], [product]))
    constants[gather.input[1]].CopyFrom(numpy_helper.from_array(at, gather.input[1]))
    assert not agree(model, feeds()).interactions


def test_without_one_tensor_of_rows():
    """Rows of several tensors are stacked, then cut off again behind the dense one."""
    values = [helper.make_tensor_value_info(n, 1, ["N", 8]) for n in "xab"]
    constants = {"axis": [1], "flat": [0, 9], "pairs": [3, 6, 7]}
    nodes = [helper.make_node("Unsqueeze", [n, "axis"], [n + "1"]) for n in "xab"]
    nodes += [
        helper.make_node("Concat", ["x1", "a1", "b1"], ["v"], axis=1),
        helper.make_node("Transpose", ["v"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["v", "t"], ["p"]),
        helper.make_node("Reshape", ["p", "flat"], ["f"]),
        helper.make_node("Gather", ["f", "pairs"], ["g"], axis=1),
        helper.make_node("Concat", ["x", "g"], ["y"], axis=1),
    ]
    tensors = [numpy_helper.from_array(np.array(v), n) for n, v in constants.items()]
    out = helper.make_empty_tensor_value_info("y")
    graph = helper.make_graph(nodes, "test", values, [out], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    rng = np.random.default_rng(0)
    given = {n: rng.standard_normal((2, 8)).astype(np.float32) for n in "xab"}
    found = agree(model, given)
    assert [s.workload.vectors for s in found.interactions.values()] == [3]


# -- kernels -------------------------------------------------------------------------------------

KERNELS = [k for k in registry.kernels() if k.name in listed("interaction")]
SHAPES = {
    "model:dlrm": Interaction(27, 64),
    "two vectors": Interaction(2, 16),
    "as many as lanes": Interaction(16, 16),
    "one more": Interaction(17, 17, diagonal=True),
    "one less": Interaction(15, 31, bags=7),
    "narrow": Interaction(9, 8, order="upper"),
    "upper": Interaction(33, 20, order="upper", diagonal=True),
    "many": Interaction(40, 24),
}


def machine_of(kernel):
    for machine in TARGETS.values():
        if set(kernel.features) <= set(machine.features):
            return machine
    raise AssertionError(kernel.name)


def build(kernel, work, params):
    machine = machine_of(kernel)
    func = kernel.build(work, params, machine).with_attr("global_symbol", "k")
    built = tvm.tirx.build(tvm.IRModule({"k": func}), legalize.target_of(machine))
    return tvm.runtime.Executable(built).jit()["k"]


def aligned(shape, fill=np.nan):
    size = int(np.prod(shape)) * 4
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    array = raw[begin : begin + size].view(np.float32).reshape(shape)
    array[...] = fill
    return array


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_kernels(kernel, shape):
    work = SHAPES[shape]
    if missing_features(kernel.features):
        pytest.skip("not this CPU's instructions")
    if kernel.refuses(work):
        assert work.dim < kernel.lanes
        pytest.skip(kernel.refuses(work))
    choices = [p for p in kernel.candidates(machine_of(kernel))]
    for params in (choices[0], kernel.default(work, machine_of(kernel))):
        function = build(kernel, work, params)
        for batch in (work.bags,) if work.bags else (1, 4, 70):
            check(function, work, batch)


def check(function, work, batch):
    rng = np.random.default_rng(batch)
    dense = aligned((batch, work.dim), rng.standard_normal((batch, work.dim)))
    shape = (batch, work.vectors - 1, work.dim)
    rows = aligned(shape, rng.standard_normal(shape))
    guard = aligned((batch * (work.dim + work.pairs) + 64,))
    out = guard[:-64].reshape(batch, -1)
    function(*map(tvm.runtime.from_dlpack, (dense, rows, out)))
    want = interact(work, dense, rows)
    np.testing.assert_array_equal(out[:, : work.dim], dense)
    x = np.abs(np.concatenate([dense[:, None], rows], axis=1)).max()
    np.testing.assert_allclose(out, want, rtol=0, atol=work.dim**1.5 * x**2 * 2**-24)
    assert np.isnan(guard[-64:]).all(), "written behind the output"


def test_registers_fit():
    for kernel in KERNELS:
        machine = machine_of(kernel)
        for work in SHAPES.values():
            assert kernel.registers(kernel.default(work, machine)) <= machine.registers


def test_what_kernels_refuse():
    for kernel in KERNELS:
        assert kernel.refuses(Interaction(27, 4))
        assert kernel.refuses(Interaction(200, 64))
        assert kernel.refuses(Interaction(100, 512))
