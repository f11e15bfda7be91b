"""Constant folding on the ONNX graph, in numpy: shape chains vanish before TVM sees them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from .editor import STANDARD, Editor, attribute, is_op, operand, static_size
from .quantized import constant_operand

GROWTH = 64 << 20  # bytes that a folded value may be bigger than what it was made from

# Deterministic operators whose output is no bigger than their inputs together, or whose size the
# shape inference gives.
_FOLDABLE = frozenset(
    """Abs Add And BitShift Cast Ceil Clip Concat ConstantOfShape Cos Div Equal Erf Exp Expand
    Flatten Floor Gather GatherElements GatherND Greater GreaterOrEqual Less LessOrEqual Log Max
    Min Mod Mul Neg Not Or Pow QuantizeLinear Range Reciprocal ReduceMax ReduceMin ReduceProd
    ReduceSum Relu Reshape Round Sigmoid Sign Sin Slice Split Sqrt Squeeze Sub Tanh Tile Transpose
    Trilu Unsqueeze Where Xor""".split()
)


def fold(editor: Editor, *, weights: bool) -> None:
    """Replaces values that depend on constants only by constants; drops Identity and dead nodes.

    With `weights` also DequantizeLinear and casts from float16, which before the recovery of the
    matrix multiplications say in what precision the weights are meant.
    """
    opsets = {"": editor.opset()}
    known: dict[str, list[int | None]] = {}  # 1-d integer values of which some elements are known
    changes: dict[str, list[NodeProto]] = {}
    for node in editor.nodes:
        if node.domain not in STANDARD:
            continue
        if _is_identity(editor, node) and editor.constant(node.input[0]) is None:
            if editor.rename_uses(node.output[0], node.input[0]):
                changes[node.name] = []
            continue
        values = _shape_values(editor, node, known)
        if values is None:
            values = _evaluate(editor, node, opsets, weights)
        if values is None:
            continue
        for name, value in zip(node.output, values, strict=False):
            if name:
                editor.set_constant(name, value)
        if not any(name in editor.outputs for name in node.output):
            changes[node.name] = []
    editor.rewrite(changes)


def _is_identity(editor: Editor, node: NodeProto) -> bool:
    """Whether a node gives what it reads: Identity, or a Cast to the type that it has."""
    if node.op_type == "Cast":
        return attribute(node, "to") == editor.dtype(node.input[0])
    return node.op_type == "Identity"


def _evaluate(
    editor: Editor, node: NodeProto, opsets: dict[str, int], weights: bool
) -> list[np.ndarray] | None:
    if node.op_type == "Constant":
        return [np.asarray(ReferenceEvaluator(node, opsets=opsets).run(None, {})[0])]
    if node.op_type == "Identity":
        value = editor.constant(node.input[0])
        return None if value is None else [value]
    if node.op_type not in _FOLDABLE and not (weights and node.op_type == "DequantizeLinear"):
        return None
    feeds = {name: editor.constant(name) for name in node.input if name}
    if not feeds or any(value is None for value in feeds.values()):
        return None
    if not weights and node.op_type == "Cast":
        kinds = (editor.dtype(node.input[0]), attribute(node, "to"))
        if kinds == (TensorProto.FLOAT16, TensorProto.FLOAT):
            return None
    given = sum(value.nbytes for value in feeds.values() if value is not None)
    size = _output_bytes(editor, node)
    if size is None or size > given + GROWTH:
        return None
    if node.op_type == "DequantizeLinear":
        found = constant_operand(editor, node.output[0])
        return None if found is None else [found.dequantize()]
    try:
        with np.errstate(all="ignore"):
            outputs = ReferenceEvaluator(node, opsets=opsets).run(None, feeds)
    except Exception:  # what the evaluator cannot do (it raises anything) is left in the graph
        return None
    return [np.asarray(value) for value in outputs]


def _output_bytes(editor: Editor, node: NodeProto) -> int | None:
    """Size of what a node would make; None where nothing bounds it."""
    total = 0
    for name in node.output:
        size = static_size(editor.shape(name))
        if size is None:
            size = _bound(editor, node)
        if size is None:
            return None
        kind = editor.dtype(name)
        total += size * (helper.tensor_dtype_to_np_dtype(kind).itemsize if kind else 8)
    return total


def _bound(editor: Editor, node: NodeProto) -> int | None:
    """Elements of an output whose shape the inference left open."""
    first, second = (editor.constant(operand(node, i)) for i in (0, 1))
    if node.op_type == "ConstantOfShape":
        return None if first is None else int(np.prod(first, dtype=np.float64))
    if node.op_type in ("Expand", "Tile"):
        if first is None or second is None:
            return None
        return int(first.size * np.prod(second, dtype=np.float64))
    if node.op_type == "Range":
        start, limit, delta = (editor.scalar(name) for name in node.input)
        return None if delta == 0 else max(0, int(abs((limit - start) / delta)) + 1)
    sizes = [v.size for v in map(editor.constant, node.input) if v is not None]
    # Broadcasting of small values only: a product of sizes bounds it.
    return int(np.prod([max(1, size) for size in sizes], dtype=np.float64))


def _shape_values(
    editor: Editor, node: NodeProto, known: dict[str, list[int | None]]
) -> list[np.ndarray] | None:
    """Follows Shape through the operators that pick dims; a value is made once all are static."""
    source = node.input[0] if node.input else ""
    if is_op(node, "Shape"):
        shape = editor.shape(source)
        if shape is None:
            return None
        start, end = attribute(node, "start", 0), attribute(node, "end", len(shape))
        dims = [dim if isinstance(dim, int) else None for dim in shape[start:end]]
        known[node.output[0]] = dims
        return [np.array(dims, np.int64)] if None not in dims else None
    if is_op(node, "Size"):
        size = static_size(editor.shape(source))
        return None if size is None else [np.array(size, np.int64)]
    dims = known.get(source, [])
    if not dims or not is_op(node, "Gather", "Slice"):
        return None
    if node.op_type == "Gather":
        index = editor.constant(node.input[1])
        if index is None or np.any(index >= len(dims)) or np.any(index < -len(dims)):
            return None
        picked = [dims[i] for i in index.reshape(-1)]
        if None in picked:
            if index.ndim == 1:
                known[node.output[0]] = picked
            return None
        return [np.array(picked, np.int64).reshape(index.shape)]
    bounds = [editor.constant(name) for name in node.input[1:3]]
    step = editor.scalar(operand(node, 4)) if operand(node, 4) else 1
    if any(b is None or b.size != 1 for b in bounds) or step is None:
        return None
    first, last = (int(b.reshape(-1)[0]) for b in bounds if b is not None)
    picked = dims[first : last : int(step)] if step > 0 else [None]
    known[node.output[0]] = picked
    return [np.array(picked, np.int64)] if None not in picked else None


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with everything that depends on constants only computed, and dead parts removed."""
    editor = Editor(model)
    fold(editor, weights=True)
    return editor.finish()
