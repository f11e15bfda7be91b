"""The two operands of a matrix multiplication as a kernel takes them, before any epilogue."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from onnx import NodeProto, TensorProto

from dccompile.columns import quantize_columns
from dccompile.workload import NUMPY, GemmWeights, accumulator_bound

from .editor import Editor, attribute, operand
from .epilogue import Tail
from .quantized import (
    INT8,
    Activation,
    Constant,
    Refused,
    activation_operand,
    check_weights,
    column,
    constant_operand,
)


@dataclass
class Product:
    """A (m, k) times b (k, n).

    a_dtype: u8, s8 or f32; b: s8, f16 or f32. Of integers, scale (n,) f32 is the accumulator's
    factor, None where the s32 sums themselves are wanted; `runtime` names a_zero and a_scale,
    tensors of one element, where one of them is computed when called. sums_bias (n,) s32 is added
    to the sums; of floats, alpha is a factor that is yet to be applied, scale is that of s8
    weights and error their relative one, where the compiler chose them. reason: why floats.
    """

    a: str
    a_dtype: str
    b: np.ndarray
    nodes: list[NodeProto]
    scale: np.ndarray | None = None
    b_zero: np.ndarray | None = None
    a_zero: int = 0
    runtime: tuple[str, ...] = ()
    sums_bias: np.ndarray | None = None
    alpha: np.float32 = field(default_factory=lambda: np.float32(1))
    before: list[NodeProto] = field(default_factory=list)  # new nodes that make A
    reason: str = ""
    error: float | None = None

    @property
    def integer(self) -> bool:
        return self.a_dtype != "f32"

    def weights(self, bias: np.ndarray | None = None) -> GemmWeights:
        bias = self.sums_bias if bias is None else bias
        return GemmWeights(np.ascontiguousarray(self.b), self.scale, bias, self.a_zero, self.b_zero)


def matrix_weights(editor: Editor, node: NodeProto, rank: int) -> Constant:
    """The right operand as a constant (k, n), for activations of this rank; else raises Refused."""
    weights = constant_operand(editor, node.input[1])
    if weights is None:
        left = constant_operand(editor, node.input[0]) is not None
        raise Refused("the constant operand is on the left" if left else "weights are not constant")
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        weights = weights.transpose()
    shape = weights.values.shape
    if len(shape) < 2:
        raise Refused("weights are a vector")
    if any(dim != 1 for dim in shape[:-2]) or len(shape) > max(rank, 2):
        raise Refused("weights differ along the batch")
    if 0 in shape:
        raise Refused("weights are empty")
    return weights.matrix()


def product(
    editor: Editor, node: NodeProto, weights: Constant, alpha: np.float32, precision: str
) -> Product:
    """Of a MatMul or Gemm: integers if both operands are quantized so, else floats.

    Weights alone that are quantized stay so; float32 ones are stored as `precision` says.
    """
    name, reason = node.input[0], ""
    try:
        activation = activation_operand(editor, name)
        if activation is not None:
            check_weights(weights)
            return _quantized(editor, activation, weights, alpha)
        if weights.scale is not None:
            reason = "activations are not quantized"
            if editor.dtype(name) == TensorProto.FLOAT:
                check_weights(weights)
                return _weight_only(name, weights, alpha)
    except Refused as refused:
        reason = str(refused)
    kind = editor.dtype(name)
    if kind != TensorProto.FLOAT:
        raise Refused(f"activations are {TensorProto.DataType.Name(kind).lower()}")
    b = weights.dequantize()
    if b.dtype not in (np.float32, np.float16):
        raise Refused(f"weights are {b.dtype}")
    if precision == "int8-weights" and weights.values.dtype == np.float32:
        try:
            return replace(_in_codes(name, weights, alpha), reason=reason)
        except Refused as refused:
            reason = reason or str(refused)
    if alpha != 1:
        with np.errstate(all="ignore"):
            scaled = b.astype(np.float32) * alpha
        exact = abs(np.frexp(alpha)[0]) == 0.5 and np.array_equal(scaled / alpha, b)
        b, alpha = (scaled, np.float32(1)) if exact else (b, alpha)
    if precision == "fp16-weights" and b.dtype == np.float32:
        with np.errstate(over="ignore"):
            rounded = b.astype(np.float16)
        if np.isfinite(rounded).all():
            b = rounded
        else:
            reason = reason or "a weight is outside the float16 range of 65504"
    return Product(name, "f32", b, list(weights.nodes), alpha=alpha, reason=reason)


def _weight_only(name: str, weights: Constant, alpha: np.float32) -> Product:
    """Floats times 8-bit weights that have no zero points; else raises Refused."""
    assert weights.scale is not None and weights.zero is not None
    b, b_zero = _signed(weights.values, weights.zero)
    if b_zero is not None:
        raise Refused("activations are not quantized, weights have zero points")
    with np.errstate(all="ignore"):
        scale = alpha * np.broadcast_to(weights.scale.reshape(-1), (b.shape[1],))
    check_scale(scale)
    reason = "activations are not quantized"
    return Product(name, "f32", b, list(weights.nodes), scale, reason=reason)


def _in_codes(name: str, weights: Constant, alpha: np.float32) -> Product:
    """Floats times float32 weights as 8-bit codes; raises Refused where they cannot be."""
    if not np.isfinite(weights.values).all():
        raise Refused("a weight is not finite")
    found = quantize_columns(weights.values)
    codes = Constant(found.codes, weights.nodes, found.scale, np.zeros((), np.int32))
    return replace(_weight_only(name, codes, alpha), error=found.relative)


def _quantized(
    editor: Editor, activation: Activation, weights: Constant, alpha: np.float32
) -> Product:
    assert weights.scale is not None and weights.zero is not None
    b, b_zero = _signed(weights.values, weights.zero)
    columns = np.broadcast_to(weights.scale.reshape(-1), (b.shape[1],))
    found = Product(
        activation.name,
        activation.dtype,
        b,
        [*activation.nodes, *weights.nodes],
        b_zero=b_zero,
    )
    with np.errstate(all="ignore"):
        if activation.zero is None or activation.scale is None:
            found.scale = alpha * columns
            found.runtime = (
                activation.zero_name or _zero(editor, found),
                activation.scale_name,
            )
        else:
            found.scale = (alpha * activation.scale) * columns
            found.a_zero = activation.zero
    check_scale(found.scale)
    _check_sums(found, moving=bool(found.runtime))
    return found


def integer_product(editor: Editor, node: NodeProto, rank: int) -> tuple[Product, Tail]:
    """Of a MatMulInteger, with the Cast and the Muls that make it a float product if they do."""
    weights = matrix_weights(editor, node, rank)
    a, a_zero, b_zero = node.input[0], operand(node, 2), operand(node, 3)
    n = weights.values.shape[1]
    zero = column(editor.constant(b_zero), n, 2) if b_zero else np.zeros(n, np.int32)
    if weights.scale is not None or zero is None:
        raise Refused("zero points of the weights are not constants per tensor or column")
    if a_zero and not editor.is_scalar(a_zero):
        raise Refused("activations have more than one zero point (per row)")
    b, columns = _signed(weights.values, zero.astype(np.int32))
    found = Product(a, INT8[editor.dtype(a)], b, list(weights.nodes), b_zero=columns)
    tail = Tail(editor, node)
    _take_sums_bias(tail, found, rank)
    scale_name = _take_scale(tail, found, rank)
    static_zero = editor.scalar(a_zero) if a_zero else 0
    if static_zero is not None and not scale_name:
        found.a_zero = int(static_zero)
    elif found.scale is None:
        found.runtime = (a_zero,)
    else:
        one = scale_name or editor.add_constant(np.ones(1, np.float32), "one")
        found.runtime = (a_zero or _zero(editor, found), one)
    return found, tail


def _zero(editor: Editor, found: Product) -> str:
    return editor.add_constant(np.zeros(1, NUMPY[found.a_dtype]), "zero")


def _take_sums_bias(tail: Tail, found: Product, rank: int) -> None:
    """Extends the tail by an Add of s32 constants."""
    node = tail.peek("Add")
    if node is not None:
        bias = column(tail.editor.constant(tail.other(node)), found.b.shape[1], rank)
        if bias is not None:
            found.sums_bias = np.ascontiguousarray(bias)
            tail.nodes.append(node)


def _take_scale(tail: Tail, found: Product, rank: int) -> str:
    """Extends the tail by Cast and Mul, or DequantizeLinear of the sums; sets the scale.

    Returns the name of the factor that is known at run time only, or "".
    """
    start = len(tail.nodes)
    scale, runtime = np.ones(found.b.shape[1], np.float32), ""
    if cast := tail.peek("Cast"):
        if attribute(cast, "to") != TensorProto.FLOAT:
            return ""
        tail.nodes.append(cast)
    elif (node := tail.peek("DequantizeLinear")) and node.input[0] == tail.value:
        columns = _dequantized_sums(tail.editor, node, scale.size, rank)
        if columns is None:
            return ""
        scale = columns
        tail.nodes.append(node)
    else:
        return ""
    while node := tail.peek("Mul"):
        factor = _factor(tail.editor, tail.other(node), scale.size, rank)
        if factor is None or (factor[1] and runtime):
            break
        scale, runtime = scale * factor[0], runtime or factor[1]
        tail.nodes.append(node)
    try:
        check_scale(scale)
        _check_sums(found, moving=True)
    except Refused:  # the integer product alone is exact modulo 2**32
        del tail.nodes[start:]
        return ""
    found.scale = scale
    return runtime


def _dequantized_sums(editor: Editor, node: NodeProto, n: int, rank: int) -> np.ndarray | None:
    """The constant scale of s32 sums as (n,), None if it is of another kind."""
    scale = editor.constant(node.input[1])
    if scale is None or scale.dtype != np.float32 or attribute(node, "block_size", 0):
        return None
    if operand(node, 2) and np.any(editor.constant(node.input[2])):
        return None
    if scale.size > 1 and attribute(node, "axis", 1) % rank != rank - 1:
        return None
    return column(scale, n, rank)


def _factor(editor: Editor, name: str, n: int, rank: int) -> tuple[np.ndarray, str] | None:
    """A factor of the accumulator: constant columns (n,) times a runtime scalar's name, if any."""
    shape = editor.shape(name)
    if editor.dtype(name) != TensorProto.FLOAT or shape is None or len(shape) > rank:
        return None
    value = editor.constant(name)
    if value is not None:
        columns = column(value, n, rank)
        return None if columns is None else (columns, "")
    node = editor.producer(name, "Mul")
    if node is not None:
        first, second = (_factor(editor, part, n, rank) for part in node.input)
        if first and second and not (first[1] and second[1]):
            return first[0] * second[0], first[1] or second[1]
    return (np.ones(n, np.float32), name) if editor.is_scalar(name) else None


def check_scale(scale: np.ndarray) -> None:
    """Raises Refused unless every factor is a normal float32."""
    size = np.abs(scale)
    if not np.isfinite(size).all() or (size < np.finfo(np.float32).tiny).any():
        raise Refused("the product of the scales is outside the float32 range")


def _check_sums(found: Product, moving: bool) -> None:
    """Raises Refused if an accumulator could overflow; `moving`: for any zero point of A."""
    weights = found.weights()
    if moving:
        weights.a_zero = -128 if found.a_dtype == "s8" else 0
    if accumulator_bound(weights, found.a_dtype).max() >= 2**31:
        raise Refused(f"sums over k={found.b.shape[0]} can leave the 32-bit range")


def _signed(values: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Weights of up to 8 bits, (k, n), as s8 with zero points (n,) s32, None where all are 0.

    The zero points are subtracted now where every difference fits s8.
    """
    wide = values.astype(np.int32)
    less = wide - zero
    if less.min() >= -128 and less.max() <= 127:
        return less.astype(np.int8), None
    shift = 128 if values.dtype == np.uint8 else 0
    columns = np.broadcast_to((zero - shift).reshape(-1), (values.shape[1],))
    return (wide - shift).astype(np.int8), columns.astype(np.int32)
