"""Converter of DccPool: max and average pooling, channels last."""

from __future__ import annotations

from typing import Any

from tvm import relax

from .operator_tools import Converter, Node

_LAYOUTS = {1: ("NWC", "1d"), 2: ("NHWC", "2d"), 3: ("NDHWC", "3d")}


class Pool(Converter):
    """x (batch, spatial dims.., channels); attributes as `layout` writes them, three dims each.

    `sizes` are the spatial dims of the result: with ceil_mode they reach beyond the pads.
    """

    @classmethod
    def convert(cls, node: Node) -> Any:
        x = node.get(0)
        shape = list(x.ty.shape.values)
        rank = len(shape) - 2
        layout, suffix = _LAYOUTS[rank]
        kernel, strides, dilations, sizes = (
            [int(v) for v in node.attr[name]][3 - rank :]
            for name in ("kernel", "strides", "dilations", "sizes")
        )
        pads = [int(v) for v in node.attr["pads"]][6 - 2 * rank :]
        before, after = pads[0::2], []
        for i in range(rank):
            reach = (sizes[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
            after.append(max(0, reach - int(shape[1 + i]) - before[i]))
        kind = node.attr["kind"]
        kind = kind.decode() if isinstance(kind, bytes) else str(kind)
        name = ("max_pool" if kind == "MaxPool" else "avg_pool") + suffix
        more = {}
        if kind == "AveragePool":
            more["count_include_pad"] = bool(node.attr.get("count_include_pad", 0))
        return getattr(relax.op.nn, name)(
            x,
            pool_size=kernel,
            strides=strides,
            padding=[*before, *after],
            dilation=dilations,
            layout=layout,
            **more,
        )
