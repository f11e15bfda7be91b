"""Builds small ONNX models, compiles them on the generic route, and asks ONNX Runtime too."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from dccompile import machine
from dccompile.frontend import operators
from dccompile.generic import legalize, stack

CODES = {np.dtype(t): c for t, c in (
    ("float32", TensorProto.FLOAT), ("uint8", TensorProto.UINT8), ("int8", TensorProto.INT8),
    ("uint16", TensorProto.UINT16), ("int16", TensorProto.INT16), ("int32", TensorProto.INT32),
    ("int64", TensorProto.INT64), ("bool", TensorProto.BOOL), ("float64", TensorProto.DOUBLE),
)}  # fmt: skip


def special(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal numbers with NaN, both infinities and both zeros among them."""
    x = (rng.standard_normal(shape) * 4).astype(np.float32)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    x.reshape(-1)[: min(5, x.size)] = odd[: min(5, x.size)]
    return x


class Case:
    """Nodes that share inputs; every node's outputs are outputs of the model."""

    def __init__(self, opset: int = 18, **feeds: Any) -> None:
        self.opset, self.feeds = opset, {k: np.asarray(v) for k, v in feeds.items()}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.outputs: list[str] = []

    def add(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Case:
        """A node; arrays among `inputs` become initializers."""
        names = []
        for value in inputs:
            if isinstance(value, str):
                names.append(value)
                continue
            name = f"c{len(self.constants)}"
            self.constants[name] = np.asarray(value)
            names.append(name)
        results = [f"y{len(self.nodes)}_{i}" for i in range(outputs)]
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, results, name=name, **attributes))
        self.outputs += results
        return self

    def model(self, symbolic: bool = True) -> onnx.ModelProto:
        """With `symbolic`, the first dimension of every input is the same name N."""
        graph = helper.make_graph(
            self.nodes,
            "case",
            [self._input(n, v, symbolic) for n, v in self.feeds.items()],
            [onnx.ValueInfoProto(name=n) for n in self.outputs],
            [numpy_helper.from_array(v, n) for n, v in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        typed = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        kinds = {v.name: v.type for v in [*typed.graph.value_info, *typed.graph.output]}
        for output in model.graph.output:
            output.type.CopyFrom(kinds[output.name])
        return model

    @staticmethod
    def _input(name: str, value: np.ndarray, symbolic: bool) -> onnx.ValueInfoProto:
        shape: list[int | str] = list(value.shape)
        if symbolic and shape:
            shape[0] = "N"
        return helper.make_tensor_value_info(name, CODES[value.dtype], shape)


def imported(model: onnx.ModelProto) -> tvm.IRModule:
    """The Relax module, with the converters under test."""
    importer = onnx_frontend.ONNXGraphImporter({}, "float32")
    original, converters = onnx_frontend._get_convert_map, operators.table()
    onnx_frontend._get_convert_map = lambda: converters
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importer.from_onnx(model.graph, model.opset_import[0].version)
    finally:
        onnx_frontend._get_convert_map = original


def compiled(model: onnx.ModelProto, target: machine.Machine | None = None) -> Any:
    """A function of numpy arrays, built on the generic route for the host or another target."""
    target = target or machine.host()
    mod = imported(model)
    mod, _ = legalize.fuse(mod, target)
    with tvm.transform.PassContext(config=stack.CONFIG):
        built = tvm.compile(mod, target=legalize.target_of(target))
    vm = relax.VirtualMachine(built, tvm.cpu())

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        result = vm["main"](*(tvm.runtime.tensor(a) for a in arrays))
        return [r.numpy() for r in ([result] if hasattr(result, "numpy") else result)]

    return run


def compare(case: Case, *, symbolic: bool = True, rtol: float = 1e-5, atol: float = 1e-6,
            others: list[dict[str, np.ndarray]] | None = None,
            target: machine.Machine | None = None) -> None:  # fmt: skip
    """Integers equal, floats close, NaN where ONNX Runtime has it; `others` are more feeds."""
    model = case.model(symbolic)
    run = compiled(model, target)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    for feeds in [case.feeds, *(others or [])]:
        got = run(*(feeds[n] for n in case.feeds))
        want = session.run(None, feeds)
        for name, a, b in zip(case.outputs, got, want, strict=True):
            node = next(n for n in case.nodes if name in n.output)
            label = f"{node.op_type} {name} of {[v.shape for v in feeds.values()]}"
            assert a.dtype == b.dtype and a.shape == b.shape, label
            if a.dtype.kind == "f":
                np.testing.assert_allclose(a, b, rtol, atol, err_msg=label)
            else:
                np.testing.assert_array_equal(a, b, err_msg=label)
