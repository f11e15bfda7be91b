"""From one f32 sum of a thread to its number of C: scale, bias, residual, activation."""

from __future__ import annotations

from typing import Any

from ...workload import Conv, Gemm
from ._epilogue import activated
from ._ir import T
from ._math import fma

__all__ = ["finished"]


def finished(
    workload: Gemm | Conv, y: Any, scale: Any = None, bias: Any = None, residual: Any = None
) -> Any:
    """C's element; what is None is not there. A scale and its bias are one fma."""
    if scale is not None:
        y = y * scale if bias is None else fma(y, scale, bias)
    elif bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return T.Bind(activated(workload, T.Bind(y)))
