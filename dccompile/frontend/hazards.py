"""Nodes whose use TVM is known to lower to a wrong result, an unsafe read, or nothing at all.

DC3110 no converter · DC3111 output sizes that depend on data · DC3112 runtime values where a
constant is needed · DC3113 a mode or output with a wrong or missing lowering · DC3114 reads or
writes memory at unchecked positions · DC3115 element type
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import onnx
from onnx import NodeProto, TensorProto

from dccompile.errors import Problem

from .structure import CONTRIB, nested, subgraphs, where

_STANDARD = ("", "ai.onnx")

# Contrib operators that the recovery spells out in standard ones, or that have converters.
_CONTRIB = {
    "QLinearMatMul", "QLinearConv", "QGemm", "QLinearAdd", "QLinearMul", "QLinearSigmoid",
    "QLinearLeakyRelu", "QLinearConcat", "QuantizeLinear", "DequantizeLinear",
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "FusedGemm", "FusedMatMul", "Gelu", "FastGelu",
    "BiasGelu", "QuickGelu", "FusedConv", "QLinearSoftmax", "QLinearAveragePool",
    "QLinearGlobalAveragePool",
}  # fmt: skip
# Inputs that must be known when compiling.
_CONSTANT_INPUTS = {
    "TopK": (1,),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
    "Split": (1,),
    "Pad": (1, 2, 3),
    "OneHot": (1,),
    "CumSum": (1,),
    "Tile": (1,),
    "Range": (0, 1, 2),
    "Trilu": (1,),
    "ReduceMax": (1,),
    "ReduceMin": (1,),
    "ReduceSum": (1,),
    "ReduceMean": (1,),
    "ReduceProd": (1,),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceSumSquare": (1,),
    "AffineGrid": (1,),
}
_SHAPE_INPUTS = {
    "Reshape": (1,),
    "Expand": (1,),
    "ConstantOfShape": (0,),
    "Slice": (1, 2, 3, 4),
    "Unsqueeze": (1,),
    "Squeeze": (1,),
}
# What turns shapes and constants into other constants before the importer runs.
_DERIVING = {
    "Constant", "Shape", "Size", "Gather", "Concat", "Slice", "Unsqueeze", "Squeeze", "Cast", "Add",
    "Sub", "Mul", "Div", "Mod", "Min", "Max", "Neg", "Abs", "Floor", "Ceil", "Range",
    "ConstantOfShape", "Identity", "Reshape", "Where", "Equal", "Transpose", "ReduceProd",
    "ReduceMax", "ReduceMin", "ReduceSum", "Expand", "Flatten", "Less", "Greater", "Not", "Split",
    "ScatterElements", "ScatterND", "Pad", "Tile", "And", "Or", "Xor", "If", "LessOrEqual",
    "GreaterOrEqual", "Round", "Sqrt", "Pow",
}  # fmt: skip
_DYNAMIC = {"Unique", "AllClassNMS"}
_UNCHECKED = {"MaxRoiPool", "MaxUnpool", "EmbedLayerNormalization", "Scatter"}
_TUPLES = {
    "Optional", "OptionalHasElement", "OptionalGetElement", "SequenceConstruct", "SequenceEmpty",
    "SequenceErase", "SequenceInsert", "SequenceLength", "ConcatFromSequence", "SplitToSequence",
    "SequenceAt", "If", "Loop", "Scan", "SequenceMap",
}  # fmt: skip
_CASTS = {
    getattr(TensorProto, n)
    for n in "FLOAT FLOAT16 DOUBLE BOOL INT8 UINT8 INT16 UINT16 INT32 UINT32 INT64 UINT64".split()
}


def hazards(model: onnx.ModelProto) -> list[Problem]:
    """Every node whose use cannot be compiled right, by name and reason."""
    from .operators import supported

    known = supported()
    graph = _Graph(model.graph)
    opset = max((o.version for o in model.opset_import if o.domain in _STANDARD), default=0)
    problems = []
    for node in _visible(model.graph.node, graph):
        if node.domain == CONTRIB and node.op_type not in _CONTRIB:
            found, fix = "this operator has no lowering", "replace it by other operators"
            problems.append(Problem("DC3110", where(node), found, fix))
        if node.domain not in _STANDARD:
            continue
        for code, found, fix in _findings(node, graph, known, opset):
            problems.append(Problem(code, where(node), found, fix))
    return problems


def _visible(nodes: Iterable[NodeProto], graph: _Graph) -> Iterator[NodeProto]:
    """The nodes, and those in the branches of every If that is decided when compiling."""
    for node in nodes:
        if node.op_type == "If" and graph.is_known(node.input[0]):
            for _, branch in subgraphs(node):
                yield from _visible(branch.node, graph)
        else:
            yield node


class _Graph:
    """Who makes a value, and whether it is known when compiling."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        nodes = list(nested(graph.node))
        tensors = [*graph.initializer, *(t for n in nodes for _, g in subgraphs(n)
                                         for t in g.initializer)]  # fmt: skip
        self.makers = {o: n for n in nodes for o in n.output if o}
        self.values = {t.name: t for t in tensors}
        self.constants = set(self.values)
        self.known: dict[str, bool] = {}

    def is_known(self, name: str) -> bool:
        """Whether a value follows from initializers and shapes alone."""
        pending = [name]
        while pending:
            current = pending[-1]
            if current in self.known or not current:
                pending.pop()
                continue
            maker = self.makers.get(current)
            if current in self.constants or (maker and maker.op_type in ("Shape", "Size")):
                self.known[current] = True
            elif maker is None or maker.op_type not in _DERIVING:
                self.known[current] = False
            else:
                missing = [i for i in maker.input if i and i not in self.known]
                if missing:
                    pending.extend(missing)
                    continue
                self.known[current] = all(self.known[i] for i in maker.input if i)
            pending.pop()
        return self.known.get(name, True)

    def array(self, name: str) -> Any:
        """The value of an initializer, or of a Constant node; None if it is neither."""
        if name in self.values:
            return onnx.numpy_helper.to_array(self.values[name])
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Constant":
            value = _attribute(maker, "value")
            return None if value is None else onnx.numpy_helper.to_array(value)
        return None


def _attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    for a in node.attribute:
        if a.name == name:
            value = onnx.helper.get_attribute_value(a)
            return value.decode() if isinstance(value, bytes) else value
    return default


Finding = tuple[str, str, str]


def _findings(node: NodeProto, graph: _Graph, known: set[str], opset: int) -> Iterator[Finding]:
    op = node.op_type
    if op in _TUPLES or op not in known:
        if op != "Constant":
            yield "DC3110", "this operator has no lowering", "replace it by other operators"
        return
    if op in _DYNAMIC:
        found = "the size of its output depends on the data"
        yield "DC3111", found, "compute this part outside the model"
        return
    if op in _UNCHECKED:
        found = "it would access memory at positions that nothing checks"
        yield "DC3114", found, "compute this part outside the model"
        return
    for table in (_CONSTANT_INPUTS, _SHAPE_INPUTS):
        for index in table.get(op, ()):
            if index < len(node.input) and node.input[index]:
                if not graph.is_known(node.input[index]):
                    found = f"its input {index} ('{node.input[index]}') is computed from data"
                    yield "DC3112", found, "make it a constant"
    rule = _RULES.get(op)
    if rule is not None:
        yield from rule(node, graph, opset)


def _resize(node: NodeProto, graph: _Graph, opset: int) -> Iterator[Finding]:
    if _attribute(node, "antialias", 0):
        yield "DC3113", "antialias has no lowering", "resize outside the model"


def _second_output(node: NodeProto, graph: _Graph, opset: int) -> Iterator[Finding]:
    if len(node.output) > 1 and any(node.output[1:]):
        yield "DC3113", "an output besides the first is used", "use the first output alone"


def _training(node: NodeProto, graph: _Graph, opset: int) -> Iterator[Finding]:
    if _attribute(node, "training_mode", 0) == 1:
        yield "DC3113", "training_mode is 1", "export the model for inference"
    yield from _second_output(node, graph, opset)


def _dropout(node: NodeProto, graph: _Graph, opset: int) -> Iterator[Finding]:
    if len(node.input) > 2 and node.input[2]:
        mode = graph.array(node.input[2])
        if mode is None or bool(mode.any()):
            yield "DC3113", "it may run in training mode", "export the model for inference"


def _cast(node: NodeProto, graph: _Graph, opset: int) -> Iterator[Finding]:
    target = _attribute(node, "to")
    if target is not None and target not in _CASTS:
        name = TensorProto.DataType.Name(target).lower()
        yield "DC3115", f"type {name} is not supported", "use a standard numeric type"


def _quantized(node: NodeProto, graph: _Graph, opset: int) -> Iterator[Finding]:
    if len(node.input) > 2 and node.input[2] in graph.values:
        kind = graph.values[node.input[2]].data_type
        if kind not in _CASTS:
            name = TensorProto.DataType.Name(kind).lower()
            yield "DC3115", f"type {name} is not supported", "use int8, uint8, int16 or uint16"


def _transposed(node: NodeProto, graph: _Graph, opset: int) -> Iterator[Finding]:
    if _attribute(node, "output_shape"):
        yield "DC3113", "output_shape has a wrong lowering", "give pads and output_padding"


def _attention(node: NodeProto, graph: _Graph, opset: int) -> Iterator[Finding]:
    yield "DC3113", "this operator has a wrong lowering", "export it as MatMul and Softmax"


def _hardmax(node: NodeProto, graph: _Graph, opset: int) -> Iterator[Finding]:
    if opset < 13:
        yield "DC3113", "its form before opset 13 has a wrong lowering", "use opset 13 or later"


_RULES: dict[str, Callable[[NodeProto, _Graph, int], Iterator[Finding]]] = {
    "Resize": _resize,
    "Upsample": _attention,
    "MaxPool": _second_output,
    "BatchNormalization": _training,
    "Dropout": _dropout,
    "Cast": _cast,
    "QuantizeLinear": _quantized,
    "DequantizeLinear": _quantized,
    "ConvTranspose": _transposed,
    "Attention": _attention,
    "Hardmax": _hardmax,
}
