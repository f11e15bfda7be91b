"""TVM's ONNX importer with converters of this compiler and shapes as expressions of symbols.

Values that follow from shapes are kept as `symbolic.Known` beside the tensors; one becomes a
tensor only where a node uses it as data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx
from onnx import NodeProto
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from ..errors import Error, ModelError, Problem, UnsupportedError
from . import operators
from .equal import pairs
from .operator_tools import Scope, constant
from .structure import subgraphs
from .symbolic import MOST_STATIC, Evaluator, Known, known, literal, tensor_of
from .symbols import Dim, Symbols, spell, wide

_OWN_CHECKS = ("Expand", "Reshape")  # these compare sizes themselves


class Importer(onnx_frontend.ONNXGraphImporter):
    """`converters` are added to those of `operators`; `symbols` collects the requirements."""

    def __init__(self, converters: dict[str, type], symbols: Symbols) -> None:
        super().__init__({}, "float32")
        self.table = {**onnx_frontend._get_convert_map(), **operators.table(), **converters}
        self.symbols = symbols
        self.known: dict[str, Known | None] = {}

    def from_onnx(self, graph: onnx.GraphProto, opset: int) -> Any:
        """The Relax module; `main` returns the outputs, then the counts of computed symbols."""
        outputs = len(graph.output)
        try:
            return super().from_onnx(graph, opset)
        finally:
            del graph.output[outputs:]

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        """The gate has listed them already, every one with its name."""

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        for value in self._inputs.values():
            if isinstance(value, relax.Var) and value.ty.shape is not None:
                self.symbols.bind(value.ty.shape.values)
        evaluator = Evaluator(self.symbols, self._known, self._dims, self.opset)
        self._run(graph.node, evaluator)
        for output in graph.output:
            self._tensor(output.name)
        for i, computed in enumerate(self.symbols.computed):
            name = f"@count{i}"
            self._nodes[name] = computed.count
            graph.output.add(name=name)

    def _run(self, nodes: Iterable[NodeProto], evaluator: Evaluator) -> None:
        for node in nodes:
            if node.op_type == "If":
                self._branch(node, evaluator)
                continue
            values = evaluator.evaluate(node)
            if values is None:
                self._import(node)
                continue
            for name, value in zip(node.output, values, strict=False):
                self._nodes.pop(name, None)
                self.known[name] = value

    def _branch(self, node: NodeProto, evaluator: Evaluator) -> None:
        """The nodes of the branch that is taken whatever the symbols are, as torch's squeeze."""
        test = self._known(node.input[0])
        if test is None or not test.static:
            found = "its condition differs between calls, or cannot be followed"
            fix = "fix the input shapes with --shape, or export without the If"
            raise UnsupportedError([Problem("DC3110", f"If '{node.name}'", found, fix)])
        taken = "then_branch" if test.array.reshape(-1)[0] else "else_branch"
        graph = next(g for name, g in subgraphs(node) if name == taken)
        for tensor in graph.initializer:
            self._set(tensor.name, literal(onnx.numpy_helper.to_array(tensor)))
        self._run(graph.node, evaluator)
        for name, inner in zip(node.output, graph.output, strict=True):
            value = self._known(inner.name)
            if value is None:
                self._set(name, self._nodes[inner.name])
            else:
                self.known[name] = value

    def _set(self, name: str, value: Any) -> None:
        self._nodes[name] = value
        self.known.pop(name, None)

    def _known(self, name: str) -> Known | None:
        if name not in self.known:
            array = self._nodes.get(name)
            small = array is not None and hasattr(array, "value") and _size(array) <= MOST_STATIC
            value = constant(array) if small else None
            self.known[name] = None if value is None else known(value)
        return self.known[name]

    def _dims(self, name: str) -> list[Dim] | None:
        value = self.known.get(name)
        if value is not None:
            return list(value.array.shape)
        tensor = self._nodes[name]
        return None if getattr(tensor.ty, "shape", None) is None else self.symbols.shape(tensor)

    def _tensor(self, name: str) -> Any:
        """A value as a tensor, computed when first used as one."""
        if name not in self._nodes:
            value = self.known[name]
            assert value is not None
            self._nodes[name] = tensor_of(self.bb, value)
        return self._nodes[name]

    def _input(self, node: NodeProto, index: int) -> Any:
        name = node.input[index]
        if not name:
            return None
        value = self.known.get(name)
        if value is not None and not value.static and index in _sizes(self.table[node.op_type]):
            return value
        return self._tensor(name)

    def _import(self, node: NodeProto) -> None:
        inputs = onnx_frontend.onnx_input(self._input(node, i) for i in range(len(node.input)))
        attr = self._parse_attr(node.attribute)
        attr["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
        result = self._convert_operator(node.op_type, self._agreed(node, inputs), attr, self.opset)
        if isinstance(result.ty, relax.TupleType) and not isinstance(result, relax.Tuple):
            result = self.bb.emit(result)
            fields = (relax.TupleGetItem(result, i) for i in range(len(result.ty.fields)))
            result = relax.Tuple([self.bb.emit(f) for f in fields])
        parts = list(result.fields) if isinstance(result, relax.Tuple) else [result]
        for name, part in zip(node.output, parts, strict=False):
            self._set(name, part)

    def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
        try:
            convert = self.table[op_name].get_converter(opset)
            value = convert(self.bb, inputs, attrs, Scope(self._nodes, self._params, self.symbols))
            return self.bb.normalize(value) if isinstance(value, relax.Expr) else value
        except Error:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            problem = Problem(
                "DC3140",
                f"{op_name} '{attrs['tvm_custom']['name']}'",
                f"this use of the operator cannot be lowered: {reason}",
                "make its secondary inputs constants and its shapes static, or rewrite the node",
            )
            raise UnsupportedError([problem]) from error

    # Dims that an operator needs to be equal, where they are not equal expressions

    def _agreed(self, node: NodeProto, inputs: Any) -> Any:
        """Inputs renamed so that dims which must be equal are one expression, checked in a call."""
        if node.op_type in _OWN_CHECKS or not any(self._symbolic(v) for v in inputs):
            return inputs
        for found in self._apart(node, inputs):
            a, b = sorted(found, key=lambda d: (not isinstance(d, int), len(str(d))))
            where = f"{node.op_type} '{node.name}'"
            if self.symbols.differ(a, b):
                text = f"dims {spell(a)} and {spell(b)} of its inputs must be equal"
                raise ModelError([Problem("DC3041", where, text, "correct the shapes")])
            self.symbols.require_equal(a, b, f"{where}: its inputs do not fit")
            inputs = onnx_frontend.onnx_input(self._renamed(v, b, a) for v in inputs)
        return inputs

    def _symbolic(self, value: Any) -> bool:
        dims = _tensor_dims(value)
        return dims is not None and any(not isinstance(self.symbols.simple(d), int) for d in dims)

    def _apart(self, node: NodeProto, inputs: Any) -> Iterator[tuple[Dim, Dim]]:
        def shape(index: int) -> list[Any] | None:
            value = inputs[index]
            return None if _tensor_dims(value) is None else self.symbols.shape(value)

        found = list(pairs(node, shape, lambda index: None))
        seen: list[tuple[Dim, Dim]] = []
        for a, b in found:
            if a is None or b is None or self.symbols.same(a, b):
                continue
            if not any(self.symbols.same(a, c) and self.symbols.same(b, d) for c, d in seen):
                seen.append((a, b))
                yield a, b

    def _renamed(self, value: Any, old: Dim, new: Dim) -> Any:
        if _tensor_dims(value) is None or not self._symbolic(value):
            return value
        dims = self.symbols.shape(value)
        hit = [not isinstance(d, int) and self.symbols.same(d, old) for d in dims]
        if not any(hit):
            return value
        shape = [wide(new if h else d) for h, d in zip(hit, dims, strict=True)]
        return self.bb.emit(relax.op.reshape(value, relax.ShapeExpr(shape)))


def _tensor_dims(value: Any) -> list[Any] | None:
    shape = getattr(getattr(value, "ty", None), "shape", None)
    return None if shape is None or not hasattr(shape, "values") else list(shape.values)


def _size(array: Any) -> int:
    total = 1
    for dim in array.value.shape:
        total *= int(dim)
    return total


def _sizes(converter: type) -> tuple[int, ...]:
    return getattr(converter, "sizes", ())


__all__ = ["Importer"]
