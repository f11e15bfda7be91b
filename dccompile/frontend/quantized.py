"""What an operand of a matrix multiplication is: quantized constant, quantized activation, bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, TensorProto

from .editor import Editor, attribute, operand

INT8 = {TensorProto.UINT8: "u8", TensorProto.INT8: "s8"}


class Refused(Exception):
    """Why a pattern is not recovered, in words for the summary of a compilation."""


@dataclass(frozen=True)
class Constant:
    """A constant and the nodes between it and its reader.

    values: any dtype; with `scale`, integers that stand for (values - zero) * scale. scale (f32)
    and zero (s32) broadcast against values; scale with more than one element of a dim that it
    shares between several is already repeated.
    """

    values: np.ndarray
    nodes: tuple[NodeProto, ...] = ()
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None

    def dequantize(self) -> np.ndarray:
        """The float values, rounded as DequantizeLinear does."""
        if self.scale is None or self.zero is None:
            return self.values
        wide = self.values.astype(np.int32) - self.zero
        return (wide.astype(np.float32) * self.scale.astype(np.float32)).astype(self.scale.dtype)

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> Constant:
        """The values, and scale and zero point unless they are scalars, changed alike."""

        def changed(x: np.ndarray | None) -> np.ndarray | None:
            return x if x is None or x.ndim == 0 else change(x)

        scale, zero = changed(self.scale), changed(self.zero)
        return replace(self, values=change(self.values), scale=scale, zero=zero)

    def transpose(self, axes: list[int] | None = None) -> Constant:
        return self.each(lambda x: np.transpose(x, axes))

    def matrix(self) -> Constant:
        """Without leading dims of one, down to rank 2."""
        return self.each(lambda x: x.reshape(x.shape[-2:]))


def constant_operand(editor: Editor, name: str) -> Constant | None:
    """The constant behind a value, through DequantizeLinear, Transpose and casts from float16."""
    value = editor.constant(name)
    if value is not None:
        return Constant(value)
    node = editor.producer(name, "DequantizeLinear", "Transpose", "Cast")
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        found = _dequantized(editor, node)
    else:
        found = constant_operand(editor, node.input[0])
        if found is None:
            return None
        if node.op_type == "Transpose":
            found = found.transpose(attribute(node, "perm"))
        elif found.scale is not None or attribute(node, "to") != TensorProto.FLOAT:
            return None
    return None if found is None else replace(found, nodes=(*found.nodes, node))


def _dequantized(editor: Editor, node: NodeProto) -> Constant | None:
    values, scale = (editor.constant(operand(node, i)) for i in (0, 1))
    if values is None or scale is None or values.dtype.kind == "f":
        return None
    zero = editor.constant(operand(node, 2)) if operand(node, 2) else np.zeros_like(scale)
    if zero is None or zero.dtype.name.startswith("float8"):
        return None
    zero = zero.astype(np.int32)
    block = attribute(node, "block_size", 0)
    axis = attribute(node, "axis", 1) % max(1, values.ndim)
    if scale.size == 1 and not block:
        scale, zero = scale.reshape(()), zero.reshape(())
    elif block:
        keep = slice(0, values.shape[axis])
        index = (slice(None),) * axis + (keep,)
        scale = np.repeat(scale, block, axis)[index]
        zero = np.repeat(zero, block, axis)[index]
    else:
        dims = [-1 if i == axis else 1 for i in range(values.ndim)]
        scale, zero = scale.reshape(dims), zero.reshape(dims)
    return Constant(values, (), scale, zero)


@dataclass(frozen=True)
class Activation:
    """A quantized left operand: integers `name` of dtype u8 or s8 with one scale and zero point.

    Where these are computed when called, zero and scale are None and the names say where.
    """

    name: str
    dtype: str
    nodes: tuple[NodeProto, ...]
    zero: int | None
    scale: np.float32 | None
    zero_name: str = ""
    scale_name: str = ""


def activation_operand(editor: Editor, name: str) -> Activation | None:
    """The quantized tensor behind a value; None if it is a float tensor of its own.

    Raises Refused for quantization that the integer kernels do not cover.
    """
    node = editor.producer(name, "DequantizeLinear")
    if node is None:
        return None
    source, scale_name, zero_name = node.input[0], node.input[1], operand(node, 2)
    dtype = editor.dtype(source)
    if dtype not in INT8:
        raise Refused(f"activations are {TensorProto.DataType.Name(dtype).lower()}, not 8-bit")
    if not editor.is_scalar(scale_name):
        blocked = attribute(node, "block_size", 0)
        what = "scales in blocks" if blocked else "more than one scale (per row or channel)"
        raise Refused(f"activations have {what}")
    if editor.dtype(scale_name) != TensorProto.FLOAT:
        raise Refused("activation scale is not float32")
    scale = editor.scalar(scale_name)
    if scale is not None and not (np.isfinite(scale) and scale > 0):
        raise Refused(f"activation scale {scale} is not positive and finite")
    zero = editor.scalar(zero_name) if zero_name else 0
    return Activation(
        source,
        INT8[dtype],
        (node,),
        None if zero is None else int(zero),
        None if scale is None else np.float32(scale),
        zero_name,
        scale_name,
    )


def check_weights(weights: Constant) -> None:
    """Raises Refused unless the (k, n) weights are quantized per tensor or per column."""

    def misplaced(scale: np.ndarray) -> str:
        if not scale.ndim or scale.shape[0] == 1:
            return ""
        blocked = scale.size == weights.values.size
        return "weights are scaled in blocks" if blocked else "weights are scaled per row"

    check_codes(weights, misplaced)


def check_codes(weights: Constant, misplaced: Callable[[np.ndarray], str]) -> None:
    """Raises Refused unless weights are 8-bit with positive scales.

    `misplaced` says what is wrong with the dims of the scale, "" if nothing is.
    """
    if weights.scale is None or weights.zero is None:
        raise Refused("weights are not quantized")
    kind = weights.values.dtype
    if kind.name not in ("int8", "uint8", "int4", "uint4", "int2", "uint2"):
        raise Refused(f"weights are {kind.name}, not 8-bit")
    if weights.scale.dtype != np.float32:
        raise Refused("weight scale is not float32")
    if reason := misplaced(weights.scale):
        raise Refused(reason)
    if not (np.isfinite(weights.scale).all() and (weights.scale > 0).all()):
        raise Refused("a weight scale is not positive and finite")


def column(value: np.ndarray | None, n: int, rank: int | None) -> np.ndarray | None:
    """A constant that broadcasts along the last dim of an output of this rank only, as (n,)."""
    if value is None or (value.ndim > (1 if rank is None else rank)):
        return None
    if value.size == 1:
        return np.broadcast_to(value.reshape(()), (n,))
    return value.reshape(n) if value.shape[-1] == n == value.size else None
