"""A model compiled in this process and called as the runtime does: `plan`, then `main`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tvm
from onnx import TensorProto, helper, numpy_helper

from dccompile import machine, pipeline
from dccompile.cache import Cache

KINDS = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
}


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


class Graph:
    """Collects nodes; arrays among the arguments become initializers."""

    def __init__(self, opset: int = 18, **inputs: tuple[str, list[int | str]]) -> None:
        self.opset, self.inputs = opset, inputs
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.outputs: list[str] = []

    def __call__(self, op: str, *args: Any, parts: int = 1, **attributes: Any) -> Any:
        names = [self._name(a) for a in args]
        results = [f"v{len(self.nodes)}_{i}" for i in range(parts)]
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, results, name=name, **attributes))
        return results[0] if parts == 1 else results

    def _name(self, value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def out(self, *names: str) -> None:
        """Makes values outputs of the model, in this order."""
        self.outputs += names

    def dim(self, name: str, axis: int) -> str:
        """One dim as a scalar, as torch exports x.shape[axis]."""
        return self("Gather", self("Shape", name), np.array(axis), axis=0)

    def vector(self, *dims: str | int) -> str:
        """Scalars and numbers as a 1-d tensor."""
        parts = [self("Unsqueeze", d, ints(0)) if isinstance(d, str) else ints(d) for d in dims]
        return self("Concat", *parts, axis=0)

    def model(self) -> bytes:
        inputs = [
            helper.make_tensor_value_info(n, KINDS[kind], shape)
            for n, (kind, shape) in self.inputs.items()
        ]
        outputs = [onnx.ValueInfoProto(name=n) for n in self.outputs]
        graph = helper.make_graph(self.nodes, "test", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        typed = {v.name: v.type for v in onnx.shape_inference.infer_shapes(model).graph.output}
        for output in model.graph.output:
            output.type.CopyFrom(typed[output.name])
        return bytes(model.SerializeToString())


class Whole:
    """A compiled model; `agrees` compares it with ONNX Runtime."""

    def __init__(self, model: bytes, shapes: dict[str, Any] | None = None) -> None:
        self.front = pipeline.front(model, shapes, "keep")
        constants = pipeline.Constants()
        self.lowered = pipeline.lower(self.front, machine.host(), constants)
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "library.so"
            pipeline.generate([self.lowered], [library], Cache(None))
            self.library = tvm.runtime.load_module(str(library))
        params = np.zeros(constants.size + 1, np.uint8)
        for (_, array), at in zip(constants.arrays, constants.offsets.values(), strict=True):
            assert isinstance(array, np.ndarray)
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            params[at : at + raw.size] = raw
        self.params = tvm.runtime.tensor(params)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(model, options)

    def plan(self, feeds: dict[str, np.ndarray]) -> list[int]:
        """Bytes of workspace, then the dims of all outputs. Raises what `plan` raises."""
        inputs, program = self.front.graph.inputs, self.lowered.program
        dims = {d: n for v in inputs for d, n in zip(v.shape, feeds[v.name].shape, strict=True)}
        symbols = np.array([dims[s.name] for s in program.symbols] or [0], np.int64)
        result = tvm.runtime.tensor(np.full(1 + sum(len(t.shape) for t in program.outputs), -1))
        self.library["plan"](tvm.runtime.tensor(symbols), result)
        return [int(n) for n in result.numpy()]

    def __call__(self, **feeds: np.ndarray) -> list[np.ndarray]:
        sizes = self.plan(feeds)
        outputs, at = [], 1
        for t in self.lowered.program.outputs:
            end = at + len(t.shape)
            outputs.append(tvm.runtime.tensor(np.zeros(sizes[at:end], t.dtype)))
            at = end
        workspace = tvm.runtime.tensor(np.full(max(sizes[0], 1), 0xFF, np.uint8))
        inputs = [tvm.runtime.tensor(feeds[v.name]) for v in self.front.graph.inputs]
        sized = bool(self.lowered.program.told())
        told = [tvm.runtime.tensor(np.full(len(sizes) - 1, -1))] if sized else []
        self.library["main"](*inputs, *outputs, *told, self.params, workspace)
        if not sized:
            return [o.numpy() for o in outputs]
        dims = told[0].numpy().tolist()
        shapes = [[dims.pop(0) for _ in t.shape] for t in self.lowered.program.outputs]
        rows = zip(outputs, shapes, strict=True)
        return [o.numpy().reshape(-1)[: np.prod(s, dtype=int)].reshape(s) for o, s in rows]

    def agrees(self, **feeds: np.ndarray) -> None:
        want = self.session.run(None, feeds)
        names = [o.name for o in self.session.get_outputs()]
        for name, a, b in zip(names, self(**feeds), want, strict=True):
            label = f"{name} of {[v.shape for v in feeds.values()]}"
            assert (a.shape, a.dtype) == (b.shape, b.dtype), label
            if a.dtype.kind == "f":
                np.testing.assert_allclose(a, b, 1e-5, 1e-5, err_msg=label)
            else:
                np.testing.assert_array_equal(a, b, err_msg=label)
