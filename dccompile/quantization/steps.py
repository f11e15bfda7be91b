"""The steps of a quantized model at which an error arises, matched with a float model.

A step is a tensor that got a Quantize/DequantizeLinear pair, or the result of a layer with
quantized operands that got none; of an integer operator that is what scales turn its sums into.
Names match them: of a pair what is quantized or what is dequantized, whichever the float model has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto

from dccompile.frontend.editor import Editor, is_op, operand

from .placement import LAYERS

DEQUANTIZE = "DequantizeLinear"
QUANTIZE = ("DynamicQuantizeLinear", "QuantizeLinear")
INTEGER = ("ConvInteger", "MatMulInteger")
_CODES = {
    TensorProto.UINT8: ("u8", 0, 255),
    TensorProto.INT8: ("s8", -128, 127),
    TensorProto.UINT16: ("u16", 0, 65535),
    TensorProto.INT16: ("s16", -32768, 32767),
    TensorProto.UINT4: ("u4", 0, 15),
    TensorProto.INT4: ("s4", -8, 7),
}


@dataclass(frozen=True)
class Codes:
    """What the integers of a tensor stand for; None where that is computed or differs by channel.

    `low` and `high` are the reals of the first and the last code.
    """

    dtype: str
    scale: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Step:
    """A tensor `start` of the quantized model that stands for `target` of the float model.

    `node` and `op` made it: where a layer is followed by a Relu or the like, the layer; an input of
    the model has no node. `tensor` is its name for people. `precision`: of a layer its operands,
    as in u8s8, else that of the tensor. `codes`: None where the tensor stays float.
    """

    node: str
    op: str
    layer: bool
    tensor: str
    start: str
    target: str
    precision: str
    codes: Codes | None


class Quantized:
    """A quantized model and its `steps`, for a float model that has the tensors `known`.

    `unmatched` are the steps whose tensors the float model lacks.
    """

    def __init__(self, model: ModelProto, known: Iterable[str]) -> None:
        self.model = model
        self.editor = Editor(model)
        self.known = frozenset(known)
        self.constants = self._constants()
        layers = [node for node in self.editor.nodes if self.is_layer(node)]
        self.layers = {self._result(node): node for node in layers}
        self.unmatched: list[str] = []
        self._paired: set[str] = set()  # layers in front of a pair, also of one unmatched
        self.steps = [*self._pairs()]
        self.pairs = {real: s for s in self.steps for real in self.twins(s.start)}
        self.steps += self._bare({step.node for step in self.steps if step.layer})

    def is_layer(self, node: NodeProto) -> bool:
        """Whether the node multiplies a tensor by constant weights."""
        found = is_op(node, *LAYERS, *INTEGER) and node.input[1] in self.constants
        return found and node.input[0] not in self.constants

    def begins(self, name: str) -> bool:
        """Whether the tensor is what a layer makes, the same as in the float model.

        One that is only quantized may lack the Relu or Clip behind which the float model has its
        name: saturation does the same.
        """
        if name not in self.layers or name not in self.known:
            return False
        readers = self.editor.users(name)
        return self.editor.is_output(name) or not all(is_op(r, *QUANTIZE) for r in readers)

    def quantizer(self, real: str) -> NodeProto | None:
        """The node whose codes a dequantized tensor comes of, if these are quantized there."""
        node = self.editor.producer(real, DEQUANTIZE)
        return None if node is None else self.editor.producer(node.input[0], *QUANTIZE)

    def twins(self, real: str) -> list[str]:
        """A dequantized tensor and the others of the same codes; none if it is no such tensor."""
        node = self.editor.producer(real, DEQUANTIZE)
        readers = self.editor.users(node.input[0]) if node is not None else []
        return [r.output[0] for r in readers if r.op_type == DEQUANTIZE]

    def _result(self, layer: NodeProto) -> str:
        """The float tensor that a layer makes, with the operators that an integer one needs."""
        name = layer.output[0]
        while layer.op_type in INTEGER and name not in self.known:
            reader = self.editor.only_user(name)
            if reader is None:
                break
            name = reader.output[0]
        return str(name)

    def _constants(self) -> set[str]:
        """Initializers and what is computed of them alone."""
        known = {tensor.name for tensor in self.model.graph.initializer}
        for node in self.editor.nodes:
            names = [name for name in node.input if name]
            if names and known.issuperset(names) and not [*self.editor.captured(node)]:
                known.update(node.output)
        return known

    def _pairs(self) -> Iterator[Step]:
        seen = set(self.constants)
        for node in self.editor.nodes:
            if node.op_type != DEQUANTIZE or node.input[0] in seen:
                continue
            seen.add(node.input[0])
            quantizer = self.editor.producer(node.input[0], *QUANTIZE)
            source = node.input[0] if quantizer is None else quantizer.input[0]
            reals = self.twins(node.output[0])
            shown = next((name for name in reals if self.editor.is_output(name)), source)
            target = next((name for name in [*reals, source] if name in self.known), None)
            head, codes = self._head(source), self.codes(node)
            made, precision = ("", "input", False), codes.dtype
            if head is not None:
                made = self._made(head)
                if self.is_layer(head):
                    self._paired.add(head.name)
                    precision = self._operands(head)
            if target is None:
                self.unmatched.append(shown)
                continue
            yield Step(*made, shown, node.output[0], target, precision, codes)

    def _bare(self, done: set[str]) -> Iterator[Step]:
        """Layers with quantized operands whose results stay float."""
        for name, node in self.layers.items():
            operands = self._operands(node)
            if node.name in done or operands == "f32f32":
                continue
            if self.begins(name):
                yield Step(*self._made(node), name, name, name, operands, None)
            elif node.name not in self._paired:
                self.unmatched.append(name)

    def _made(self, node: NodeProto) -> tuple[str, str, bool]:
        return node.name, node.op_type, self.is_layer(node)

    def _head(self, name: str) -> NodeProto | None:
        """The node that makes a value, before those that change only this one tensor."""
        node = self.editor.producer(name)
        while node is not None and not self.is_layer(node):
            data = [n for n in node.input if n and n not in self.constants]
            before = self.editor.producer(data[0]) if len(data) == 1 else None
            alone = before is not None and self.editor.only_user(data[0]) is not None
            if before is None or not alone or is_op(before, DEQUANTIZE):
                break
            node = before
        return node

    def codes(self, node: NodeProto) -> Codes:
        """Of a DequantizeLinear."""
        kind = self.editor.dtype(node.input[0])
        name, least, most = _CODES.get(kind, (TensorProto.DataType.Name(kind).lower(), 0, 0))
        scale = self.editor.scalar(node.input[1])
        zero = self.editor.scalar(operand(node, 2)) if operand(node, 2) else 0
        if scale is None or zero is None or not most:
            return Codes(name)
        real, offset = float(scale), int(zero)
        return Codes(name, real, real * (least - offset), real * (most - offset))

    def _operands(self, layer: NodeProto) -> str:
        """What a layer multiplies: u8s8, f32s8, f32f32 .."""
        return "".join(self._operand(name) for name in layer.input[:2])

    def _operand(self, name: str) -> str:
        if codes := _CODES.get(self.editor.dtype(name)):
            return codes[0]
        node = self.editor.producer(name)
        while node is not None and node.op_type != DEQUANTIZE and name in self.constants:
            node = self.editor.producer(node.input[0])
        return self.codes(node).dtype if is_op(node, DEQUANTIZE) and node is not None else "f32"
