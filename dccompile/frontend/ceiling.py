"""Pooling with ceil_mode where onnx infers one window too many.

A window that would begin behind the data, in the padding there, does not count: ONNX says so since
opset 19, ONNX Runtime does so always, onnx's shape inference never. Such a node gets pads with
which both count alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import NodeProto, helper

from .editor import STANDARD, attribute
from .structure import CONTRIB

_POOLS = ("AveragePool", "LpPool", "MaxPool")


def settle(model: onnx.ModelProto, types: Mapping[str, onnx.TypeProto]) -> bool:
    """Changes the first such node of the main graph; whether there was one."""
    for node in model.graph.node:
        ours = node.domain in STANDARD and node.op_type in _POOLS
        ours |= node.domain == CONTRIB and node.op_type == "QLinearAveragePool"
        if not ours or not attribute(node, "ceil_mode", 0) or node.input[0] not in types:
            continue
        if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            continue  # these modes say how many windows there are
        dims = [d.dim_value for d in types[node.input[0]].tensor_type.shape.dim]
        size = dims[1:-1] if attribute(node, "channels_last", 0) else dims[2:]
        found = extra_windows(node, size)
        if found and _change(node, *found):
            return True
    return False


def extra_windows(node: NodeProto, size: Sequence[int]) -> tuple[list[int], list[bool]] | None:
    """For spatial dims `size`, 0 where open: pads behind that end where the last window does.

    Negative where elements remain behind it. With them, whether the dim has one window less than
    onnx infers; None if no dim has.
    """
    rank = len(size)
    kernel = attribute(node, "kernel_shape") or []
    strides = attribute(node, "strides") or [1] * rank
    dilations = attribute(node, "dilations") or [1] * rank
    pads = attribute(node, "pads") or [0] * (2 * rank)
    if len(kernel) != rank or min([*kernel, *strides, *dilations, *size]) < 1 or min(pads) < 0:
        return None
    ends, more = [], []
    for i, (n, k, s, d) in enumerate(zip(size, kernel, strides, dilations, strict=True)):
        before, reach = pads[i], (k - 1) * d + 1
        inferred = -(-(n + before + pads[rank + i] - reach) // s) + 1
        count = min(inferred, -(-(n + before) // s))
        ends.append((count - 1) * s + reach - n - before)
        more.append(count < inferred)
    return (ends, more) if any(more) else None


def _change(node: NodeProto, ends: list[int], more: list[bool]) -> bool:
    rank = len(ends)
    pads = list(attribute(node, "pads") or [0] * (2 * rank))
    beyond = [not m and end > pad for end, m, pad in zip(ends, more, pads[rank:], strict=True)]
    kept = [a for a in node.attribute if a.name not in ("pads", "auto_pad")]
    if not any(beyond) or not attribute(node, "count_include_pad", 0):
        # Where what is outside of the data has no weight, pads may reach as far as windows do.
        kept = [a for a in kept if a.name != "ceil_mode"]
        chosen = [max(0, e) if m or b else None for e, m, b in zip(ends, more, beyond, strict=True)]
    elif all(end >= 0 for end, m in zip(ends, more, strict=True) if m):
        chosen = [e if m else None for e, m in zip(ends, more, strict=True)]
    else:
        return False
    pads[rank:] = [p if c is None else c for c, p in zip(chosen, pads[rank:], strict=True)]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("pads", pads)])
    return True
