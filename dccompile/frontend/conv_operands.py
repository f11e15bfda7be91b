"""Constant operands of a convolution as kernels take them, and what their scales become."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from dccompile.workload import ConvWeights

from .editor import Editor, operand
from .epilogue import Epilogue
from .products import check_scale
from .quantized import INT8, Constant, Refused, check_codes


def kernel_order(b: np.ndarray) -> np.ndarray:
    """(filters, channels, spatial dims..) as (kd, kh, kw, channels, filters)."""
    spatial = b.shape[2:]
    b = b.reshape(*b.shape[:2], *[1] * (3 - len(spatial)), *spatial)
    return np.ascontiguousarray(b.transpose(2, 3, 4, 1, 0))


def check_weights(weights: Constant) -> None:
    """Raises Refused unless weights are 8-bit, per tensor or per filter, and fit s8."""
    filters = weights.values.shape[0]

    def misplaced(scale: np.ndarray) -> str:
        fits = scale.size == 1 or (scale.size == filters and scale.shape[0] == filters)
        return "" if fits else "weights are not scaled per tensor or per filter"

    check_codes(weights, misplaced)
    assert weights.zero is not None
    wide = weights.values.astype(np.int32) - weights.zero
    if wide.min() < -128 or wide.max() > 127:
        raise Refused("asymmetric weights do not fit signed 8 bits")


def lifted(scale: np.ndarray) -> np.ndarray:
    """The factors, those of dead filters brought up to where float32 has normal numbers.

    Training lets weights vanish: a filter 2**-60 of the largest adds nothing to codes either way.
    """
    least = np.float32(2.0**-90)
    dead = (scale > 0) & (scale < least)
    return np.where(dead, least, scale) if dead.any() and scale.max() > 2.0**-30 else scale


def integer_bias(constant: Constant, scale: np.ndarray) -> np.ndarray | None:
    """The bias as s32 where it is quantized with the accumulator's own scale."""
    if (
        constant.scale is None
        or constant.values.dtype != np.int32
        or np.any(constant.zero)
        # Tools compute this product in float32 or in float64: equal to a rounding or two.
        or not np.allclose(constant.scale.reshape(-1), scale, rtol=1e-6, atol=0)
    ):
        return None
    return np.ascontiguousarray(constant.values.reshape(-1))


def divide(found: ConvWeights, y_scale: np.float32) -> None:
    """Brings the accumulator's factor, and a float bias, to the scale of the output."""
    assert found.scale is not None
    with np.errstate(all="ignore"):
        found.scale = found.scale / y_scale
    check_scale(found.scale)
    if found.bias is not None and found.bias.dtype == np.float32:
        found.bias = found.bias / y_scale


def undoes(editor: Editor, node: NodeProto, epilogue: Epilogue) -> bool:
    """Whether a DequantizeLinear has the parameters of the quantization before it."""
    zero = editor.scalar(operand(node, 2)) if operand(node, 2) else 0
    scale = editor.scalar(node.input[1])
    return (
        scale is not None
        and zero is not None
        and scale == epilogue.y_scale
        and int(zero) == epilogue.zero_point
        and editor.dtype(node.input[0]) in INT8
    )
