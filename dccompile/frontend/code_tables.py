"""Makes a table of what elementwise operators compute between two 8-bit tensors.

Operators from a DequantizeLinear to a QuantizeLinear that depend on one 8-bit tensor and constant
numbers only, as in x * sigmoid(x), are a function of 256 codes, with every quantization on the
way. It is evaluated here, operator by operator in float32 and rounded as the model rounds, and
becomes one node: DccTable (domain "dccompile"; inputs q and the table of 256, for s8 by the code's
bits; output table[q]). ONNX Runtime's elementary functions are off by a rounding or two: an entry
that lies within that of a tie may be the neighbour of ONNX Runtime's.

Also a dequantization that is quantized again, with another scale, is such a table: a look-up takes
a third of the time of the conversions alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto
from onnx.reference import ReferenceEvaluator

from .editor import Editor, attribute, is_op, operand
from .quantized import INT8, constant_operand

DOMAIN, OP = "dccompile", "DccTable"

# Each computes an element of its output from one element of every input.
ELEMENTWISE = (
    "Abs", "Add", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Mean", "Min", "Mish",
    "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin",
    "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_CODES = np.arange(256, dtype=np.uint8)


def make_tables(editor: Editor) -> None:
    """Rewrites the graph."""
    sources = _Sources(editor)
    made: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        region = sources.add(node)
        if region is None:
            continue
        source, inner = region
        table = _evaluate(editor, source, inner)
        if table is None:
            continue
        name = editor.add_constant(table, f"{node.output[0]}_table")
        new = editor.node(OP, [source, name], node, output=node.output[0], domain=DOMAIN)
        origins = [o for part in inner for o in editor.origin[part.name]]
        editor.origin[new.name] = tuple(dict.fromkeys(origins))
        made[node.name] = [new]
    editor.rewrite(made)


class _Sources:
    """The 8-bit tensors that each value is a function of, the nearest first."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.of: dict[str, list[str]] = {}

    def add(self, node: NodeProto) -> tuple[str, list[NodeProto]] | None:
        """Notes what a node computes; of a QuantizeLinear the region that a table computes."""
        editor, name = self.editor, node.output[0] if node.output else ""
        if is_op(node, "DequantizeLinear") and scalar_pair(editor, node):
            if editor.constant(node.input[0]) is None:
                self.of[name] = self.of.get(node.input[0], [node.input[0]])
        elif is_op(node, "QuantizeLinear") and scalar_pair(editor, node):
            found = self.of.get(node.input[0], [])
            self.of[name] = [name, *found]
            for source in reversed(found):  # the farthest makes the longest table
                inner = self._between(source, node)
                if inner:
                    return source, inner
        elif is_op(node, *ELEMENTWISE) and len(node.output) == 1:
            common = self._common(node)
            if common and editor.dtype(name) == TensorProto.FLOAT:
                self.of[name] = common
        return None

    def _common(self, node: NodeProto) -> list[str]:
        editor = self.editor
        found: list[str] | None = None
        for value in (name for name in node.input if name and number(editor, name) is None):
            here = self.of.get(value, [])
            found = here if found is None else [s for s in found if s in here]
        before, after = (editor.shape(name) for name in ((found or [""])[0], node.output[0]))
        if not found or before is None or after is None or len(before) != len(after):
            return []  # the last: a constant of more dims gives the result its rank
        return found

    def _between(self, source: str, node: NodeProto) -> list[NodeProto]:
        """The nodes that make the output of `node` from `source`; none if others read within."""
        editor = self.editor
        inner: dict[str, NodeProto] = {}
        left = [node]
        while left:
            part = left.pop()
            if part.name in inner:
                continue
            inner[part.name] = part
            values = part.input[:1] if _converts(part) else part.input
            for value in values:
                if value and value != source and number(editor, value) is None:
                    maker = editor.producer(value)
                    assert maker is not None
                    left.append(maker)
        for part in inner.values():
            value = part.output[0]
            if part is node or (is_op(part, "DequantizeLinear") and part.input[0] == source):
                continue
            if editor.is_output(value) or any(u.name not in inner for u in editor.users(value)):
                return []
        return [n for n in editor.nodes if n.name in inner]


def number(editor: Editor, name: str) -> np.ndarray | None:
    """A constant of one element, which may be stored in 8 bits."""
    if not editor.is_scalar(name):
        return None
    found = constant_operand(editor, name)
    return None if found is None else found.dequantize()


def _converts(node: NodeProto) -> bool:
    return is_op(node, "QuantizeLinear", "DequantizeLinear")


def scalar_pair(editor: Editor, node: NodeProto) -> bool:
    """Whether a Q- or DequantizeLinear is between f32 and 8 bits, its parameters one constant."""
    scale = editor.scalar(node.input[1])
    zero = editor.scalar(node.input[2]) if operand(node, 2) else 0
    codes = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
    numbers = node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]
    plain = not attribute(node, "block_size", 0) and not attribute(node, "precision", 0)
    fits = editor.dtype(codes) in INT8 and editor.dtype(numbers) == TensorProto.FLOAT
    return fits and plain and isinstance(scale, np.float32) and zero is not None


def _evaluate(editor: Editor, source: str, inner: list[NodeProto]) -> np.ndarray | None:
    """What the nodes make of every code of `source`; None where one cannot be evaluated."""
    kind = np.int8 if editor.dtype(source) == TensorProto.INT8 else np.uint8
    values: dict[str, np.ndarray] = {source: _CODES.view(kind)}
    for node in inner:
        if _converts(node):
            values[node.output[0]] = _converted(editor, node, values[node.input[0]])
            continue
        feeds = dict(_feeds(editor, node, values))
        try:
            with np.errstate(all="ignore"):
                evaluator = ReferenceEvaluator(node, opsets={"": editor.opset()})
                (value,) = evaluator.run(None, feeds)
        except Exception:  # what the evaluator cannot do (it raises anything) stays in the graph
            return None
        values[node.output[0]] = np.asarray(value, np.float32).reshape(256)
    return values[inner[-1].output[0]]


def _feeds(
    editor: Editor, node: NodeProto, values: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    for index, name in enumerate(node.input):
        if name in values:
            yield name, values[name]
        elif name and (constant := number(editor, name)) is not None:
            yield name, constant.reshape(() if node.op_type == "Clip" and index else 1)


def _converted(editor: Editor, node: NodeProto, x: np.ndarray) -> np.ndarray:
    scale, zero = parameters(editor, node)
    return (quantize if node.op_type == "QuantizeLinear" else dequantize)(x, scale, zero)


def parameters(editor: Editor, node: NodeProto) -> tuple[np.float32, np.integer]:
    """Scale and zero point, in the codes' type, of a node of which `scalar_pair` holds."""
    codes = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
    kind = np.int8 if editor.dtype(codes) == TensorProto.INT8 else np.uint8
    zero = editor.scalar(node.input[2]) if operand(node, 2) else 0
    return editor.scalar(node.input[1]), kind(zero)


def quantize(x: np.ndarray, scale: np.float32, zero: np.integer) -> np.ndarray:
    """Codes of f32 numbers as ONNX Runtime rounds; NaN gives the least code."""
    info = np.iinfo(zero.dtype)
    with np.errstate(all="ignore"):
        codes = np.rint(x / scale) + np.float32(zero)
    codes = np.nan_to_num(codes, nan=info.min, posinf=info.max, neginf=info.min)
    return np.clip(codes, info.min, info.max).astype(zero.dtype)


def dequantize(codes: np.ndarray, scale: np.float32, zero: np.integer) -> np.ndarray:
    """Numbers f32 of codes."""
    return (codes.astype(np.int32) - np.int32(zero)).astype(np.float32) * scale
