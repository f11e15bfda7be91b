"""Converters of operators that sample maps: RoiAlign and Resize.

The kernels take channels-last maps. ONNX's own operators, channels first, get a transposition on
both sides; `DccRoiAlign` and `DccResize` with the attribute layout "NHWC" are the same operators
on maps that are channels-last already: x and y (batch, rows, columns, channels).
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from dccompile.generic import gpu_roi, roi

from .operator_tools import Converter, Node, dtype_of

_LAST, _FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def _is_last(node: Node) -> bool:
    return node.text("layout", "NCHW") == "NHWC"


class RoiAlign(Converter):
    """Boxes of a map, each averaged or maximized into the same number of bins."""

    @classmethod
    def convert(cls, node: Node) -> Any:
        x, rois, batch = (node.get(i) for i in range(3))
        kind = dtype_of(x)
        if kind not in ("float32", "float64"):
            raise node.refuse(f"type {kind} is not supported", "use float32")
        last = _is_last(node)
        if not last:
            x = node.do(relax.op.permute_dims(x, _LAST))
        shape = node.symbols.shape(x)
        if not isinstance(shape[3], int):
            raise node.refuse("its number of channels is symbolic", "fix it")
        boxes = node.symbols.shape(rois)[0]
        node.symbols.require_equal(
            boxes, node.symbols.shape(batch)[0], f"{node.where}: its boxes and batch indices"
        )
        mode = node.text("coordinate_transformation_mode", "half_pixel")
        align = roi.Align(
            int(node.attr.get("output_height", 1)),
            int(node.attr.get("output_width", 1)),
            int(node.attr.get("sampling_ratio", 0)),
            float(node.attr.get("spatial_scale", 1.0)),
            node.opset >= 16 and mode == "half_pixel",
            node.text("mode", "avg") == "max",
        )
        build = gpu_roi.roi_align if node.symbols.gpu else roi.roi_align
        func = build(shape, boxes, kind, align, node.where)
        out = relax.TensorType([boxes, align.height, align.width, shape[3]], kind)
        y = node.call(func, "roi_align", [x, rois, batch], out)
        return y if last else relax.op.permute_dims(y, _FIRST)


SPATIAL = {"RoiAlign": RoiAlign, "DccRoiAlign": RoiAlign}
