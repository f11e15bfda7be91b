"""Windows over spatial dims: the numbers of a convolution or a pooling, three dims each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnx import NodeProto

from .editor import attribute
from .quantized import Refused


@dataclass(frozen=True)
class Geometry:
    """The numbers of a convolution, three spatial dims each, as `workload.Conv` has them."""

    size: tuple[int, int, int]
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int]
    dilations: tuple[int, int, int]
    pads: tuple[tuple[int, int], ...]


def geometry(node: NodeProto, size: list[Any], window: tuple[int, ...]) -> Geometry:
    """Of a Conv or a pooling over static `size`; raises Refused for open dims."""
    rank = len(size)
    if not 1 <= rank <= 3:
        raise Refused(f"{rank} spatial dims, 1 to 3 have kernels")
    if not all(isinstance(s, int) for s in size):
        raise Refused("spatial dims are open")
    strides = attribute(node, "strides") or [1] * rank
    dilations = attribute(node, "dilations") or [1] * rank
    dilations = [d if k > 1 else 1 for d, k in zip(dilations, window, strict=True)]
    pads = attribute(node, "pads") or [0] * (2 * rank)
    mode = attribute(node, "auto_pad", b"NOTSET").decode()
    pairs = list(zip(pads[:rank], pads[rank:], strict=True))
    if mode == "VALID":
        pairs = [(0, 0)] * rank
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        pairs = []
        for s, k, stride, dilation in zip(size, window, strides, dilations, strict=True):
            total = max(0, (-(-s // stride) - 1) * stride + (k - 1) * dilation + 1 - s)
            small, large = total // 2, total - total // 2
            pairs.append((small, large) if mode == "SAME_UPPER" else (large, small))
    if any(p < 0 for pair in pairs for p in pair):
        raise Refused("pads are negative")

    def full(values: Any, outer: Any) -> Any:
        return (*[outer] * (3 - rank), *values)

    return Geometry(
        full(size, 1),
        full(window, 1),
        full(strides, 1),
        full(dilations, 1),
        full([tuple(p) for p in pairs], (0, 0)),
    )
