"""Transposed convolution as a convolution: one filter per phase of the stride, then interleaved.

y[i*s - pad + k*d] += x[i] * W[k]. With t = y + pad = q*s + r, phase r of the output is
sum over m of x[q - m] * W[(r + m*s) / d]: a convolution whose window has floor((K-1)*d/s) + 1
taps. All s phases together have s times the filters; `Interleave` puts their results in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from onnx import NodeProto

from .editor import attribute
from .quantized import Constant, Refused


@dataclass(frozen=True)
class Interleave:
    """From (batch, d, h, w, groups * phases * filters) to (batch, .., groups * filters).

    The result begins at element `first` of the interleaved dims and has `size` of them.
    """

    groups: int
    strides: tuple[int, ...]  # phases of d, h, w
    first: tuple[int, ...]
    size: tuple[int, ...]

    def steps(self, batch: Any, dims: tuple[int, ...], filters: int) -> tuple[Any, Any, Any]:
        """Shape to split into, axes to permute by, shape to merge into (filters of the result)."""
        per = filters // self.groups
        split = [batch, *dims, self.groups, *self.strides, per]
        axes = [0, 1, 5, 2, 6, 3, 7, 4, 8]
        merged = [n * s for n, s in zip(dims, self.strides, strict=True)]
        return split, axes, [batch, *merged, filters]


def as_convolution(
    node: NodeProto, weights: Constant, size: list[Any]
) -> tuple[Constant, dict[str, list[int]], Interleave]:
    """Weights and attributes of the Conv, and what follows it; raises Refused.

    `size` are the spatial dims of the input, `weights` (channels, filters / groups, window).
    """
    rank, groups = len(size), attribute(node, "group", 1)
    if not 1 <= rank <= 3 or not all(isinstance(n, int) for n in size):
        raise Refused("spatial dims are open, or more than 3")
    window = weights.values.shape[2:]
    strides = list(attribute(node, "strides") or [1] * rank)
    dilations = list(attribute(node, "dilations") or [1] * rank)
    begin, out = _extent(node, size, window, strides, dilations)
    reach = [(k - 1) * d // s for k, d, s in zip(window, dilations, strides, strict=True)]
    steps = [(o - 1 + p) // s + 1 for o, p, s in zip(out, begin, strides, strict=True)]
    after = [q - n for q, n in zip(steps, size, strict=True)]
    if min(out) < 1 or min(begin) < 0 or min(after) < 0:
        raise Refused("more is cut off than one row of phases")
    phases = tuple([1] * (3 - rank) + strides)
    interleave = Interleave(groups, phases, (*[0] * (3 - rank), *begin), (*[1] * (3 - rank), *out))
    attributes = {"pads": [*reach, *after], "dilations": [1] * rank, "strides": [1] * rank}
    turned = _weights(weights, groups, strides, dilations, reach)
    return turned, attributes, interleave


def spread(values: np.ndarray, interleave: Interleave) -> np.ndarray:
    """One number per filter (filters,) as one per filter and phase."""
    apart = values.reshape(interleave.groups, 1, -1)
    count = prod(interleave.strides)
    return np.ascontiguousarray(np.repeat(apart, count, axis=1).reshape(-1))


def _extent(
    node: NodeProto,
    size: list[int],
    window: tuple[int, ...],
    strides: list[int],
    dilations: list[int],
) -> tuple[list[int], list[int]]:
    """Elements cut off in front, and the output's dims."""
    rank = len(size)
    more = attribute(node, "output_padding") or [0] * rank
    pads = attribute(node, "pads") or [0] * (2 * rank)
    mode = attribute(node, "auto_pad", b"NOTSET").decode()
    wanted = attribute(node, "output_shape")
    whole = [
        s * (n - 1) + o + (k - 1) * d + 1
        for s, n, o, k, d in zip(strides, size, more, window, dilations, strict=True)
    ]
    if mode in ("SAME_UPPER", "SAME_LOWER") and wanted is None:
        wanted = [n * s for n, s in zip(size, strides, strict=True)]
    if wanted is None:
        if mode == "VALID":
            pads = [0] * (2 * rank)
        out = [w - p - q for w, p, q in zip(whole, pads[:rank], pads[rank:], strict=True)]
        return list(pads[:rank]), out
    wanted = list(wanted)[-rank:]
    total = [w - o for w, o in zip(whole, wanted, strict=True)]
    # As ONNX Runtime does: SAME_UPPER cuts the odd one behind, everything else in front.
    begin = [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in total]
    return begin, wanted


def _weights(
    weights: Constant, groups: int, strides: list[int], dilations: list[int], reach: list[int]
) -> Constant:
    values = weights.values
    channels, per = values.shape[0] // groups, values.shape[1]
    window = values.shape[2:]
    apart = values.reshape(groups, channels, per, *window)
    taps = [m + 1 for m in reach]
    count = prod(strides)
    fill = 0 if weights.zero is None or weights.zero.size > 1 else int(weights.zero.reshape(-1)[0])
    made = np.full((groups, count, per, channels, *taps), fill, values.dtype)
    for index, phase in enumerate(np.ndindex(*strides)):
        for m in np.ndindex(*taps):
            at = [r + i * s for r, i, s in zip(phase, m, strides, strict=True)]
            if any(a % d for a, d in zip(at, dilations, strict=True)):
                continue
            tap = [a // d for a, d in zip(at, dilations, strict=True)]
            if any(t >= k for t, k in zip(tap, window, strict=True)):
                continue
            here = tuple(r - i for r, i in zip(reach, m, strict=True))
            every = slice(None)
            source, target = (every, every, every, *tap), (every, index, every, every, *here)
            made[target] = apart[source].transpose(0, 2, 1)
    made = made.reshape(groups * count * per, channels, *taps)
    if weights.scale is None or weights.zero is None or weights.scale.size == 1:
        return replace(weights, values=made)
    if groups > 1 or weights.scale.shape[1] != per or np.any(weights.zero):
        return Constant(_float(weights, groups, strides, dilations, reach), weights.nodes)
    dims = (-1, *[1] * (made.ndim - 1))
    scale = np.tile(weights.scale.reshape(-1), count).reshape(dims)
    return replace(weights, values=made, scale=scale, zero=np.zeros(scale.shape, np.int32))


def _float(weights: Constant, *how: Any) -> np.ndarray:
    """The dequantized weights, where no scale per filter remains."""
    return _weights(Constant(weights.dequantize()), *how).values
