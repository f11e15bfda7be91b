"""What can be computed together with a matrix multiplication: bias, clamps, requantization."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, TensorProto

from dccompile.workload import INT8_LIMITS

from .editor import Editor, attribute, is_op, operand
from .quantized import INT8, Constant, column, constant_operand

Bounds = tuple[np.float32, np.float32]
_OPEN: Bounds = (np.float32(-np.inf), np.float32(np.inf))


class Tail:
    """The nodes from a product on, as far as each value has exactly one reader."""

    def __init__(self, editor: Editor, node: NodeProto) -> None:
        self.editor = editor
        self.nodes = [node]

    @property
    def value(self) -> str:
        return str(self.nodes[-1].output[0])

    def peek(self, *ops: str) -> NodeProto | None:
        """The only reader of the value, if it is one of these operators."""
        node = self.editor.only_user(self.value)
        return node if is_op(node, *ops) else None

    def other(self, node: NodeProto) -> str:
        """The operand of a binary node that is not the value."""
        return str(node.input[1] if node.input[0] == self.value else node.input[0])


@dataclass
class Epilogue:
    """Bias as (n,), then clamps or one activation, then an output quantization; each optional."""

    bias: Constant | None = None
    activation: str = "none"
    clip: tuple[float, float] | None = None
    y_scale: np.float32 | None = None
    y_dtype: str = ""
    zero_point: int = 0
    clamp: tuple[int, int] | None = None


def column_constant(constant: Constant | None, n: int, rank: int) -> Constant | None:
    """The constant as (n,) if it broadcasts along the columns of an output of this rank."""
    if constant is None:
        return None
    values = column(constant.values, n, rank)
    if values is None:
        return None
    if constant.scale is None:
        return replace(constant, values=values)
    scale, zero = column(constant.scale, n, rank), column(constant.zero, n, rank)
    return None if scale is None else replace(constant, values=values, scale=scale, zero=zero)


def take_bias(tail: Tail, n: int, rank: int) -> Constant | None:
    """An Add of a constant row; its nodes include the Add's own operands."""
    node = tail.peek("Add")
    if node is None:
        return None
    found = column_constant(constant_operand(tail.editor, tail.other(node)), n, rank)
    if found is None or (found.scale is None and found.values.dtype.kind != "f"):
        return None
    tail.nodes.append(node)
    return found


def take_activation(tail: Tail, epilogue: Epilogue, *, quantize: bool) -> None:
    """Extends the tail by clamps and a QuantizeLinear (if wanted), or by one activation."""
    start = len(tail.nodes)
    steps: list[Bounds] = [_OPEN]
    while node := tail.peek("Relu", "Clip", "Min", "Max"):
        bounds = _bounds(tail, node)
        if bounds is None:
            break
        low, high = (min(max(x, bounds[0]), bounds[1]) for x in steps[-1])
        steps.append((low, high))
        tail.nodes.append(node)
    if quantize and _take_quantize(tail, epilogue, steps[-1]):
        return
    for taken in range(len(steps) - 1, -1, -1):
        low, high = steps[taken]
        if (low, high) == (0, np.inf):
            epilogue.activation = "relu"
        elif np.isfinite(low) and np.isfinite(high):
            epilogue.activation, epilogue.clip = "clip", (float(low), float(high))
        elif taken:
            continue  # bounded on one side only, elsewhere than at 0: left to its own operator
        break
    del tail.nodes[start + taken :]
    if not taken and (node := tail.peek("Sigmoid", "Tanh")):
        epilogue.activation = node.op_type.lower()
        tail.nodes.append(node)


def _bounds(tail: Tail, node: NodeProto) -> Bounds | None:
    """Lower and upper bound of a clamping node; None if they are not constant scalars."""
    if node.op_type == "Relu":
        return np.float32(0), _OPEN[1]
    found = list(_OPEN)
    if node.op_type == "Clip":
        if node.input[0] != tail.value:
            return None
        names = [operand(node, 1), operand(node, 2)]
    else:
        if len(node.input) != 2:
            return None
        names = ["", tail.other(node)] if node.op_type == "Min" else [tail.other(node), ""]
        value = tail.editor.constant(tail.other(node))
        if value is None or value.ndim > len(tail.editor.shape(tail.value) or ()):
            return None
    for index, name in enumerate(names):
        if name:
            bound = tail.editor.scalar(name)
            if bound is None or np.isnan(bound):
                return None
            found[index] = np.float32(bound)
    return found[0], found[1]


def _take_quantize(tail: Tail, epilogue: Epilogue, bounds: Bounds) -> bool:
    node = tail.peek("QuantizeLinear")
    if node is None or node.input[0] != tail.value or attribute(node, "block_size", 0):
        return False
    editor, zero_name = tail.editor, operand(node, 2)
    scale, zero = editor.scalar(node.input[1]), np.uint8(0)
    kind = attribute(node, "output_dtype", 0) or TensorProto.UINT8
    if zero_name:
        kind, zero = editor.dtype(zero_name), editor.scalar(zero_name)
    if kind not in INT8 or zero is None or not isinstance(scale, np.float32):
        return False
    if not (np.isfinite(scale) and scale > 0):
        return False
    dtype = INT8[kind]
    limits = INT8_LIMITS[dtype]
    with np.errstate(over="ignore"):  # a bound beyond the output's range is the range's end
        codes = [np.clip(np.rint(bound / scale) + float(zero), *limits) for bound in bounds]
    low, high = int(codes[0]), int(codes[1])
    epilogue.y_scale, epilogue.y_dtype, epilogue.zero_point = scale, dtype, int(zero)
    epilogue.clamp = None if (low, high) == limits else (low, high)
    tail.nodes.append(node)
    return True
